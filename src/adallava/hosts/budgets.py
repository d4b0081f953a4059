"""The budgets of a batch: what each request's budget buys, for the length that its own prompt has in each layer.

A share and an amount of FLOPs buy each request its own k. Milliseconds are different: a batch ends its prefill
together, so all its requests with a budget in time get one k, the largest that can keep every one of them.

What they get is looked at several times. Before the prefill it is told whether the budget can be kept, and what the
latency token is to say. When the prefix has run and the plan is decided, most of the time is not a forecast any more:
it has gone by. On a CPU, where reading the clock costs nothing, a single one is asked about before every layer too, so
that a layer that took long is made up for by those to come, and time that was left over is spent. Elsewhere the clock
can only be read when everything before it is done, so once has to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch

from adallava.budget import Budget, Forecast, ResolvedBudget
from adallava.config import AdaptiveConfig
from adallava.cost import ModelSpec, resolve_budget
from adallava.cost.calibration import Measured, Measurement
from adallava.cost.forecast import Forecaster, Tails
from adallava.cost.work import Work, decode_work, prefill_work, tail_features, tail_work
from adallava.errors import BudgetError
from adallava.hosts.answer import Stopwatch, Timing
from adallava.hosts.visual import Selector
from adallava.scheduling.scheduler import Mode

Often = Literal["once", "twice", "each layer"]
"""How often budgets in time are looked at: before the prefill, at the decision too, before every layer after it too."""


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


class Looks:
    """What the budgets of a batch buy: ``resolved``, first looked at when this is made, and by calls as time goes by.

    config: None for a base model, which runs everything. forecaster: needed for budgets in milliseconds. watch: needed
    for the looks after the first. often: how many there are. Raises ``BudgetError`` for what is below its minimum.
    """

    def __init__(
        self,
        budgets: Sequence[Budget],
        config: AdaptiveConfig | None,
        spec: ModelSpec,
        batch: Batch,
        forecaster: Forecaster | None = None,
        watch: Stopwatch | None = None,
        *,
        often: Often = "once",
    ) -> None:
        self.resolved: list[ResolvedBudget | None] = [
            None if budget.timed else resolve_budget(budget, config, spec, row)
            for budget, row in zip(budgets, batch.lengths, strict=True)
        ]
        self._config, self._batch, self._watch, self._often = config, batch, watch, often
        self._timed = {row: budget for row, budget in enumerate(budgets) if budget.timed}
        self._limits = {unit: self._least(unit) for unit in ("ms", "ms/token")}
        self._of_unit = {budget.unit: budget for budget in self._timed.values()}
        self._others = [one.k if one else 0 for one in self.resolved]
        self._tails = dict[tuple[int, ...], Tails]()
        self._decided_ms = self._deciding_ms = 0.0
        if not self._timed:
            return
        assert forecaster is not None, "a timed budget is refused where there is no profile"
        self._forecaster = forecaster
        self._most = self._most_by_token()
        self._k, foretold = self._first()
        self._tell(foretold)

    @property
    def each_layer(self) -> bool:
        """Whether there is a look before each layer beyond the prefix.

        Rows with budgets in time get one k, but run it in layers of their own, so that several of them would have to
        come down to different ones: their last look is at the decision.
        """
        return self._again and self._often == "each layer" and len(self._timed) == 1

    def __call__(self, layer: int, left: list[int]) -> list[int]:
        """How many switches each row may still run: more than ``left``, or less, only with a budget in time."""
        config, watch = self._config, self._watch
        assert config is not None and watch is not None, "only a plan that is decided is looked at again"
        decided = layer == config.prefix_layers
        passed_ms = watch.decided() if decided else 0.0
        if not self._again:
            return left
        if decided:
            self._decided_ms = passed_ms
        else:
            # What comes after a decision is foretold with the time that it takes, which is over by now.
            passed_ms = watch.passed_ms() - self._deciding_ms
        done = 0 if decided else self._k - left[next(iter(self._timed))]
        room = min((config.num_layers - layer) * config.switches_per_layer, max(0, self._most - done))
        sure, k = self._within(passed_ms, room, left, last=layer == config.num_layers - 1)
        changed, self._k = done + k != self._k, done + k
        if decided:
            self._tell(_later(passed_ms, self._tail(left, room), k, sure or 0))
        elif changed:
            (row,) = self._timed
            before = self.resolved[row]
            assert before is not None, "it was told what it gets"
            self.resolved[row] = replace(before, k=self._k)
        return [k if row in self._timed else each for row, each in enumerate(left)]

    def decided(self) -> None:
        """Note that the first of these layers can begin."""
        assert self._watch is not None, "given where anybody looks"
        self._deciding_ms = self._watch.passed_ms() - self._decided_ms

    # -- which k ------------------------------------------------------------------------------------------------------

    @property
    def _again(self) -> bool:
        """Whether k may become another one than that of the first look."""
        if self._often == "once" or self._config is None or self._limits["ms"] is None:
            return False
        return self._forecaster.profile.tail is not None

    def _first(self) -> tuple[int, Forecast | None]:
        """The k that will be right when the plan is decided, as far as it is known; what cannot be kept is told.

        And a forecast until the second look replaces it; None where there is none, and the whole has to be foretold.

        Where the device is busier than it was measured, so that even k = 0 is not sure to hold, k = 0: it is the best
        that can be done, and how long it takes shows when the device is free again.
        """
        least = {unit: self._whole(budget, 0) for unit, budget in self._of_unit.items()}
        self._remarks = {unit: forecast.remark for unit, forecast in least.items()}
        for budget in self._timed.values():
            if least[budget.unit].upper_ms > budget.ms:
                minimum = self._plain_ms(budget)
                if minimum > budget.ms:
                    raise self._infeasible(budget, minimum)
        if self._again:
            tails = self._tail(self._others, self._most)
            ends = max(self._batch.elapsed_ms, least["ms"].ms - tails.ms[0])
            sure, k = self._within(ends, self._most, self._others)
            return k, _later(ends, tails, k, sure or 0)
        limit = self._limits["ms"]
        if limit is None:
            return self._most, None
        first_token = self._of_unit["ms"]
        return next((k for k in range(self._most, 0, -1) if self._whole(first_token, k).upper_ms <= limit), 0), None

    def _within(self, passed_ms: float, room: int, left: list[int], *, last: bool = False) -> tuple[int | None, int]:
        """The largest k up to ``room`` that is sure to end in time, None where none is; and the one to aim for.

        Where every layer is asked again, what half of the switches take will have shown in time to mend it: of those
        the forecast counts, and the upper bound of the other half only. left: what the others still run. last: there is
        no later look.
        """
        limit, tails = self._limits["ms"], self._tail(left, room)
        assert limit is not None, "otherwise k is not looked at again"
        time = limit - passed_ms
        ms, upper = tails.ms, tails.upper_ms
        sure = next((k for k in range(room, -1, -1) if upper[k] <= time), None)
        if last or not self.each_layer:
            return sure, sure or 0
        halves = ((k, (k + 1) // 2) for k in range(room, 0, -1))
        aim = next((k for k, half in halves if ms[k] - ms[half] + upper[half] <= time), 0)
        return sure, max(sure or 0, aim)

    def _most_by_token(self) -> int:
        """The largest k whose decoding steps are quick enough; 0 where none is sure to be."""
        highest = self._config.max_k if self._config is not None else 0
        limit = self._limits["ms/token"]
        if limit is None:
            return highest
        budget = self._of_unit["ms/token"]
        return next((k for k in range(highest, 0, -1) if self._whole(budget, k).upper_ms <= limit), 0)

    def _tell(self, later: Forecast | None = None) -> None:
        """Note what the rows with a budget in time get. later: of the first token, where more is known of it by now."""
        config = self._config
        if config is None:
            return
        for row, budget in self._timed.items():
            forecast = later if later is not None and budget.unit == "ms" else self._whole(budget, self._k)
            late = "the budget may be exceeded" if forecast.upper_ms > budget.ms else None
            remark = "; ".join(filter(None, [self._remarks[budget.unit], late])) or None
            forecast = Forecast(forecast.ms, forecast.upper_ms, remark)
            found = ResolvedBudget(budget, self._k, config.prefix_switches, config.total_switches, forecast)
            self.resolved[row] = found

    # -- how long -----------------------------------------------------------------------------------------------------

    def _least(self, unit: str) -> Fraction | None:
        return min((budget.ms for budget in self._timed.values() if budget.unit == unit), default=None)

    def _ks(self, k: int, others: Sequence[int]) -> list[int]:
        return [k if row in self._timed else other for row, other in enumerate(others)]

    def _work(self, budget: Budget, k: int) -> Work:
        batch, ks = self._batch, self._ks(k, self._others)
        if budget.unit == "ms":
            return prefill_work(self._config, batch.lengths, ks, batch.images)
        return decode_work(self._config, batch.last_lengths, ks)

    def _whole(self, budget: Budget, k: int) -> Forecast:
        """From the call to the first token, or of a decoding step, whichever the budget is about."""
        work = self._work(budget, k)
        if budget.unit == "ms":
            return self._forecaster.prefill(work, self._batch.elapsed_ms)
        return self._forecaster.decode(work)

    def _plain_ms(self, budget: Budget) -> float:
        """The bound with k = 0 on a device as busy as when it was measured."""
        work = self._work(budget, 0)
        if budget.unit == "ms":
            return self._forecaster.plain_ms("prefill", work) + self._batch.elapsed_ms
        return self._forecaster.plain_ms("decode", work)

    def _tail(self, left: list[int], room: int) -> Tails:
        """For each k up to ``room``, or more: what comes after a decision that leaves so many switches to be run.

        They count as spread over all layers beyond the prefix. For a single row of variant L that changes nothing; what
        shares the few layers that are left, heads or rows of a batch, takes a little less than this.
        """
        config, key = self._config, tuple(self._ks(0, left))
        assert config is not None, "a base model decides no plan"
        known = self._tails.get(key)
        if known is None or len(known.ms) <= room:
            ks = [self._ks(k, left) for k in range(room + 1)]
            known = self._tails[key] = self._forecaster.tails(tail_features(config, self._batch.lengths, ks))
        return known

    def _infeasible(self, budget: Budget, least: float) -> BudgetError:
        config, batch = self._config, self._batch
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


def how_often(device: torch.device, mode: Mode) -> Often:
    """How often a prefill can look at its budgets in time. device: of its last layers. mode: who decides its plan."""
    return "each layer" if device.type == "cpu" and mode == "learned" else "twice"


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


def _later(passed_ms: float, tails: Tails, k: int, sure: int) -> Forecast:
    """When k switches will have run, and when at the latest, if they come down to ``sure`` where they take long."""
    return Forecast(passed_ms + tails.ms[k], passed_ms + max(tails.ms[k], tails.upper_ms[sure]))


def _rounded_up(ms: float) -> str:
    """Two digits, so that asking for them is enough although no two requests are prepared in quite the same time."""
    step = 10.0 ** (math.floor(math.log10(ms)) - 1)
    return f"{math.ceil(ms / step) * step:.{max(0, -round(math.log10(step)))}f}"
