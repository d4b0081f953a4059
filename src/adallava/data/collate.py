"""Pads encoded samples on the right and stacks them, as training needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adallava.data.conversation import IGNORE_INDEX


@dataclass(frozen=True)
class Collator:
    """Batch of ``{"input_ids", "labels"?, "pixel_values"?}`` -> tensors [B, T], [B, T], [images, 3, height, width].

    ``mask_padding`` adds the attention mask. Padding stands to the right of causal attention and carries no label, so
    without the mask the loss is the same and the attention kernel is the fast one.
    """

    pad_token_id: int
    mask_padding: bool = True

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and stack."""
        ids = [torch.as_tensor(s["input_ids"]) for s in samples]
        batch = {"input_ids": _pad(ids, self.pad_token_id)}
        if self.mask_padding:
            batch["attention_mask"] = _pad([torch.ones_like(i) for i in ids], 0)
        if "labels" in samples[0]:
            batch["labels"] = _pad([torch.as_tensor(s["labels"]) for s in samples], IGNORE_INDEX)
        images = [s["pixel_values"] for s in samples if s.get("pixel_values") is not None]
        if images:
            batch["pixel_values"] = torch.stack(images)
        return batch


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
