"""``adallava export-tasks``: the mini benchmark as tasks of lmms-eval."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Console

from adallava.cli.sweep import split_tasks
from adallava.errors import ConfigError
from adallava.evaluation.lmms_mini import export


def export_tasks(folder: Path, families: str, seed: int, limit: int) -> None:
    """Write the tasks and say how to run them."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("tasks are written with datasets, which comes with lmms-eval: pip install 'adallava[eval]'")
    if limit < 1 or seed < 0:
        raise ConfigError(f"limit is {limit} and seed {seed}, expected 1 or more questions and a seed of 0 or more.")
    names = export(folder, split_tasks(families), seed, limit)
    console = Console(highlight=False)
    console.print(f"written into {folder}: {', '.join(names)}", soft_wrap=True, markup=False)
    console.print(
        f"lmms-eval --model adallava --model_args pretrained=mini-L,budget=60% --tasks {names[0]} "
        f"--include_path {folder} --batch_size 16",
        style="dim",
        soft_wrap=True,
        markup=False,
    )
