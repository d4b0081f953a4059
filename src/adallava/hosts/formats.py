"""The released checkpoint formats: how to tell them apart, and what their configs mean in transformers' terms.

The released code keeps the vision tower beside the checkpoint and names it in ``mm_vision_tower``; transformers wants
one config that holds both. What a config of theirs says and ours cannot is kept under ``converted_from``, so that the
way back gives the same file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration

from adallava.config import DEFAULT_HEADS_PER_SWITCH, AdaptiveConfig
from adallava.errors import CheckpointError, ConfigError, did_you_mean
from adallava.hosts.arch import ARCHITECTURES
from adallava.hosts.convert_towers import Tower
from adallava.hosts.keymaps import ADA_LLAVA, LLAVA, MIPHA, Pairs
from adallava.hosts.mipha import MiphaConfig, MiphaForConditionalGeneration

ORIGIN = "converted_from"
OWN = "adallava"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
)
_LLAMA = (*_SIZES, "rms_norm_eps", "attention_bias", "mlp_bias")
_PHI = (*_SIZES, "layer_norm_eps", "qk_layernorm", "resid_pdrop", "embd_pdrop")
_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_ADAPTIVE = ("scheduler_type", "num_prefix_layers", "scheduler_rank", "token_selecting")
_PREFIX_LAYERS = 16
"""What the released code takes where its config does not say."""


@dataclass(frozen=True)
class Format:
    """One layout of checkpoints that is not transformers' own."""

    name: str
    """As in ``adallava convert --to``."""
    title: str
    model_types: tuple[str, ...]
    """``model_type`` of its config.json; the first is the one that is written."""
    architecture: str
    names: Pairs
    decoder: str
    text_fields: tuple[str, ...]
    model_class: type[LlavaForConditionalGeneration] = LlavaForConditionalGeneration
    adaptive: bool = False


OFFICIAL = Format(
    "official",
    "AdaLLaVA, released layout",
    ("ada_llava_llama",),
    "AdaLlavaLlamaForCausalLM",
    ADA_LLAVA,
    "llama",
    _LLAMA,
    adaptive=True,
)
LLAVA_1_5 = Format(
    "llava", "LLaVA-1.5, original layout", ("llava_llama", "llava"), "LlavaLlamaForCausalLM", LLAVA, "llama", _LLAMA
)
MIPHA_PHI = Format(
    "mipha", "Mipha", ("mipha_phi",), "MiphaPhiForCausalLM", MIPHA, "phi", _PHI, MiphaForConditionalGeneration
)
FORMATS = {f.name: f for f in (OFFICIAL, LLAVA_1_5, MIPHA_PHI)}


def detect(raw: dict[str, Any], source: str) -> Format | None:
    """The released format that a config.json is of; None for one that transformers reads itself.

    Raises ``CheckpointError`` for a model type that neither knows.
    """
    kind = raw.get("model_type")
    # "llava" is both transformers' type, which says vision_config, and what the first LLaVA checkpoints say.
    if kind in ARCHITECTURES and not (kind == "llava" and "vision_config" not in raw and "mm_vision_tower" in raw):
        return None
    for found in FORMATS.values():
        if kind in found.model_types:
            return found
    released = [f.model_types[0] for f in FORMATS.values()]
    known = [*ARCHITECTURES, *released]
    raise CheckpointError(
        f"{source} is a {kind!r} model; known hosts: {', '.join(ARCHITECTURES)}; known released layouts: "
        f"{', '.join(released)}.{did_you_mean(str(kind), known)} Pass a checkpoint of one of these."
    )


def vision_tower_name(raw: dict[str, Any]) -> str:
    """What a LLaVA config names as its tower."""
    name = raw.get("mm_vision_tower", raw.get("vision_tower"))
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"the config names no vision tower: mm_vision_tower is {name!r}, expected a folder or hub id, such as "
            "'openai/clip-vit-large-patch14-336'. Set it in config.json."
        )
    return name


