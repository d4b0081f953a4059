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

import numpy as np
from numpy.typing import NDArray

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
    layers_on, unit_tokens, unit_scores, *in_part = _switched(config, *_sizes(tail), k)
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
    features = (1.0, float(len(lengths)), *_switched(config, *_sizes(_split(config, lengths, k)[1]), k))
    return Work(features, {"tokens": max(map(max, lengths)), "rows": len(lengths)})


def tail_features(
    config: AdaptiveConfig, lengths: Sequence[Sequence[int]], ks: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """Features ``TAIL`` [n, 7] of the same rows for n times their k [B], quicker than one by one."""
    tokens, scores = _sizes(_split(config, lengths, *ks)[1])
    if len(lengths) == 1:  # the common case, and a request waits while this is asked
        return _of_one_token(config)[[k for (k,) in ks]] * (1.0, 1.0, 1.0, *tokens, *scores, 1.0, 1.0)
    return np.array([(1.0, float(len(lengths)), *_switched(config, tokens, scores, k)) for k in ks])


def decode_work(config: AdaptiveConfig | None, contexts: Sequence[Sequence[int]], k: Sequence[int]) -> Work:
    """Return the work of one decoding step, with features ``DECODE``; contexts: keys each layer reads, [B][layers]."""
    prefix, tail = _split(config, contexts, k)
    layers_on, unit_keys, _, *in_part = _switched(config, *_sizes(tail), k)
    features = (
        1.0,
        float(len(contexts)),
        sum(map(sum, prefix)) + unit_keys,
        layers_on,
        0.0 if config is None else sum(k) / config.switches_per_layer,
        unit_keys,
        *in_part,
    )
    return Work(features, {"tokens": max(map(max, contexts)), "rows": len(contexts)})


def _split(
    config: AdaptiveConfig | None, lengths: Sequence[Sequence[int]], *ks: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Lengths of the prefix and of the switchable layers, checked; ks: one or several k [B]."""
    layers = {len(row) for row in lengths} if config is None else {config.num_layers}
    rows = {len(k) for k in ks}
    if not lengths or rows != {len(lengths)} or {len(row) for row in lengths} != layers:
        raise PlanError(
            f"{len(lengths)} rows with lengths for {sorted({len(row) for row in lengths})} layers and {sorted(rows)} "
            "ks do not go together. Pass a k and one length per layer for each row."
        )
    highest = 0 if config is None else config.max_k
    if min(map(min, ks)) < 0 or max(map(max, ks)) > highest:
        wrong = next(k for k in ks if not 0 <= min(k) <= max(k) <= highest)
        raise PlanError(f"k is {list(wrong)}, expected whole numbers from 0 to {highest} for this model.")
    cut = layers.pop() if config is None else config.prefix_layers
    return [list(row[:cut]) for row in lengths], [list(row[cut:]) for row in lengths]


def _sizes(tail: list[list[int]]) -> tuple[list[float], list[float]]:
    """Tokens of each row, and their squares, in the mean over the layers beyond the prefix; tail: lengths there."""
    layers = max(1, len(tail[0]))
    return [sum(row) / layers for row in tail], [sum(t * t for t in row) / layers for row in tail]


def _switched(
    config: AdaptiveConfig | None, tokens: list[float], scores: list[float], k: Sequence[int]
) -> tuple[float, ...]:
    """From "layer on" to "slice", which ``PREFILL`` and ``TAIL`` share; tokens, scores: ``_sizes``."""
    if config is None:
        return (0.0,) * 5
    of_each_k = _of_each_k(config)
    units, off, in_part, slices = zip(*(of_each_k[each] for each in k), strict=True)
    return (
        config.tail_layers * (1 - math.prod(off)),  # at least one row runs something there; rows choose apart
        sum(map(operator.mul, units, tokens)),
        sum(map(operator.mul, units, scores)),
        sum(in_part),
        sum(slices),
    )


# Asked at every request with a budget in time; the binomials of many switches are long numbers.
@functools.lru_cache
def _of_each_k(config: AdaptiveConfig) -> list[tuple[float, float, float, float]]:
    """For each k of one row, in the mean over all its plans.

    Layers' worth of switches on; share of the plans in which a given layer is off; layers with some switches on and
    some off, which are computed slice by slice; and their slices, runs of adjacent switches that are on.
    """
    total, each, layers = config.max_k, config.switches_per_layer, config.tail_layers
    found = []
    for k in range(total + 1):
        plans, off = math.comb(total, k), math.comb(total - each, k)
        in_part = slices = 0.0
        if each > 1 and k:
            whole = math.comb(total - each, k - each) if k >= each else 0
            in_part = layers * (1 - (off + whole) / plans)
            slices = layers * (each * k / total - (each - 1) * k * (k - 1) / (total * (total - 1)))
        found.append((k / each, off / plans, in_part, slices))
    return found


@functools.lru_cache
def _of_one_token(config: AdaptiveConfig) -> NDArray[np.float64]:
    """Features ``TAIL`` of one token, for each k: [k, 7]."""
    return np.array([(1.0, 1.0, *_switched(config, [1.0], [1.0], [k])) for k in range(config.max_k + 1)])
