"""What a batch of requests makes a device do, as a few sums: the features that measured time is a linear function of.

Time is not known per plan but per k, because a budget buys k switches before any plan is decided. So what depends on
the plan (how many layers a k touches, into how many slices its heads fall) is the mean over all plans of k switches.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from adallava.config import AdaptiveConfig
from adallava.errors import PlanError

PREFILL = (
    "fixed",
    "image",
    "row",
    "token",
    "score",
    "layer on",
    "unit token",
    "unit score",
    "layer in part",
    "slice",
)
"""Vision (per image); per token and layer run, and per query-key pair; what units, which are layers beyond the prefix,
cost more than layers of the prefix do; and what is paid in any case. Of one kind of layer one number is measured."""
TAIL = ("fixed", "row", "layer on", "unit token", "unit score", "layer in part", "slice")
"""What is left of a prefill once the plan is decided: the layers beyond the prefix, the head, the choice of a token."""
DECODE = ("fixed", "row", "key", "layer on", "unit", "unit key", "layer in part", "slice")
"""The same for one step, which processes one token per row and reads the keys before it."""


@dataclass(frozen=True)
class Work:
    """What one pass over a batch has to do."""

    features: tuple[float, ...]
    """As named by ``PREFILL``, ``TAIL`` or ``DECODE``."""
    extent: dict[str, int]
    """What a user would call its size: tokens of the longest row, rows, images."""


def prefill_work(
    config: AdaptiveConfig | None, lengths: Sequence[Sequence[int]], k: Sequence[int], images: int
) -> Work:
    """Return the work of a batch that is prefilled together, with features ``PREFILL``.

    config: None for a base model, which runs everything. lengths: tokens that each layer processes, [B][layers].
    k: switches on beyond the prefix, one per row. images: pictures still to be encoded. ``PlanError`` for another
    number of rows or layers.
    """
    prefix, tail = _split(config, lengths, k)
    layers_on, unit_tokens, unit_scores, *in_part = _tail_features(config, *_sizes(tail), k)
    features = (
        1.0,
        float(images),
        float(len(lengths)),
        sum(map(sum, prefix)) + unit_tokens,
        sum(t * t for row in prefix for t in row) + unit_scores,
        layers_on,
        unit_tokens,
        unit_scores,
        *in_part,
    )
    return Work(features, {"tokens": max(map(max, lengths)), "rows": len(lengths), "images": images})


def tail_work(config: AdaptiveConfig, lengths: Sequence[Sequence[int]], k: Sequence[int]) -> Work:
    """Return what is left of the same prefill once its plan is decided, with features ``TAIL``."""
    return tail_works(config, lengths, [k])[0]


def tail_works(config: AdaptiveConfig, lengths: Sequence[Sequence[int]], ks: Sequence[Sequence[int]]) -> list[Work]:
    """``tail_work`` for several k [B] of the same rows, quicker than one by one."""
    tokens, scores = _sizes(_split(config, lengths, ks[0])[1])
    extent, rows = {"tokens": max(map(max, lengths)), "rows": len(lengths)}, float(len(lengths))
    return [Work((1.0, rows, *_tail_features(config, tokens, scores, k)), extent) for k in ks]


def _sizes(tail: list[list[int]]) -> tuple[list[float], list[float]]:
    """Tokens of each row, and their squares, in the mean over the layers beyond the prefix; tail: lengths there."""
    return [_mean(row) for row in tail], [_mean([t * t for t in row]) for row in tail]


def _tail_features(
    config: AdaptiveConfig | None, tokens: list[float], scores: list[float], k: Sequence[int]
) -> tuple[float, ...]:
    """From "layer on" to "slice", which ``PREFILL`` and ``TAIL`` share; tokens, scores: ``_sizes``."""
    units = _units(config, k)
    return (
        _layers_on(config, k),
        sum(map(operator.mul, units, tokens)),
        sum(map(operator.mul, units, scores)),
        sum(_layers_in_part(config, each) for each in k),
        sum(_slices(config, each) for each in k),
    )


def decode_work(config: AdaptiveConfig | None, contexts: Sequence[Sequence[int]], k: Sequence[int]) -> Work:
    """Return the work of one decoding step, with features ``DECODE``; contexts: keys each layer reads, [B][layers]."""
    prefix, tail = _split(config, contexts, k)
    units = _units(config, k)
    unit_keys = sum(u * _mean(row) for u, row in zip(units, tail, strict=True))
    features = (
        1.0,
        float(len(contexts)),
        sum(map(sum, prefix)) + unit_keys,
        _layers_on(config, k),
        sum(units),
        unit_keys,
        sum(_layers_in_part(config, each) for each in k),
        sum(_slices(config, each) for each in k),
    )
    return Work(features, {"tokens": max(map(max, contexts)), "rows": len(contexts)})


def _split(
    config: AdaptiveConfig | None, lengths: Sequence[Sequence[int]], k: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Lengths of the prefix and of the switchable layers, checked."""
    layers = {len(row) for row in lengths} if config is None else {config.num_layers}
    if not lengths or len(k) != len(lengths) or {len(row) for row in lengths} != layers:
        raise PlanError(
            f"{len(lengths)} rows with lengths for {sorted({len(row) for row in lengths})} layers and {len(k)} ks do "
            "not go together. Pass a k and one length per layer for each row."
        )
    highest = 0 if config is None else config.max_k
    if not all(0 <= each <= highest for each in k):
        raise PlanError(f"k is {list(k)}, expected whole numbers from 0 to {highest} for this model.")
    cut = layers.pop() if config is None else config.prefix_layers
    return [list(row[:cut]) for row in lengths], [list(row[cut:]) for row in lengths]


def _units(config: AdaptiveConfig | None, k: Sequence[int]) -> list[float]:
    """Layers' worth of switches on beyond the prefix, per row."""
    return [0.0] * len(k) if config is None else [each / config.switches_per_layer for each in k]


def _layers_on(config: AdaptiveConfig | None, k: Sequence[int]) -> float:
    """Switchable layers in which at least one row has a switch on: the mean over plans drawn evenly, row by row."""
    if config is None:
        return 0.0
    return config.tail_layers * (1 - math.prod(_layer_off(config, each) for each in k))


# Asked for every k of every request with a budget in time; the binomials of many switches are long numbers.
@functools.lru_cache(maxsize=4096)
def _layer_off(config: AdaptiveConfig, k: int) -> float:
    """Share of the plans of k switches that leave a given layer off."""
    total, each = config.max_k, config.switches_per_layer
    return math.comb(total - each, k) / math.comb(total, k)


@functools.lru_cache(maxsize=4096)
def _layers_in_part(config: AdaptiveConfig | None, k: int) -> float:
    """Layers with some switches on and some off, which are computed slice by slice: the mean over plans of k."""
    if config is None or config.switches_per_layer == 1:
        return 0.0
    total, each = config.max_k, config.switches_per_layer
    none, whole = math.comb(total - each, k), math.comb(total - each, k - each) if k >= each else 0
    return config.tail_layers * (1 - (none + whole) / math.comb(total, k))


def _slices(config: AdaptiveConfig | None, k: int) -> float:
    """Runs of adjacent switches that are on, over all switchable layers: the mean over plans of k switches."""
    if config is None or config.switches_per_layer == 1 or not k:
        return 0.0
    total, each = config.max_k, config.switches_per_layer
    together = k * (k - 1) / (total * (total - 1))
    return config.tail_layers * (each * k / total - (each - 1) * together)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