def import_config(found: Format, raw: dict[str, Any], tower: Tower, image_token: tuple[int, bool]) -> LlavaConfig:
    """Their config -> ours. image_token: its id, and whether it was added to the tokenizer; ``CheckpointError``."""
    token_id, added = image_token
    _check_multimodal(found, raw)
    vocabulary = grown(_number(raw, "vocab_size"), token_id)
    text = {key: raw[key] for key in (*found.text_fields, *_ROPE) if raw.get(key) is not None}
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        _number(raw, key)
    ids = {key: raw.get(key) for key in IDS}
    text |= {**ids, "model_type": found.decoder, "vocab_size": vocabulary, "tie_word_embeddings": False}
    vision = dict(tower.config)
    full = found is MIPHA_PHI or raw.get("mm_vision_select_feature", "patch") == "cls_patch"
    fields: dict[str, Any] = dict(
        vision_config=vision,
        text_config=text,
        image_token_index=token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2 + int(full and tower.has_cls),
        vision_feature_select_strategy="full" if full else "default",
        vision_feature_layer=_select_layer(found, raw),
        tie_word_embeddings=False,
        **ids,
        **{ORIGIN: {"format": found.name, "image_token_added": added, "config": raw}},
    )
    try:
        return MiphaConfig(**fields) if found is MIPHA_PHI else LlavaConfig(**fields)
    except Exception as error:  # transformers raises classes of its own for a value of the wrong type
        raise CheckpointError(f"the config cannot be used: {error}") from error


def import_adaptive(raw: dict[str, Any], text_config: Any) -> AdaptiveConfig:
    """The adaptive part of an official config; ``CheckpointError`` for values that make no sense."""
    selecting = raw.get("token_selecting") or "none"
    if isinstance(selecting, list) and len(selecting) == 1:
        selecting = selecting[0]  # the released train.py's default is a tuple, by a trailing comma
    try:
        return AdaptiveConfig.from_model_config(
            text_config,
            variant=str(raw.get("scheduler_type")),
            prefix_layers=raw.get("num_prefix_layers", _PREFIX_LAYERS),
            heads_per_switch=raw.get("scheduler_rank", DEFAULT_HEADS_PER_SWITCH),
            token_selection=str(selecting),
        )
    except ConfigError as error:
        raise CheckpointError(f"the config's scheduler cannot be used: {error}") from error


def grown(vocabulary: int, token_id: int) -> int:
    """Rows of the vocabulary that hold ``token_id``: a multiple of 64 where it must grow, as Hugging Face publishes."""
    return vocabulary if token_id < vocabulary else 64 * math.ceil((token_id + 1) / 64)


def _check_multimodal(found: Format, raw: dict[str, Any]) -> None:
    projector = raw
    if found is MIPHA_PHI:
        projector = (raw.get("vision_config") or {}).get("mm_projector") or {}
    expected = {"mm_projector_type": "mlp2x_gelu"}
    if found is not MIPHA_PHI:
        expected |= {"mm_patch_merge_type": "flat"}
    for key, value in expected.items():
        if projector.get(key, value) != value:
            raise CheckpointError(f"{key} is {projector[key]!r}; this version reads {value!r}, as of LLaVA-1.5.")
    if str(raw.get("image_aspect_ratio", "pad")).startswith("anyres"):
        raise CheckpointError(
            f"image_aspect_ratio is {raw['image_aspect_ratio']!r}: this is a LLaVA-1.6. Use its Hugging Face version."
        )
    if raw.get("mm_use_im_start_end"):
        raise CheckpointError(
            "mm_use_im_start_end is true: prompts with image start and end tokens are not known here."
        )
    if raw.get("tie_word_embeddings") and found is not MIPHA_PHI:
        raise CheckpointError(
            "tie_word_embeddings is true, but LLaVA-1.5 has an lm_head of its own. Check config.json."
        )


def _select_layer(found: Format, raw: dict[str, Any]) -> int:
    section = (raw.get("vision_config") or {}).get("vision_tower") or {} if found is MIPHA_PHI else raw
    return section.get("mm_vision_select_layer", -2)


