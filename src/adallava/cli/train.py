"""``adallava train``: run a recipe with a progress bar; Ctrl-C leaves a state from which it goes on."""

from __future__ import annotations

import importlib.util
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from adallava.cli.group import Stopped
from adallava.data.llava_json import read_llava_json
from adallava.errors import ConfigError, UnknownNameError, did_you_mean
from adallava.mini import recipe as mini
from adallava.training.dry_run import DryRun, dry_run

# From the module that defines the stages: this room does not speak to transformers itself.
from adallava.training.fit import Interrupted, TrainerCallback
from adallava.training.recipes import RECIPES, TrainRecipe, load_recipe, parse_change
from adallava.training.run import DataPaths, part_together, train_recipe

_LOG_LINES = 20
"""Lines per stage where stderr is no terminal."""


@dataclass(frozen=True)
class TrainOptions:
    """What ``adallava train`` was asked for."""

    recipe: str
    out: Path | None = None
    data: Path | None = None
    images: Path | None = None
    changes: tuple[str, ...] = ()
    dry_run: bool = False
    devices: int = 8
    scale: float = 1.0


def train(options: TrainOptions) -> None:
    """Run a recipe; ``UnknownNameError`` for a name that is none, ``Stopped`` says after Ctrl-C how to go on."""
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError("training needs accelerate, which is not installed: pip install 'adallava[train]'")
    recipe = None
    if options.recipe in mini.RECIPES:
        _check_mini(options)
    else:
        recipe = _load(options)
    if recipe is not None and options.dry_run:
        conversations = None if options.data is None else read_llava_json(options.data)
        found = dry_run(recipe, options.devices, conversations)
        Console(highlight=False).print(dry_run_table(options, recipe, found))
        return
    if options.out is None:
        raise ConfigError("where should the model go? Pass --out FOLDER.")
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a file, expected a folder. Choose another name.")
    console = Console(stderr=True, highlight=False)
    try:
        with TrainingBar(console) as bar:
            if recipe is None:
                result = mini.run(options.recipe, options.out, options.scale, [bar])
            else:
                result = train_recipe(recipe, _paths(options), options.out, [bar])
                part_together()
    except KeyboardInterrupt as error:
        where = "at a checkpoint" if isinstance(error, Interrupted) else "; the last checkpoint is kept"
        raise Stopped(f"stopped {where}. Go on with: {_command(options)}".replace(" ;", ";")) from error
    console.print(f"done: {result}", style="green", markup=False, soft_wrap=True)


def _check_mini(options: TrainOptions) -> None:
    if not (math.isfinite(options.scale) and options.scale > 0):
        raise ConfigError(
            f"scale is {options.scale!r}, expected a number above 0: 1 for the whole recipe, 0.1 for a tenth."
        )
    if options.data or options.images or options.changes or options.dry_run:
        raise ConfigError(
            f"{options.recipe} is a mini recipe, which draws its own data and has no settings but --scale. Leave out "
            "--data, --images, --set and --dry-run."
        )


def _load(options: TrainOptions) -> TrainRecipe:
    """The recipe of the paper's scale that the options name and change."""
    names = [*mini.RECIPES, *RECIPES]
    if options.recipe not in RECIPES and not options.recipe.endswith(".json"):
        raise UnknownNameError(
            f"there is no recipe {options.recipe!r}; known: {', '.join(names)}, or a .json file of your own."
            f"{did_you_mean(options.recipe, names)}"
        )
    if options.scale != 1:
        raise ConfigError(f"--scale is for mini recipes. Use --set epochs={options.scale:g} for fewer steps.")
    return load_recipe(options.recipe, dict(parse_change(text) for text in options.changes))


def _paths(options: TrainOptions) -> DataPaths:
    if options.data is None or options.images is None:
        raise ConfigError(
            f"{options.recipe} trains on LLaVA's data: pass --data llava_v1_5_mix665k.json --images FOLDER; or "
            "--dry-run to see what it would take."
        )
    return DataPaths(options.data, options.images)


def _command(options: TrainOptions) -> str:
    """The command that goes on with what these options began."""
    words = ["adallava", "train", options.recipe, "--out", str(options.out)]
    for name, value in (("--data", options.data), ("--images", options.images)):
        words += [] if value is None else [name, str(value)]
    for change in options.changes:
        words += ["--set", change]
    return shlex.join([*words, *(["--scale", f"{options.scale:g}"] if options.scale != 1 else [])])


def dry_run_table(options: TrainOptions, recipe: TrainRecipe, run: DryRun) -> Table:
    """What a dry run found, one quantity to a line."""
    title = f"{options.recipe}: {recipe.about}"
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for part, (every, trained) in run.parameters.items():
        if every:
            table.add_row(f"{part}, parameters", f"{every / 1e6:,.1f} M, {trained / 1e6:,.1f} M of them trained")
    table.add_row("steps", f"{run.steps:,} of {recipe.global_batch} samples, {run.samples:,} samples in an epoch")
    shared = "a copy of the model each" if recipe.sharding == "none" else f"one model by {recipe.sharding}"
    passes = f"{run.device_batch} samples at once, {run.passes} passes in a step"
    table.add_row(f"each of {options.devices} devices", f"{passes}, {shared}")
    table.add_row("mean sample", f"{run.tokens:,} tokens")
    parts = (("weights", run.weights_gib), ("gradients", run.gradients_gib), ("optimizer", run.optimizer_gib))
    told = ", ".join(f"{part} {gib:.1f}" for part, gib in parts)
    table.add_row(
        "memory of a device", f"{run.device_gib:.1f} GiB: {told}, activations about {run.activations_gib:.1f}"
    )
    table.add_row("compute", f"{run.step_flops / 1e15:,.2f} PFLOPs a step, {run.total_flops / 1e18:,.2f} EFLOPs in all")
    table.add_row("learning rate", f"{recipe.learning_rate:g}, {recipe.warmup_frac:.0%} warm-up, then a cosine")
    return table


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
