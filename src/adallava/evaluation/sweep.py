"""Accuracy over budgets: models x token selections x modes x budgets on benchmark tasks, as result rows.

Tasks are the families of the mini benchmark, and those of lmms-eval where it is installed.

Each model is loaded once, those of lmms-eval once per task. With an output file every finished task is kept at once,
and a sweep that was stopped goes on where it was: a row is skipped if the file has it, provided that seed, limit, the
model's weights and, of lmms-eval's tasks, the data are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adallava.budget import Budget
from adallava.config import AdaptiveConfig
from adallava.errors import ConfigError
from adallava.evaluation import lmms_tasks, minibench
from adallava.evaluation.modes import NO_MODE, PlanMode
from adallava.evaluation.preflight import check_budgets, check_selections, preflight
from adallava.evaluation.store import Key, RowStore
from adallava.evaluation.tasks import OnBatch, TaskRun, TaskSettings, mean_metrics
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.questions import FAMILIES
from adallava.results import ResultRow, provenance
from adallava.selection import describe_selector, parse_selector

MEAN = "mean"


@dataclass(frozen=True)
class SweepSettings:
    """What to run; raises ``ConfigError`` for values that cannot be."""

    budgets: tuple[Budget, ...]
    """Budgets, each run on every adaptive model; a base model runs at 100 % only."""
    seed: int = 0
    """Which test scenes of the mini tasks are drawn."""
    limit: int | None = None
    """Questions per task; None: 1,000 of a mini task, which has no end, and all of one of lmms-eval."""
    modes: tuple[str, ...] = ("learned",)
    """Who decides the plans: "learned", or a baseline, see ``PlanMode``."""
    batch_size: int = 64
    """Questions that are answered together."""
    out: Path | None = None
    """JSONL file that keeps every finished task, and from which a stopped sweep goes on."""
    token_selections: tuple[str, ...] | None = None
    """Which visual tokens are kept, such as "none" and "fastv:layer=3"; None: as each model is configured."""
    tasks: tuple[str, ...] = tuple(FAMILIES)
    """Families of the mini benchmark, and tasks of lmms-eval."""
    tasks_folder: Path | None = None
    """Where further tasks of lmms-eval are described."""

    def __post_init__(self) -> None:
        """Check the values, write each token selection in one way, and drop repeated values."""
        for name, least in (("seed", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if name == "limit" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}, expected a whole number of {least} or more.")
        object.__setattr__(self, "modes", tuple(str(PlanMode.parse(mode)) for mode in self.modes))
        if self.token_selections is not None:
            selections = tuple(describe_selector(parse_selector(text)) for text in self.token_selections)
            object.__setattr__(self, "token_selections", selections)
        for name in ("budgets", "modes", "token_selections", "tasks"):
            values = getattr(self, name)
            if values is None:
                continue
            if not values:
                raise ConfigError(f"no {name} are given. Give at least one.")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))

    def limit_of(self, task: str) -> int | None:
        """Questions of a task; None for all there are."""
        return self.limit or minibench.DEFAULT_LIMIT if task in FAMILIES else self.limit


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
    """Run models (names, folders or hub ids) and return their rows: every task and "mean" for each run of a model.

    Everything that can be checked is checked before the first model runs. Raises ``CheckpointError`` for unknown
    models, ``BudgetError`` for a budget below a model's minimum, ``ConfigError`` for a token selection that cannot
    work in a model, ``UnknownNameError`` for unknown tasks, ``ResultExistsError`` where the output file holds rows of
    other settings.
    """
    listener = listener or Listener()
    names = labels(models)
    others = [task for task in settings.tasks if task not in FAMILIES]
    if others:
        lmms_tasks.check_tasks(others, settings.tasks_folder)
    configs = [_preflight(source, settings) for source in names.values()]
    store = RowStore(settings.out)
    counts = [len(list(_runs(config, settings))) for config in configs]
    each = sum(_questions(task, settings) for task in settings.tasks)
    rows: list[ResultRow] = []
    for number, (label, source) in enumerate(names.items()):
        listener.on_total(each * sum(counts))
        listener.on_model(label)
        if source.startswith(lmms_tasks.OTHER):
            rows += _sweep_other(label, source, settings, store, listener)
            continue
        vlm = AdaptiveVLM.from_pretrained(source)
        counts[number] = len(list(_runs(vlm.adaptive_config, settings)))
        listener.on_total(each * sum(counts))
        rows += _sweep_model(label, vlm, settings, store, listener)
        del vlm  # before the next one takes memory
    return rows


def _preflight(source: str, settings: SweepSettings) -> AdaptiveConfig | None:
    if not source.startswith(lmms_tasks.OTHER):
        return preflight(source, settings.budgets, settings.token_selections or ())
    lmms_tasks.check_other(source)
    if mini := [task for task in settings.tasks if task in FAMILIES]:
        raise ConfigError(
            f"{source} is a model of lmms-eval, which does not know {', '.join(mini)}. Write the mini benchmark as its "
            "tasks, 'adallava export-tasks FOLDER', and pass --tasks adallava_mini_open,... --tasks-folder FOLDER."
        )
    return None


def _questions(task: str, settings: SweepSettings) -> int:
    limit = settings.limit_of(task)
    if task in FAMILIES:
        assert limit is not None, "the mini tasks have no end"
        return limit
    total, _ = lmms_tasks.look_at(task, settings.tasks_folder)
    return total if limit is None else min(limit, total)


def label(source: str) -> str:
    """What a model is called in rows: a folder's last part, else its name as it is."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def labels(models: Sequence[str]) -> dict[str, str]:
    """Give each model a name for the rows: its label where that is unique, else the text as it is."""
    short = {model: label(model) for model in dict.fromkeys(models)}
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
    origin = provenance(device=vlm.device, dtype=next(vlm.parameters()).dtype, seed=settings.seed)

    def ask(asked: TaskSettings) -> TaskRun:
        return run_task(vlm, asked, listener.on_questions)

    for selection, budget, mode in _runs(config, settings):
        selected = selection or describe_selector(vlm.token_selection)
        yield from _run(label, weights, (selected, budget, mode), settings, store, listener, ask, origin)


