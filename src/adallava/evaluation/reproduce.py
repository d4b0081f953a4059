"""What is measured for each table and figure of the paper, at any scale: sweeps, plans and looks, as result rows.

Sweeps go into a file per set of tasks, from which a stopped reproduction goes on. Shipped or released models are enough
for most items; those that need others (controls, models trained under token selection) use the ones found in a folder
that ``adallava train`` wrote, and do without them otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from adallava.budget import Budget
from adallava.config import AdaptiveConfig
from adallava.evaluation import lmms_tasks
from adallava.evaluation.plans import PlanCounts
from adallava.evaluation.preflight import preflight
from adallava.evaluation.scales import BASE, SCALES, H, L, Scale
from adallava.evaluation.sweep import MEAN, Listener, SweepSettings, label, sweep
from adallava.hosts.looking import look
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.questions import FAMILIES
from adallava.plan import ExecutionPlan, expand_tail
from adallava.results import ResultRow, provenance

BUDGETS = ("100%", "85%", "70%", "60%", "50%")
PAPER_BUDGETS = ("100%", "85%", "60%")
SELECTIONS = ("none", "prumerge", "prumerge+", "fastv", "random:ratio=0.25", "uniform:ratio=0.25")
DRAWS = 5
CANDIDATES = 20
"""Fixed plans that are tried per budget; all there are, where there are no more."""
_FEW = 500
"""Questions per task for choosing among them where a run has all there are."""
SWEEP, BROAD, CHOOSING = "sweep.jsonl", "broad.jsonl", "choosing.jsonl"
"""Result files: of most items, of Tab. A where it has tasks of its own, and of the search for the best fixed plan."""
CHOOSING_SEED = 1_000_003
"""Added to the seed of mini tasks: the best fixed plan is not chosen on the questions that it is tested on."""


@dataclass(frozen=True)
class Settings:
    """How much is measured, of which models, and where the results go."""

    out: Path
    """Folder of the result files."""
    scale: Scale = SCALES["mini"]
    limit: int | None = None
    """Questions per task and run; the scale's when None."""
    seed: int = 1
    """Which test scenes of mini tasks are drawn."""
    models: Path | None = None
    """Folder with trained models beside the scale's."""
    batch_size: int | None = None
    """Questions answered together; the scale's when None."""
    tasks_folder: Path | None = None
    """Where further tasks of lmms-eval are described."""

    @property
    def questions(self) -> int | None:
        """Questions per task and run; None for all."""
        return self.limit or self.scale.limit

    def found(self, *roles: str) -> list[str]:
        """Where the models of the roles are, of those that are there."""
        return [source for role in roles if (source := self.scale.source(role, self.models)) is not None]

    def sweep(
        self, budgets: Sequence[str], modes: Sequence[str], selections: Sequence[str], **more: Any
    ) -> SweepSettings:
        """Settings of one sweep over the scale's tasks, or over others that are passed."""
        return SweepSettings(
            tuple(Budget.parse(budget) for budget in budgets),
            **{
                "seed": self.seed,
                "limit": self.questions,
                "modes": tuple(modes),
                "batch_size": self.batch_size or self.scale.batch_size,
                "out": self.out / SWEEP,
                "token_selections": tuple(selections),
                "tasks": self.scale.tasks,
                "tasks_folder": self.tasks_folder,
                **more,
            },
        )


def sweep_rows(settings: Settings, items: Sequence[str], listener: Listener) -> list[ResultRow]:
    """Run every sweep that ``items`` need; rows of all of them, those done before included."""
    rows: list[ResultRow] = []
    for models, asked in _sweeps(settings, items):
        rows += sweep(models, asked, listener)
    return list({(*_key(row), row.name): row for row in rows}.values())


def check(settings: Settings, items: Sequence[str]) -> None:
    """See that models can be told apart and that every task can be loaded, before hours of measuring."""
    scale = settings.scale
    scale.roles(settings.models)
    tasks = [*scale.tasks, *(scale.broad_tasks if "table-a" in items else ())]
    tasks += scale.choosing_tasks if "content" in items else ()
    if others := [task for task in dict.fromkeys(tasks) if task not in FAMILIES]:
        lmms_tasks.check_tasks(others, settings.tasks_folder)
        for task in others:
            lmms_tasks.look_at(task, settings.tasks_folder)


def broad_rows(settings: Settings, listener: Listener) -> list[ResultRow]:
    """The rows of Tab. A where it has tasks of its own, else none."""
    if not settings.scale.broad_tasks:
        return []
    more = {"tasks": settings.scale.broad_tasks, "out": settings.out / BROAD}
    rows = sweep(settings.found(BASE), settings.sweep(("100%",), ("learned",), ("none",), **more), listener)
    return rows + sweep(settings.found(L), settings.sweep(PAPER_BUDGETS, ("learned",), ("none",), **more), listener)


