"""Times of several things side by side: interleaved in random order, after a warm-up, told as medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of one thing, one per round."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.ms)

    def ratio(self, other: Times) -> float:
        """Median over rounds of this time over the other's in the same round: what slows a round slows both."""
        return statistics.median(a / b for a, b in zip(self.ms, other.ms, strict=True))


def interleaved(
    things: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, Times]:
    """Run everything once per round, in an order drawn anew, after one round that is not counted."""
    rng = random.Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in things}
    for number in range(rounds + 1):
        for name in rng.sample(list(things), len(things)):
            started = now(device)
            things[name]()
            if number > 0:
                taken[name].append(1e3 * (now(device) - started))
    return {name: Times(tuple(ms)) for name, ms in taken.items()}


def now(device: torch.device) -> float:
    """Seconds on the clock when all work given to ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