def _sweep_other(
    label: str, source: str, settings: SweepSettings, store: RowStore, listener: Listener
) -> Iterator[ResultRow]:
    """A model of lmms-eval, as it is: at 100 %, with every token."""

    def ask(asked: TaskSettings) -> TaskRun:
        run = lmms_tasks.run_other(source, asked)
        listener.on_questions(_questions(asked.task, settings))
        return run

    # Where lmms-eval's models put themselves.
    origin = provenance(device="cuda" if torch.cuda.is_available() else "cpu", seed=settings.seed)
    whole = ("none", Budget.parse(1), None)
    yield from _run(label, source, whole, settings, store, listener, ask, origin)


def _run(
    label: str,
    weights: str,
    chosen: tuple[str, Budget, PlanMode | None],
    settings: SweepSettings,
    store: RowStore,
    listener: Listener,
    ask: Callable[[TaskSettings], TaskRun],
    origin: dict[str, Any],
) -> Iterator[ResultRow]:
    """The rows of one run: a token selection, a budget and a mode, on every task."""
    selected, budget, mode = chosen
    common = {"model": label, "budget": str(budget), "mode": str(mode or NO_MODE), "token_selection": selected}
    rows = []
    for task in settings.tasks:
        limit = settings.limit_of(task)
        made_with = {"seed": settings.seed, "limit": limit, "weights": weights}
        if task not in FAMILIES:
            _, made_with["task_data"] = lmms_tasks.look_at(task, settings.tasks_folder)
        row = store.find(Key(**common, task=task), made_with)
        if row is None:
            size, folder = settings.batch_size, settings.tasks_folder
            run = ask(TaskSettings(task, budget, mode, settings.seed, limit, size, selected, folder))
            row = ResultRow(task, run.metrics(), {**common, **made_with}, origin)
            store.add(row)
        else:
            listener.on_questions(_questions(task, settings))
        rows.append(row)
        listener.on_row(row)
        yield row
    # A mean of other tasks, from a sweep of fewer, gives way: it says nothing that its tasks' rows do not.
    mean = mean_row(rows)
    found = store.find(Key(**common, task=MEAN), {})
    if found is not None and found.metrics == mean.metrics:
        mean = found
    else:
        store.add(mean)
    listener.on_row(mean)
    yield mean


def run_task(vlm: AdaptiveVLM, asked: TaskSettings, on_batch: OnBatch | None = None) -> TaskRun:
    """Ask a model one task, of the mini benchmark or of lmms-eval."""
    return (minibench if asked.task in FAMILIES else lmms_tasks).run_task(vlm, asked, on_batch)


def weights_digest(vlm: AdaptiveVLM) -> str:
    """Return a short digest of a model's weights (the first 256 values of each), to tell a retrained model apart."""
    digest = hashlib.sha256()
    for name, weight in vlm.named_parameters():
        values = weight.detach().flatten()[:256].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def mean_row(rows: Sequence[ResultRow]) -> ResultRow:
    """Make the row "mean" from one row per task."""
    config = {**rows[0].config, "tasks": [row.name for row in rows]}
    return ResultRow(MEAN, mean_metrics([row.metrics for row in rows]), config, rows[-1].provenance)
