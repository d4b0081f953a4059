"""How much of the model a request gets: what it asked for, what its deadline leaves, or what the load allows.

The governor keeps a promise to everybody, the time to the first token that most requests must have, by giving each of
them less of the model when many come. It knows what a prefill takes at every k (the calibrated forecast, which follows
the device), who is waiting and for how long, and how often requests have been coming.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from adallava.budget import Budget
from adallava.cost.forecast import Forecaster
from adallava.errors import BudgetError, ConfigError
from adallava.hosts.model import AdaptiveVLM
from adallava.serving.jobs import Job

_ARRIVALS = 32
"""Requests from whose arrivals the rate is measured."""
_MOST_BUSY = 0.8
"""Share of the time that the rate may fill: beyond it a queue grows without end, near it for long."""
_FEW, _CYCLES = 5, 20
"""Admissions, at least and at most, from which is learned what goes by beside the model."""
_RESERVE = 0.7
"""Share of the objective that is kept for requests that are about to come, while any wait (docs/LOG.md)."""


@dataclass(frozen=True)
class Decision:
    """What a request gets, and what it is expected to take."""

    budget: Budget
    new_tokens: int
    remark: str | None = None


class Governor:
    """Decides for one model on one device. ``objective_ms``: time to the first token that is to hold; None: none is."""

    def __init__(self, vlm: AdaptiveVLM, objective_ms: float | None = None) -> None:
        """Raise ``ConfigError`` for an objective that cannot be, ``ProfileError`` for one without a device profile."""
        if objective_ms is not None and not objective_ms > 0:
            raise ConfigError(f"the objective is {objective_ms} ms, expected more than 0.")
        assert vlm.adaptive_config is not None, "a server has an adaptive model"
        self.vlm, self.config, self.objective_ms = vlm, vlm.adaptive_config, objective_ms
        self.forecaster = None if objective_ms is None else self._found()
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS)
        self._busy_ms: deque[float] = deque(maxlen=_ARRIVALS)
        self._expected_ms: float | None = None
        self._drags: deque[float] = deque(maxlen=_CYCLES)
        self.drag = 1.0
        """Time that goes by over that of prefill and step, lately; 1 until some have been seen, and at least."""

    # -- what it learns -----------------------------------------------------------------------------------------------

    def arrived(self, at: float) -> None:
        """Note an arrival, in seconds of ``time.perf_counter``."""
        self._arrivals.append(at)

    def ended(self, decode_ms: float) -> None:
        """Note what decoding a request took of the device: its share of each step that it was in."""
        self._busy_ms.append(decode_ms)

    def passed(self, ms: float) -> None:
        """Note how long it took to do what was decided last, with the step of the others that came after it."""
        if self._expected_ms is not None:
            self._drags.append(ms / self._expected_ms)
            self._learn()
        self._expected_ms = None

    def _learn(self) -> None:
        # Once here: those who ask whether they may come read it for each who waits, on threads of their own.
        self.drag = max(1.0, median(self._drags)) if len(self._drags) >= _FEW else 1.0

    @property
    def rate(self) -> float:
        """Requests a second, lately; 0 until a few have come."""
        if len(self._arrivals) < 4:
            return 0.0
        return (len(self._arrivals) - 1) / max(1e-3, time.perf_counter() - self._arrivals[0])

    # -- what it decides ----------------------------------------------------------------------------------------------

    def decide(self, job: Job, waiting: Sequence[Job], rows: int) -> Decision:
        """What ``job`` gets now. waiting: who comes after it, in order. rows: requests that are decoding."""
        new_tokens = job.sampling.max_new_tokens
        if job.deadline_ms is not None:
            try:
                return self._by_deadline(job)
            except BudgetError:  # it could have been kept when the job came
                return Decision(Budget.of_k(self.config, 0), 1, "late: less time is left than one token takes")
        if job.budget is not None:
            return Decision(job.budget, new_tokens)
        k = self._by_load(job, waiting, rows)
        if rows and self.forecaster is not None:
            self._expected_ms = self._first_ms(job, k, rows)[0] / self.drag
        elif self._drags:
            # Who comes to an idle server is taken whatever is expected, and so a slow hour is forgotten.
            self._drags.popleft()
            self._learn()
        late = "" if self._in_time([job], k, rows, self.objective_ms or 0.0) else "late: "
        remark = f"{late}k = {k} of {self.config.max_k} under this load"
        return Decision(Budget.of_k(self.config, k), new_tokens, remark)

    def wait_ms(self, job: Job, waiting: Sequence[Job], rows: int) -> float:
        """How much later than the objective ``job`` would have its first token behind ``waiting``, at least."""
        if self.objective_ms is None or self.forecaster is None:
            return 0.0
        before = sum(self._first_ms(other, self._k_of(other), rows)[1] for other in waiting)
        return before + self._first_ms(job, 0, rows)[1] + job.elapsed_ms - self.objective_ms

    def check(self, job: Job) -> None:
        """Raise ``BudgetError`` for a deadline that could not be kept if nobody else were here."""
        if job.deadline_ms is not None:
            self._by_deadline(job)
        elif job.budget is None and self.objective_ms is None:
            raise BudgetError(
                'the budget is "auto", and this server has no objective. Start it with --objective, or ask for a share.'
            )

    def _by_deadline(self, job: Job) -> Decision:
        """The most of the model with which the whole answer fits; if none does, the least of it and fewer tokens."""
        forecaster, wanted = self._found(), job.sampling.max_new_tokens
        assert job.deadline_ms is not None and job.prepared is not None
        left = job.deadline_ms - job.elapsed_ms
        best = 0
        for k in range(self.config.max_k, -1, -1):
            first = forecaster.prefill(job.prepared.work(self.vlm, k)).upper_ms
            each = forecaster.decode(job.prepared.step_work(self.vlm, k)).upper_ms
            fit = 1 + int((left - first) / each) if left >= first else 0
            if fit >= wanted:
                return Decision(Budget.of_k(self.config, k), wanted)
            best = fit
        if best < 1:
            least = forecaster.prefill(job.prepared.work(self.vlm, 0)).upper_ms + job.elapsed_ms
            raise BudgetError(
                f"deadline_ms {job.deadline_ms:g} is infeasible: the minimum is {least:.0f} ms, for one token."
            )
        return Decision(Budget.of_k(self.config, 0), best, f"at most {best} of {wanted} tokens fit the deadline")

    def _by_load(self, job: Job, waiting: Sequence[Job], rows: int) -> int:
        """The largest k at which this job and those behind it are in time, and the present rate can be kept up."""
        assert self.objective_ms is not None, "checked when the job came"
        # Alone it may take all of the objective. Behind others it leaves a part to those who are about to come.
        within_ms = self.objective_ms * (1.0 if not waiting else 1 - _RESERVE)
        for k in range(self.config.max_k, 0, -1):
            if self._in_time([job, *waiting], k, rows, within_ms) and self._sustained(job, k, rows):
                return k
        return 0

    def _in_time(self, jobs: Sequence[Job], k: int, rows: int, within_ms: float) -> bool:
        spent = 0.0
        for job in jobs:
            asks = job.budget is None and job.deadline_ms is None
            spent += self._first_ms(job, k if asks else self._k_of(job), rows)[1]
            if asks and job.elapsed_ms + spent > within_ms:
                return False
        return True

    def _k_of(self, job: Job) -> int:
        """What a job gets at least: what its share buys; nothing beyond the prefix where that is decided later."""
        if job.budget is None or job.budget.unit != "share":
            return 0
        return job.budget.resolve(self.config).k

    def _sustained(self, job: Job, k: int, rows: int) -> bool:
        decoding = sum(self._busy_ms) / len(self._busy_ms) if self._busy_ms else 0.0
        return self.rate * (self._first_ms(job, k, 0)[0] + decoding) <= 1e3 * _MOST_BUSY

    def _first_ms(self, job: Job, k: int, rows: int) -> tuple[float, float]:
        """A prefill at k, expected and at most, with the step of the others that comes between it and the next."""
        assert self.forecaster is not None and job.prepared is not None
        forecast, between = self.forecaster.prefill(job.prepared.work(self.vlm, k)), 0.0
        if rows and self.forecaster.profile.decode is not None:
            between = self.forecaster.decode(job.prepared.step_work(self.vlm, k, rows)).ms
        return self.drag * (forecast.ms + between), self.drag * (forecast.upper_ms + between)

    def _found(self) -> Forecaster:
        return self.vlm.profiles.get(self.vlm, self.vlm.token_selection, Budget.parse("1 ms"))
