"""Conversion of whole folders: recordings of the released code, ways there and back, shards."""

import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from adallava import AdaptiveVLM
from adallava.budget import Budget
from adallava.errors import CheckpointError, ConfigError
from adallava.hosts import convert_files
from adallava.hosts.convert import convert
from released import GOLDEN, copy_golden, edit_config, edit_weights, read, reshard, same_weights
from tiny import processor, tiny_base, tiny_vlm

OFFICIAL = ["ada_L", "ada_H_rank4"]


# -- against recordings -----------------------------------------------------------------------------------------------


def placed(ids, model, images):
    """Recorded ids, where -200 is an image, with a run of placeholders for each image."""
    image = [model.config.image_token_id] * 16
    assert ids.count(-200) == images
    return torch.tensor([[new for token in ids for new in (image if token == -200 else [token])]])


@torch.no_grad()
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_recordings(name, tmp_path):
    convert(str(GOLDEN / name / "checkpoint"), tmp_path / "ours")
    recorded, cases = load_file(GOLDEN / name / "golden.safetensors"), 0
    pair = [AdaptiveVLM.from_pretrained(folder) for folder in (GOLDEN / name / "checkpoint", tmp_path / "ours")]
    assert all(vlm.processor is None for vlm in pair)
    pixels = recorded["in0.pixel_values"]
    for key in [k for k in recorded if k.startswith("in0.lat") and k.endswith(".prefill_last_logits")]:
        cases += 1
        for vlm in pair:
            k = Budget.parse(float(key.split("lat")[1].rsplit(".", 1)[0])).resolve(vlm.adaptive_config, clamp=True).k
            ids = placed(recorded["in0.input_ids"][0].tolist(), vlm.model, 1)
            logits = vlm(input_ids=ids, pixel_values=pixels, k=torch.tensor([k])).logits[0, -1]
            torch.testing.assert_close(logits, recorded[key].view(-1), atol=1e-4, rtol=0)
    assert cases == 8


@torch.no_grad()
def test_mipha_recordings(tmp_path):
    source = GOLDEN / "mipha" / "checkpoint"
    convert(str(source), tmp_path / "ours")
    recorded = load_file(GOLDEN / "mipha" / "mipha.safetensors")
    (case,) = [c for c in read(GOLDEN / "mipha", "mipha.json")["cases"] if c["key"] == "in0"]
    for folder in (source, tmp_path / "ours"):
        model = AdaptiveVLM.from_pretrained(folder).model
        assert type(model).__name__ == "MiphaForConditionalGeneration" and model.lm_head.bias is not None
        pixels = recorded["in0.pixel_values"]
        features = torch.stack(list(model.get_image_features(pixels).pooler_output))
        torch.testing.assert_close(features, recorded["in0.image_features"], atol=1e-5, rtol=0)
        ids, steps = placed(case["input_ids"], model, 1), len(case["generated_ids"])
        how = {"max_new_tokens": steps, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **how)
        assert out.sequences[0, -steps:].tolist() == case["generated_ids"]
        torch.testing.assert_close(torch.cat(out.logits), recorded["in0.step_logits"], atol=1e-4, rtol=0)


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [("ada_L", "official"), ("ada_H_rank4", "official"), ("mipha", "mipha")])
def test_there_and_back_is_equal(name, layout, tmp_path):
    source = GOLDEN / name / "checkpoint"
    there = convert(str(source), tmp_path / "ours")
    back = convert(str(tmp_path / "ours"), tmp_path / "back", to=layout)
    assert there.source_format == back.format == layout and there.tensors == back.tensors
    same_weights(source, tmp_path / "back")
    assert read(tmp_path / "back") == read(source)
    ids = read(tmp_path / "back", "generation_config.json")
    assert {
        key: value for key, value in read(source, "generation_config.json").items() if "token" in key
    }.items() <= ids.items()
    for path in (tmp_path / "ours").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "ours" / "config.json").stat().st_mode)


@pytest.mark.parametrize("name", OFFICIAL)
def test_there_and_back_after_saving(name, tmp_path):
    """What transformers wrote under its newest names goes back as well, and so does a changed config."""
    source = copy_golden(name, tmp_path)
    edit_config(source, token_selecting="prumerge")
    assert AdaptiveVLM.from_pretrained(source).token_selection.name == "prumerge"
    AdaptiveVLM.from_pretrained(source, token_selection="none").save_pretrained(tmp_path / "saved")
    report = convert(str(tmp_path / "saved"), tmp_path / "back", to="official")
    same_weights(source, tmp_path / "back")
    assert read(tmp_path / "back") == read(source) | {"token_selecting": "none"}
    assert "reads the vision tower from '../clip'" in report.notes[-1]
    assert AdaptiveVLM.from_pretrained(tmp_path / "back").adaptive_config.token_selection == "none"


