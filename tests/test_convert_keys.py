"""Key maps on the full names and shapes of the real checkpoints, without their data."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from adallava.errors import CheckpointError
from adallava.hosts import convert_read
from adallava.hosts.convert_files import TensorInfo
from adallava.hosts.convert_read import read_foreign
from adallava.hosts.formats import FORMATS, detect, export_config, grown
from adallava.hosts.keymaps import PUBLISHED, normal, to_ours, to_theirs
from adallava.hosts.mipha import MiphaForConditionalGeneration
from adallava.scheduling.scheduler import Scheduler
from released import (
    GOLDEN,
    ada_config,
    clip_names,
    llama_names,
    llava_config,
    phi_names,
    projector_names,
    scheduler_names,
    siglip_names,
)

SMALL, LARGE = (4096, 11008, 32), (5120, 13824, 40)


def llava(sizes, tower=True, inv_freq=False):
    names = llama_names(*sizes, 32000, inv_freq) | projector_names(sizes[0], 1024)
    return names | (clip_names() if tower else {})


def mipha_config():
    tower = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    tower |= {"image_size": 384, "patch_size": 14, "mm_vision_select_layer": -2, "model_type": "mipha_vision_model"}
    return {
        "model_type": "mipha_phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 51200,
        "partial_rotary_factor": 0.4,
        "rope_theta": 10000.0,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "vision_config": {"vision_tower": tower, "mm_projector": {"mm_projector_type": "mlp2x_gelu"}},
    }


REAL = {
    "llava-1.5-7b": (llava_config(*SMALL, 32), llava(SMALL)),
    "llava-1.5-13b": (llava_config(*LARGE, 40), llava(LARGE, inv_freq=True)),
    "ada-llava-L-7b": (
        llava_config(*SMALL, 32) | ada_config("L"),
        llava(SMALL) | scheduler_names(4096, 16),
    ),
    "ada-llava-H-7b": (
        llava_config(*SMALL, 32) | ada_config("H", token_selecting="prumerge+"),
        llava(SMALL) | scheduler_names(4096, 16 * 2 * 32),
    ),
    "mipha-3b": (
        mipha_config(),
        phi_names(2560, 10240, 32, 51200) | projector_names(2560, 1152) | siglip_names(),
    ),
}


def fake_weights(monkeypatch, places):
    """Headers without files: place -> names and shapes."""

    def weights(source):
        if source not in places:
            raise CheckpointError(f"no weights in {source}")
        info = {name: TensorInfo(shape, torch.float16) for name, shape in places[source].items()}
        return SimpleNamespace(source=source, info=info)

    monkeypatch.setattr(convert_read, "Weights", weights)


def module_shapes(foreign):
    """Our names and shapes of the model that transformers builds."""
    cls = MiphaForConditionalGeneration if foreign.format.name == "mipha" else LlavaForConditionalGeneration
    with torch.device("meta"):
        shapes = {normal(name): tuple(t.shape) for name, t in cls(foreign.config).state_dict().items()}
        if foreign.adaptive is not None:
            parts = Scheduler(foreign.adaptive).state_dict().items()
            shapes |= {f"scheduler.{name}": tuple(t.shape) for name, t in parts}
    return shapes


@pytest.mark.parametrize("name", REAL)
def test_real_key_lists(name, monkeypatch, tmp_path):
    raw, names = REAL[name]
    source = str(tmp_path)
    fake_weights(monkeypatch, {source: names})
    foreign = read_foreign(source, raw, detect(raw, source))
    (part,) = foreign.parts
    mapped = {new: names[old] for old, new in part.names.items()}
    assert mapped == module_shapes(foreign) and len(mapped) == len(part.names)
    dropped = names.keys() - part.names.keys()
    assert all(old.endswith("rotary_emb.inv_freq") for old in dropped)
    assert len(dropped) == (40 if name == "llava-1.5-13b" else 0)
    # And back: every one of our names has the released one.
    assert {to_theirs(new, foreign.format.names): shape for new, shape in mapped.items()} == {
        old: shape for old, shape in names.items() if old not in dropped
    }


def test_a_tower_that_is_only_named(monkeypatch, tmp_path):
    raw, names = llava_config(*SMALL, 32), llava(SMALL, tower=False)
    tower = clip_names("vision_model.") | {"vision_model.embeddings.position_ids": (1, 577), "logit_scale": ()}
    tower |= {"text_model.final_layer_norm.weight": (768,), "visual_projection.weight": (768, 1024)}
    source = str(tmp_path)
    fake_weights(monkeypatch, {source: names, raw["mm_vision_tower"]: tower})
    foreign = read_foreign(source, raw, detect(raw, source))
    here, apart = foreign.parts
    assert len(apart.names) == len(clip_names()) and len(here.names) == len(names)
    assert {*here.names.values(), *apart.names.values()} == module_shapes(foreign).keys()
    assert "0 of the 391 tensors of its vision tower" in foreign.notes[0]
    # Some keys of the tower are as good as none: all are read from the place that is named.
    some = dict(list(clip_names().items())[:5])
    fake_weights(monkeypatch, {source: names | some, raw["mm_vision_tower"]: tower})
    assert not some.keys() & read_foreign(source, raw, detect(raw, source)).parts[0].names.keys()
    with pytest.raises(CheckpointError, match="holds 5 of the 391 .*says that the tower was trained"):
        read_foreign(source, raw | {"unfreeze_mm_vision_tower": True}, FORMATS["llava"])
    fake_weights(monkeypatch, {source: names})
    with pytest.raises(
        CheckpointError, match=f"holds 0 of the 391 .*mm_vision_tower names, '{raw['mm_vision_tower']}'"
    ):
        read_foreign(source, raw, FORMATS["llava"])


def test_real_configs(monkeypatch, tmp_path):
    for name, (raw, names) in REAL.items():
        fake_weights(monkeypatch, {str(tmp_path): names})
        foreign = read_foreign(str(tmp_path), raw, detect(raw, "x"))
        config, text = foreign.config, foreign.config.text_config
        # Without a tokenizer the vocabulary stays, and an id that no text has marks images.
        assert (text.vocab_size, config.vision_feature_layer) == (raw["vocab_size"], -2)
        assert config.image_token_id == (51199 if name == "mipha-3b" else 0)
        assert text.num_hidden_layers == raw["num_hidden_layers"] and text.hidden_act == raw["hidden_act"]
        if name == "mipha-3b":
            assert (config.image_seq_length, config.vision_feature_select_strategy) == (729, "full")
            assert text.rope_parameters["partial_rotary_factor"] == 0.4 and config.model_type == "mipha"
        else:
            assert (config.image_seq_length, config.vision_feature_select_strategy) == (576, "default")
            assert config.vision_config.hidden_act == "quick_gelu" and config.vision_config.image_size == 336
        if name.startswith("ada"):
            adaptive = foreign.adaptive
            assert (adaptive.variant, adaptive.max_k) == (("L", 16) if "-L-" in name else ("H", 64))
            assert adaptive.token_selection == raw["token_selecting"]
        # The way back gives the same file, also after transformers has written and read ours.
        config.save_pretrained(tmp_path)
        again = type(config).from_pretrained(tmp_path)
        assert export_config(foreign.format, again, foreign.adaptive, None) == {
            **raw,
            "architectures": [foreign.format.architecture],
        }


def test_the_vocabulary_grows_as_published():
    assert grown(32000, 32000) == 32064 and grown(32064, 32064) == 32128
    assert grown(51200, 50295) == 51200 and grown(32000, 31999) == 32000


def test_names_of_all_versions_of_transformers():
    ours = ["model.language_model.layers.0.mlp.up_proj.weight", "lm_head.weight", "lm_head.bias"]
    ours += ["model.vision_tower.vision_model.embeddings.class_embedding", "model.multi_modal_projector.linear_1.bias"]
    published = [to_theirs(name, PUBLISHED) for name in ours]
    assert published[0] == "language_model.model.layers.0.mlp.up_proj.weight"
    assert published[3] == "vision_tower.vision_model.embeddings.class_embedding"
    assert [to_ours(name, PUBLISHED) for name in published] == ours
    newest = [name.replace("vision_tower.vision_model.", "vision_tower.") for name in published]
    nested = [name.replace("model.language_model.", "model.language_model.model.") for name in ours]
    for names in (ours, published, newest, nested):
        assert [normal(name) for name in names] == ours


def test_the_original_llava_type():
    raw = llava_config(*SMALL, 32) | {"model_type": "llava"}
    assert detect(raw, "x") is FORMATS["llava"]
    assert detect(raw | {"vision_config": {}}, "x") is None
    assert detect(json.loads((GOLDEN / "ada_L/checkpoint/config.json").read_text()), "x") is FORMATS["official"]
    with pytest.raises(CheckpointError, match=r"'llava_lama' model; known hosts: llava, .*Did you mean 'llava_llama'"):
        detect({"model_type": "llava_lama"}, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'.*'mlp2x_gelu'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
        ({"image_aspect_ratio": "anyres"}, "'anyres': this is a LLaVA-1.6"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is true"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"hidden_size": "4096"}, "hidden_size of the config is '4096', expected a whole number"),
        ({"rms_norm_eps": "x"}, "the config cannot be used: .*rms_norm_eps"),
        ({"mm_vision_tower": None}, "names no vision tower: mm_vision_tower is None"),
        ({"mm_vision_tower": "./nowhere"}, "vision tower './nowhere', which mm_vision_tower of .* cannot be had"),
        ({"scheduler_type": "X"}, "scheduler cannot be used: variant is 'X'"),
        ({"num_prefix_layers": 32}, "scheduler cannot be used: prefix_layers is 32"),
        ({"token_selecting": "magic"}, "scheduler cannot be used: token_selection is 'magic'"),
    ],
)
def test_configs_that_make_no_sense(changes, message, monkeypatch, tmp_path):
    raw, names = REAL["ada-llava-L-7b"]
    fake_weights(monkeypatch, {str(tmp_path): names})
    with pytest.raises(CheckpointError, match=message):
        read_foreign(str(tmp_path), raw | changes, FORMATS["official"])


def test_the_tuple_of_the_released_trainer(monkeypatch, tmp_path):
    raw, names = REAL["ada-llava-L-7b"]
    fake_weights(monkeypatch, {str(tmp_path): names})
    foreign = read_foreign(str(tmp_path), raw | {"token_selecting": ["prumerge"]}, FORMATS["official"])
    assert foreign.adaptive.token_selection == "prumerge"
