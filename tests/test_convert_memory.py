"""Converting holds one shard at a time, and loading holds each weight once: peak memory of a process of their own.

The growth is from the memory in use before to the highest since the process began, so it is never told too low.
``ru_maxrss`` would not do: a child begins with its parent's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from released import clip_names, llama_names, llava_config, projector_names

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux' account of memory")
SHARD = 40_000_000
SCRIPT = """
import json, re, sys
from pathlib import Path
from adallava import AdaptiveVLM
from adallava.hosts.convert import convert
from released import GOLDEN

small, source, out, what = GOLDEN / "ada_L" / "checkpoint", *sys.argv[1:4]
def memory(what):
    return 1024 * int(re.search(rf"{what}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

# Once on a tiny checkpoint, so that code and libraries are not counted.
convert(str(small), Path(out) / "warm")
AdaptiveVLM.from_pretrained(small)
before = memory("VmRSS")
if what == "convert":
    convert(source, Path(out) / "ours", shard_bytes=int(sys.argv[4]))
else:
    AdaptiveVLM.from_pretrained(source, dtype="auto")
print(json.dumps(memory("VmHWM") - before))
"""


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def sharded(request, tmp_path_factory):
    """A LLaVA of about 190 MB in shards of about 40 MB."""
    folder = tmp_path_factory.mktemp(request.param)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower |= {"image_size": 56, "patch_size": 14, "model_type": "clip_vision_model"}
    (folder / "clip").mkdir()
    (folder / "clip" / "config.json").write_text(json.dumps(tower))
    raw = llava_config(512, 1376, 12, 8, vocab=8000, mm_vision_tower="clip")
    (folder / "config.json").write_text(json.dumps(raw))
    names = llama_names(512, 1376, 12, 8000) | projector_names(512, 64)
    names |= clip_names(hidden=64, inter=128, layers=2, positions=17)
    shards, size = [{}], 0
    for name, shape in names.items():
        tensor = torch.full(shape, 0.01)
        if size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    where, ending = {}, request.param
    stem = "pytorch_model" if ending == "bin" else "model"
    for number, part in enumerate(shards):
        file = f"{stem}-{number}.{ending}"
        (torch.save if ending == "bin" else save_file)(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder, [sum(t.nbytes for t in part.values()) for part in shards]


def growth(sharded, tmp_path, *arguments):
    folder, _ = sharded
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=str(tmp_path), env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_converting_holds_one_shard(sharded, tmp_path):
    _, sizes = sharded
    assert len(sizes) >= 4 and max(sizes) > 30_000_000
    grown = growth(sharded, tmp_path, "convert", str(SHARD))
    assert grown < 1.2 * max(sizes) + SHARD, f"{grown / 1e6:.0f} MB for shards of {max(sizes) / 1e6:.0f} MB"
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) >= 4


def test_loading_holds_each_weight_once(sharded, tmp_path):
    _, sizes = sharded
    grown = growth(sharded, tmp_path, "load")
    assert sum(sizes) < grown < sum(sizes) + 1.2 * max(sizes), f"{grown / 1e6:.0f} MB for {sum(sizes) / 1e6:.0f} MB"
