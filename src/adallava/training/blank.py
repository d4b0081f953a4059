"""A sample that holds a picture and nothing to learn, for batches that have no picture.

With weights spread over devices, or gradients averaged over them, every layer must run on every one of them; a batch
of text alone would leave out the vision tower, and the other devices would wait for it forever. One device does the
same, or it would train differently: the projector's gradient must be zero there and not absent, because Adam moves
weights by their momentum in the first case and leaves them alone in the second.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from adallava.data.collate import INDEX
from adallava.data.conversation import IGNORE_INDEX
from adallava.data.masking import encode_plain

_SIDE = 336


def blank_sample(processor: Any) -> dict[str, Any]:
    """A grey picture as a sample in which no token has a label."""
    sample = encode_plain(processor, [Image.new("RGB", (_SIDE, _SIDE), (127, 127, 127))], "")
    rows = {n: v[0] if n == "input_ids" or n.endswith("type_ids") else v for n, v in sample.items()}
    rows.pop("attention_mask", None)
    return {**rows, "labels": torch.full_like(rows["input_ids"], IGNORE_INDEX), INDEX: -1}