def test_convert_keeps_the_token_selection(tmp_path):
    source = copy_golden("ada_L", tmp_path)
    edit_config(source, token_selecting="prumerge+")
    assert convert(str(source), tmp_path / "ours").token_selection == "prumerge+"
    assert read(tmp_path / "ours", "adaptive_config.json")["token_selection"] == "prumerge+"
    assert AdaptiveVLM.from_pretrained(tmp_path / "ours").token_selection.name == "prumerge+"
    assert (
        AdaptiveVLM.from_pretrained(tmp_path / "ours", token_selection="none").adaptive_config.token_selection == "none"
    )
    convert(str(tmp_path / "ours"), tmp_path / "back", to="official")
    assert read(tmp_path / "back") == read(source)
    mipha = GOLDEN / "mipha" / "checkpoint"
    assert AdaptiveVLM.from_pretrained(mipha, token_selection="fastv").token_selection.name == "fastv"
    with pytest.raises(ConfigError, match="has none. Use 'fastv'"):
        AdaptiveVLM.from_pretrained(mipha, token_selection="prumerge")


@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])
def test_original_llava(model_type, tmp_path):
    """An official checkpoint without its scheduler is one of LLaVA-1.5; here the tower is only named."""
    source = copy_golden("ada_L", tmp_path)
    ada = dict.fromkeys(("scheduler_type", "num_prefix_layers", "scheduler_rank", "token_selecting"))
    edit_config(source, model_type=model_type, architectures=["LlavaLlamaForCausalLM"], **ada)
    tower, whole = {}, load_file(source / "model.safetensors")

    def drop(weights):
        for name in list(weights):
            if "vision_tower" in name:
                tower[name.split("vision_tower.vision_tower.")[1]] = weights.pop(name)
            elif name.startswith("scheduler."):
                del weights[name]

    edit_weights(source, drop)
    with pytest.raises(CheckpointError, match=r"holds 0 of the .*mm_vision_tower names, '.*clip', cannot be read"):
        convert(str(source), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    torch.save(tower | {"logit_scale": torch.ones(())}, tmp_path / "clip" / "pytorch_model.bin")
    report = convert(str(source), tmp_path / "ours")
    assert "the vision tower was read from" in report.notes[0]
    vlm, direct = AdaptiveVLM.from_pretrained(tmp_path / "ours"), AdaptiveVLM.from_pretrained(source)
    assert vlm.adaptive_config is None and vlm.status()["parameters"] == direct.status()["parameters"]
    for a, b in zip(vlm.model.state_dict().values(), direct.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    convert(str(tmp_path / "ours"), tmp_path / "back", to="llava")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == {name for name in whole if not name.startswith("scheduler.")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in back.items())
    assert read(tmp_path / "back") == read(source)


def test_a_model_that_never_was_released(tmp_path):
    vlm = tiny_vlm(variant="H")
    vlm.save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="does not say where its tower comes from. Pass vision_tower"):
        convert(str(tmp_path / "ours"), tmp_path / "back", to="official")
    with pytest.raises(CheckpointError, match="clip-vit-large-patch14 has hidden_size 1024, this model's 16"):
        convert(str(tmp_path / "ours"), tmp_path / "back", to="official", vision_tower="openai/clip-vit-large-patch14")
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(vlm.config.vision_config.to_dict()))
    convert(str(tmp_path / "ours"), tmp_path / "back", to="official", vision_tower=str(tmp_path / "tower"))
    raw = read(tmp_path / "back")
    assert raw["unfreeze_mm_vision_tower"] and raw["scheduler_rank"] == 2 and raw["num_prefix_layers"] == 3
    again = AdaptiveVLM.from_pretrained(tmp_path / "back")
    assert again.adaptive_config == vlm.adaptive_config and again.config.image_token_id == vlm.config.image_token_id
    for a, b in zip(again.state_dict().values(), vlm.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    AdaptiveVLM(tiny_base(), processor()).save_pretrained(tmp_path / "base")
    convert(str(tmp_path / "base"), tmp_path / "llava", to="llava", vision_tower=str(tmp_path / "tower"))
    assert AdaptiveVLM.from_pretrained(tmp_path / "llava").adaptive_config is None


def test_what_a_layout_cannot_hold(tmp_path):
    def refused(to, message):
        with pytest.raises(CheckpointError, match=message):
            convert(str(tmp_path / "ours"), tmp_path / "back", to=to, vision_tower="tower")
        assert not (tmp_path / "back").exists()

    tiny_vlm("llava-gqa", variant="H").save_pretrained(tmp_path / "ours")
    refused("official", "4 heads on 2 key/value heads")
    refused("llava", "has switches, which the layout cannot say. Use --to official")
    refused("mipha", "it is a llava with a llama decoder, expected a phi one")
    AdaptiveVLM(tiny_base(), processor()).save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "adaptive_config.json").unlink()
    refused("official", "it is a base model without a scheduler. Use --to llava")
    tiny_vlm(variant="L").save_pretrained(tmp_path / "ours")
    edit = read(tmp_path / "ours", "adaptive_config.json")
    for change, message in (
        ({"token_selection": "fastv"}, "token selection is 'fastv'"),
        ({"latency_dim": 128}, "latency encoding has 128 features"),
    ):
        (tmp_path / "ours" / "adaptive_config.json").write_text(json.dumps(edit | change))
        refused("official", message)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
