"""``adallava explain``: the plan of one request, and what the latency token looked at when it was decided."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from adallava.cli.show import check_question
from adallava.errors import ConfigError
from adallava.evaluation.reproduce import answer_rows, attention_rows
from adallava.hosts.images import load_image
from adallava.hosts.model import AdaptiveVLM
from adallava.results import write_json


@dataclass(frozen=True)
class ExplainOptions:
    """What ``adallava explain`` was asked for."""

    image: Path
    questions: tuple[str, ...]
    budget: str
    model: str
    out: Path


def explain(options: ExplainOptions, as_json: bool) -> None:
    """Answer every question and write pictures of plan and attention, and ``explain.json``, into ``options.out``."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib, which is not installed: pip install 'adallava[plots]'")
    from adallava.plots import items
    from adallava.plots.page import write_items

    for question in options.questions:
        check_question(question)
    picture = load_image(options.image)
    vlm = AdaptiveVLM.from_pretrained(options.model, token_selection="none")
    if vlm.adaptive_config is None:
        raise ConfigError(f"{options.model} is a base model, which has no plan to explain. Load an adaptive model.")
    name = Path(options.model).name
    plans = [row for text in options.questions for row in answer_rows(vlm, name, picture, text, [options.budget])]
    overlays, layers = attention_rows(vlm, name, picture, options.questions, options.budget)
    made = [
        items.fig_e(plans, by="question"),
        items.fig_f(np.asarray(picture), overlays),
        items.fig_g(layers),
        items.table_c(plans),
    ]
    title = f"{name} at {options.budget}: {options.image.name}"
    page = write_items(made, options.out, title, [("model", options.model), ("budget", options.budget)])
    write_json(options.out / "explain.json", [*plans, *overlays, *layers], overwrite=True)
    if as_json:
        print(json.dumps([row.to_dict() for row in (*plans, *layers)], indent=2))
        return
    console = Console(highlight=False)
    for row in plans:
        marks = "".join("■" if share == 1 else "□" if share == 0 else "▪" for share in row.metrics["layer_frac"])
        console.print(f"{row.config['question']}  [bold]{row.metrics['answer']}[/bold]  {marks}", soft_wrap=True)
    console.print(f"written: {page}", soft_wrap=True, markup=False)
