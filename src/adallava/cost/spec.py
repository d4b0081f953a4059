"""``ModelSpec``: the sizes of a vision-language model that its cost depends on, and nothing else.

The cost room runs without torch, transformers or a model, so a spec is read by duck typing from whatever describes
the model: a Hugging Face config object, the same as a dict, or numbers written by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adallava.errors import AdaLlavaError, ConfigError

# Where vision-language configs keep the language model; a flat config has its sizes at the top.
_TEXT_KEYS = ("text_config", "llm_config", "language_config")
# Size -> the names configs use for it, in the order they are tried.
_TEXT_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocab_size": ("vocab_size",),
}
_VISION_NAMES = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "image_size": ("image_size",),
    "patch_size": ("patch_size",),
}
# Decoders with two MLP matrices instead of three; no config says so by a field of its own.
_UNGATED_MLP = frozenset({"phi", "mipha_phi", "opt", "gpt2", "gpt_neox", "gptj", "bloom", "falcon", "starcoder2"})
_NAMED_TOWERS = {"clip-vit-large-patch14-336": 336, "clip-vit-large-patch14": 224}
# Fields of decoders that these formulas would count wrongly: mixtures of experts, compressed attention.
_UNSUPPORTED = ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank")


class CostError(AdaLlavaError, ValueError):
    """A question to the cost model that has no answer, such as the cost of zero tokens."""


@dataclass(frozen=True)
class VisionSpec:
    """Sizes of a ViT tower and the two-layer projector behind it; ``ConfigError`` for values that cannot be."""

    hidden_size: int
    """Width of the tower."""
    intermediate_size: int
    """Width of the tower's MLP."""
    num_layers: int
    """Layers of the tower (those after the selected feature layer included)."""
    num_heads: int
    """Attention heads per layer."""
    image_size: int
    """Side of the square input image in pixels."""
    patch_size: int
    """Side of a patch in pixels."""
    projector_hidden_size: int
    """Width of the projector's hidden and output layers: the language model's hidden size in LLaVA."""
    num_channels: int = 3
    """Colour channels."""
    class_token: bool = True
    """Whether a class token is processed with the patches (CLIP yes, SigLIP no)."""

    def __post_init__(self) -> None:
        """Check that sizes are whole numbers above 0."""
        _check_sizes(self)

    @property
    def num_patches(self) -> int:
        """Patches of one image, which are its visual tokens (N)."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of the decoder, and of the vision tower where known; ``ConfigError`` for values that contradict."""

    hidden_size: int
    """Width of the residual stream (D)."""
    intermediate_size: int
    """Width of the MLP."""
    num_layers: int
    """Decoder layers (L)."""
    num_heads: int
    """Attention (query) heads per layer (H)."""
    num_kv_heads: int
    """Key/value heads per layer; equals num_heads without grouped-query attention."""
    head_dim: int
    """Width of one head; hidden_size / num_heads in most models."""
    vocab_size: int
    """Rows of the output layer (V)."""
    gated_mlp: bool = True
    """Whether the MLP has gate, up and down matrices (Llama, Qwen) or only up and down (Phi)."""
    vision: VisionSpec | None = None
    """Vision tower and projector, or None where unknown; the paper's FLOPs leave them out."""

    def __post_init__(self) -> None:
        """Check that sizes are whole numbers above 0 and that key/value heads divide the heads."""
        _check_sizes(self)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}. "
                "Take both from the model's config (num_attention_heads and num_key_value_heads)."
            )

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_config(cls, config: Any) -> ModelSpec:
        """Read a spec from a Hugging Face style config: an object or a mapping, flat or with a nested text config.

        The vision tower is read where ``vision_config`` has all sizes of a ViT, and is None otherwise, since the
        paper's convention does without it. Raises ``ConfigError`` naming every size that is missing, and for
        decoders that are counted differently (mixture of experts, compressed attention).
        """
        text = _text_config(config)
        _check_supported(text)
        sizes = {size: _first(text, names) for size, names in _TEXT_NAMES.items()}
        if missing := [_TEXT_NAMES[size][0] for size, value in sizes.items() if value is None]:
            raise ConfigError(
                f"{_describe(config)} lacks {', '.join(missing)} of the language model. A config.json leaves out "
                "values that equal their defaults: load it with transformers.AutoConfig and pass the object, or add "
                "what is missing."
            )
        heads = sizes["num_heads"]
        return cls(
            **sizes,
            num_kv_heads=_first(text, ("num_key_value_heads",)) or heads,
            head_dim=_first(text, ("head_dim",)) or _head_dim(sizes["hidden_size"], heads),
            gated_mlp=_first(text, ("model_type",)) not in _UNGATED_MLP,
            vision=_vision_spec(config, sizes["hidden_size"]),
        )


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := _get(config, name)) is not None), None)


