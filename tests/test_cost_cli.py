"""``adallava cost`` and ``adallava table-b`` from outside."""

import json
import subprocess
import sys

import pytest
import transformers as hf
from typer.testing import CliRunner

from adallava.cli.main import app
from adallava.config import AdaptiveConfig
from adallava.cost import LLAVA_1_5_7B, SPECS, prefill_flops


def call(*arguments):
    return CliRunner().invoke(app, ["cost", *map(str, arguments)], prog_name="adallava", env={"COLUMNS": "100"})


def read(*arguments):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_example():
    result = call("llava-1.5-7b", "--budget", "85%", "--tokens", "645")
    assert result.exit_code == 0
    assert "27 of 32 layers on (16 always, 11 of 16 switches)" in result.stdout
    assert "prompt: 645 tokens (576 visual, 68 text, 1 latency)" in result.stdout
    for words in ("8.58 TFLOPs", "7.24 TFLOPs", "84.4%", "68.8 ms", "11.3 GB", "no measurements"):
        assert words in result.stdout


def test_json_has_everything():
    data = read("llava-1.5-7b", "--budget", "85%", "--tokens", 645)
    assert (data["k"], data["units_on"], data["units_total"], data["unit"]) == (11, 27, 32, "layers")
    assert data["flops_convention"] == "paper" and data["placement"] == "any"
    assert data["cost"]["prefill"]["flops"] == 7235975521760
    assert data["cost"]["footprint_bytes"] == 11342792832
    assert data["cost"]["decode"]["flops"] == 11061321728 + 446688 * 645
    assert data["base"]["prefill"]["flops"] == 8575946716160
    assert data["layer_tokens"] == [645] * 32


