"""What token selectors share: the tensors a vision tower hands over, what comes back, and how many tokens stay.

Images keep different numbers of tokens, so results are lists with one tensor per image and never padded: a prompt is
spliced image by image, and padding would have to be taken out again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from adallava.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Patches:
    """A batch of encoded images; raises ``ValueError`` for tensors that do not fit together.

    All images of a batch have the same N. Images cut into different numbers of patches go into batches of their own.
    """

    features: Tensor
    """[B, N, C], patch features before the projector, without CLS, in reading order."""
    key: Tensor | None = None
    """[B, 1+N, D], k_proj outputs of the layer that looks, CLS first; [B, N, D] from a tower without CLS."""
    query: Tensor | None = None
    """[B, 1+N, D], q_proj outputs of the same layer, CLS first. Only the row of CLS is read."""
    cls_attention: Tensor | None = None
    """[B, N], how much CLS looks at each patch; given instead of query, or where a tower has no CLS."""

    def __post_init__(self) -> None:
        """Check every shape against ``features``."""
        if self.features.dim() != 3 or 0 in self.features.shape[1:]:
            raise ValueError(
                f"features are {list(self.features.shape)}, expected [B, N, C]. Give a single image as features[None]."
            )
        if self.query is not None and self.cls_attention is not None:
            raise ValueError("query and cls_attention are both given, but query only serves to compute cls_attention.")
        n = self.features.shape[1]
        self._check("query", self.query, [1 + n])
        self._check("key", self.key, [1 + n] if self.query is not None else [1 + n, n])
        if self.key is not None and self.query is not None and self.key.shape != self.query.shape:
            raise ValueError(f"key is {list(self.key.shape)} and query {list(self.query.shape)}, expected one shape.")
        if self.cls_attention is not None and self.cls_attention.shape != self.features.shape[:2]:
            shape, expected = list(self.cls_attention.shape), list(self.features.shape[:2])
            raise ValueError(f"cls_attention is {shape}, expected {expected}: one number per patch, none for CLS.")

    def _check(self, name: str, tensor: Tensor | None, rows: list[int]) -> None:
        batch = len(self.features)
        if tensor is not None and (tensor.dim() != 3 or len(tensor) != batch or tensor.shape[1] not in rows):
            expected = " or ".join(f"[{batch}, {n}, D]" for n in rows)
            raise ValueError(
                f"{name} is {list(tensor.shape)}, expected {expected} for features {list(self.features.shape)}. "
                "Give the outputs of one layer for all positions, CLS first."
            )


@dataclass(frozen=True, eq=False)
class Selected:
    """What a selector at the tower made of a batch of images: one entry per image in each list."""

    features: list[Tensor]
    """[M, C] each, M tokens of that image, in the order in which they enter the prompt; dtype of the input."""
    indices: list[Tensor]
    """int64 [K] each: patch that each of the first K tokens stands for. A last token beyond K is merged from others."""


class TowerSelector(Protocol):
    """A frozen dataclass that shortens the output of a vision tower."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    place: ClassVar[Literal["tower"]]
    reads_attention: ClassVar[bool]
    """Whether ``select`` needs keys, and queries or CLS attention; if not, the host need not record them."""

    def select(self, patches: Patches, generators: Sequence[torch.Generator] | None = None) -> Selected:
        """Select tokens of each image. generators: one per image, read by selectors that draw."""


class DecoderSelector(Protocol):
    """A frozen dataclass that drops image tokens inside the decoder."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    place: ClassVar[Literal["decoder"]]

    @property
    def layer(self) -> int:
        """Decoder layer, counted from 0, before which tokens are dropped."""

    def keep(self, attention: Tensor, image: Tensor) -> Tensor:
        """Say which tokens stay: bool [B, T] from attention [B, H, T] of layer - 1 and image-token mask [B, T]."""


def take(patches: Patches, indices: Sequence[Tensor]) -> Selected:
    """Take the patches named by ``indices``, int64 [M] per image, as they are."""
    pairs = zip(patches.features, indices, strict=True)
    return Selected([features[index] for features, index in pairs], list(indices))


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if that is what it is: choices must not hang on half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def floor(value: float) -> int:
    """Round down, but forgive what float division loses: 100 * 0.29 is 28.999999999999996 and means 29."""
    return math.floor(value + 1e-9)


def kept_count(n: int, count: int | None = None, ratio: float | None = None) -> int:
    """Number of n patches that stay, from 1 to n: ``count``, or the share ``ratio`` of n, rounded down."""
    wanted = floor(n * ratio) if ratio is not None else count
    assert wanted is not None, "the selectors check that one of the two is given"
    return max(1, min(n, wanted))


def check_count_or_ratio(owner: str, count: object, ratio: object) -> None:
    """Raise ``ConfigError`` unless exactly one of the two is given, and right."""
    if (count is None) == (ratio is None):
        given = "neither is" if count is None else f"both are (count={count!r}, ratio={ratio!r})"
        raise ConfigError(f"{owner} needs either count or ratio, but {given} given. Set one, for example ratio=0.25.")
    if ratio is None:
        check_whole(owner, "count", count, least=1)
    else:
        check_kept_ratio(owner, ratio)


def check_kept_ratio(owner: str, ratio: object) -> None:
    """Raise ``ConfigError`` unless ``ratio`` is a number above 0 and up to 1."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise ConfigError(f"{owner}: ratio is {ratio!r}, expected the share of patches to keep, above 0 and up to 1.")


def check_whole(owner: str, name: str, value: object, *, least: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is a whole number of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{owner}: {name} is {value!r}, expected a whole number of {least} or more.")
