"""What is measured for each table and figure of the paper in miniature: sweeps, plans and looks, as result rows.

All sweeps go into one file, from which a stopped reproduction goes on. The shipped models are enough for most items;
those that need models which are not shipped (controls, models trained under token selection) use the ones found in a
folder that ``adallava train`` wrote, and do without them otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adallava.budget import Budget
from adallava.config import AdaptiveConfig
from adallava.errors import ConfigError
from adallava.evaluation.plans import PlanCounts
from adallava.evaluation.preflight import preflight
from adallava.evaluation.sweep import MEAN, Listener, SweepSettings, sweep
from adallava.hosts.looking import look
from adallava.hosts.model import AdaptiveVLM
from adallava.plan import ExecutionPlan, expand_tail
from adallava.results import ResultRow, provenance

BASE, L, H = "mini-base", "mini-L", "mini-H"
BUDGETS = ("100%", "85%", "70%", "60%", "50%")
PAPER_BUDGETS = ("100%", "85%", "60%")
SELECTIONS = ("none", "prumerge", "prumerge+", "fastv", "random:ratio=0.25", "uniform:ratio=0.25")
DRAWS = 5
CANDIDATES = 20
"""Fixed plans that are tried per budget; all there are, where there are no more."""
CHOOSING_SEED = 1_000_003
"""Added to the seed: the questions on which the best fixed plan is chosen are not those it is tested on."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    limit: int = 300
    """Questions per family and run."""
    seed: int = 1
    """Which test scenes are drawn."""
    models: Path | None = None
    """Folder with trained models beside the shipped ones."""

    def source(self, name: str) -> str | None:
        """Where a model is: the folder's, else the shipped one, else None."""
        if self.models is not None and (self.models / name / "config.json").is_file():
            return str(self.models / name)
        return name if name in (BASE, L, H) else None


def sweep_rows(settings: Settings, out: Path, items: Sequence[str], listener: Listener) -> list[ResultRow]:
    """Run every sweep that ``items`` need, into ``out``; rows of all of them, those done before included."""
    rows: list[ResultRow] = []
    for models, budgets, modes, selections in _sweeps(settings, items):
        parsed = tuple(Budget.parse(budget) for budget in budgets)
        wanted = SweepSettings(parsed, settings.seed, settings.limit, modes, out=out, token_selections=selections)
        rows += sweep(models, wanted, listener)
    return list({(*_key(row), row.name): row for row in rows}.values())


_Sweep = tuple[list[str], tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def _sweeps(settings: Settings, items: Sequence[str]) -> Iterator[_Sweep]:
    wanted = set(items)
    none, learned = ("none",), ("learned",)
    if wanted & {"table-a", "table-b", "fig-b", "fig-c", "fig-d", "content"}:
        yield _found(settings, BASE), ("100%",), learned, none
        yield _found(settings, L, H), BUDGETS, learned, none
    if "table-b" in wanted:
        yield _found(settings, BASE, L, H), PAPER_BUDGETS, learned, SELECTIONS[1:]
        for selection in ("prumerge", "prumerge+", "fastv"):
            trained = _found(settings, f"{L}-{selection}", f"{H}-{selection}")
            if trained:
                yield trained, PAPER_BUDGETS, learned, (selection,)
    if "fig-c" in wanted and (ablations := _found(settings, "mini-L-9-switches", "mini-H-2-heads")):
        yield ablations, BUDGETS, learned, none
    if "fig-d" in wanted:
        draws = tuple("random" if draw == 0 else f"random:{draw}" for draw in range(DRAWS))
        yield _found(settings, L, f"{L}-random"), BUDGETS, draws, none


def _found(settings: Settings, *names: str) -> list[str]:
    return [source for name in names if (source := settings.source(name)) is not None]


def _key(row: ResultRow) -> tuple[str, ...]:
    return tuple(row.config[name] for name in ("model", "budget", "mode", "token_selection"))


# -- learned plans against fixed ones -------------------------------------------------------------------------------


def content_rows(
    settings: Settings, out: Path, choosing: Path, learned: Sequence[ResultRow], listener: Listener
) -> list[ResultRow]:
    """The best single plan of each model and budget, chosen on other questions, then tested: its rows.

    choosing: JSONL file of the runs among which it is chosen. learned: the sweep's rows of the learned plans, of which
    the commonest are candidates where there are too many plans to try all.
    """
    rows: list[ResultRow] = []
    for name in (L, H):
        source = settings.source(name)
        assert source is not None, "both are shipped"
        config = preflight(source, (), ())
        assert config is not None, "a local folder with an adaptive config"
        for budget in BUDGETS[1:-1]:  # at both ends there is only one plan
            parsed = Budget.parse(budget)
            modes = tuple(f"fixed:{key}" for key in candidates(config, parsed, name, learned))
            tried = sweep(
                [source],
                SweepSettings(
                    (parsed,),
                    settings.seed + CHOOSING_SEED,
                    _few(settings),
                    modes,
                    out=choosing,
                    token_selections=("none",),
                ),
                listener,
            )
            means = [row for row in tried if row.name == MEAN]
            best = max(means, key=lambda row: row.metrics["accuracy"]).config["mode"]
            rows += sweep(
                [source],
                SweepSettings((parsed,), settings.seed, settings.limit, (best,), out=out, token_selections=("none",)),
                listener,
            )
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
    """Questions per family for choosing among many plans: a fifth, but not fewer than twenty."""
    return max(20, settings.limit // 5)


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
        grids = {layer: _grid(row) for layer, row in seen.on_image.items()}
        config = {"model": model, "budget": budget, "question": question, "answer": seen.answer.text}
        origin = provenance(device=vlm.device)
        mean = np.mean(list(grids.values()), axis=0)
        overlays.append(ResultRow("attention", {"image": mean.tolist()}, config, origin))
        if number == 0:
            layers = [
                ResultRow("attention", {"image": grid.tolist()}, {**config, "layer": layer}, origin)
                for layer, grid in grids.items()
            ]
    return overlays, layers


def _grid(row: torch.Tensor) -> np.ndarray:
    side = round(len(row) ** 0.5)
    if side * side != len(row):
        raise ConfigError(
            f"the picture has {len(row)} visual tokens, which make no square. Attention is drawn for hosts that see "
            "one square picture, such as LLaVA-1.5."
        )
    return row.float().reshape(side, side).numpy()
