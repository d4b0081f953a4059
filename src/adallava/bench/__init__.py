"""Measured time: what plans and selected tokens save on this machine, as result rows.

A benchmark is a function ``(settings) -> rows``, registered by name with a lazy target, which ``adallava bench NAME``
runs. Everything that is compared runs in one process, interleaved, and is told as medians.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adallava.errors import ConfigError
from adallava.registry import Registry
from adallava.results import ResultRow


@dataclass(frozen=True)
class BenchSettings:
    """How to measure: ``rounds`` in each of which everything runs once, in random order."""

    model: str = "mid"
    """A name of ``adallava.bench.models``: random weights, nothing is downloaded; "latency" takes a checkpoint too."""
    rounds: int = 15
    threads: int = 2
    """CPU threads of torch."""
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values; raise ``ConfigError``."""
        for name, least in (("rounds", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}, expected a whole number of {least} or more.")


Benchmark = Callable[[BenchSettings], list[ResultRow]]
BENCHMARKS: Registry[Benchmark] = Registry("benchmark")
BENCHMARKS.register("selection", "adallava.bench.selection:measure")
BENCHMARKS.register("latency", "adallava.bench.latency:measure")
BENCHMARKS.register("speed", "adallava.bench.speed:measure")
BENCHMARKS.register("paper", "adallava.bench.paper:measure")
BENCHMARKS.register("quantized", "adallava.bench.quantized:measure")
BENCHMARKS.register("scaling", "adallava.bench.scaling:measure")
BENCHMARKS.register("load", "adallava.bench.load:measure")
BENCHMARKS.register("soak", "adallava.bench.soak:measure")
