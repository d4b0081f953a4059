"""Accuracy over budgets: models x token selections x modes x budgets on the mini benchmark, as result rows.

Each model is loaded once. With an output file every finished task is kept at once, and a sweep that was stopped goes
on where it was: a row is skipped if the file has it, provided that seed, limit and the model's weights are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adallava.budget import Budget
from adallava.config import AdaptiveConfig
from adallava.errors import ConfigError
from adallava.evaluation.minibench import TaskRun, TaskSettings, run_task
from adallava.evaluation.modes import NO_MODE, PlanMode
from adallava.evaluation.plans import PlanCounts
from adallava.evaluation.preflight import check_budgets, check_selections, preflight
from adallava.evaluation.store import Key, RowStore
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.questions import FAMILIES
from adallava.mini.scoring import mean_and_interval
from adallava.results import ResultRow, provenance
from adallava.selection import describe_selector, parse_selector

MEAN = "mean"


@dataclass(frozen=True)
class SweepSettings:
    """What to run; raises ``ConfigError`` for values that cannot be."""

    budgets: tuple[Budget, ...]
    """Budgets, each run on every adaptive model; a base model runs at 100 % only."""
    seed: int = 0
    """Which test scenes are drawn."""
    limit: int = 1000
    """Questions per family."""
    modes: tuple[str, ...] = ("learned",)
    """Who decides the plans: "learned", or a baseline, see ``PlanMode``."""
    batch_size: int = 64
    """Questions that are answered together."""
    out: Path | None = None
    """JSONL file that keeps every finished task, and from which a stopped sweep goes on."""
    token_selections: tuple[str, ...] | None = None
    """Which visual tokens are kept, such as "none" and "fastv:layer=3"; None: as each model is configured."""

    def __post_init__(self) -> None:
        """Check the values, write each token selection in one way, and drop repeated values."""
        for name, least in (("seed", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}, expected a whole number of {least} or more.")
        object.__setattr__(self, "modes", tuple(str(PlanMode.parse(mode)) for mode in self.modes))
        if self.token_selections is not None:
            selections = tuple(describe_selector(parse_selector(text)) for text in self.token_selections)
            object.__setattr__(self, "token_selections", selections)
        for name in ("budgets", "modes", "token_selections"):
            values = getattr(self, name)
            if values is None:
                continue
            if not values:
                raise ConfigError(f"no {name} are given. Give at least one.")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))


class Listener:
    """What a sweep tells while it runs; the methods here do nothing, so override the ones of interest."""

    def on_total(self, questions: int) -> None:
        """Say how many questions there are in all, those done before included; may change as models are loaded."""

    def on_model(self, model: str) -> None:
        """Say that a model is being loaded."""

    def on_questions(self, count: int) -> None:
        """Say that so many questions are answered."""

    def on_row(self, row: ResultRow) -> None:
        """Give a finished row, also one that an earlier run had finished."""

    def on_note(self, text: str) -> None:
        """Give a remark for the user."""


def sweep(models: Sequence[str], settings: SweepSettings, listener: Listener | None = None) -> list[ResultRow]:
    """Run models (names, folders or hub ids) and return their rows: six tasks and "mean" for each run of a model.

    Everything that can be checked is checked before the first model runs. Raises ``CheckpointError`` for unknown
    models, ``BudgetError`` for a budget below a model's minimum, ``ConfigError`` for a token selection that cannot
    work in a model, ``ResultExistsError`` where the output file holds rows of other settings.
    """
    listener = listener or Listener()
    names = labels(models)
    configs = [preflight(source, settings.budgets, settings.token_selections or ()) for source in names.values()]
    store = RowStore(settings.out)
    counts = [len(list(_runs(config, settings))) for config in configs]
    each = len(FAMILIES) * settings.limit
    rows: list[ResultRow] = []
    for number, (label, source) in enumerate(names.items()):
        listener.on_total(each * sum(counts))
        listener.on_model(label)
        vlm = AdaptiveVLM.from_pretrained(source)
        counts[number] = len(list(_runs(vlm.adaptive_config, settings)))
        listener.on_total(each * sum(counts))
        rows += _sweep_model(label, vlm, settings, store, listener)
    return rows


def labels(models: Sequence[str]) -> dict[str, str]:
    """Give each model a name for the rows: a folder's last part where that is unique, else the text as it is."""
    unique = list(dict.fromkeys(models))
    short = {model: Path(model).resolve().name if Path(model).is_dir() else model for model in unique}
    taken = list(short.values())
    return {name if taken.count(name) == 1 else model: model for model, name in short.items()}


def flat(row: ResultRow) -> dict[str, Any]:
    """Return a row as one flat object for JSON, its numbers beside what they were made with."""
    metrics = {name: value for name, value in row.metrics.items() if name != "plan_counts"}
    return {**row.config, "task": row.name, **metrics, "provenance": row.provenance}