def test_neither_torch_nor_transformers_is_needed():
    code = """
import sys
from typer.testing import CliRunner
from adallava.cli.main import app
for line in (["cost", "llava-1.5-7b", "--budget", "60%"], ["cost", "mini-H"], ["table-b", "--costs", "--json"]):
    assert CliRunner().invoke(app, line).exit_code == 0, line
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_default_prompt_gives_table_b():
    data = read("llava-1.5-7b", "--budget", "85%")
    assert data["tokens"]["total"] == 644
    assert f"{data['cost']['prefill']['flops'] / 1e12:.1f}" == "7.2"
    assert f"{data['cost']['prefill']['time_ms']:.0f}" == "69"


@pytest.mark.parametrize(
    ("model", "variant", "units", "total"),
    [("mini", "L", 9, 12), ("mini-L", "L", 9, 12), ("mini-H", "H", 36, 48), ("mini-base", "L", 9, 12)],
)
def test_the_packaged_models(model, variant, units, total):
    data = read(model, "--budget", "75%", "--text-tokens", 12)
    assert (data["variant"], data["units_on"], data["units_total"]) == (variant, units, total)
    assert data["tokens"] == {"total": 77, "text": 12, "visual": 64, "latency": 1, "cut_layer": None, "kept": None}
    assert data["switches_assumed"] == (model == "mini-base")


def test_h_tells_what_the_placement_is_worth():
    data = read("llava-1.5-7b", "--variant", "H", "--budget", "60%", "--tokens", 645)
    assert (data["k"], data["unit"], data["placement"]) == (12, "head groups", "spread evenly")
    assert data["cost"]["prefill"]["flops"] > data["cost_packed"]["prefill"]["flops"] == 5092021610720
    assert "packed into few layers: 5.09 TFLOPs, 48.5 ms" in call(
        "llava-1.5-7b", "--variant", "H", "--budget", "60%", "--tokens", 645
    ).stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("selection", "visual", "kept", "total"),
    [
        ("none", 576, None, 644),
        ("fastv", 576, 288, 644),
        ("fastv:layer=3,ratio=0.75", 576, 144, 644),
        ("fastv:rank=10", 576, 10, 644),
        ("uniform:count=100", 100, None, 168),
        ("random:ratio=0.25", 144, None, 212),
        ("prumerge:ratio=0.1", 58, None, 126),
        ("prumerge", 40, None, 108),
        ("prumerge+", 163, None, 231),
    ],
)
def test_token_selection(selection, visual, kept, total):
    data = read("llava-1.5-7b", "--budget", "85%", "--token-selection", selection)
    assert (data["tokens"]["visual"], data["tokens"]["kept"], data["tokens"]["total"]) == (visual, kept, total)
    assert data["base"]["tokens"]["total"] == 644
    heads = [32] * 27 + [0] * 5
    assert data["cost"]["prefill"]["flops"] == prefill_flops(LLAVA_1_5_7B, heads, data["layer_tokens"])


def test_flops_depend_on_the_prompt():
    assert read("llava-1.5-7b", "--budget", "5.1 TFLOPs", "--tokens", 645)["k"] == 3
    assert read("llava-1.5-7b", "--budget", "5.1 TFLOPs", "--token-selection", "fastv")["k"] == 16
    assert read("llava-1.5-7b", "--budget", "5.1T", "--tokens", 700)["k"] == 1


def test_conventions_and_vision():
    data = read("llava-1.5-7b", "--tokens", 624, "--convention", "strict", "--with-vision")
    assert data["flops_convention"] == "strict"
    assert data["cost"]["prefill"]["flops"] == 8_286_462_017_536
    assert data["cost"]["prefill_and_vision_flops"] == 8_692_539_424_768
    paper = read("llava-1.5-7b", "--tokens", 624, "--with-vision")["cost"]
    assert paper["vision_flops_strict"] == 406_077_407_232 and "prefill_and_vision_flops" not in paper
    text = call("llava-1.5-7b", "--with-vision", "--convention", "strict").stdout
    assert "FLOPs (strict)" in text and "vision FLOPs (strict)" in text


def test_settings():
    one = read("qwen2-vl-7b", "--tokens", 1200, "--budget", "70%")["cost"]
    four = read("qwen2-vl-7b", "--tokens", 1200, "--budget", "70%", "--tensor-parallel", 4, "--batch", 8)["cost"]
    assert one["kv_cache_bytes"] * 2 == four["kv_cache_bytes"]
    h100 = read("qwen2-vl-7b", "--tokens", 1200, "--budget", "70%", "--device", "nvidia_H100", "--flash")["cost"]
    assert h100["prefill"]["time_ms"] < one["prefill"]["time_ms"]
    assert "each of 4 devices" in call("qwen2-vl-7b", "--tokens", 1200, "--tensor-parallel", 4).stdout


# -- configs ----------------------------------------------------------------------------------------------------------


def test_config_files(tmp_path):
    config = hf.LlavaConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = read("llava-1.5-7b")["cost"]
    assert read(tmp_path)["cost"] == read(tmp_path / "config.json")["cost"] == whole
    adaptive = AdaptiveConfig("H", 32, 32, 32, 4096, prefix_layers=8, heads_per_switch=4)
    adaptive.to_json_file(tmp_path / "adaptive_config.json")
    data = read(tmp_path, "--budget", "50%")
    assert (data["variant"], data["units_total"], data["k"], data["prefix_layers"]) == ("H", 256, 64, 8)
    assert read(tmp_path, "--variant", "L")["switches_assumed"]


def test_a_config_that_leaves_out_its_defaults(tmp_path):
    """As save_pretrained writes it, and as the hub has it for llava-1.5-7b-hf."""
    text = {"model_type": "llama", "vocab_size": 32064}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    assert read(tmp_path)["base"]["prefill"]["flops"] == read("llava-1.5-7b")["base"]["prefill"]["flops"] + 4096 * 64


def test_released_layout(tmp_path):
    flat = {"model_type": "ada_llava_llama", "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
    flat |= {"num_hidden_layers": 32, "num_attention_heads": 32, "scheduler_type": "H", "num_prefix_layers": 16}
    flat |= {"scheduler_rank": 4, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    data = read(tmp_path, "--budget", "60%")
    assert (data["variant"], data["units_total"], data["tokens"]["total"]) == ("H", 256, 644)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lava-1.5-7b"], ["no model 'lava-1.5-7b'", "Did you mean 'llava-1.5-7b'?"]),
        (["no/such/config.json"], ["there is no no/such/config.json"]),
        (["llava-1.5-7b", "--budget", "1T"], ["infeasible: the minimum for this input is 4.282 TFLOPs"]),
        (["llava-1.5-7b", "--budget", "40%"], ["below the minimum of this model, 50%"]),
        (["llava-1.5-7b", "--budget", "5 TFLOP/s"], ["is a rate"]),
        (["llava-1.5-7b", "--variant", "X"], ["variant is 'X', expected one of 'L', 'H'"]),
        (["llava-1.5-7b", "--tokens", "100"], ["--tokens is 100", "577 or more"]),
        (["llava-1.5-7b", "--tokens", "700", "--text-tokens", "5"], ["both given"]),
        (["llava-1.5-7b", "--text-tokens", "-5"], ["text is -5"]),
        (["llava-1.5-7b", "--batch", "0"], ["batch is 0"]),
        (["llava-1.5-7b", "--tensor-parallel", "3"], ["does not divide the 32 key/value heads", "1, 2, 4, 8, 16, 32"]),
        (["llava-1.5-7b", "--device", "nvidia_V10"], ["Did you mean 'nvidia_V100'?", "intel_13900k"]),
        (["llava-1.5-7b", "--convention", "strct"], ["Did you mean 'strict'?"]),
        (["llava-1.5-7b", "--token-selection", "fastw"], ["fastw", "Did you mean 'fastv'?"]),
        (["llava-1.5-7b", "--token-selection", "fastv:layer=20"], ["drops tokens before layer 20", "from 1 to 16"]),
        (["mipha-3b", "--token-selection", "prumerge"], ["reads where the CLS token looks", "mipha-3b has none"]),
        (["mini", "--token-selection", "prumerge"], ["depends on the picture", "--visual-tokens"]),
        (["qwen2-vl-7b"], ["pictures at their own size", "--tokens"]),
        (["qwen2-vl-7b", "--tokens", "900", "--with-vision"], ["vision tower are not known"]),
    ],
)
def test_errors(arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2, result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and result.stdout == ""
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["is not JSON"]),
        ("[]", ["holds a list"]),
        ('{"hidden_size": 64}', ["lacks intermediate_size"]),
        ('{"variant": "L", "prefix_layers": 2}', ["not its sizes"]),
    ],
)
def test_bad_files(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    result = call(tmp_path)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    for word in words:
        assert word in result.stderr
    assert call(tmp_path / "none").exit_code == 2


def test_adaptive_config_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf.LlavaConfig().to_dict()))
    AdaptiveConfig("L", 12, 8, 8, 128, prefix_layers=6).to_json_file(tmp_path / "adaptive_config.json")
    assert "is for 12 layers of 8 heads, but config.json has 32 of 32" in call(tmp_path).stderr


# -- table-b ----------------------------------------------------------------------------------------------------------


def test_table_b():
    result = CliRunner().invoke(app, ["table-b", "--costs"])
    assert result.exit_code == 0
    assert "59 of 70 cells round to what the paper prints" in result.stdout
    assert "AdaLLaVA-L 85%       7.2   7.228 yes" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if line.startswith("  ")) <= 80
    data = json.loads(CliRunner().invoke(app, ["table-b", "--costs", "--json"]).stdout)
    assert len(data) == 70
    assert all(cell.keys() >= {"row", "column", "paper", "ours", "match", "reason"} for cell in data)
    assert sum(cell["match"] for cell in data) == 59


def test_table_b_without_costs():
    result = CliRunner().invoke(app, ["table-b"], prog_name="adallava")
    assert result.exit_code == 2 and "Pass --costs; the accuracy columns come later" in result.stderr


def test_every_shipped_spec_works():
    for name, spec in SPECS.items():
        data = read(name, *([] if spec.vision else ["--tokens", 900]))
        assert data["prefill_flops_frac"] == 1.0
