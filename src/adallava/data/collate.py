"""Pads encoded samples on the right and stacks them, as training needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adallava.data.conversation import IGNORE_INDEX

INDEX = "sample_index"
"""Each sample's place in its data set, int64 [B]; what is random in training is drawn from it."""
_PER_TOKEN = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Collator:
    """Batch of ``{"input_ids" [T], "labels"? [T], "sample_index"?, ...}`` -> tensors [B, T] and all images in a row.

    Whatever else a sample has belongs to its images, such as ``pixel_values`` [images, ...], and is joined along the
    first dimension; images cut into unequal numbers of tiles are filled up with zeros. ``mask_padding`` adds the
    attention mask. Padding stands to the right of causal attention and carries no label, so without the mask the loss
    is the same and the attention kernel is the fast one. ``blank`` is added to a batch in which no sample has images.
    """

    pad_token_id: int
    mask_padding: bool = True
    blank: dict[str, Any] | None = None

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack."""
        if self.blank is not None and not any("pixel_values" in sample for sample in samples):
            samples = [*samples, self.blank]
        ids = [torch.as_tensor(s["input_ids"]) for s in samples]
        batch = {"input_ids": _pad(ids, self.pad_token_id)}
        if self.mask_padding:
            batch["attention_mask"] = _pad([torch.ones_like(i) for i in ids], 0)
        if "labels" in samples[0]:
            batch["labels"] = _pad([torch.as_tensor(s["labels"]) for s in samples], IGNORE_INDEX)
        if INDEX in samples[0]:
            batch[INDEX] = torch.tensor([s[INDEX] for s in samples])
        names = dict.fromkeys(name for sample in samples for name in sample)
        for name in names:
            values = [sample[name] for sample in samples if sample.get(name) is not None]
            if name in batch or name == "attention_mask" or not values:
                continue
            if name in _PER_TOKEN:
                rows = [torch.as_tensor(s.get(name, torch.zeros_like(i))) for s, i in zip(samples, ids, strict=True)]
                batch[name] = _pad(rows, 0)
            else:
                batch[name] = _join(values)
        return batch


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _join(values: list[Tensor]) -> Tensor:
    sizes = torch.tensor([value.shape[1:] for value in values]).amax(0).tolist()
    return torch.cat([_filled(value, sizes) for value in values])


def _filled(value: Tensor, sizes: Sequence[int]) -> Tensor:
    """``value`` with zeros at the end of every dimension but the first, up to ``sizes``."""
    if list(value.shape[1:]) == list(sizes):
        return value
    filled = value.new_zeros(len(value), *sizes)
    filled[tuple(slice(size) for size in value.shape)] = value
    return filled
