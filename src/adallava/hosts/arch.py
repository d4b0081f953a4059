"""Which hosts can be made adaptive, and where their parts are.

A host is recognised by the ``model_type`` of its config and of its text config. To add one, give its entry here; if
its decoder layer is not built like Llama's (norm, attention, add; norm, gated MLP, add), it also needs a layer
implementation beside ``LlamaLikeLayer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn

from adallava.errors import CheckpointError, did_you_mean


@dataclass(frozen=True)
class Architecture:
    """Where a host's decoder layers are, relative to the top model, and which decoders are built as expected."""

    model_type: str
    decoder_types: tuple[str, ...]
    layers: str = "model.language_model.layers"


ARCHITECTURES = {a.model_type: a for a in (Architecture("llava", ("llama",)),)}


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a transformers model; ``CheckpointError`` says which hosts there are."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"a model of type {kind!r} ({type(model).__name__}) cannot be made adaptive yet; known: {known}."
            f"{did_you_mean(str(kind), ARCHITECTURES)} Pass a LlavaForConditionalGeneration."
        )
    found = ARCHITECTURES[kind]
    decoder = config.get_text_config().model_type
    if decoder not in found.decoder_types:
        raise CheckpointError(
            f"this {kind} model has a decoder of type {decoder!r}; known for {kind}: {', '.join(found.decoder_types)}."
        )
    if not hasattr(model, "lm_head"):
        raise CheckpointError(
            f"{type(model).__name__} has no language-model head. Load it as LlavaForConditionalGeneration."
        )
    return found


def part(model: nn.Module, path: str) -> Any:
    """The submodule at a dotted path."""
    return reduce(getattr, path.split("."), model)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a host."""
    return part(model, architecture_of(model).layers)
