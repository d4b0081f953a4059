"""Answers: the cost of a plan as one small value, and of a whole generation.

A ``Cost`` names its convention, because FLOPs counted in different ways must not be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from adallava.cost.flops import (
    CONVENTION,
    Tokens,
    decode_step_flops,
    footprint_bytes,
    prefill_flops,
)
from adallava.cost.load import PlanLike, as_loads, full_loads
from adallava.cost.spec import CostError, ModelSpec


@dataclass(frozen=True)
class Cost:
    """What one plan costs for one prompt, beside the base model that sees all of the prompt."""

    prefill_flops: float
    """FLOPs of the prefill."""
    base_prefill_flops: float
    """FLOPs of the prefill with everything on and every token kept."""
    decode_flops_per_token: float
    """FLOPs of the first decoding step; each further position adds a little."""
    convention: str = CONVENTION
    """How FLOPs were counted: "paper" is the convention of ``adallava.cost.flops``."""

    @property
    def frac(self) -> float:
        """Share of the base model's prefill FLOPs."""
        return self.prefill_flops / self.base_prefill_flops


@dataclass(frozen=True)
class GenerationCost:
    """What one answer costs, in the paper's convention."""

    flops: float
    """FLOPs of the prefill and all decoding steps."""
    prefill_flops: float
    """FLOPs of the prefill alone."""
    new_tokens: int
    """Tokens of the answer."""
    footprint_sum_bytes: float
    """Sum of the footprints of all passes, which released results call "memory_consumption"; it is not a peak."""
    peak_footprint_bytes: float
    """Largest footprint of a pass."""
    convention: str = CONVENTION
    """How FLOPs were counted."""

    @property
    def avg_flops(self) -> float:
        """FLOPs per token of the answer."""
        return self.flops / self.new_tokens


def plan_cost(spec: ModelSpec, heads_on: PlanLike, tokens: Tokens, base_tokens: int | None = None) -> Cost:
    """Return what a plan costs for a prompt of ``tokens`` positions, batch 1 (paper convention).

    heads_on: heads on in each layer, 0 for a layer that is skipped; or loads, as from ``plan_loads``.
    tokens: prompt length, visual and latency tokens included, or one length per layer where tokens are dropped inside.
    base_tokens: prompt length of the base model, where token selection made ``tokens`` fewer.
    Raises ``PlanError`` for a plan of another model and ``CostError`` for a length below 1.
    """
    loads = as_loads(spec, heads_on)
    return Cost(
        prefill_flops=prefill_flops(spec, loads, tokens),
        base_prefill_flops=prefill_flops(spec, full_loads(spec), tokens if base_tokens is None else base_tokens),
        decode_flops_per_token=decode_step_flops(spec, loads, tokens),
    )


def generate(spec: ModelSpec, plan: PlanLike, tokens: Tokens, new_tokens: int, *, batch: int = 1) -> GenerationCost:
    """Return the cost of an answer of ``new_tokens`` tokens to a prompt of ``tokens`` (paper convention).

    The prefill gives the first token; each further one takes a step over ``tokens``, ``tokens`` + 1, ... positions.
    The paper's count is kept: a step is charged the positions before its own token.
    Raises ``PlanError`` and ``CostError`` as ``flops.prefill``, and ``CostError`` for less than one new token.
    """
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 1:
        raise CostError(f"new_tokens is {new_tokens!r}, expected a whole number of 1 or more.")
    loads = as_loads(spec, plan)
    first = prefill_flops(spec, loads, tokens, batch=batch)
    footprints = [footprint_bytes(spec, loads, tokens, batch=batch)]
    flops = first
    for step in range(new_tokens - 1):
        length = tokens + step if isinstance(tokens, int) else [layer + step for layer in tokens]
        flops += decode_step_flops(spec, loads, length, batch=batch)
        footprints.append(footprint_bytes(spec, loads, length, stage="decode", batch=batch))
    return GenerationCost(flops, first, new_tokens, sum(footprints), max(footprints))
