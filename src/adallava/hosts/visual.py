"""Visual token selection at a host: which selector fits which model, and prompts shortened to what a selector kept.

A selector works before the decoder, on the patches of the vision tower (then prompts are shortened here), or inside it
(``cut``).
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from adallava.errors import ConfigError, PromptError
from adallava.hosts.inputs import PER_TOKEN, slot_id
from adallava.hosts.tower import has_cls, tower_features, tower_patches
from adallava.selection import describe_selector, parse_selector
from adallava.selection.common import DecoderSelector, Patches, TowerSelector

Selector = TowerSelector | DecoderSelector

# Hosts with one grid of patches for each image. Others cut an image into tiles or take it at its own resolution, and
# count their placeholders by rules of their own.
_ONE_GRID = ("llava", "mipha")
# Features of the tower enter later decoder layers too, at the places of the image tokens.
_DEEPSTACK = ("qwen3_vl",)


def as_selector(chosen: str | Selector | None) -> Selector:
    """A selector, from its text, such as "fastv:ratio=0.75"; None is "none"."""
    return parse_selector(chosen or "none") if chosen is None or isinstance(chosen, str) else chosen


def check_selector(model: Any, selector: Selector, prefix_layers: int | None) -> None:
    """Raise ``ConfigError`` if ``selector`` cannot work in this host; prefix_layers None for a base model."""
    kind, text = model.config.model_type, describe_selector(selector)
    if selector.place == "decoder":
        layers = model.config.get_text_config().num_hidden_layers
        last = layers - 1 if prefix_layers is None else prefix_layers
        if kind in _DEEPSTACK:
            raise ConfigError(
                f"token selection {text!r} drops image tokens inside the decoder, but {kind} adds features to them "
                "in later layers. Use 'none'."
            )
        if selector.layer > last:
            what = "has no such layer" if prefix_layers is None else f"always runs its first {last} layers only"
            raise ConfigError(
                f"token selection {text!r} drops tokens before layer {selector.layer}, but this model {what}. Choose a "
                f"layer from 1 to {last}."
            )
    elif selector.name != "none":
        if kind not in _ONE_GRID:
            raise ConfigError(
                f"token selection {text!r} works on one grid of patches per image, but {kind} cuts images into tiles "
                "or takes them at their own resolution. Use 'fastv' or 'none'."
            )
        if not isinstance(model.config.vision_feature_layer, int):
            raise ConfigError(
                f"token selection {text!r} needs features of one layer of the vision tower, but this model takes "
                f"them of {model.config.vision_feature_layer}. Use 'fastv' or 'none'."
            )
        if has_cls(model.model.vision_tower) and model.config.vision_feature_select_strategy != "default":
            raise ConfigError(
                f"token selection {text!r} takes patches without the CLS token, but this model's "
                f"vision_feature_select_strategy is {model.config.vision_feature_select_strategy!r}. Use 'fastv'."
            )
        if selector.reads_attention and not has_cls(model.model.vision_tower):
            raise ConfigError(
                f"token selection {text!r} reads where the CLS token looks, but the {kind} model's vision tower "
                f"({type(model.model.vision_tower).__name__}) has none. Use 'fastv', 'random', 'uniform' or 'none'."
            )


def select_images(
    model: Any, inputs: dict[str, Any], selector: Selector, seed: int = 0
) -> tuple[dict[str, Any], list[Tensor] | None]:
    """Encode the pictures of a batch, select tokens of each, and shorten the prompts to them.

    inputs: ``input_ids`` [B, T] with the placeholders of whole images, ``pixel_values`` [I, 3, H, W], and masks and
        labels [B, T]. Returns inputs without pixels, padded on the right if they have labels and on the left if not;
        and [M, D] for each row, what its placeholders stand for. Where nothing is dropped the inputs come back as they
        are, with None.
    seed: of selectors that draw; what they draw for an image depends on it and on the picture alone.
    """
    pixels = inputs.get("pixel_values")
    if selector.place == "decoder" or selector.name == "none" or pixels is None:
        return inputs, None
    ids = inputs.get("input_ids")
    if ids is None:
        raise PromptError(f"token selection {selector.name!r} shortens prompts, so it needs input_ids, not embeddings.")
    patches = _patches(model, pixels, selector.reads_attention)
    selected = selector.select(patches, [_generator(picture, seed) for picture in pixels])
    each = patches.features.shape[1]
    if all(len(tokens) == each for tokens in selected.features):
        return inputs, None
    place = ids == model.config.image_token_id
    if int(place.sum()) != each * len(pixels):
        raise PromptError(
            f"the prompts have {int(place.sum())} image placeholders for {len(pixels)} images of {each} patches each."
        )
    counts = torch.tensor([len(tokens) for tokens in selected.features], device=ids.device)
    rank = (place.flatten().cumsum(0) - 1).view_as(ids)
    keep = ~place | (rank % each < counts[(rank // each).clamp(0, len(counts) - 1)])
    filler = slot_id(model.config, getattr(model.config.get_text_config(), "pad_token_id", None))
    new = _compact({k: v for k, v in inputs.items() if k != "pixel_values"}, keep, filler)
    tokens = model.model.multi_modal_projector(torch.cat(selected.features).to(_dtype(model)))
    images_of_row = (place.sum(1) // each).tolist()
    sizes = [int(part.sum()) for part in counts.split(images_of_row)]
    return new, list(tokens.split(sizes))


def _patches(model: Any, pixels: Tensor, attention: bool) -> Patches:
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    return tower_patches(tower, pixels, layer) if attention else Patches(tower_features(tower, pixels, layer))


def _generator(picture: Tensor, seed: int) -> torch.Generator:
    """Noise of one picture: the same alone and in a batch."""
    own = zlib.crc32(picture.detach().float().cpu().numpy().tobytes())
    return torch.Generator().manual_seed(own + seed)


def _dtype(model: Any) -> torch.dtype:
    return next(model.model.multi_modal_projector.parameters()).dtype


def _compact(inputs: dict[str, Any], keep: Tensor, filler: int) -> dict[str, Any]:
    """Take padding and what is not kept out of everything [B, T], and pad the rows again; ``filler`` pads ids."""
    mask = inputs.get("attention_mask")
    keep = keep if mask is None else keep & mask.bool()
    width, right = int(keep.sum(1).max()), inputs.get("labels") is not None
    order = keep.byte().sort(dim=1, stable=True, descending=right).indices
    order = order[:, :width] if right else order[:, -width:]
    real = keep.gather(1, order)
    fillers = {"input_ids": filler, **PER_TOKEN}
    new = {
        name: inputs[name].gather(1, order).masked_fill(~real, value)
        for name, value in fillers.items()
        if isinstance(inputs.get(name), Tensor)
    }
    return {**inputs, **new, "attention_mask": real.to(torch.long)}