def _number(raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{key} of the config is {value!r}, expected a whole number of 1 or more. Set it.")
    return value


# -- the way back ---------------------------------------------------------------------------------------------------


def export_config(
    target: Format, config: Any, adaptive: AdaptiveConfig | None, vision_tower: str | None
) -> dict[str, Any]:
    """Our config -> theirs; ``CheckpointError`` says what the format cannot hold.

    vision_tower: what to name as the tower; None keeps the name that the checkpoint came with.
    """
    _check_can_hold(target, config, adaptive)
    text, origin = config.text_config, getattr(config, ORIGIN, None)
    raw: dict[str, Any] = dict(origin["config"]) if origin else _new_config(target, config)
    for key in _ADAPTIVE:
        raw.pop(key, None)
    raw |= {key: getattr(text, key) for key in target.text_fields if key in raw}
    raw |= {"model_type": target.model_types[0], "architectures": [target.architecture]}
    if origin and origin["format"] == target.name:
        raw["model_type"] = origin["config"]["model_type"]
    if target is not MIPHA_PHI:
        raw["mm_vision_tower"] = vision_tower or raw.get("mm_vision_tower")
        if not raw["mm_vision_tower"]:
            raise CheckpointError(
                f"the layout {target.name!r} names its vision tower, and this model does not say where its tower comes "
                "from. Pass vision_tower (--vision-tower): a folder or hub id."
            )
    if adaptive is not None:
        values = (adaptive.variant, adaptive.prefix_layers, adaptive.heads_per_switch, adaptive.token_selection)
        raw |= dict(zip(_ADAPTIVE, values, strict=True))
    return raw


def _new_config(target: Format, config: Any) -> dict[str, Any]:
    """A config in their terms for a model that did not come from them."""
    text = config.text_config
    raw = {key: getattr(text, key) for key in (*target.text_fields, *IDS, "vocab_size") if hasattr(text, key)}
    rope = text.rope_parameters
    raw |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    raw |= {"tie_word_embeddings": False, "use_cache": True, "image_aspect_ratio": "pad"}
    raw |= {"mm_use_im_start_end": False, "mm_use_im_patch_token": False}
    projector = {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": config.vision_config.hidden_size}
    layer = {"mm_vision_select_feature": "patch", "mm_vision_select_layer": config.vision_feature_layer}
    if target is MIPHA_PHI:
        vision = config.vision_config.to_dict() | {"model_type": "mipha_vision_model"} | layer
        raw["vision_config"] = {"vision_tower": vision, "mm_projector": projector | {"hidden_size": text.hidden_size}}
        return raw
    if config.vision_feature_select_strategy == "full":
        layer["mm_vision_select_feature"] = "cls_patch"
    # The released code reads the tower named here; unfreeze makes it then take the checkpoint's own weights for it.
    raw |= projector | layer | {"mm_vision_tower": None, "unfreeze_mm_vision_tower": True, "use_mm_proj": True}
    return raw


def _check_can_hold(target: Format, config: Any, adaptive: AdaptiveConfig | None) -> None:
    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"the layout {target.name!r} ({target.title}) cannot hold this model: {reason}")

    text = config.text_config
    if config.model_type != ("mipha" if target is MIPHA_PHI else "llava") or text.model_type != target.decoder:
        raise refuse(f"it is a {config.model_type} with a {text.model_type} decoder, expected a {target.decoder} one.")
    if target.adaptive and adaptive is None:
        raise refuse("it is a base model without a scheduler. Use --to llava.")
    if adaptive is not None:
        if not target.adaptive:
            hint = " Use --to official." if target is LLAVA_1_5 else ""
            raise refuse(f"it has switches, which the layout cannot say.{hint}")
        _check_adaptive(refuse, text, adaptive)
    tower = "siglip_vision_model" if target is MIPHA_PHI else "clip_vision_model"
    if config.vision_config.model_type != tower:
        raise refuse(f"its tower is a {config.vision_config.model_type}, expected a {tower}.")
    if not isinstance(config.vision_feature_layer, int):
        raise refuse(f"it reads several layers of its tower, {config.vision_feature_layer}, expected one.")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise refuse("its projector is not two linear layers with biases and a GELU between them.")
    if config.tie_word_embeddings:
        raise refuse("its embeddings and lm_head are tied.")
    if text.rope_parameters.get("rope_type", "default") != "default" and not getattr(config, ORIGIN, None):
        raise refuse(f"its rotary embedding is scaled, {text.rope_parameters}.")


def _check_adaptive(refuse: Any, text: Any, adaptive: AdaptiveConfig) -> None:
    if adaptive.variant == "H" and adaptive.num_kv_heads != adaptive.num_heads:
        raise refuse(
            f"its decoder has {adaptive.num_heads} heads on {adaptive.num_kv_heads} key/value heads, and the released "
            "code cannot switch off a part of such a layer."
        )
    if adaptive.variant == "H" and (text.attention_bias or text.mlp_bias):
        raise refuse("its layers have biases, which the released code drops from partly-on layers.")
    if adaptive.token_selection not in ("none", "prumerge", "prumerge+"):
        raise refuse(f"its token selection is {adaptive.token_selection!r}; known there: none, prumerge, prumerge+.")
    if adaptive.latency_dim != 256:
        raise refuse(f"its latency encoding has {adaptive.latency_dim} features, expected 256.")
