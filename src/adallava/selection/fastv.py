"""FastV (Chen et al. 2024, arXiv:2403.06764): drop image tokens inside the decoder, before layer K.

Image tokens are ranked by the attention that the prompt's last token pays them in layer K - 1, averaged over heads.
Here is the ranking only: the host drops the tokens, keeps the positions of those that stay, and drops them once, in the
prefill. Every row of a batch is ranked by itself, over all its images together.

The released code takes the whole attention matrix from the model, which rules out fast attention kernels. One row of
it is enough, and ``last_query_attention`` computes that row from the layer's queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adallava.errors import ConfigError
from adallava.selection.common import check_whole, wide


@dataclass(frozen=True)
class FastV:
    """Drop the image tokens that the last token of the prompt looks at least. Set ratio or rank, or neither."""

    name: ClassVar[str] = "fastv"
    place: ClassVar[Literal["decoder"]] = "decoder"

    layer: int = 2
    """Decoder layer, counted from 0, before which tokens are dropped (K); the attention is that of the one before."""
    ratio: float | None = None
    """Share of a row's image tokens that is dropped, not kept (R); 0.5 where rank is not set either."""
    rank: int | None = None
    """Image tokens kept in each row, instead of ratio; all of a row that has fewer."""

    def __post_init__(self) -> None:
        """Check the settings; raise ``ConfigError``."""
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ConfigError(
                f"fastv: layer is {self.layer!r}, expected a whole number of 1 or more, because tokens are ranked by "
                "the attention of the layer before. The paper drops before layer 2."
            )
        if self.ratio is not None and self.rank is not None:
            raise ConfigError(f"fastv: ratio={self.ratio!r} and rank={self.rank!r} are both given. Set one of them.")
        if self.rank is not None:
            check_whole("fastv", "rank", self.rank, least=0)
            return
        if self.ratio is None:
            object.__setattr__(self, "ratio", 0.5)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= 1:
            raise ConfigError(f"fastv: ratio is {self.ratio!r}, expected the share of tokens to drop, from 0 to 1.")

    def kept(self, image_tokens: Tensor) -> Tensor:
        """Image tokens that stay, int64 [B], of ``image_tokens``, int64 [B]: ``rank``, or round(n * (1 - ratio))."""
        if self.rank is not None:
            return image_tokens.clamp(max=self.rank)
        assert self.ratio is not None
        # float64 and half to even: Python's round, which the released code uses.
        return (image_tokens.double() * (1 - self.ratio)).round().long()

    def keep(self, attention: Tensor, image: Tensor) -> Tensor:
        """Say which tokens of a prompt stay: bool [B, T], as ``keep_mask``.

        attention: [B, H, T], of the prompt's last token in layer ``layer - 1``. image: bool [B, T], image tokens.
        """
        return keep_mask(attention, image, self.kept(image.sum(-1)))


def keep_mask(attention: Tensor, image: Tensor, count: Tensor) -> Tensor:
    """Say which tokens stay: bool [B, T], true for all but image tokens and for exactly ``count`` image tokens a row.

    attention: [B, H, T] probabilities; those of image tokens are averaged over heads and the largest stay, ties to the
        lower index.
    image: bool [B, T], true for image tokens, however many and in however many images. Text, padding and the latency
        token are false and always stay.
    count: int64 [B], from 0 to the row's image tokens.
    """
    if attention.dim() != 3 or image.shape != (attention.shape[0], attention.shape[2]) or image.dtype != torch.bool:
        raise ValueError(
            f"attention is {list(attention.shape)} and image {image.dtype} {list(image.shape)}, expected [B, H, T] and "
            "bool [B, T]. Give the one row of attention that belongs to the last token."
        )
    order = wide(attention).mean(1).sort(dim=-1, descending=True, stable=True).indices  # [B, T]
    image_in_order = image.gather(1, order)
    # Counted among image tokens only: whatever the others' attention is, the count comes out right.
    stays = image_in_order & (image_in_order.cumsum(1) <= count[:, None])
    return torch.zeros_like(image).scatter(1, order, stays) | ~image


def last_query_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention probabilities of one token per row, [B, H, T] in float32 or wider; memory grows with T, not T².

    query: [B, H, D], of the token that looks, after rotary embedding.
    key: [B, Hkv, T, D], likewise; each key head serves H / Hkv adjacent query heads, as in grouped-query attention.
    mask: [B, T], what the token may see: bool or whole numbers (nonzero: may), or floats that are added to the scores.
    scaling: factor of the scores, D ** -0.5 when None. softcap: bound of the scores (Gemma 2), none when None.
    """
    batch, heads, width = query.shape
    key_heads, tokens = key.shape[1], key.shape[2]
    if key.shape != (batch, key_heads, tokens, width) or heads % key_heads:
        raise ValueError(
            f"query is {list(query.shape)} and key {list(key.shape)}, expected [B, H, D] and [B, Hkv, T, D] with H a "
            "multiple of Hkv. Give the last token's query only, and keys before they are repeated."
        )
    if mask is not None and mask.shape != (batch, tokens):
        raise ValueError(
            f"mask is {list(mask.shape)}, expected [{batch}, {tokens}]. Of a mask [B, 1, T, T] give mask[:, 0, -1]."
        )
    with torch.autocast(query.device.type, enabled=False):
        grouped = wide(query).view(batch, key_heads, heads // key_heads, width)
        scores = (grouped @ wide(key).mT).flatten(1, 2)  # [B, H, T]
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None and mask.is_floating_point():
        scores = scores + mask[:, None].to(scores.dtype)
    elif mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1)
