"""``adallava train``: run a recipe with a progress bar; Ctrl-C leaves a state from which it goes on."""

from __future__ import annotations

import importlib.util
import math
import shlex
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adallava.cli.group import Stopped
from adallava.errors import ConfigError
from adallava.mini import recipe as recipes

# From the module that defines the stages: this room does not speak to transformers itself.
from adallava.training.fit import Interrupted, TrainerCallback

_LOG_LINES = 20
"""Lines per stage where stderr is no terminal."""


def train(recipe: str, out: Path, scale: float) -> None:
    """Run ``recipe``; ``UnknownNameError`` for a name that is none, ``Stopped`` says after Ctrl-C how to go on."""
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("training needs accelerate, which is not installed: pip install 'adallava[train]'")
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"scale is {scale!r}, expected a number above 0: 1 for the whole recipe, 0.1 for a tenth.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, expected a folder. Choose another name.")
    console = Console(stderr=True, highlight=False)
    try:
        with TrainingBar(console) as bar:
            result = recipes.run(recipe, out, scale, [bar])
    except KeyboardInterrupt as error:
        where = "at a checkpoint" if isinstance(error, Interrupted) else "; the last checkpoint is kept"
        again = f"adallava train {shlex.quote(recipe)} --out {shlex.quote(str(out))}"
        again += "" if scale == 1 else f" --scale {scale:g}"
        raise Stopped(f"stopped {where}. Go on with: {again}".replace(" ;", ";")) from error
    console.print(f"done: {result}", style="green", markup=False, soft_wrap=True)


class TrainingBar(TrainerCallback):
    """One bar per stage with loss and time left; a line now and then where stderr is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: Any = None
        self.stage, self.next_line = "", 0

    def __enter__(self) -> TrainingBar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar of a stage, at the step of its last checkpoint."""
        self.stage, self.next_line = Path(args.output_dir).parent.name, state.global_step
        self.task = self.progress.add_task(self.stage, total=state.max_steps, completed=state.global_step, loss="-")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if not logs or "loss" not in logs:
            return
        loss = f"{float(logs['loss']):.3f}"
        self.progress.update(self.task, loss=loss)
        if not self.console.is_terminal and state.global_step >= self.next_line:
            self.console.print(f"{self.stage}: step {state.global_step}/{state.max_steps}, loss {loss}", soft_wrap=True)
            self.next_line = state.global_step + max(1, state.max_steps // _LOG_LINES)
