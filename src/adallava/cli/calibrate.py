"""``adallava calibrate``: measure a model on this device, so that budgets in milliseconds can be kept."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adallava.bench.calibrate import CalibrationSettings, ask, calibrate, noise_picture
from adallava.cost.calibration import DeviceProfile, StageModel
from adallava.cost.work import Work, decode_work, prefill_work
from adallava.errors import ConfigError
from adallava.hosts.images import load_image
from adallava.hosts.model import AdaptiveVLM, Request
from adallava.hosts.profiles import profile_path
from adallava.hosts.threads import TAKEN, CoreMeter
from adallava.plots.units import ms_text, share_text
from adallava.selection import parse_selector

_QUESTION = "how many of the red ones are left of the green one ?"


@dataclass(frozen=True)
class CalibrateOptions:
    """What ``adallava calibrate`` was asked for."""

    model: str
    seconds: float
    batch_sizes: str
    image: str | None
    token_selection: str | None


def command(asked: CalibrateOptions, as_json: bool) -> None:
    """Load the model, measure, keep the profile, and say what times can be asked for; see ``--help``."""
    try:
        sizes = tuple(int(part) for part in asked.batch_sizes.split(","))
    except ValueError:
        raise ConfigError(
            f"--batch is {asked.batch_sizes!r}, expected whole numbers with commas, such as '1,4'."
        ) from None
    if asked.token_selection is not None:
        parse_selector(asked.token_selection)
    picture = load_image(asked.image) if asked.image is not None else None
    settings = CalibrationSettings(asked.seconds, sizes, image=picture)
    vlm = AdaptiveVLM.from_pretrained(asked.model, token_selection=asked.token_selection)
    bar = _bar()
    with bar:
        task = bar.add_task(f"measuring {asked.model}", total=1.0)
        meter = CoreMeter()
        profile = calibrate(vlm, asked.model, settings, progress=lambda share: bar.update(task, completed=share))
    path, others = profile_path(profile.fingerprint), meter.others()
    if as_json:
        told = {"path": str(path), "typical": _typical(vlm, profile, settings), "cores_of_others": others}
        print(json.dumps({**dataclasses.asdict(profile), **told}))
        return
    console = Console(highlight=False)
    _show(console, vlm, profile, settings)
    if vlm.device.type == "cpu" and others >= TAKEN:
        console.print(
            f"other programs took {others:.1f} cores meanwhile, so these times are of a busy machine. For budgets that "
            "are not wasted, measure again when it is idle.",
            style="bold",
        )
    console.print(f"kept in {path}", style="dim", markup=False, soft_wrap=True)


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("left:"), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _show(console: Console, vlm: AdaptiveVLM, profile: DeviceProfile, settings: CalibrationSettings) -> None:
    typical = _typical(vlm, profile, settings)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name, justify in (
        ("", "left"),
        ("least", "right"),
        ("everything", "right"),
        ("error", "right"),
        ("bound", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, key, stage in (
        ("first token", "first_token_ms", profile.prefill),
        ("each token after it", "token_ms", profile.decode),
    ):
        if stage is not None:
            least, most = typical[key]
            bound = f"+{share_text(max(stage.factors) - 1)}"
            table.add_row(name, ms_text(least), ms_text(most), share_text(stage.mape), bound)
    console.print(table)
    console.print(f"measured: {_extent(profile.prefill)}", style="dim")
    console.print(
        f"least and everything: 95 % upper bounds for a prompt of {typical['tokens']} tokens, preparation included; "
        "error: mean, of measurements held out; bound: how far above the expected time it lies, at most.",
        style="dim",
    )
    middle = sum(typical["first_token_ms"]) / 2
    console.print(f"try: adallava run IMAGE QUESTION --model {profile.model} --budget '{middle:.3g} ms'")


def _typical(vlm: AdaptiveVLM, profile: DeviceProfile, settings: CalibrationSettings) -> dict[str, Any]:
    """Bounds for a picture and a short question, with nothing but the prefix on and with everything on."""
    picture = settings.image or noise_picture(settings.seed)
    answer = ask(vlm, [Request(_QUESTION, picture)], settings.new_tokens)[0]
    before = answer.timing.prepare_ms + answer.timing.selection_ms
    images = 0 if answer.timing.selection_ms > 0 and vlm.token_selection.place == "tower" else 1
    config = vlm.adaptive_config
    ks = (0, config.max_k if config is not None else 0)

    def bound(stage: StageModel, work: Work) -> float:
        return stage.forecast(work).upper_ms

    lengths = [answer.layer_tokens]
    first = [before + bound(profile.prefill, prefill_work(config, lengths, [k], images)) for k in ks]
    assert profile.decode is not None
    each = [bound(profile.decode, decode_work(config, lengths, [k])) for k in ks]
    return {"tokens": max(answer.layer_tokens), "first_token_ms": first, "token_ms": each}


def _extent(stage: StageModel) -> str:
    ends = [(name, least, most) for name, (least, most) in stage.extent.items()]
    parts = [f"{least} to {most} {name}" if least < most else f"{most} {name}" for name, least, most in ends]
    return f"{stage.fitted + stage.held_out} requests of {', '.join(parts)}".replace("1 rows", "1 row")