def _sweeps(settings: Settings, items: Sequence[str]) -> Iterator[tuple[list[str], SweepSettings]]:
    wanted, scale = set(items), settings.scale
    none, learned = ("none",), ("learned",)
    if wanted & {"table-b", "fig-b", "fig-c", "fig-d", "content"} or ("table-a" in wanted and not scale.broad_tasks):
        yield settings.found(BASE), settings.sweep(("100%",), learned, none)
        yield settings.found(L, H), settings.sweep(BUDGETS, learned, none)
    if "table-b" in wanted:
        yield settings.found(BASE, L, H), settings.sweep(PAPER_BUDGETS, learned, SELECTIONS[1:])
        for selection in ("prumerge", "prumerge+", "fastv"):
            if trained := settings.found(f"{L}-{selection}", f"{H}-{selection}"):
                yield trained, settings.sweep(PAPER_BUDGETS, learned, (selection,))
    if "fig-c" in wanted and (designs := settings.found(*(role for role in scale.designs if role not in (L, H)))):
        yield designs, settings.sweep(BUDGETS, learned, none)
    if "fig-d" in wanted:
        draws = tuple("random" if draw == 0 else f"random:{draw}" for draw in range(DRAWS))
        yield settings.found(L, f"{L}-random"), settings.sweep(BUDGETS, draws, none)


def _key(row: ResultRow) -> tuple[str, ...]:
    return tuple(row.config[name] for name in ("model", "budget", "mode", "token_selection"))


# -- learned plans against fixed ones -------------------------------------------------------------------------------


def content_rows(settings: Settings, learned: Sequence[ResultRow], listener: Listener) -> list[ResultRow]:
    """The best single plan of each model and budget, chosen on other questions, then tested: its rows.

    learned: the sweep's rows of the learned plans, of which the commonest are candidates where there are too many plans
    to try all.
    """
    rows: list[ResultRow] = []
    # Other questions of the same tasks, or other tasks.
    choosing: dict[str, Any] = {"limit": _few(settings), "out": settings.out / CHOOSING}
    if settings.scale.choosing_tasks:
        choosing["tasks"] = settings.scale.choosing_tasks
    else:
        choosing["seed"] = settings.seed + CHOOSING_SEED
    for source in settings.found(L, H):
        name = label(source)
        config = preflight(source, (), ()) or AdaptiveVLM.from_pretrained(source).adaptive_config
        assert config is not None, "L and H are adaptive"
        for budget in BUDGETS[1:-1]:  # at both ends there is only one plan
            modes = [f"fixed:{key}" for key in candidates(config, Budget.parse(budget), name, learned)]
            tried = sweep([source], settings.sweep((budget,), modes, ("none",), **choosing), listener)
            means = [row for row in tried if row.name == MEAN]
            best = max(means, key=lambda row: row.metrics["accuracy"]).config["mode"]
            rows += sweep([source], settings.sweep((budget,), (best,), ("none",)), listener)
    return rows


def candidates(config: AdaptiveConfig, budget: Budget, model: str, learned: Sequence[ResultRow]) -> list[str]:
    """Keys of the plans to try at a budget: every one of variant L if they are few, else the commonest learned ones."""
    counts = PlanCounts.for_config(config)
    k = budget.resolve(config).k
    if config.variant == "L":
        every = list(combinations(range(config.tail_layers), k))
        if len(every) <= CANDIDATES:
            for on in every:
                tail = torch.zeros(1, config.tail_layers, 2, config.groups, dtype=torch.bool)
                tail[:, list(on)] = True
                counts.add(ExecutionPlan(expand_tail(tail, config), config))
            return list(counts.counts)
    for row in learned:
        if row.name != MEAN and _key(row) == (model, str(budget), "learned", "none"):
            counts = counts + PlanCounts.from_dict(row.metrics["plan_counts"])
    return [key for key, _ in counts.counts.most_common(CANDIDATES)]


def _few(settings: Settings) -> int:
    """Questions per task for choosing among many plans: a fifth, but not fewer than twenty."""
    return max(20, (settings.questions or _FEW * 5) // 5)


# -- one picture: answers, plans, attention --------------------------------------------------------------------------


def answer_rows(
    vlm: AdaptiveVLM, model: str, picture: Image.Image, question: str, budgets: Sequence[str]
) -> list[ResultRow]:
    """Tab. C and Fig. E: answers and plans of one input under falling budgets; rows "plan"."""
    rows = []
    for budget in budgets:
        answer = vlm.generate(picture, question, budget=budget, do_sample=False)
        assert answer.plan is not None and vlm.adaptive_config is not None
        metrics = {
            "answer": answer.text,
            "layer_frac": answer.plan.gates[0].float().mean((1, 2)).tolist(),
            "prefix_layers": vlm.adaptive_config.prefix_layers,
            "flops_frac": answer.cost.frac,
        }
        config = {"model": model, "budget": budget, "question": question}
        rows.append(ResultRow("plan", metrics, config, provenance(device=vlm.device)))
    return rows


def attention_rows(
    vlm: AdaptiveVLM, model: str, picture: Image.Image, questions: Sequence[str], budget: str
) -> tuple[list[ResultRow], list[ResultRow]]:
    """Fig. F and G: rows "attention" of each question, averaged over layers, and of the first one layer by layer.

    "image" is a square grid of shares of the latency token's attention.
    """
    overlays, layers = [], []
    for number, question in enumerate(questions):
        seen = look(vlm, picture, question, budget=budget, do_sample=False)
        grids = seen.grids()
        config = {"model": model, "budget": budget, "question": question, "answer": seen.answer.text}
        origin = provenance(device=vlm.device)
        overlays.append(ResultRow("attention", {"image": seen.on_picture().tolist()}, config, origin))
        if number == 0:
            layers = [
                ResultRow("attention", {"image": grid.tolist()}, {**config, "layer": layer}, origin)
                for layer, grid in grids.items()
            ]
    return overlays, layers
