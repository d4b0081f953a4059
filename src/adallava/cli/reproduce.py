"""``adallava reproduce``: the paper's tables and figures in miniature, from the mini models."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from adallava.cli.sweep import SweepBar
from adallava.errors import ConfigError, UnknownNameError, did_you_mean
from adallava.evaluation.reproduce import H, L, Settings, answer_rows, attention_rows, content_rows, sweep_rows
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.questions import DESCRIBE, rich_scene
from adallava.mini.scenes import to_image
from adallava.results import ResultRow, provenance, read_rows, write_json

ITEMS = (
    "table-a",
    "table-b",
    "table-c",
    "content",
    "fig-a",
    "fig-b",
    "fig-c",
    "fig-d",
    "fig-e",
    "fig-f",
    "fig-g",
)
_SWEPT = {"table-a", "table-b", "content", "fig-b", "fig-c", "fig-d"}
_SWEEP, _CHOOSING, _LOOKS = "sweep.jsonl", "choosing.jsonl", "looks.json"
_PLAN_BUDGETS = ("100%", "90%", "85%", "75%", "70%", "60%", "50%")


@dataclass(frozen=True)
class ReproduceOptions:
    """What ``adallava reproduce`` was asked for."""

    what: tuple[str, ...]
    out: Path
    limit: int
    seed: int
    models: Path | None = None
    training: Path | None = None


def reproduce(options: ReproduceOptions) -> None:
    """Measure what is asked for and not measured yet, then write tables, figures and the page into ``options.out``."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib, which is not installed: pip install 'adallava[plots]'")
    wanted = _wanted(options)
    settings = Settings(options.limit, options.seed, options.models)
    results = options.out / "results"
    swept: list[ResultRow] = []
    if wanted & _SWEPT:
        with SweepBar() as bar:
            swept = sweep_rows(settings, results / _SWEEP, sorted(wanted), bar)
            if "content" in wanted:
                swept += content_rows(settings, results / _SWEEP, results / _CHOOSING, swept, bar)
    page = _write(options, wanted, swept)
    Console(highlight=False).print(f"written: {page}", soft_wrap=True, markup=False)


def _wanted(options: ReproduceOptions) -> set[str]:
    if options.what == ("all",):
        return set(ITEMS) - ({"fig-a"} if options.training is None else set())
    for name in options.what:
        if name not in ITEMS:
            known = ", ".join(("all", *ITEMS))
            raise UnknownNameError(f"there is no item {name!r}; known: {known}.{did_you_mean(name, ITEMS)}")
    if "fig-a" in options.what and options.training is None:
        raise ConfigError("fig-a is drawn from a run's training.json. Pass --training FILE.")
    return set(options.what)


def _write(options: ReproduceOptions, wanted: set[str], swept: list[ResultRow]) -> Path:
    from adallava.plots import items as made
    from adallava.plots.page import write_items

    runs = made.Runs(swept)
    items = [
        make(runs)
        for name, make in (
            ("table-a", made.table_a),
            ("table-b", made.table_b_item),
            ("content", made.content),
            ("fig-b", made.fig_b),
            ("fig-c", made.fig_c),
            ("fig-d", made.fig_d),
        )
        if name in wanted
    ]
    if "fig-a" in wanted and options.training is not None:
        items.append(made.fig_a(read_rows(options.training)))
    if wanted & {"table-c", "fig-e", "fig-f", "fig-g"}:
        picture, plans, overlays, layers = _looks(options)
        items += [
            item
            for name, item in (
                ("table-c", made.table_c(plans)),
                ("fig-e", made.fig_e(plans)),
                ("fig-f", made.fig_f(picture, overlays)),
                ("fig-g", made.fig_g(layers)),
            )
            if name in wanted
        ]
    items.sort(key=lambda item: ITEMS.index(item.name))
    origin = provenance(seed=options.seed)
    facts = [(name, str(origin[name])) for name in ("adallava", "commit", "torch", "transformers", "device_name")]
    facts += [("seed", str(options.seed)), ("questions per task", str(options.limit))]
    return write_items(items, options.out, "AdaLLaVA in miniature", facts)


def _looks(options: ReproduceOptions) -> tuple[np.ndarray, list[ResultRow], list[ResultRow], list[ResultRow]]:
    """One picture: answers and plans of L and H under falling budgets, and where L's latency token looks."""
    scene, questions = rich_scene(options.seed)
    picture = to_image(scene)
    texts = [question.text for question in questions]
    settings = Settings(options.limit, options.seed, options.models)
    loaded = {name: AdaptiveVLM.from_pretrained(settings.source(name) or name) for name in (L, H)}
    plans = [row for name, vlm in loaded.items() for row in answer_rows(vlm, name, picture, DESCRIBE, _PLAN_BUDGETS)]
    overlays, layers = attention_rows(loaded[L], L, picture, texts, "100%")
    write_json(options.out / "results" / _LOOKS, [*plans, *overlays, *layers], overwrite=True)
    return np.asarray(picture), plans, overlays, layers
