"""``adallava doctor``: is this installation in order, and if not, what to do.

Each check is a function that returns what it found. A check never raises: what is broken is the thing to report.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adallava import __version__
from adallava.errors import AdaLlavaError

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
_MARKS = {"ok": "✓", "warn": "!", "fail": "✗"}
_MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "lmms-eval": "lmms_eval"}


@dataclass(frozen=True)
class Check:
    """What one check found; ``remedy`` is empty where nothing is to be done."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def doctor(as_json: bool) -> None:
    """Print every check; exit with status 1 if one fails."""
    groups = (_python, _packages, _torchvision, _device, _entry_point, _lmms_eval, _models)
    checks = [check for group in groups for check in _safe(group)]
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _print(checks)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def _safe(group: Callable[[], Iterator[Check]]) -> list[Check]:
    try:
        return list(group())
    except Exception as error:  # a doctor that dies of the disease helps nobody
        remedy = "Install adallava again: pip install --force-reinstall adallava"
        return [Check(group.__name__.strip("_"), "fail", f"{type(error).__name__}: {error}", remedy)]


def _print(checks: list[Check]) -> None:
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for check in checks:
        style = _STYLES[check.status]
        detail = Text(check.detail)
        if check.remedy:
            detail.append(f"\n→ {check.remedy}", style=style)
        table.add_row(Text(_MARKS[check.status], style=style), check.name, detail)
    console.print(table)
    counts = {status: sum(check.status == status for check in checks) for status in _STYLES}
    console.print(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed", style="dim")


# -- the checks -------------------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    version, supported = platform.python_version(), (3, 10) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if supported else "Use Python 3.10 to 3.13."
    yield Check("Python", "ok" if supported else "warn", f"{version} on {platform.platform()}", remedy)
    yield Check("adallava", "ok", __version__)


def _packages() -> Iterator[Check]:
    """The declared dependencies: installed, importable, and in the declared range."""
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires("adallava") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "warn", "adallava runs from source and is not installed", "pip install -e .")
        return
    for requirement in declared:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement, "fail", f"pip install '{_plain(requirement)}'")
    # "dev" is for those who work on adallava itself.
    for extra in ("train", "plots", "eval"):
        for requirement in declared:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                yield _package(requirement, "warn", f"Only for the extra [{extra}]: pip install 'adallava[{extra}]'")


def _package(requirement: Requirement, otherwise: Literal["warn", "fail"], remedy: str) -> Check:
    name = requirement.name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, otherwise, "not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        detail = f"{version}, tested with {requirement.specifier}"
        return Check(name, "warn", detail, f"pip install '{_plain(requirement)}'")
    try:
        importlib.import_module(_MODULES.get(name.lower(), name))
    except Exception as error:
        return Check(name, otherwise, f"{version} is installed but cannot be imported: {error}", remedy)
    return Check(name, "ok", version)


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _torchvision() -> Iterator[Check]:
    """A torchvision of another torch breaks the import of image processors, with a message that names neither."""
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        yield Check("torchvision", "ok", "not installed, not needed")
        return
    needs = importlib.metadata.requires("torchvision") or []
    wanted = next((match[1] for text in needs if (match := re.match(r"torch\s*\(?==\s*([\w.+]+)", text))), None)
    found = importlib.metadata.version("torch")
    remedy = (
        "Install the torchvision of this torch, or remove it, as adallava does not need it: pip uninstall torchvision"
    )
    if wanted is not None and wanted.partition("+")[0] != found.partition("+")[0]:
        yield Check("torchvision", "warn", f"{version} was built for torch {wanted}, but torch is {found}", remedy)
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        yield Check("torchvision", "fail", f"{version} cannot be imported: {error}", remedy)
    else:
        yield Check("torchvision", "ok", version)


def _device() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        yield Check("device", "ok", f"cuda: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    elif torch.version.cuda is not None and shutil.which("nvidia-smi"):
        yield Check(
            "device",
            "warn",
            f"cpu, although torch is built for CUDA {torch.version.cuda}",
            "Check that nvidia-smi shows a device and that its driver is new enough for this CUDA version.",
        )
    else:
        yield Check("device", "ok", "cpu")
    threads, cores = torch.get_num_threads(), _cores()
    remedy = "" if threads <= cores else f"More threads than cores slow everything down: export OMP_NUM_THREADS={cores}"
    yield Check("threads", "warn" if remedy else "ok", f"{threads} of {cores} cores", remedy)


def _cores() -> int:
    # What this process may use, which in a container is less than the machine has.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _entry_point() -> Iterator[Check]:
    points = importlib.metadata.entry_points(group="console_scripts", name="adallava")
    for point in points:
        try:
            point.load()
        except Exception as error:
            yield Check("command", "fail", f"{point.value} cannot be loaded: {error}", "Reinstall adallava.")
            return
    if not points:
        yield Check("command", "warn", "the command adallava is not installed", "pip install -e .")
        return
    yield Check("command", "ok", shutil.which("adallava") or "installed; its folder is not in PATH")


def _lmms_eval() -> Iterator[Check]:
    """lmms-eval only logs that an entry point is broken, and then does not know the model."""
    if importlib.util.find_spec("lmms_eval") is None:
        return  # the packages say so
    points = importlib.metadata.entry_points(group="lmms_eval.models", name="adallava")
    if not points:
        yield Check("lmms-eval", "warn", "it does not know adallava, which is not installed", "pip install -e .")
    for point in points:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it logs there, and this may be JSON
                from lmms_eval.models import get_model

                for manifest in point.load()():
                    get_model(manifest.model_id)
        except Exception as error:
            remedy = "Install lmms-eval again: pip install --force-reinstall 'adallava[eval]'"
            yield Check("lmms-eval", "fail", f"{point.value} cannot be loaded: {error}", remedy)
            continue
        yield Check("lmms-eval", "ok", "knows --model adallava")


def _models() -> Iterator[Check]:
    """The shipped models load and answer, adaptive ones also at their smallest budget."""
    from adallava.hosts import load

    for name in load.SHIPPED:
        try:
            yield Check(name, "ok", _try(name))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            detail = first if isinstance(error, AdaLlavaError) else f"{type(error).__name__}: {first}"
            yield Check(
                name, "fail", detail, "Install adallava again, or make the models: adallava train mini --out DIR"
            )


def _try(name: str) -> str:
    from adallava.hosts.model import AdaptiveVLM
    from adallava.mini.scenes import sample_scene, to_image

    started = time.perf_counter()
    vlm = AdaptiveVLM.from_pretrained(name)
    loaded = time.perf_counter()
    image, smallest = to_image(sample_scene("test", 0, 0)), vlm.reachable_budgets()[0]
    budgets = dict.fromkeys(["100%", str(smallest)])
    for budget in budgets:
        vlm.generate(image, "what numbers are there ?", budget=budget, max_new_tokens=8)
    answered = time.perf_counter()
    return f"loads in {loaded - started:.1f} s, answers at {' and '.join(budgets)} in {answered - loaded:.1f} s"
