"""The budgets of a batch: what each request's budget buys, for the length that its own prompt has in each layer.

A share and an amount of FLOPs buy each request its own k. Milliseconds are different: a batch ends its prefill
together, so all its requests with a budget in time get one k, the largest that keeps every one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adallava.budget import Budget, Forecast, ResolvedBudget
from adallava.config import AdaptiveConfig
from adallava.cost import ModelSpec, resolve_budget
from adallava.cost.forecast import Forecaster
from adallava.cost.work import Work, decode_work, prefill_work
from adallava.errors import BudgetError
from adallava.hosts.answer import Timing
from adallava.hosts.visual import Selector


@dataclass(frozen=True)
class Batch:
    """Requests between their call and their first token."""

    lengths: list[list[int]]
    """Tokens that each layer will process, [B][layers], latency tokens included."""
    images: int = 0
    """Pictures still to be encoded."""
    elapsed_ms: float = 0.0
    """Time since the call."""
    new_tokens: int = 1
    """Of each answer, at most."""

    @property
    def last_lengths(self) -> list[list[int]]:
        """Keys that the last step of the longest answers reads."""
        return [[tokens + self.new_tokens - 1 for tokens in row] for row in self.lengths]


def resolve_budgets(
    budgets: Sequence[Budget],
    config: AdaptiveConfig | None,
    spec: ModelSpec,
    batch: Batch,
    forecaster: Forecaster | None = None,
) -> list[ResolvedBudget | None]:
    """What each budget buys; None for a base model (``config`` None). ``BudgetError`` names what is below its minimum.

    forecaster: needed for budgets in milliseconds.
    """
    resolved = [
        None if budget.timed else resolve_budget(budget, config, spec, row)
        for budget, row in zip(budgets, batch.lengths, strict=True)
    ]
    timed = [row for row, budget in enumerate(budgets) if budget.timed]
    if not timed:
        return resolved
    assert forecaster is not None, "a timed budget is refused where there is no profile"
    clock = _Clock(config, batch, [one.k if one else 0 for one in resolved], timed, forecaster)
    k = _largest_k(clock, [budgets[row] for row in timed])
    if config is not None:
        total, prefix = config.total_switches, config.prefix_switches
        for row in timed:
            resolved[row] = ResolvedBudget(budgets[row], k, prefix, total, _promise(budgets[row], clock, k))
    return resolved


def work_done(
    config: AdaptiveConfig | None, batch: Batch, k: Sequence[int], timing: Timing
) -> tuple[Work, Work | None]:
    """What a batch with k [B] switches per row did: its prefill, and its mean decoding step where it had any."""
    middle = [[tokens + timing.new_tokens // 2 for tokens in row] for row in batch.lengths]
    prefill = prefill_work(config, batch.lengths, k, batch.images)
    return prefill, decode_work(config, middle, k) if timing.ms_per_token is not None else None


def prompt_lengths(
    model: Any, layers: int, inputs: dict[str, Any], selector: Selector, latency: int
) -> list[list[int]]:
    """Tokens that each layer will process, [B][layers], before any is ranked.

    How many tokens a selector inside the decoder drops is known from how many there are; one that does not say it
    (``kept``) is taken to drop none, so that a budget holds in any case. latency: latency tokens of a prompt.
    """
    totals = (inputs["attention_mask"].sum(-1) + latency).tolist()
    count = getattr(selector, "kept", None)
    if selector.place != "decoder" or count is None:
        return [[total] * layers for total in totals]
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(-1)
    dropped = (visual - count(visual)).tolist()
    return [[t] * selector.layer + [t - d] * (layers - selector.layer) for t, d in zip(totals, dropped, strict=True)]


@dataclass(frozen=True)
class _Clock:
    """How long a batch takes if all its timed rows get k switches."""

    config: AdaptiveConfig | None
    batch: Batch
    fixed: list[int]
    timed: list[int]
    forecaster: Forecaster

    def work(self, budget: Budget, k: int) -> Work:
        ks = [k if row in self.timed else other for row, other in enumerate(self.fixed)]
        if budget.unit == "ms":
            return prefill_work(self.config, self.batch.lengths, ks, self.batch.images)
        return decode_work(self.config, self.batch.last_lengths, ks)

    def forecast(self, budget: Budget, k: int) -> Forecast:
        work = self.work(budget, k)
        if budget.unit == "ms":
            return self.forecaster.prefill(work, self.batch.elapsed_ms)
        return self.forecaster.decode(work)

    def plain_ms(self, budget: Budget, k: int) -> float:
        """The bound on a device as busy as when it was measured."""
        work = self.work(budget, k)
        if budget.unit == "ms":
            return self.forecaster.plain_ms("prefill", work) + self.batch.elapsed_ms
        return self.forecaster.plain_ms("decode", work)


def _largest_k(clock: _Clock, budgets: Sequence[Budget]) -> int:
    """The largest k with which every budget holds.

    Where the device is busier than it was measured, so that even k = 0 is not sure to hold, k = 0: it is the best that
    can be done, and how long it takes shows when the device is free again.
    """
    highest = clock.config.max_k if clock.config is not None else 0
    for k in range(highest, -1, -1):
        if all(clock.forecast(budget, k).upper_ms <= budget.ms for budget in budgets):
            return k
    for budget in budgets:
        least = clock.plain_ms(budget, 0)
        if least > budget.ms:
            raise _infeasible(budget, least, clock)
    return 0


def _promise(budget: Budget, clock: _Clock, k: int) -> Forecast:
    """The forecast with k, with a remark where it is no promise."""
    forecast = clock.forecast(budget, k)
    if forecast.upper_ms <= budget.ms:
        return forecast
    remarks = [text for text in (forecast.remark, "the budget may be exceeded") if text]
    return replace(forecast, remark="; ".join(remarks))


def _infeasible(budget: Budget, least: float, clock: _Clock) -> BudgetError:
    config, batch = clock.config, clock.batch
    why = "a base model always runs whole"
    if config is not None:
        why = f"{config.prefix_layers} of {config.num_layers} layers always run"
    rows = len(batch.lengths)
    together = f"{rows} requests together, " if rows > 1 else ""
    need = f"{_rounded_up(least)} {budget.unit}"
    return BudgetError(
        f"budget {budget} is infeasible: the minimum on this device for this input is {need} ({why}; {together}"
        f"{max(map(max, batch.lengths))} tokens). Ask for at least '{need}', or for a share such as '60%'."
    )


def _rounded_up(ms: float) -> str:
    """Two digits, so that asking for them is enough although no two requests are prepared in quite the same time."""
    step = 10.0 ** (math.floor(math.log10(ms)) - 1)
    return f"{math.ceil(ms / step) * step:.{max(0, -round(math.log10(step)))}f}"
