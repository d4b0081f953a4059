"""``adallava``: the commands and their options. What each does is in the module of its name.

Nothing heavy is imported here, so that ``adallava --help`` and a misspelt option answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adallava import __version__
from adallava.cli.group import Commands
from adallava.cli.serve import serve

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SELECTORS = "none, prumerge, prumerge+, fastv, random:ratio=0.25 or uniform:count=16"
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adallava {__version__}")
        raise typer.Exit


@app.callback()
def adallava(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run one vision-language model at any compute budget."""


@app.command()
def run(
    image: Annotated[str, typer.Argument(help="Image file; 'none' to ask without an image.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    budget: Annotated[
        str,
        typer.Option(
            help="Share of the full model's compute, '60%'; FLOPs of the prefill, '2 GFLOPs'; once calibrated, time to "
            "the first token, '80 ms', or of each one after it, '30 ms/token'."
        ),
    ] = "100%",
    model: Annotated[str, typer.Option(help="mini-L, mini-H, mini-base, a checkpoint folder or a hub id.")] = "mini-L",
    more_images: Annotated[
        list[str] | None, typer.Option("--image", help="A further image; may be given several times.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    token_selection: Annotated[
        str | None,
        typer.Option(
            help=f"Which visual tokens are kept: {_SELECTORS}; with settings: 'fastv:layer=3,ratio=0.75'.",
            show_default="the model's own",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer one question about an image within a budget."""
    from adallava.cli.run import RunOptions
    from adallava.cli.run import run as command

    images = [] if image == "none" and not Path(image).exists() else [image]
    command(
        RunOptions((*images, *(more_images or [])), question, budget, model, max_new_tokens, token_selection), as_json
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the HTML report is written.")] = Path("adallava-report.html"),
    seed: Annotated[int, typer.Option(help="Draws another test scene.")] = 0,
    image: Annotated[Path | None, typer.Option(help="Ask about this image instead of a drawn scene.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Ask this instead; may be given several times.")] = None,
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = "100%,85%,60%,50%",
    model: Annotated[
        list[str] | None, typer.Option(help="Models to show instead of mini-base, mini-L and mini-H.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="Show a page in the browser instead: move the budget.")] = False,
    port: Annotated[int | None, typer.Option(help="Of the page.", show_default="a free one from 7860 on")] = None,
) -> None:
    """Ask about a picture at several budgets: answers, plans, FLOPs and times, here and as an HTML report."""
    from adallava.cli.demo import DemoOptions, demo_or_page

    models = tuple(model or (("mini-L", "mini-H") if web else ("mini-base", "mini-L", "mini-H")))
    options = DemoOptions(out, seed, image, tuple(question or ()), budgets, models)
    demo_or_page(options, web, port)


@app.command()
def sweep(
    models: Annotated[list[str], typer.Argument(help="Shipped names, checkpoint folders or hub ids.")],
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = "100%,85%,60%",
    seed: Annotated[int, typer.Option(help="Which test scenes are drawn.")] = 0,
    limit: Annotated[
        int | None,
        typer.Option(help="Questions per task.", show_default="1,000 of a mini task, all of one of lmms-eval"),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, separated by commas: mini for the mini benchmark, its families by name, or tasks of "
            "lmms-eval (extra [eval]) such as pope,mme,gqa."
        ),
    ] = "mini",
    tasks_folder: Annotated[
        Path | None, typer.Option(help="Folder that describes further tasks of lmms-eval (its include_path).")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="Who decides the plans: learned, random, random:1 for another draw, static; several with commas."
        ),
    ] = "learned",
    token_selection: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Which visual tokens are kept: {_SELECTORS}; several with commas, as the two in "
            "'none,fastv:layer=3,ratio=0.75', or in several such options.",
            show_default="each model's own",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file that keeps each finished task; the same sweep goes on from it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy at several budgets and token selections on the mini benchmark, or on tasks of lmms-eval."""
    from adallava.budget import parse_budgets
    from adallava.cli.sweep import split_selections, split_tasks
    from adallava.cli.sweep import sweep as command
    from adallava.evaluation.sweep import SweepSettings

    modes = tuple(part.strip() for part in mode.split(","))
    selections = tuple(part for text in token_selection for part in split_selections(text)) if token_selection else None
    settings = SweepSettings(
        tuple(parse_budgets(budgets)), seed, limit, modes, batch_size, out, selections, split_tasks(tasks), tasks_folder
    )
    command(models, settings, as_json)


@app.command(name="export-tasks")
def export_tasks(
    folder: Annotated[Path, typer.Argument(help="Folder for the tasks and their data.")],
    families: Annotated[str, typer.Option(help="Families, separated by commas; mini for all.")] = "mini",
    seed: Annotated[int, typer.Option(help="Which test scenes are drawn.")] = 0,
    limit: Annotated[int, typer.Option(help="Questions per task.")] = 1000,
) -> None:
    """Write the mini benchmark as tasks of lmms-eval, for its other models and its own command."""
    from adallava.cli.export_tasks import export_tasks as command

    command(folder, families, seed, limit)


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="mini makes all shipped models, llava-1.5-7b-L is the paper's; or a .json file of your own. An "
            "unknown name lists them all."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model and its checkpoints.", show_default="required")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="LLaVA conversations, .json or .jsonl.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that the images' names are relative to.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the recipe, 'learning_rate=2e-5'; may be given several times."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, steps, memory and FLOPs, and train nothing.")
    ] = False,
    devices: Annotated[int, typer.Option(help="Devices that a dry run reckons with.")] = 8,
    scale: Annotated[float, typer.Option(help="Mini recipes: share of the steps, for a quick look.")] = 1.0,
) -> None:
    """Train models by a recipe. Ctrl-C stops at a checkpoint, and the same command goes on from there."""
    from adallava.cli.train import TrainOptions
    from adallava.cli.train import train as command

    command(TrainOptions(recipe, out, data, images, tuple(changes or ()), dry_run, devices, scale))


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="mini-L, mini-H, mini-base, a checkpoint folder or a hub id.")],
    seconds: Annotated[float, typer.Option(help="Time to measure for.")] = 40.0,
    batch: Annotated[str, typer.Option(help="Requests answered together; several with commas.")] = "1",
    image: Annotated[
        str | None, typer.Option(help="A typical picture; matters to models that take any resolution.")
    ] = None,
    token_selection: Annotated[
        str | None, typer.Option(help=f"Which visual tokens are kept: {_SELECTORS}.", show_default="the model's own")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on this device; then budgets such as '80 ms' and '30 ms/token' work."""
    from adallava.cli.calibrate import CalibrateOptions
    from adallava.cli.calibrate import command as measure

    measure(CalibrateOptions(model, seconds, batch, image, token_selection), as_json)


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="speed: do ms follow FLOPs? quantized: with packed weights? paper: at its budgets. scaling: over "
            "sizes. selection: over tokens kept. latency: do budgets in ms hold? load, soak: a server's."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(help="Random weights in the shape of mid, llava-1.5-7b, ...; of latency, load, soak also mini-L."),
    ] = "mid",
    rounds: Annotated[int, typer.Option(help="Everything runs once per round; medians are told.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, or cuda (in bfloat16).")] = "cpu",
    seed: Annotated[int, typer.Option(help="Draws weights, inputs and order.")] = 0,
    out: Annotated[Path | None, typer.Option(help="New JSON file for the result rows.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Result rows to show instead of measuring.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for figures of speed, scaling or load.")] = None,
    as_json: Json = False,
) -> None:
    """Measure times on this machine, side by side in one process."""
    from adallava.bench import BenchSettings
    from adallava.cli.bench import BenchFiles
    from adallava.cli.bench import bench as command

    command(name, BenchSettings(model, rounds, threads, device, seed), BenchFiles(rows, out, figures), as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint folder or hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder to write.")],
    to: Annotated[
        str, typer.Option(help="adallava, or a released layout to go back to: official, llava or mipha.")
    ] = "adallava",
    vision_tower: Annotated[
        str | None, typer.Option(help="Going back: folder or hub id to name as the vision tower.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a released AdaLLaVA, LLaVA-1.5 or Mipha checkpoint, with tokenizer and prompt format; or back."""
    from adallava.cli.convert import convert as command

    command(source, destination, to, vision_tower, as_json)


@app.command()
def parity(
    folder: Annotated[Path, typer.Argument(help="Folder of recordings of the released code, such as tests/golden.")],
    as_json: Json = False,
) -> None:
    """Replay recordings of the released code; status 1 if a difference is past its tolerance."""
    from adallava.cli.parity import parity as command

    command(folder, as_json)


@app.command()
def cost(
    model: Annotated[
        str, typer.Argument(help="llava-1.5-7b, llava-1.5-13b, mipha-3b, mini-L ...; a config.json, folder or hub id.")
    ],
    budget: Annotated[str, typer.Option(help="A share, '60%', or FLOPs of the prefill, '5.1 TFLOPs'.")] = "100%",
    variant: Annotated[
        str | None,
        typer.Option(help="L switches layers, H groups of heads.", show_default="the model's own, or L"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens that enter the decoder, visual and latency tokens included.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Text tokens, template included.", show_default="67, typical of MME")
    ] = None,
    visual_tokens: Annotated[
        int | None,
        typer.Option(help="Visual tokens that enter the decoder.", show_default="one image of this model"),
    ] = None,
    token_selection: Annotated[str, typer.Option(help=f"Which visual tokens are kept: {_SELECTORS}.")] = "none",
    device: Annotated[
        str, typer.Option(help="Device of the roofline times; an unknown one lists all.")
    ] = "nvidia_V100",
    batch: Annotated[int, typer.Option(help="Prompts that run together.")] = 1,
    flash: Annotated[bool, typer.Option("--flash", help="Count attention as one fused operator.")] = False,
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share each layer; costs are per device.")] = 1,
    with_vision: Annotated[bool, typer.Option("--with-vision", help="Show vision tower and projector too.")] = False,
    convention: Annotated[
        str, typer.Option(help="How FLOPs are counted: paper, or strict as a FLOP counter does.")
    ] = "paper",
    as_json: Json = False,
) -> None:
    """Compute what a budget costs: FLOPs, bytes, roofline time and memory, without weights or a device."""
    from adallava.cli.cost import CostOptions
    from adallava.cli.cost import cost as command
    from adallava.cost import Setting

    asked = CostOptions(
        model, budget, variant, tokens, text_tokens, visual_tokens, token_selection, with_vision=with_vision
    )
    command(asked, Setting(device, batch, flash, tensor_parallel, convention), as_json)


@app.command(name="table-b")
def table_b(
    costs: Annotated[bool, typer.Option("--costs", help="The FLOPs and prefill-time columns.")] = False,
    as_json: Json = False,
) -> None:
    """Set the paper's Table B beside what this package computes, cell by cell."""
    from adallava.cli.table_b import print_table_b

    print_table_b(costs, as_json)


@app.command()
def reproduce(
    what: Annotated[
        list[str],
        typer.Argument(help="all, or some of: table-a, table-b, table-c, content, fig-a to fig-g."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results, tables, figures and the page.")] = Path("reproduction"),
    scale: Annotated[
        str,
        typer.Option(help="mini; 7b for the released models on lmms-eval's benchmarks; or a .json file of your own."),
    ] = "mini",
    limit: Annotated[
        int | None, typer.Option(help="Questions per task and run.", show_default="300 of mini, else all")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which test scenes of mini tasks are drawn.")] = 1,
    models: Annotated[
        Path | None, typer.Option(help="Folder of 'adallava train' with controls and models under token selection.")
    ] = None,
    training: Annotated[Path | None, typer.Option(help="training.json of a run, for fig-a.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Questions answered together.", show_default="64 of mini, else 8")
    ] = None,
    tasks_folder: Annotated[
        Path | None, typer.Option(help="Folder that describes further tasks of lmms-eval (its include_path).")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Picture of table-c and fig-e to -g; see --question.", show_default="a scene")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="What to ask about --image; several to compare where it looks.")
    ] = None,
) -> None:
    """Make the paper's tables and figures, in miniature or at full scale; a stopped run goes on where it was."""
    from adallava.cli.reproduce import ReproduceOptions
    from adallava.cli.reproduce import reproduce as command

    shown = (image, tuple(question or ()))
    command(ReproduceOptions(tuple(what), out, scale, limit, seed, models, training, batch_size, tasks_folder, *shown))


@app.command()
def explain(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    questions: Annotated[list[str], typer.Argument(help="What to ask; several to compare where it looks.")],
    budget: Annotated[str, typer.Option(help="Share of the full model's compute, '60%'.")] = "100%",
    model: Annotated[str, typer.Option(help="mini-L, mini-H, a checkpoint folder or a hub id.")] = "mini-L",
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the page.")] = Path("explained"),
    as_json: Json = False,
) -> None:
    """Show the plan of a request and where its latency token looks: as pictures, a page and numbers."""
    from adallava.cli.explain import ExplainOptions
    from adallava.cli.explain import explain as command

    command(ExplainOptions(image, tuple(questions), budget, model, out), as_json)


app.command()(serve)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check the installation: packages, device, shipped models. Exits with status 1 if something fails."""
    from adallava.cli.doctor import doctor as command

    command(as_json)


if __name__ == "__main__":  # so that torchrun can start it
    app()
