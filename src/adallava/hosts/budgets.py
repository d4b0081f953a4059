"""The budgets of a batch: what each request's budget buys, for the length that its own prompt has in each layer.

A share and an amount of FLOPs buy each request its own k. Milliseconds are different: a batch ends its prefill
together, so all its requests with a budget in time get one k, the largest that keeps every one of them.

What they get is looked at twice. Before the prefill it is told whether the budget can be kept, and what the latency
token is to say. When the prefix has run and the plan is decided, most of the time is not a forecast any more: it has
gone by. So what a quick prefix left over is spent, and what a slow one took too much is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adallava.budget import Budget, Forecast, ResolvedBudget
from adallava.config import AdaptiveConfig
from adallava.cost import ModelSpec, resolve_budget
from adallava.cost.calibration import Measured, Measurement
from adallava.cost.forecast import Forecaster
from adallava.cost.work import Work, decode_work, prefill_work, tail_work
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
    *,
    again: bool = True,
) -> list[ResolvedBudget | None]:
    """What each budget buys; None for a base model (``config`` None). ``BudgetError`` names what is below its minimum.

    forecaster: needed for budgets in milliseconds. again: there will be a ``SecondLook``, so that k need not be sure.
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
    k = _first_k(clock, [budgets[row] for row in timed], again)
    if config is not None:
        total, prefix = config.total_switches, config.prefix_switches
        for row in timed:
            resolved[row] = ResolvedBudget(budgets[row], k, prefix, total, _promise(budgets[row], clock, k))
    return resolved


class SecondLook:
    """What a request's state asks when the prefix has run: k again, from the time that is left then.

    resolved: what the first look gave each row; the second's once it was asked. forecaster: None where no budget is in
    time. decided_ms: notes that the prefix has run, and tells the time since the call.
    """

    def __init__(
        self,
        resolved: Sequence[ResolvedBudget | None],
        config: AdaptiveConfig,
        batch: Batch,
        forecaster: Forecaster | None,
        decided_ms: Callable[[], float],
    ) -> None:
        self.resolved = list(resolved)
        self._config, self._batch, self._forecaster, self._decided_ms = config, batch, forecaster, decided_ms

    def __call__(self, k: Sequence[int]) -> list[int]:
        """The k of each row: another one where it had a budget in time to the first token, which buys it now."""
        passed_ms = self._decided_ms()
        budgets = {row: one.budget for row, one in enumerate(self.resolved) if one is not None and one.budget.timed}
        forecaster = self._forecaster
        if forecaster is None or not _two_looks(forecaster, budgets.values()):
            return list(k)
        clock = _Clock(self._config, self._batch, list(k), list(budgets), forecaster, passed_ms)
        most = clock.largest_k(list(budgets.values())) or 0
        for row, budget in budgets.items():
            found = self.resolved[row]
            assert found is not None
            self.resolved[row] = replace(found, k=most, forecast=_promise(budget, clock, most))
        return [most if row in budgets else each for row, each in enumerate(k)]


def measured_of(config: AdaptiveConfig | None, batch: Batch, k: Sequence[int], timing: Timing) -> Measured:
    """What a batch with k [B] switches per row did, and took."""
    prefill = prefill_work(config, batch.lengths, k, batch.images)
    tail = decode = None
    if config is not None and timing.decided_ms is not None:
        tail = Measurement(tail_work(config, batch.lengths, k), timing.first_token_ms - timing.decided_ms)
    if timing.ms_per_token is not None:
        middle = [[tokens + timing.new_tokens // 2 for tokens in row] for row in batch.lengths]
        decode = Measurement(decode_work(config, middle, k), timing.ms_per_token)
    return Measured(Measurement(prefill, timing.first_token_ms - timing.selection_ms), tail, decode)


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
    """How long a batch takes if all its timed rows get k switches.

    decided_ms: when the prefix had run; None before.
    """

    config: AdaptiveConfig | None
    batch: Batch
    fixed: list[int]
    timed: list[int]
    forecaster: Forecaster
    decided_ms: float | None = None

    def _ks(self, k: int) -> list[int]:
        return [k if row in self.timed else other for row, other in enumerate(self.fixed)]

    def _prefill_work(self, k: int) -> Work:
        return prefill_work(self.config, self.batch.lengths, self._ks(k), self.batch.images)

    def _decode_work(self, k: int) -> Work:
        return decode_work(self.config, self.batch.last_lengths, self._ks(k))

    def forecast(self, budget: Budget, k: int) -> Forecast:
        if budget.unit == "ms":
            return self._tail(k, self.decided_ms) if self.decided_ms is not None else self._prefill(k)
        return self.forecaster.decode(self._decode_work(k))

    def remark(self, budget: Budget, k: int) -> str | None:
        """What is unusual about the request or the device; of the whole prefill, also when most of it is over."""
        return (self._prefill(k) if budget.unit == "ms" else self.forecast(budget, k)).remark

    def _prefill(self, k: int) -> Forecast:
        return self.forecaster.prefill(self._prefill_work(k), self.batch.elapsed_ms)

    def _tail(self, k: int, decided_ms: float) -> Forecast:
        assert self.config is not None, "a base model decides no plan"
        return self.forecaster.tail(tail_work(self.config, self.batch.lengths, self._ks(k)), decided_ms)

    def expected_at_decision(self) -> _Clock:
        """This clock when the prefix will have run, as far as it is known."""
        left = self._tail(0, 0.0).ms
        return replace(self, decided_ms=max(self.batch.elapsed_ms, self._prefill(0).ms - left))

    def plain_ms(self, budget: Budget, k: int) -> float:
        """The bound on a device as busy as when it was measured."""
        if budget.unit == "ms":
            return self.forecaster.plain_ms("prefill", self._prefill_work(k)) + self.batch.elapsed_ms
        return self.forecaster.plain_ms("decode", self._decode_work(k))

    def largest_k(self, budgets: Sequence[Budget]) -> int | None:
        """The largest k with which every budget holds; None where not even 0 is sure to."""
        highest = self.config.max_k if self.config is not None else 0
        fitting = (
            k
            for k in range(highest, -1, -1)
            if all(self.forecast(budget, k).upper_ms <= budget.ms for budget in budgets)
        )
        return next(fitting, None)


def _first_k(clock: _Clock, budgets: Sequence[Budget], again: bool) -> int:
    """The k that will be right when the plan is decided, as far as it is known; what cannot be kept is told.

    Where the device is busier than it was measured, so that even k = 0 is not sure to hold, k = 0: it is the best that
    can be done, and how long it takes shows when the device is free again.
    """
    sure = clock.largest_k(budgets)
    if sure is None:
        for budget in budgets:
            least = clock.plain_ms(budget, 0)
            if least > budget.ms:
                raise _infeasible(budget, least, clock)
    if not again or clock.config is None or not _two_looks(clock.forecaster, budgets):
        return sure or 0
    return max(sure or 0, clock.expected_at_decision().largest_k(budgets) or 0)


def _two_looks(forecaster: Forecaster, budgets: Iterable[Budget]) -> bool:
    """Whether there is anything to be seen when the plan is decided."""
    return forecaster.profile.tail is not None and any(budget.unit == "ms" for budget in budgets)


def _promise(budget: Budget, clock: _Clock, k: int) -> Forecast:
    """The forecast with k, with a remark where it is no promise."""
    forecast = clock.forecast(budget, k)
    remarks = [clock.remark(budget, k), "the budget may be exceeded" if forecast.upper_ms > budget.ms else None]
    return replace(forecast, remark="; ".join(filter(None, remarks)) or None)


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