def _runs(
    config: AdaptiveConfig | None, settings: SweepSettings
) -> Iterator[tuple[str | None, Budget, PlanMode | None]]:
    """Token selection, None for the model's own; budget; and mode of each run of a model."""
    for selection in settings.token_selections or (None,):
        if config is None:
            yield selection, Budget.parse(1), None
        else:
            modes = [PlanMode.parse(mode) for mode in settings.modes]
            yield from ((selection, budget, mode) for mode in modes for budget in settings.budgets)


# -- one model --------------------------------------------------------------------------------------------------------


def _sweep_model(
    label: str, vlm: AdaptiveVLM, settings: SweepSettings, store: RowStore, listener: Listener
) -> Iterator[ResultRow]:
    config = vlm.adaptive_config
    check_selections(label, vlm.model, config, settings.token_selections or ())
    if config is not None:
        check_budgets(label, config, settings.budgets)
    elif skipped := [str(b) for b in settings.budgets if b.fraction != 1]:
        listener.on_note(f"{label} is a base model: it runs at 100% only, so {', '.join(skipped)} is skipped.")
    weights = weights_digest(vlm)
    for selection, budget, mode in _runs(config, settings):
        selected = selection or describe_selector(vlm.token_selection)
        common = {"model": label, "budget": str(budget), "mode": str(mode or NO_MODE), "token_selection": selected}
        made_with = {"seed": settings.seed, "limit": settings.limit, "weights": weights}
        rows = []
        for task in FAMILIES:
            row = store.find(Key(**common, task=task), made_with)
            if row is None:
                asked = TaskSettings(task, budget, mode, settings.seed, settings.limit, settings.batch_size, selected)
                run = run_task(vlm, asked, listener.on_questions)
                row = ResultRow(task, _metrics(run), {**common, **made_with}, _provenance(vlm, settings))
                store.add(row)
            else:
                listener.on_questions(settings.limit)
            rows.append(row)
            listener.on_row(row)
            yield row
        mean = store.find(Key(**common, task=MEAN), made_with)
        if mean is None:
            mean = mean_row(rows)
            store.add(mean)
        listener.on_row(mean)
        yield mean


def weights_digest(vlm: AdaptiveVLM) -> str:
    """Return a short digest of a model's weights (the first 256 values of each), to tell a retrained model apart."""
    digest = hashlib.sha256()
    for name, weight in vlm.named_parameters():
        values = weight.detach().flatten()[:256].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def mean_row(rows: Sequence[ResultRow]) -> ResultRow:
    """Make the row "mean" from one row per task: every task counts alike, and the tasks' errors are independent."""
    metrics = [row.metrics for row in rows]
    fracs = [m["flops_frac"] for m in metrics if m["flops_frac"] is not None]
    counts = [PlanCounts.from_dict(m["plan_counts"]) for m in metrics if m["plan_counts"]]
    plans = sum(counts[1:], counts[0]) if counts else None
    merged = {
        **_accuracy(
            sum(m["accuracy"] for m in metrics) / len(metrics),
            math.sqrt(sum(m["interval"] ** 2 for m in metrics)) / len(metrics),
        ),
        "n": sum(m["n"] for m in metrics),
        "failed": sum(m["failed"] for m in metrics),
        "failures": [text for m in metrics for text in m["failures"]][:5],
        "flops_frac": sum(fracs) / len(fracs) if fracs else None,
        **{name: _mean_of([m[name] for m in metrics]) for name in ("prompt_tokens", "last_layer_tokens")},
        "plans": plans.statistics() if plans else None,
        "plan_counts": None,  # the tasks' rows have them
    }
    return ResultRow(MEAN, merged, rows[0].config, rows[-1].provenance)


def _metrics(run: TaskRun) -> dict[str, Any]:
    return {
        **_accuracy(*mean_and_interval(run.scores)),
        "n": len(run.scores),
        "failed": len(run.failures),
        "failures": run.failures[:5],
        "flops_frac": _mean_of(run.flops_fracs),
        "prompt_tokens": _mean_of(run.prompt_tokens),
        "last_layer_tokens": _mean_of(run.last_layer_tokens),
        "plans": run.plans.statistics() if run.plans else None,
        "plan_counts": run.plans.to_dict() if run.plans else None,
    }


def _mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None for no values, and where one is not known, as in rows of an older version."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _accuracy(mean: float, interval: float) -> dict[str, float]:
    return {
        "accuracy": mean,
        "interval": interval,
        "low": max(0.0, mean - interval),
        "high": min(1.0, mean + interval),
    }


def _provenance(vlm: AdaptiveVLM, settings: SweepSettings) -> dict[str, Any]:
    return provenance(device=vlm.device, dtype=next(vlm.parameters()).dtype, seed=settings.seed)
