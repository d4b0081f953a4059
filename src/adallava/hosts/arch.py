"""Which hosts can be made adaptive, where their decoder layers are, and how a layer of each family is built.

A host is recognised by the ``model_type`` of its config, its decoder by that of its text config. The two are
independent, because hosts take their decoder from transformers as it is. Everything else about a family (rotary
embedding, query/key norms, scaling, sliding windows) stays in transformers' own attention and MLP, see ``heads``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn

from adallava.errors import CheckpointError, did_you_mean


@dataclass(frozen=True)
class Architecture:
    """Where a host's decoder layers are, relative to the top model."""

    model_type: str
    layers: str = "model.language_model.layers"


@dataclass(frozen=True)
class Decoder:
    """How a family's decoder layer is built, by the names of its parts. The defaults are Llama's.

    Query, key and value are ``q_proj``, ``k_proj`` and ``v_proj`` of ``self_attn`` in every family, and the norm before
    attention is ``input_layernorm``.
    """

    attention_out: str = "o_proj"
    """Output projection of the attention."""
    mlp_in: tuple[str, ...] = ("gate_proj", "up_proj")
    """Projections into the MLP's neurons."""
    mlp_out: str = "down_proj"
    """Projection out of them."""
    mlp_norm: str | None = "post_attention_layernorm"
    """Norm before the MLP; None where the MLP reads what attention reads, and both are added at once."""
    attention_post_norm: str | None = None
    """Norm of the attention's output, before it is added."""
    mlp_post_norm: str | None = None
    """Norm of the MLP's output, before it is added."""
    dropout: str | None = None
    """Dropout of both outputs."""


_LLAMA = Decoder()
_PHI = Decoder(attention_out="dense", mlp_in=("fc1",), mlp_out="fc2", mlp_norm=None, dropout="resid_dropout")
_GEMMA2 = Decoder(
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
DECODERS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen3_vl_text": _LLAMA,
    "phi": _PHI,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}

_TEXT_MODEL = "model.text_model.layers"
_HOSTS = (
    Architecture("llava"),
    Architecture("mipha"),
    Architecture("llava_next"),
    Architecture("llava_onevision"),
    Architecture("qwen2_vl"),
    Architecture("qwen2_5_vl"),
    Architecture("qwen3_vl"),
    Architecture("smolvlm", _TEXT_MODEL),
    Architecture("idefics3", _TEXT_MODEL),
    Architecture("internvl"),
    Architecture("paligemma"),
    Architecture("gemma3"),
)
ARCHITECTURES = {a.model_type: a for a in _HOSTS}


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a transformers model; ``CheckpointError`` says which hosts there are."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"a model of type {kind!r} ({type(model).__name__}) cannot be made adaptive yet; known: "
            f"{', '.join(ARCHITECTURES)}.{did_you_mean(str(kind), ARCHITECTURES)} Pass a vision-language model of one "
            "of these types, such as a LlavaForConditionalGeneration."
        )
    decoder = config.get_text_config().model_type
    if decoder not in DECODERS:
        raise CheckpointError(
            f"this {kind} model has a decoder of type {decoder!r}, whose layers are built in a way not known here; "
            f"known: {', '.join(DECODERS)}."
        )
    if not hasattr(model, "lm_head"):
        raise CheckpointError(
            f"{type(model).__name__} has no language-model head. Load it with AutoModelForImageTextToText."
        )
    return ARCHITECTURES[kind]


def part(model: nn.Module, path: str) -> Any:
    """The submodule at a dotted path."""
    return reduce(getattr, path.split("."), model)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a host."""
    return part(model, architecture_of(model).layers)


def last_device(model: nn.Module) -> torch.device:
    """Where the last decoder layer of a host is, whose parts may be spread over devices."""
    return next(decoder_layers(model)[-1].parameters()).device


def decoder_of(model: Any) -> Decoder:
    """How the decoder layers of a host are built."""
    return DECODERS[model.config.get_text_config().model_type]
