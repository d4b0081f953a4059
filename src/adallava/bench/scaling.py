"""How time and memory grow with the prompt, the batch and the model, at whole and partial budgets, as exponents too.

Prompts are text, as in ``speed``. A point is measured in a few rounds, everything interleaved. What grows as n^p has
the exponent p: the slope of a straight line through the logarithms, here of the upper half of an axis, where what does
not grow has lost its weight.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from adallava.bench import BenchSettings
from adallava.bench.models import random_llava
from adallava.bench.speed import Sample, Suite
from adallava.bench.timing import in_rounds, set_up
from adallava.results import ResultRow, provenance

TOKENS, BATCH = 256, 1
"""What stays where another axis varies."""
SIZES = {"cpu": ("small", "mid", "large"), "cuda": ("mid", "large", "llava-1.5-7b")}
AXES: dict[str, tuple[int, ...]] = {
    "prompt tokens": (64, 128, 256, 512, 1024, 2048, 4096),
    "requests": (1, 2, 4, 8, 16),
}
WAYS = {"plain": None, "L, 75%": ("L", "75%"), "L, 50%": ("L", "50%"), "H, 75%": ("H", "75%")}
NUMBERS = ("prefill_ms", "decode_ms", "kv_bytes", "peak_bytes")


@dataclass(frozen=True)
class Point:
    """One model, one length of prompts, one batch."""

    axis: str
    at: int
    tokens: int = TOKENS
    batch: int = BATCH


def measure(settings: BenchSettings) -> list[ResultRow]:
    """One row per point and way of running it, then one per axis and way with the exponents."""
    device, dtype = set_up(settings)
    rows: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for name in dict.fromkeys((settings.model, *_sizes(settings))):
        suite = Suite(random_llava(name, device, dtype), replace(settings, model=name))
        for point in _points(suite, name == settings.model, name in _sizes(settings)):
            rows += [({"model": name, **told}, metrics) for told, metrics in _measure(suite, point, settings)]
        del suite
    origin = provenance(device=device, dtype=dtype, seed=settings.seed)
    return [ResultRow("scaling", metrics, config, origin) for config, metrics in (*rows, *_exponents(rows))]


def _sizes(settings: BenchSettings) -> tuple[str, ...]:
    """The models of the third axis; a tiny model, for tests, is alone."""
    return (settings.model,) if settings.model == "tiny" else SIZES[torch.device(settings.device).type]


def _points(suite: Suite, chosen: bool, size: bool) -> Iterator[Point]:
    if chosen:
        for at in AXES["prompt tokens"]:
            yield Point("prompt tokens", at, tokens=at)
        for at in AXES["requests"]:
            yield Point("requests", at, batch=at)
    if size:
        yield Point("parameters", sum(weight.numel() for weight in suite.base.model.language_model.parameters()))


def _measure(suite: Suite, point: Point, settings: BenchSettings) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    suite.tokens = point.tokens
    things: dict[str, Callable[[], Sample]] = {}
    for name, way in WAYS.items():
        if way is None:
            things[name] = partial(suite.plain, suite.base, point.batch)
        else:
            things[name] = suite.asking(way[0], [way[1]] * point.batch)
    told = in_rounds(
        {name: partial(_peak, thing, suite.base.device) for name, thing in things.items()}, settings.rounds
    )
    for name, samples in told.items():
        way = WAYS[name]
        # A plain cache holds what that of a plan which runs everything does.
        held = suite.filled(way or ("L", "100%"), point.batch).nbytes
        metrics: dict[str, Any] = {
            "prefill_ms": statistics.median(sample["prefill"] for sample in samples),
            "decode_ms": statistics.median(sample["decode"] for sample in samples),
            "kv_bytes": held,
            "peak_bytes": max((int(sample["peak"]) for sample in samples), default=0) or None,
            "prefill": [sample["prefill"] for sample in samples],
            "decode": [sample["decode"] for sample in samples],
        }
        config = {"axis": point.axis, "at": point.at, "tokens": point.tokens, "batch": point.batch, "way": name}
        yield config, metrics


def _peak(thing: Callable[[], Sample], device: torch.device) -> Sample:
    """A sample with the most bytes that the device had allocated meanwhile; 0 on a CPU, which does not tell."""
    if device.type != "cuda":
        return {**thing(), "peak": 0}
    torch.cuda.reset_peak_memory_stats(device)
    sample = thing()
    return {**sample, "peak": torch.cuda.max_memory_allocated(device)}


def _exponents(
    rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for axis in dict.fromkeys(config["axis"] for config, _ in rows):
        for way in WAYS:
            chosen = [(c["at"], m) for c, m in rows if (c["axis"], c["way"]) == (axis, way)]
            told = {name: exponent([(at, m[name]) for at, m in chosen if m[name]]) for name in NUMBERS}
            yield {"axis": axis, "way": way, "part": "exponents"}, {f"{n}_exponent": told[n] for n in NUMBERS}


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of log y over log x, by least squares over the upper half of the points; None for fewer than two."""
    upper = sorted(points)[-max(2, math.ceil(len(points) / 2)) :]
    if len({x for x, _ in upper}) < 2:
        return None
    x, y = np.log(np.array(upper, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])
