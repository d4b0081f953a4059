"""PruMerge and PruMerge+ (Shang et al. 2024, arXiv:2403.15388): keep the patches CLS looks at, merge the others in.

CLS looks at few patches. PruMerge keeps those whose attention is an upward outlier by the interquartile rule, adds to
each the patches with the most similar keys, weighted by their attention, and puts the sum of all dropped patches,
weighted alike, at the end. PruMerge+ also keeps a grid over the whole image.

Values and choices are those of the released code on one image of 576 patches, because checkpoints were trained with
them, oddities included: the kept patches come in the order of their attention, merging adds and does not average,
attention is that of undivided heads with a softmax that includes CLS, and the grid of PruMerge+ never reaches the last
patch. Where the released code fails, this one does not: any number of patches; every image of a batch has its own
count; no patch is kept twice; an image without outliers keeps the patch with the most attention; and where nothing
would be dropped, nothing is merged either and the features come back as they were.

Everything is differentiable in features and attention, though not in what is kept. Towers are usually frozen: call it
under ``torch.no_grad()`` then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from adallava.errors import ConfigError
from adallava.selection.common import Patches, Selected, check_kept_ratio, check_whole, floor, kept_count, wide


@dataclass(frozen=True)
class PruMerge:
    """Keep the outliers of CLS attention and merge the other patches into them."""

    name: ClassVar[str] = "prumerge"
    place: ClassVar[Literal["tower"]] = "tower"
    reads_attention: ClassVar[bool] = True

    ratio: float | None = None
    """Share of patches kept for their attention, the same in every image; None: the outliers of each image."""
    neighbours: int = 32
    """Patches with the most similar keys that are merged into each kept patch."""

    def __post_init__(self) -> None:
        """Check the settings; raise ``ConfigError``."""
        if self.ratio is not None:
            check_kept_ratio(self.name, self.ratio)
        check_whole(self.name, "neighbours", self.neighbours, least=0)

    def select(self, patches: Patches, generators: Sequence[torch.Generator] | None = None) -> Selected:
        """Select tokens of each image: its kept patches, then one token that stands for all dropped ones.

        patches: with ``key``, and ``query`` or ``cls_attention``, of the tower's last layer; raises ``ValueError``
        without. LLaVA's features are the input of that layer. ``generators`` are not read.
        """
        if patches.key is None or (patches.query is None and patches.cls_attention is None):
            given = [name for name in ("key", "query", "cls_attention") if getattr(patches, name) is not None]
            raise ValueError(
                f"{self.name} needs key, and query or cls_attention, but the patches have "
                f"{' and '.join(given) or 'neither'}. Record k_proj and q_proj of the tower's last layer."
            )
        # Image by image, so that no number depends on who shares the batch; without autocast, whose half precision
        # would decide close choices by rounding.
        with torch.autocast(patches.features.device.type, enabled=False):
            pairs = [self._one(patches, image) for image in range(len(patches.features))]
        return Selected([features for features, _ in pairs], [kept for _, kept in pairs])

    def _one(self, patches: Patches, image: int) -> tuple[Tensor, Tensor]:
        assert patches.key is not None
        features, key = patches.features[image], patches.key[image]
        if patches.query is not None:
            attention = cls_attention(patches.query[image], key)
        else:
            assert patches.cls_attention is not None
            attention = patches.cls_attention[image]
        kept = self._kept(attention)
        if len(kept) == len(features):
            return features, torch.arange(len(features), device=features.device)
        return merge(features, key[-len(features) :], attention, kept, self.neighbours), kept

    def _kept(self, attention: Tensor) -> Tensor:
        return top_patches(attention, self.ratio)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge that keeps an even grid of patches besides, denser where more patches are outliers."""

    name: ClassVar[str] = "prumerge+"

    whole_grid: bool = False
    """Let the grid reach the last patch. The released code and checkpoints trained with it leave that one out."""

    def __post_init__(self) -> None:
        """Check the settings; raise ``ConfigError``."""
        super().__post_init__()
        if not isinstance(self.whole_grid, bool):
            raise ConfigError(f"{self.name}: whole_grid is {self.whole_grid!r}, expected True or False.")

    def _kept(self, attention: Tensor) -> Tensor:
        return add_grid(super()._kept(attention), len(attention), self.ratio, whole=self.whole_grid)


def cls_attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention of CLS to the patches: [N], float32 or wider; it sums to 1 less the attention of CLS to itself.

    query, key: [1+N, D], CLS first; heads are not told apart. Only the row of CLS is computed, never [N, N].
    """
    scores = wide(key) @ wide(query[0]) * key.shape[-1] ** -0.5
    return scores.softmax(0)[1:]


def count_outliers(attention: Tensor) -> int:
    """Count the patches above Q3 + 1.5 (Q3 - Q1) of attention [N], quartiles by linear interpolation."""
    attention = wide(attention)
    low, high = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    return int((attention > high + 1.5 * (high - low)).sum())


def top_patches(attention: Tensor, ratio: float | None = None) -> Tensor:
    """Patches with the most attention: int64 [K], most first, ties to the lower index.

    attention: [N]. ratio: K as a share of N, rounded down; None: as many as there are outliers; at least one.
    """
    count = kept_count(len(attention), count_outliers(attention) if ratio is None else None, ratio)
    return wide(attention).sort(descending=True, stable=True).indices[:count]


def add_grid(top: Tensor, n: int, ratio: float | None = None, *, whole: bool = False) -> Tensor:
    """Add to ``top``, int64 [K], the patches of an even grid over n that are not in it, ascending: int64 [K + G].

    ratio: as given to ``top_patches``. Without it the grid is three times as dense as K patches evenly spread; with it
    just as dense, and starting half a step in, which the released code does in training.
    whole: let the grid reach patch n - 1.
    """
    if ratio is None:
        start, step = 0, max(1, n // len(top) // 3)
    else:
        step = floor(1 / ratio)
        start = step // 2
    grid = torch.arange(n if whole else n - 1, device=top.device)[start::step]
    return torch.cat((top, grid[~torch.isin(grid, top)]))


def merge(features: Tensor, key: Tensor, attention: Tensor, kept: Tensor, neighbours: int = 32) -> Tensor:
    """Merge patches into the kept ones: [K + 1, C] in the features' dtype, computed in float32 or wider.

    features: [N, C]. key: [N, D]. attention: [N]. kept: int64 [K], no patch twice.
    Token i < K is x_i + sum_j a_j x_j over the ``neighbours`` patches j, kept or not, whose keys have the largest
    cosine similarity to that of i; token K is sum_j a_j x_j over the patches that are not kept.
    """
    x, weight = wide(features), wide(attention)
    unit = functional.normalize(wide(key.detach()), dim=-1)
    similarity = unit[kept] @ unit.T  # [K, N]
    similarity.scatter_(1, kept[:, None], float("-inf"))
    # At most N - 1, or a patch would become its own neighbour.
    nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, : min(neighbours, len(x) - 1)]
    # Weights as a matrix: gathered neighbours would take [K, neighbours, C].
    merged = torch.zeros_like(similarity).scatter(1, nearest, weight[nearest])  # [K, N]
    rest = weight.index_fill(0, kept, 0.0)  # [N]
    tokens = torch.cat((x[kept], torch.zeros_like(x[:1]))) + torch.cat((merged, rest[None])) @ x
    return tokens.to(features.dtype)
