"""Checkpoints that are damaged, incomplete or not what they say: one clear error each, and nothing is written."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from adallava import AdaptiveVLM
from adallava.cli.main import app
from adallava.errors import CheckpointError
from adallava.hosts.convert import convert
from released import GOLDEN, copy_golden, edit_config, edit_weights, reshard


@pytest.fixture
def source(tmp_path):
    return copy_golden("ada_L", tmp_path)


def assert_refused(source, message):
    """Both converting and loading say so, and no folder appears."""
    with pytest.raises(CheckpointError, match=message):
        convert(str(source), source.parent / "out")
    with pytest.raises(CheckpointError, match=message):
        AdaptiveVLM.from_pretrained(source)
    assert not list(source.parent.glob("*out*"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "1 keys are missing, such as model.language_model.norm.weight"),
        (lambda w: w.pop("scheduler.mlp_head.bias"), "1 keys are missing, such as scheduler.head.bias"),
        (lambda w: w.update(stranger=torch.zeros(2)), "1 keys are foreign, such as stranger"),
        (lambda w: w.update({"model.layers.8.x": torch.zeros(2)}), "1 keys are foreign, such as model.layers.8.x"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
            r"1 shapes differ, such as .*norm.weight', \(3,\), \(64,\)",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(500, 64)}),
            r"1 shapes differ, such as .*lm_head.weight', \(500, 64\), \(512, 64\)",
        ),
    ],
)
def test_keys_that_do_not_fit(source, edit, message):
    edit_weights(source, edit)
    assert_refused(source, message)


def test_a_trained_tower_must_be_complete(source):
    edit_config(source, unfreeze_mm_vision_tower=True)
    AdaptiveVLM.from_pretrained(source)
    edit_weights(source, lambda w: [w.pop(name) for name in list(w) if name.endswith("post_layernorm.bias")])
    assert_refused(source, "holds 54 of the 55 tensors.*the tower was trained, so that no other will do")


def test_incomplete_towers_name_both_places(source):
    edit_weights(source, lambda w: [w.pop(name) for name in list(w) if name.endswith("post_layernorm.bias")])
    assert_refused(
        source, "checkpoint holds 54 of the 55 .*mm_vision_tower names, '.*clip', cannot be read: .*no weights"
    )


@pytest.mark.parametrize("binary", [False, True])
def test_truncated_shards(source, binary):
    reshard(source, 2, binary)
    path = next(source.glob("*-00002-of-00002.*"))
    path.write_bytes(path.read_bytes()[:20_000])
    assert_refused(source, f"{path.name} is damaged or truncated|{path.name} holds more than tensors, or is damaged")
    path.unlink()
    assert_refused(source, f"names the shard {path.name}, which is missing")


def test_damaged_indices(source):
    index = reshard(source, 2)
    good = json.loads(index.read_text())
    index.write_text(json.dumps(good | {"weight_map": {"a": "../checkpoint/model-00001-of-00002.safetensors"}}))
    assert_refused(source, "names the shard '../checkpoint/.*', expected a file beside it")
    index.write_text(json.dumps({"weight_map": [1]}))
    assert_refused(source, "has no weight_map of names to files")
    index.write_text("{")
    assert_refused(source, "index.json is not JSON")
    index.unlink()
    assert_refused(
        source, "has no weights: none of model.safetensors, .*a LoRA or a projector alone must first be merged"
    )


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_more_than_tensors(source, zipped, capsys):
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    path = source / "pytorch_model.bin"
    torch.save(weights | {"evil": Evil()}, path, _use_new_zipfile_serialization=zipped)
    assert_refused(
        source, "pytorch_model.bin holds more than tensors.*could run foreign code. Use a checkpoint in safeten"
    )
    path.write_bytes(pickle.dumps(Evil()))
    assert_refused(source, "holds more than tensors, or is damaged")
    torch.save({"state_dict": weights}, path)
    assert_refused(source, "not a plain dict of tensors")
    path.write_bytes(b"")
    assert_refused(source, "pytorch_model.bin (is damaged or truncated|holds more than tensors)")
    assert "this ran" not in capsys.readouterr().out


def test_configs_that_cannot_be_read(source):
    edit_config(source, model_type="ada_lava_llama")
    assert_refused(source, "'ada_lava_llama' model; known hosts: llava.*Did you mean 'ada_llava_llama'")
    (source / "config.json").write_text("[]")
    assert_refused(source, "config.json holds a list, expected a JSON object")
    (source / "config.json").write_bytes(b"\xff\xfe")
    assert_refused(source, "config.json is not JSON")
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        convert(str(source), source.parent / "out")


def test_sources_that_are_no_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no local folder, and the hub does not give it"):
        convert("nobody/nothing", tmp_path / "out")
    source = copy_golden("ada_L", tmp_path)
    edit_config(source, mm_vision_tower="nobody/tower")
    assert_refused(
        source, "vision tower 'nobody/tower', .* cannot be had: there is no folder .*the hub does not give it"
    )


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("offical", "no format 'offical'.*Did you mean 'official'"),
        ("llava", "is AdaLLaVA, released layout; .*without --to"),
    ],
)
def test_formats(to, message, source, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        convert(str(source), tmp_path / "out", to=to)
    convert(str(source), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="can be loaded as it is. Name a layout"):
        convert(str(tmp_path / "ours"), tmp_path / "out")


# -- the command ----------------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], prog_name="adallava")


def test_command(tmp_path):
    source = GOLDEN / "ada_H_rank4" / "checkpoint"
    result = call(source, tmp_path / "ours")
    assert result.exit_code == 0, result.stderr
    lines = " ".join(result.stdout.split())
    assert f"from {source} (official)" in lines and f"to {tmp_path / 'ours'} (adallava)" in lines
    assert "142 tensors, 2.2 MB in 1 file" in lines and "no tokenizer files" in lines
    assert result.stderr == ""
    result = call(tmp_path / "ours", tmp_path / "back", "--to", "official", "--json")
    report = json.loads(result.stdout)
    assert (report["source_format"], report["format"], report["tensors"]) == ("adallava", "official", 142)
    assert report["nbytes"] == (tmp_path / "back" / "model.safetensors").stat().st_size


def test_command_shows_the_token_selection(source, tmp_path):
    edit_config(source, token_selecting="prumerge")
    assert "prumerge, kept in the config" in " ".join(call(source, tmp_path / "ours").stdout.split())


def test_command_on_a_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = call(GOLDEN / "mipha" / "checkpoint", tmp_path / "ours")
    assert result.exit_code == 0 and "converting" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["./nowhere", "out"], ["there is no model './nowhere'"]),
        ([GOLDEN / "mipha" / "checkpoint", "."], ["exists and is not an empty folder"]),
        ([GOLDEN / "mipha" / "checkpoint", "out", "--to", "mipa"], ["no format 'mipa'", "Did you mean 'mipha'"]),
        ([GOLDEN / "mipha" / "checkpoint", "out", "--vision-tower", "x"], ["only be named for an exported config"]),
        (["mini-L"], ["Missing argument", "adallava convert --help"]),
    ],
)
def test_command_mistakes(arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("x")
    result = call(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)
    assert [p.name for p in tmp_path.iterdir()] == ["something"]
