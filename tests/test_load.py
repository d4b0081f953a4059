"""Loading: names, formats, and checkpoints that are not what they promise."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adallava import AdaptiveVLM
from adallava.errors import BudgetError, CheckpointError, ConfigError
from tiny import processor, tiny_base, tiny_vlm


@pytest.fixture
def folder(tmp_path):
    tiny_vlm().save_pretrained(tmp_path)
    return tmp_path


def test_names_nobody_knows():
    with pytest.raises(CheckpointError, match="Did you mean 'mini-L'"):
        AdaptiveVLM.from_pretrained("mini-l")
    with pytest.raises(CheckpointError, match="no model './nowhere'"):
        AdaptiveVLM.from_pretrained("./nowhere")


def test_hub_names_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="the hub does not give it"):
        AdaptiveVLM.from_pretrained("nobody/nothing-at-all")


def test_a_plain_checkpoint_loads_as_base_model(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    vlm = AdaptiveVLM.from_pretrained(tmp_path)
    assert not vlm.status()["adaptive"] and [str(b) for b in vlm.reachable_budgets()] == ["100%"]
    assert vlm.generate(None, "how many ?", max_new_tokens=2).plan is None
    with pytest.raises(BudgetError, match="base model, which always runs whole"):
        vlm.generate(None, "how many ?", budget="60%")
    with pytest.raises(ConfigError, match="follows no plan"):
        vlm.generate(None, "how many ?", mode="random")
    with pytest.raises(ConfigError, match="has no switches"):
        vlm.request_state(torch.tensor([1]))


def test_a_processor_that_lacks_a_package(folder, monkeypatch):
    def without_torchvision(*args, **kwargs):
        raise ImportError("requires the Torchvision library")

    monkeypatch.setattr("adallava.hosts.load.AutoProcessor.from_pretrained", without_torchvision)
    with pytest.raises(CheckpointError, match=r"pip install 'adallava\[processors\]'.*Torchvision"):
        AdaptiveVLM.from_pretrained(folder)


def change(folder, name, edit):
    weights = load_file(folder / name)
    edit(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("file", ["model.safetensors", "adaptive.safetensors"])
def test_missing_and_foreign_keys(folder, file):
    def drop(weights):
        del weights[sorted(weights)[-1]]

    change(folder, file, drop)
    with pytest.raises(CheckpointError, match="1 keys are missing"):
        AdaptiveVLM.from_pretrained(folder)
    tiny_vlm().save_pretrained(folder)
    change(folder, file, lambda weights: weights.update(stranger=torch.zeros(1)))
    with pytest.raises(CheckpointError, match="1 keys are foreign, such as stranger"):
        AdaptiveVLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "key"), [("model.safetensors", "language_model.lm_head.weight"), ("adaptive.safetensors", "head.bias")]
)
def test_misshapen_keys(folder, file, key):
    change(folder, file, lambda weights: weights.update({key: torch.zeros(2, 3)}))
    with pytest.raises(CheckpointError, match=f"1 shapes differ, such as .*{key.split('.', 1)[-1]}"):
        AdaptiveVLM.from_pretrained(folder)


def test_damaged_files(folder):
    path = folder / "adaptive.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        AdaptiveVLM.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="but no adaptive.safetensors"):
        AdaptiveVLM.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        AdaptiveVLM.from_pretrained(folder)


def test_wrong_format_version_and_unknown_keys(folder):
    path = folder / "adaptive_config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"format_version": 99}))
    with pytest.raises(ConfigError, match="format_version is 99"):
        AdaptiveVLM.from_pretrained(folder)
    path.write_text(json.dumps(good | {"varriant": "L"}))
    with pytest.raises(ConfigError, match="varriant.*Did you mean 'variant'"):
        AdaptiveVLM.from_pretrained(folder)
    path.write_text(json.dumps(good | {"num_layers": 8}))
    with pytest.raises((ConfigError, CheckpointError), match=r"num_layers|shapes differ"):
        AdaptiveVLM.from_pretrained(folder)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json and names no base model"):
        AdaptiveVLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert' model; known hosts: llava"):
        AdaptiveVLM.from_pretrained(tmp_path)
