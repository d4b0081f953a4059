"""Selectors that look at nothing: none, random and uniform.

Learned and attention-based pruning often fails to beat random or evenly spaced patches of the same number; a table of
selectors without these two rows says little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adallava.selection.common import Patches, Selected, check_count_or_ratio, kept_count, take


@dataclass(frozen=True)
class NoSelection:
    """Keep every patch."""

    name: ClassVar[str] = "none"
    place: ClassVar[Literal["tower"]] = "tower"
    reads_attention: ClassVar[bool] = False

    def select(self, patches: Patches, generators: Sequence[torch.Generator] | None = None) -> Selected:
        """Return the features of each image as they are. ``generators`` are not read."""
        batch, n, _ = patches.features.shape
        everything = torch.arange(n, device=patches.features.device)
        return Selected(list(patches.features), [everything] * batch)


@dataclass(frozen=True)
class Random:
    """Keep patches drawn at random without replacement, in reading order. Set count or ratio."""

    name: ClassVar[str] = "random"
    place: ClassVar[Literal["tower"]] = "tower"
    reads_attention: ClassVar[bool] = False

    count: int | None = None
    """Patches kept of each image; all of an image that has fewer."""
    ratio: float | None = None
    """Share of patches kept, rounded down, at least one patch."""

    def __post_init__(self) -> None:
        """Check the settings; raise ``ConfigError``."""
        check_count_or_ratio(self.name, self.count, self.ratio)

    def select(self, patches: Patches, generators: Sequence[torch.Generator] | None = None) -> Selected:
        """Draw patches of each image; a smaller count from an equal seed draws a subset.

        generators: one per image, each advanced by one draw, so that an image's patches depend on the seed of its own
        request and not on who shares the batch. They may live on the CPU while the features do not, so that a seed
        means the same everywhere. None: torch's global generator.
        """
        batch, n, _ = patches.features.shape
        if generators is not None and len(generators) != batch:
            raise ValueError(f"{len(generators)} generators for {batch} images, expected one per image.")
        kept = kept_count(n, self.count, self.ratio)
        sources: Sequence[torch.Generator | None] = [None] * batch if generators is None else generators
        draws = [_draw(n, kept, source) for source in sources]
        return take(patches, [draw.to(patches.features.device) for draw in draws])


@dataclass(frozen=True)
class Uniform:
    """Keep evenly spaced patches, in reading order. Set count or ratio."""

    name: ClassVar[str] = "uniform"
    place: ClassVar[Literal["tower"]] = "tower"
    reads_attention: ClassVar[bool] = False

    count: int | None = None
    """Patches kept of each image; all of an image that has fewer."""
    ratio: float | None = None
    """Share of patches kept, rounded down, at least one patch."""

    def __post_init__(self) -> None:
        """Check the settings; raise ``ConfigError``."""
        check_count_or_ratio(self.name, self.count, self.ratio)

    def select(self, patches: Patches, generators: Sequence[torch.Generator] | None = None) -> Selected:
        """Keep the same patches of every image. ``generators`` are not read."""
        batch, n, _ = patches.features.shape
        even = evenly_spaced(n, kept_count(n, self.count, self.ratio)).to(patches.features.device)
        return take(patches, [even] * batch)


def evenly_spaced(n: int, count: int) -> Tensor:
    """Return the middles of ``count`` equal stretches of 0 to n - 1, int64 [count] ascending; count is at most n."""
    # Integers, because (i + 0.5) * n / count in floating point may give an index twice.
    return (2 * torch.arange(count) + 1) * n // (2 * count)


def _draw(n: int, count: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randperm(n, generator=generator, device=device)[:count].sort().values
