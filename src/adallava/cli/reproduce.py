"""``adallava reproduce``: the paper's tables and figures, in miniature from the mini models or at full scale."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from adallava.cli.sweep import SweepBar
from adallava.errors import ConfigError, UnknownNameError, did_you_mean
from adallava.evaluation.reproduce import (
    Settings,
    answer_rows,
    attention_rows,
    broad_rows,
    check,
    content_rows,
    sweep_rows,
)
from adallava.evaluation.scales import H, L, Scale, find_scale
from adallava.hosts.images import load_image
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
_LOOKS = "looks.json"
_PLAN_BUDGETS = ("100%", "90%", "85%", "75%", "70%", "60%", "50%")


@dataclass(frozen=True)
class ReproduceOptions:
    """What ``adallava reproduce`` was asked for."""

    what: tuple[str, ...]
    out: Path
    scale: str = "mini"
    limit: int | None = None
    seed: int = 1
    models: Path | None = None
    training: Path | None = None
    batch_size: int | None = None
    tasks_folder: Path | None = None
    image: Path | None = None
    """The picture of Tab. C and Fig. E to G; a drawn scene when None."""
    questions: tuple[str, ...] = ()
    """About it; the first is that of Tab. C and Fig. E."""


def reproduce(options: ReproduceOptions) -> None:
    """Measure what is asked for and not measured yet, then write tables, figures and the page into ``options.out``."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib, which is not installed: pip install 'adallava[plots]'")
    wanted, scale = _wanted(options), find_scale(options.scale)
    if (options.image is None) != (not options.questions):
        raise ConfigError("pass --image and --question together: a picture and what to ask about it.")
    settings = Settings(
        options.out / "results",
        scale,
        options.limit,
        options.seed,
        options.models,
        options.batch_size,
        options.tasks_folder,
    )
    swept: list[ResultRow] = []
    broad: list[ResultRow] = []
    if wanted & _SWEPT:
        check(settings, sorted(wanted))
        with SweepBar() as bar:
            swept = sweep_rows(settings, sorted(wanted), bar)
            if "content" in wanted:
                swept += content_rows(settings, swept, bar)
            if "table-a" in wanted:
                broad = broad_rows(settings, bar)
    page = _write(options, settings, wanted, swept, broad)
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


def _write(
    options: ReproduceOptions, settings: Settings, wanted: set[str], swept: list[ResultRow], broad: list[ResultRow]
) -> Path:
    from adallava.plots import items as made
    from adallava.plots.page import write_items

    scale = settings.scale
    roles = scale.roles(settings.models)
    runs = made.Runs(swept, roles)
    makers: dict[str, Callable[[], made.Item]] = {
        "table-a": lambda: made.table_a(made.Runs(broad, roles) if broad else runs),
        "table-b": lambda: made.table_b_item(runs),
        "content": lambda: made.content(runs),
        "fig-b": lambda: made.fig_b(runs),
        "fig-c": lambda: made.fig_c(runs, scale.designs),
        "fig-d": lambda: made.fig_d(runs),
    }
    if options.training is not None:
        history = read_rows(options.training)
        makers["fig-a"] = lambda: made.fig_a(history)
    if wanted & {"table-c", "fig-e", "fig-f", "fig-g"}:
        picture, plans, overlays, layers = _looks(options, settings)
        makers |= {
            "table-c": lambda: made.table_c(plans),
            "fig-e": lambda: made.fig_e(plans),
            "fig-f": lambda: made.fig_f(picture, overlays),
            "fig-g": lambda: made.fig_g(layers),
        }
    items = [makers[name]() for name in ITEMS if name in wanted]
    origin = provenance(seed=options.seed)
    facts = [(name, str(origin[name])) for name in ("adallava", "commit", "torch", "transformers", "device_name")]
    facts += [("seed", str(options.seed)), ("questions per task", str(settings.questions or "all"))]
    return write_items(items, options.out, _title(scale), facts)


def _title(scale: Scale) -> str:
    return "AdaLLaVA in miniature" if scale.name == "mini" else f"AdaLLaVA, {scale.name}"


def _looks(
    options: ReproduceOptions, settings: Settings
) -> tuple[np.ndarray, list[ResultRow], list[ResultRow], list[ResultRow]]:
    """One picture: answers and plans of L and H under falling budgets, and where L's latency token looks."""
    if options.image is not None:
        picture, texts = load_image(options.image), list(options.questions)
        told = texts[0]
    else:
        scene, questions = rich_scene(options.seed)
        picture, texts, told = to_image(scene), [question.text for question in questions], DESCRIBE
    plans: list[ResultRow] = []
    overlays: list[ResultRow] = []
    layers: list[ResultRow] = []
    for role in (L, H):
        (source,) = settings.found(role)
        vlm = AdaptiveVLM.from_pretrained(source)
        plans += answer_rows(vlm, role, picture, told, _PLAN_BUDGETS)
        if role == L:
            overlays, layers = attention_rows(vlm, role, picture, texts, "100%")
    write_json(settings.out / _LOOKS, [*plans, *overlays, *layers], overwrite=True)
    return np.asarray(picture), plans, overlays, layers
