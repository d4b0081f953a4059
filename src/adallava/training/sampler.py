"""The order of samples: batches of about equal length, each with images or without, as LLaVA trains.

A batch that mixes a page of text with one line is mostly padding; one without any image lets the vision tower rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_BATCHES_SORTED = 50
"""How many batches are drawn together and then sorted by length; few enough that order stays random."""


class LengthGroupedSampler(Sampler[int]):
    """Every index once per epoch, in groups of ``batch_size`` with similar ``abs(length)`` and the same sign.

    lengths: one per sample, negative for samples without images. batch_size: samples of one step of all devices.
    Groups that are left over at the end of a kind are joined, so at most one batch mixes both kinds. The order is
    a function of seed and epoch alone.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch; Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        whole: list[list[int]] = []
        rest: list[int] = []
        for keep in (lambda length: length >= 0, lambda length: length < 0):
            groups = self._groups([i for i, length in enumerate(self.lengths) if keep(length)], generator)
            if groups and len(groups[-1]) < self.batch_size:
                rest += groups.pop()
            whole += groups
        for number in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[number]
        yield from rest

    def _groups(self, indices: list[int], generator: torch.Generator) -> list[list[int]]:
        """Shuffle, sort within chunks, and cut into batches; only the last one may be short."""
        shuffled = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
        chunk = self.batch_size * _BATCHES_SORTED
        ordered: list[int] = []
        for start in range(0, len(shuffled), chunk):
            ordered += sorted(shuffled[start : start + chunk], key=lambda i: abs(self.lengths[i]), reverse=True)
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
