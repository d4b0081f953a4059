"""The recordings of the released code, replayed through the public code, and what the replay itself must notice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from adallava import AdaptiveVLM
from adallava.cli.main import app
from adallava.errors import CheckpointError
from adallava.parity.fastv import replay_fastv
from adallava.parity.replay import find_recordings
from adallava.parity.sampling import PARTS
from adallava.parity.tally import Tally, all_ok
from adallava.parity.training import replay_training
from matrix import fastv_by_hand, inputs_of
from tiny import tiny_base, tiny_vlm

GOLDEN = Path(__file__).parent / "golden"
RECORDINGS = {path: (name, replay) for path, name, replay in find_recordings(GOLDEN)}
# Quantities whose every case must have been compared; the official checkpoints have 35 cases, gated and skipped.
COUNTS = {
    "ada_L": {"generated ids": 35, "plan, gated": 35, "plan, skipped": 35, "scheduler logits": 70, "image features": 2},
    "ada_H_rank4": {"generated ids": 35, "prefill last logits, gated": 35, "prefill last logits, skipped": 35},
    "mipha": {"generated ids": 2, "step logits": 2, "image features": 1},
    "prumerge": {"prumerge indices": 1, "prumerge+ tokens": 1},
    "sampling": {"sample": 12, "straight-through gradient": 12, "greedy choice": 44, "set frequencies / error": 2},
    "train_step/train_L": {"loss": 1, "plan": 1, "gradients": 23, "gradient norms": 142},
}


def test_all_recordings_are_found():
    assert {name for name, _ in RECORDINGS.values()} == set(COUNTS)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name)
def test_recorded(path):
    name, replay = RECORDINGS[path]
    rows = replay(path, name)
    assert [row for row in rows if not row.ok] == []
    counts = {row.name: row.count for row in rows}
    assert {key: counts.get(key) for key in COUNTS[name]} == COUNTS[name]


def run(*arguments):
    return CliRunner().invoke(app, ["parity", *map(str, arguments)])


def test_the_command_says_what_is_past_its_tolerance(tmp_path):
    shutil.copytree(GOLDEN / "sampling", tmp_path / "sampling")
    assert run(tmp_path).exit_code == 0
    file = tmp_path / "sampling" / "sampling.safetensors"
    tensors = load_file(file)
    tensors["H3.grad"][0, 0] += 1e-3
    save_file(tensors, file)
    done = run(tmp_path)
    assert done.exit_code == 1
    (line,) = [line for line in done.stdout.splitlines() if "no " in line]
    assert line.split()[:3] == ["straight-through", "gradient", "12"] and line.endswith("H3")
    assert "1.0e-03" in line and "1 of 4 quantities" in done.stdout
    rows = json.loads(run(tmp_path, "--json").stdout)
    assert [row["name"] for row in rows if not row["ok"]] == ["straight-through gradient"]


def test_folders_without_recordings(tmp_path):
    with pytest.raises(CheckpointError, match="holds no recordings"):
        find_recordings(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        find_recordings(tmp_path / "missing")


def test_differences_that_are_no_numbers_are_past_any_tolerance():
    tally = Tally("x")
    tally.close("shape", "a", torch.zeros(2), torch.zeros(3), 1.0)
    tally.close("nan", "a", torch.tensor([float("nan")]), torch.zeros(1), 1.0)
    tally.close("nan", "b", torch.zeros(1), torch.zeros(1), 1.0)
    tally.same("list", "a", [1], [1, 2])
    assert [row.ok for row in tally.rows()] == [False] * 3
    assert not all_ok([]) and not all_ok(tally.rows())


def test_a_training_step_of_variant_h_is_replayed_with_its_noise(tmp_path):
    """No step of H is recorded here: one is made with this code, to see that all of its draws are read."""
    folder = tmp_path / "train_step"
    folder.mkdir()
    meta = json.loads((GOLDEN / "train_step" / "train_L.json").read_text())
    meta["checkpoint"], meta["grad_norms"] = str(GOLDEN / "ada_H_rank4" / "checkpoint"), {}
    meta["latency"], meta["units_k"] = [0.75, 1.0, 0.625, 0.5], [4, 8, 2, 0]
    (folder / "train_H.json").write_text(json.dumps(meta))
    recorded = load_file(GOLDEN / "train_step" / "train_L.safetensors")
    kept = {key: recorded[key] for key in ("attention_mask_with_latency", "latency_token_position", "pixel_values")}
    generator = torch.Generator().manual_seed(0)
    for row, k in enumerate(meta["units_k"]):
        for pick in range(k):
            for part, size in zip(PARTS.values(), (64, 8, 8), strict=True):
                kept[f"exp_noise.s{row}.pick{pick}.{part}"] = torch.empty(size).exponential_(generator=generator)
    path = folder / "train_H.json"
    made = replay_and_record(path, kept)
    assert [row for row in replay_training(path, "H") if not row.ok] == []
    made["exp_noise.s1.pick0.layer"] = made["exp_noise.s1.pick0.layer"].flip(0)
    made["exp_noise.s0.pick3.mlp"] = made["exp_noise.s0.pick3.mlp"].flip(0)
    save_file(made, path.with_suffix(".safetensors"))
    wrong = {row.name for row in replay_training(path, "H") if not row.ok}
    assert {"plan", "loss"} <= wrong


def replay_and_record(path, tensors):
    """Fill in what a recording holds besides its inputs and noise, from a first replay."""
    seen, forward = {}, AdaptiveVLM.forward

    def spy(self, *, ada_state, **inputs):
        out = forward(self, ada_state=ada_state, **inputs)
        tensors = {"plan": ada_state.gates, "scheduler_logits": ada_state.logits, "loss": out.loss}
        seen.update({name: tensor.detach().clone() for name, tensor in tensors.items()})
        return out

    zeros = {"plan": torch.zeros(4, 8, 2, 8), "scheduler_logits": torch.zeros(4, 64), "loss": torch.zeros(())}
    save_file({**tensors, **zeros}, path.with_suffix(".safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptiveVLM, "forward", spy)
        replay_training(path, "H")
    made = {**tensors, **seen}
    save_file(made, path.with_suffix(".safetensors"))
    return made


# -- FastV, whose recorded model is too large to come with the tests: a recording made by hand ------------------------


@torch.no_grad()
def test_fastv_in_the_model(tmp_path):
    host = tiny_base("llava-gqa")
    inputs = inputs_of(tiny_vlm("llava-gqa"), "how many sevens are there ?")
    image = inputs["input_ids"][0] == host.config.image_token_id
    ids, logits, kept, embeds = fastv_by_hand(tiny_base("llava-gqa"), inputs, 2, 8, 5)
    llama = LlamaForCausalLM(host.config.text_config)
    llama.model.load_state_dict(host.model.language_model.state_dict())
    llama.lm_head.load_state_dict(host.lm_head.state_dict())
    llama.save_pretrained(tmp_path / "llama")
    case = {"key": "in0.K2.R0.5.hf_cache", "K": 2, "rank": 8, "generated_ids": ids}
    case["prefill_keep"] = (kept & image).nonzero()[:, 0].tolist()
    meta = {"sys_length": int(image.int().argmax()), "image_token_length": int(image.sum()), "agg_layer_K": 2}
    (tmp_path / "fastv_A.json").write_text(json.dumps({**meta, "cases": [case]}))
    recorded = {"in0.inputs_embeds": embeds, f"{case['key']}.step_logits": logits}
    save_file({name: value.contiguous() for name, value in recorded.items()}, tmp_path / "fastv_A.safetensors")
    rows = {row.name: row for row in replay_fastv(tmp_path, "fastv")}
    assert rows.keys() == {"kept image tokens", "generated ids", "step logits"} and all_ok(list(rows.values()))
    case["prefill_keep"][0] += 1
    (tmp_path / "fastv_A.json").write_text(json.dumps({**meta, "cases": [case]}))
    assert not all_ok(replay_fastv(tmp_path, "fastv"))
