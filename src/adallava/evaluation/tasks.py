"""What a task is, whoever asks its questions: its settings, and what comes out of it.

Tasks are the families of the mini benchmark (``minibench``) and those of lmms-eval (``lmms_tasks``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adallava.budget import Budget
from adallava.cost import ModelSpec, full_loads, plan_loads
from adallava.cost.roofline import prefill_time_ms
from adallava.evaluation.modes import PlanMode
from adallava.evaluation.plans import PlanCounts
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.scoring import mean_and_interval


@dataclass(frozen=True)
class TaskSettings:
    """What to ask: ``limit`` questions of one task, at one budget."""

    task: str
    budget: Budget
    mode: PlanMode | None
    """Who decides the plans; None for a base model."""
    seed: int
    """Draws the scenes of a mini task."""
    limit: int | None
    """The first so many questions; None for all, of tasks that have an end."""
    batch_size: int = 64
    token_selection: str | None = None
    """Which visual tokens the model keeps, such as "fastv:layer=3"; None for the model's own selection."""
    folder: Path | None = None
    """Where further tasks of lmms-eval are described, beside its own."""

    @property
    def noise(self) -> str:
        """Text from which random plans are drawn, so that they are the same after a restart."""
        return f"{self.task}/{self.budget}/{self.seed}"


@dataclass(frozen=True)
class Measured:
    """The outcome of a task that aggregates its own scores, in its own unit."""

    metric: str
    """Name of the metric, such as "mme_perception_score"."""
    score: float
    out_of: float
    """The best possible score, 2000 for MME's perception."""
    interval: float
    """Half width of the 95 % interval of ``score``."""
    n: int
    """Questions."""
    scores: dict[str, float] = field(default_factory=dict)
    """Every number that the task reports."""


@dataclass
class TaskRun:
    """What came out of one task."""

    scores: list[float] = field(default_factory=list)
    """One score in [0, 1] per question, 0 for a failed one; empty where ``measured`` is given."""
    measured: Measured | None = None
    failures: list[str] = field(default_factory=list)
    """The error of each question that failed."""
    failures_told: bool = True
    """Whether failures are known at all; False of models that keep them to themselves."""
    flops_fracs: list[float] = field(default_factory=list)
    """Share of the base model's prefill FLOPs, for each answered question (paper convention)."""
    prefill_flops: list[float] = field(default_factory=list)
    """FLOPs of each prefill (paper convention)."""
    roofline_ms: list[float] = field(default_factory=list)
    """Roofline time of each prefill, alone on the paper's device: its column "prefill time"."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Tokens of each answered prompt before any is dropped, without the latency token."""
    last_layer_tokens: list[int] = field(default_factory=list)
    """Tokens of it that are left in the last layer, without the latency token."""
    plans: PlanCounts | None = None
    """The plans that were run; None for a base model."""
    spec: ModelSpec | None = None
    """The model's sizes, for what its answers cost."""
    _known_ms: dict[Any, float] = field(default_factory=dict)

    @classmethod
    def of(cls, vlm: AdaptiveVLM) -> TaskRun:
        """Nothing yet of a model."""
        plans = None if vlm.adaptive_config is None else PlanCounts.for_config(vlm.adaptive_config)
        return cls(plans=plans, spec=vlm.spec)

    def add_cost(self, answer: Answer) -> None:
        """Take what an answer cost, of the model that this run is ``of``."""
        assert self.spec is not None, "made by TaskRun.of"
        self.flops_fracs.append(answer.cost.frac)
        self.prefill_flops.append(answer.cost.prefill_flops)
        self.roofline_ms.append(self._roofline_ms(answer, self.spec))
        self.prompt_tokens.append(answer.prompt_tokens)
        # The latency token is not counted, so that models with and without one can be compared.
        self.last_layer_tokens.append(answer.layer_tokens[-1] - (answer.plan is not None))
        if self.plans is not None and answer.plan is not None:
            self.plans.add(answer.plan)

    def _roofline_ms(self, answer: Answer, spec: ModelSpec) -> float:
        plan, tokens = answer.plan, answer.layer_tokens
        key = (None if plan is None else PlanCounts.key_of(plan), *tokens)
        if key not in self._known_ms:
            loads = full_loads(spec) if plan is None else plan_loads(spec, plan, 0)
            self._known_ms[key] = prefill_time_ms(spec, loads, tokens)
        return self._known_ms[key]

    def metrics(self) -> dict[str, Any]:
        """The numbers of a result row."""
        if self.measured is None:
            outcome, n = accuracy(*mean_and_interval(self.scores)), len(self.scores)
        else:
            told = self.measured
            outcome = accuracy(told.score / told.out_of, told.interval / told.out_of)
            outcome |= {"metric": told.metric, "score": told.score, "out_of": told.out_of, "scores": told.scores}
            n = told.n
        return {
            **outcome,
            "n": n,
            "failed": len(self.failures) if self.failures_told else None,
            "failures": self.failures[:5],
            "flops_frac": mean_of(self.flops_fracs),
            **{name: mean_of(getattr(self, name)) for name in COSTS},
            "plans": self.plans.statistics() if self.plans else None,
            "plan_counts": self.plans.to_dict() if self.plans else None,
        }


COSTS = ("prefill_flops", "roofline_ms", "prompt_tokens", "last_layer_tokens")
"""Metrics that are means over the questions; None where nobody knows them."""
OnBatch = Callable[[int], None]
"""Called after each batch with the number of questions in it."""


def mean_metrics(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the row "mean", of one row per task: tasks count alike, and their errors are independent."""
    fracs = [m["flops_frac"] for m in metrics if m["flops_frac"] is not None]
    counts = [PlanCounts.from_dict(m["plan_counts"]) for m in metrics if m["plan_counts"]]
    plans = sum(counts[1:], counts[0]) if counts else None
    return {
        **accuracy(
            sum(m["accuracy"] for m in metrics) / len(metrics),
            math.sqrt(sum(m["interval"] ** 2 for m in metrics)) / len(metrics),
        ),
        "n": sum(m["n"] for m in metrics),
        "failed": None if None in (failed := [m["failed"] for m in metrics]) else sum(failed),
        "failures": [text for m in metrics for text in m["failures"]][:5],
        "flops_frac": sum(fracs) / len(fracs) if fracs else None,
        **{name: mean_of([m.get(name) for m in metrics]) for name in COSTS},
        "plans": plans.statistics() if plans else None,
        "plan_counts": None,  # the tasks' rows have them
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None for no values, and where one is not known, as in rows of an older version."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def accuracy(mean: float, interval: float) -> dict[str, Any]:
    """A share of the best possible score, with its 95 % interval."""
    return {
        "accuracy": mean,
        "interval": interval,
        "low": max(0.0, mean - interval),
        "high": min(1.0, mean + interval),
    }