def test_shards(binary, tmp_path, monkeypatch):
    source = copy_golden("ada_H_rank4", tmp_path)
    whole = convert(str(source), tmp_path / "whole")
    reshard(source, 3, binary)
    seen = []
    report = convert(str(source), tmp_path / "ours", shard_bytes=600_000, progress=lambda *p: seen.append(p))
    assert report.tensors == whole.tensors and report.shards == 5 - (whole.nbytes < 2.4e6)
    assert seen[-1][0] == seen[-1][1] and len(seen) == report.tensors
    index = read(tmp_path / "ours", "model.safetensors.index.json")
    files = sorted(path.name for path in (tmp_path / "ours").glob("model-*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) == report.shards
    sizes, tensors = 0, {}
    for name in files:
        with safe_open(tmp_path / "ours" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(index["weight_map"][key] == name for key in file.keys())  # noqa: SIM118
        part = load_file(tmp_path / "ours" / name)
        assert sum(t.nbytes for t in part.values()) <= 600_000
        sizes, tensors = sizes + sum(t.nbytes for t in part.values()), tensors | part
    assert index["metadata"]["total_size"] == sizes
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[k], wanted[k]) for k in wanted)
    a, b = (AdaptiveVLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "ours", source))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_bin_files_with_shared_memory_and_of_the_old_kind(tmp_path):
    source = copy_golden("ada_L", tmp_path)
    weights = load_file(source / "model.safetensors")
    first, second = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
    weights[second] = weights[first]
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(str(source), tmp_path / "ours")
    state = AdaptiveVLM.from_pretrained(tmp_path / "ours").model.state_dict()
    for name in (first, second):
        assert torch.equal(state[name.replace("model.", "model.language_model.", 1)], weights[first])


def test_dtypes(tmp_path):
    source = copy_golden("ada_L", tmp_path)
    edit_weights(source, lambda weights: weights.update({k: v.half() for k, v in weights.items()}))
    convert(str(source), tmp_path / "ours")
    assert read(tmp_path / "ours")["dtype"] == "float16"
    for folder in (source, tmp_path / "ours"):
        assert AdaptiveVLM.from_pretrained(folder).status()["dtype"] == "float32"
        assert AdaptiveVLM.from_pretrained(folder, dtype="auto").status()["dtype"] == "float16"
        assert AdaptiveVLM.from_pretrained(folder, dtype="bfloat16").status()["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="dtype is 'float12'"):
        AdaptiveVLM.from_pretrained(source, dtype="float12")


def test_destination(tmp_path):
    source = str(GOLDEN / "ada_L" / "checkpoint")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    with pytest.raises(CheckpointError, match="full exists and is not an empty folder"):
        convert(source, tmp_path / "full")
    with pytest.raises(CheckpointError, match="kept exists and is not an empty folder"):
        convert(source, tmp_path / "full" / "kept")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(convert_files, "save_file", fail)
    with pytest.raises(type(error)):
        convert(str(GOLDEN / "ada_L" / "checkpoint"), tmp_path / "out" / "ours")
    assert list((tmp_path / "out").iterdir()) == []


def test_loading_copies_the_files(tmp_path):
    """Overwriting a checkpoint must not change a model that was loaded from it."""
    source = copy_golden("ada_L", tmp_path)
    vlm = AdaptiveVLM.from_pretrained(source)
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    path = source / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(100_000)
        file.write(bytes(path.stat().st_size - 100_000))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vlm.state_dict().items())


def test_adapting_a_released_base(tmp_path):
    """LLaVA-1.5 in its original layout as the base that an adapter-only folder names."""
    source = copy_golden("ada_L", tmp_path)
    edit_config(source, model_type="llava_llama")
    edit_weights(source, lambda w: [w.pop(name) for name in list(w) if name.startswith("scheduler.")])
    base = AdaptiveVLM.from_pretrained(source)
    vlm = AdaptiveVLM.adapt(base.model, None, variant="L", base_model=str(source))
    vlm.save_pretrained(tmp_path / "adapter", adapter_only=True)
    again = AdaptiveVLM.from_pretrained(tmp_path / "adapter")
    for a, b in zip(again.state_dict().values(), vlm.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match="not an adapter alone"):
        convert(str(tmp_path / "adapter"), tmp_path / "back", to="official")
