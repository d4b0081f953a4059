"""Times of several things side by side: interleaved in random order, after a warm-up, told as medians."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from adallava.bench import BenchSettings
from adallava.hosts.answer import device_now
from adallava.hosts.memory import keep_memory


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


def set_up(settings: BenchSettings) -> tuple[torch.device, torch.dtype]:
    """Make this process ready to measure; returns the device, and float32 on a CPU, bfloat16 elsewhere."""
    keep_memory()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


Result = TypeVar("Result")


def in_rounds(things: Mapping[str, Callable[[], Result]], rounds: int, seed: int = 0) -> dict[str, list[Result]]:
    """Run everything once per round, in an order drawn anew; what each returned, but for a first round to warm up."""
    rng = random.Random(seed)
    told: dict[str, list[Result]] = {name: [] for name in things}
    for number in range(rounds + 1):
        for name in rng.sample(list(things), len(things)):
            result = things[name]()
            if number > 0:
                told[name].append(result)
    return told


def interleaved(
    things: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, seed: int = 0
) -> dict[str, Times]:
    """Time everything once per round, see ``in_rounds``."""

    def timed(thing: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            started = device_now(device)
            thing()
            return 1e3 * (device_now(device) - started)

        return run

    told = in_rounds({name: timed(thing) for name, thing in things.items()}, rounds, seed)
    return {name: Times(tuple(ms)) for name, ms in told.items()}