def _text_config(config: Any) -> Any:
    nested = _first(config, _TEXT_KEYS)
    return config if nested is None else nested


def _vision_spec(config: Any, projector_hidden_size: int) -> VisionSpec | None:
    vision = _get(config, "vision_config")
    if vision is None:
        # The released LLaVA layout names its tower, and keeps its config elsewhere.
        image_size = _NAMED_TOWERS.get(str(_get(config, "mm_vision_tower")).rpartition("/")[2])
        return None if image_size is None else _clip_l(projector_hidden_size, image_size)
    tower = _get(vision, "vision_tower") or vision  # Mipha nests the tower once more
    sizes = {size: _first(tower, names) for size, names in _VISION_NAMES.items()}
    # isinstance, because some towers give sizes as [height, width] and are no square ViT.
    if not all(isinstance(value, int) for value in sizes.values()):
        return None
    return VisionSpec(
        **sizes,
        projector_hidden_size=projector_hidden_size,
        num_channels=_get(tower, "num_channels") or 3,
        class_token="clip" in str(_get(tower, "model_type")),
    )


def _head_dim(hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and the config has no "
            "head_dim. Add head_dim."
        )
    return hidden_size // num_heads


def _check_supported(text: Any) -> None:
    for name in _UNSUPPORTED:
        value = _get(text, name)
        if isinstance(value, int) and value > 1:
            raise ConfigError(
                f"{_describe(text)} has {name} = {value}: mixtures of experts and compressed attention are not "
                "counted by this cost model. Use a dense decoder."
            )


def _check_sizes(spec: ModelSpec | VisionSpec) -> None:
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{field.name} is {value!r}, expected a whole number of 1 or more.")


def _describe(config: Any) -> str:
    return "the config" if isinstance(config, Mapping) else type(config).__name__


def _clip_l(projector_hidden_size: int, image_size: int = 336) -> VisionSpec:
    """CLIP ViT-L/14, the tower of LLaVA-1.5."""
    return VisionSpec(1024, 4096, 24, 16, image_size, 14, projector_hidden_size)


def _llava_1_5(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> ModelSpec:
    # vocab_size is Vicuna's 32000, which the paper's FLOPs use; the "-hf" conversions pad it to 32064.
    vision = _clip_l(hidden_size)
    return ModelSpec(hidden_size, intermediate_size, num_layers, num_heads, num_heads, 128, 32000, vision=vision)


def _mipha_3b() -> ModelSpec:
    """Phi-2 with SigLIP so400m at 384 pixels, whose edge of 384 holds 27 patches of 14."""
    siglip = VisionSpec(1152, 4304, 27, 16, 384, 14, 2560, class_token=False)
    return ModelSpec(2560, 10240, 32, 32, 32, 80, 51200, gated_mlp=False, vision=siglip)


LLAVA_1_5_7B = _llava_1_5(4096, 11008, 32, 32)
LLAVA_1_5_13B = _llava_1_5(5120, 13824, 40, 40)
SPECS: Mapping[str, ModelSpec] = {
    "llava-1.5-7b": LLAVA_1_5_7B,
    "llava-1.5-13b": LLAVA_1_5_13B,
    "mipha-3b": _mipha_3b(),
    # Decoders only: these take pictures at their own size, so that there is no fixed number of visual tokens.
    "qwen2-vl-2b": ModelSpec(1536, 8960, 28, 12, 2, 128, 151936),
    "qwen2-vl-7b": ModelSpec(3584, 18944, 28, 28, 4, 128, 152064),
    "qwen2.5-vl-3b": ModelSpec(2048, 11008, 36, 16, 2, 128, 151936),
    "qwen2.5-vl-7b": ModelSpec(3584, 18944, 28, 28, 4, 128, 152064),
}
