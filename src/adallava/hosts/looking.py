"""What the last token of a prompt looks at, layer by layer: the latency token of an adaptive model (paper, Fig. F, G).

The model's attention function is exchanged for one that works out that token's row of attention beside calling the old
one, so any kernel and any family will do, and only what a plan runs is recorded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adallava.errors import ConfigError
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import ImageSource
from adallava.selection.fastv import last_query_attention

_NAME = "adallava_looking"
_RECORDS: ContextVar[dict[int, Tensor] | None] = ContextVar("records", default=None)
_KERNEL: ContextVar[str] = ContextVar("kernel", default="sdpa")


@dataclass(frozen=True)
class Look:
    """An answer, and what the token that decides its plan looked at in every layer that ran."""

    answer: Answer
    attention: dict[int, Tensor]
    """Layer -> probabilities [T] over the prompt's tokens, mean over the heads that ran."""
    image: Tensor
    """bool [T], tokens of the image."""

    @property
    def on_image(self) -> dict[int, Tensor]:
        """Layer -> attention over the image's tokens alone, [N], summing to the share that falls on the image."""
        return {layer: row[self.image] for layer, row in self.attention.items()}

    def grids(self) -> dict[int, np.ndarray]:
        """Layer -> attention over the picture, [side, side]; ``ConfigError`` where its tokens make no square."""
        return {layer: _square(row) for layer, row in self.on_image.items()}

    def on_picture(self) -> np.ndarray:
        """Attention over the picture, [side, side], averaged over the layers that ran."""
        return np.asarray(np.mean(list(self.grids().values()), axis=0))


def look(vlm: AdaptiveVLM, image: ImageSource, question: str, *, budget: object = "100%", **kwargs: Any) -> Look:
    """Answer one question about one image, and record what its last prompt token looks at.

    kwargs: as of ``AdaptiveVLM.generate``. Raises ``ConfigError`` where visual tokens are selected, because what is
    left of them has no place in the picture any more.
    """
    if vlm.token_selection.name != "none" or kwargs.get("token_selection", "none") not in (None, "none"):
        raise ConfigError(
            "attention is drawn over all visual tokens. Leave token selection out: token_selection='none'."
        )
    ids: list[Tensor] = []
    hook = vlm.model.register_forward_pre_hook(lambda _, __, kw: ids.append(kw["input_ids"][0]), with_kwargs=True)
    try:
        with _recording(vlm.model) as records:
            answer = vlm.generate(image, question, budget=budget, **kwargs)
    finally:
        hook.remove()
    attention = {layer: rows[0].mean(0).cpu() for layer, rows in sorted(records.items())}
    length = len(next(iter(attention.values())))
    is_image = (ids[0] == vlm.model.config.image_token_id).cpu()
    # The slot of the latency token comes last, and is not yet in the ids that generate() passes.
    return Look(answer, attention, torch.nn.functional.pad(is_image, (0, length - len(is_image))))


def _square(row: Tensor) -> np.ndarray:
    side = round(len(row) ** 0.5)
    if side * side != len(row):
        raise ConfigError(
            f"the picture has {len(row)} visual tokens, which make no square. Attention is drawn for hosts that see "
            "one square picture, such as LLaVA-1.5."
        )
    return row.float().reshape(side, side).numpy()


@contextlib.contextmanager
def _recording(model: Any) -> Iterator[dict[int, Tensor]]:
    """Record attention rows of the prefill of one request, on this thread; others must not use the model meanwhile."""
    config = model.config.get_text_config()
    kernel = config._attn_implementation
    if kernel != "eager":
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    records: dict[int, Tensor] = {}
    tokens = (_RECORDS.set(records), _KERNEL.set(kernel))
    config._attn_implementation = _NAME
    try:
        yield records
    finally:
        config._attn_implementation = kernel
        _RECORDS.reset(tokens[0])
        _KERNEL.reset(tokens[1])


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """Record the last query's row of the prefill, then run the attention function that the model was loaded with."""
    records, kernel = _RECORDS.get(), _KERNEL.get()
    if records is not None and query.shape[2] > 1 and module.layer_idx not in records:
        with torch.no_grad():
            row = last_query_attention(
                query[:, :, -1], key, scaling=options.get("scaling"), softcap=options.get("softcap")
            )
        records[module.layer_idx] = row
    if kernel == "eager":
        whole = getattr(module, "_module", module)
        function = vars(sys.modules[type(whole).__module__])["eager_attention_forward"]
    else:
        function = ALL_ATTENTION_FUNCTIONS[kernel]
    return function(module, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
