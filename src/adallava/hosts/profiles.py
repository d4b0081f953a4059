"""Where device profiles are kept, and what of a model and a device its times depend on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import transformers

from adallava import __version__
from adallava.cost import ModelSpec
from adallava.cost.calibration import DeviceProfile, Measured
from adallava.cost.forecast import Forecaster
from adallava.errors import ProfileError
from adallava.hosts.answer import Foretold
from adallava.hosts.memory import keep_memory
from adallava.hosts.threads import CoreMeter, asked_threads
from adallava.hosts.visual import Selector
from adallava.results import device_name
from adallava.selection import describe_selector

if TYPE_CHECKING:
    from adallava.hosts.model import AdaptiveVLM

FOLDER_VARIABLE = "ADALLAVA_PROFILES"
_TOWER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


def fingerprint(vlm: AdaptiveVLM, selector: Selector | None = None) -> dict[str, str]:
    """What the times of ``vlm`` depend on, as plain text; selector: the model's own when None."""
    device = vlm.device
    named = {
        "model": _shape(vlm),
        "token selection": describe_selector(selector or vlm.token_selection),
        "device": device_name(str(device)) or platform.machine(),
        "dtype": str(next(vlm.model.parameters()).dtype).removeprefix("torch."),
        "attention": str(vlm.model.config._attn_implementation),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "adallava": __version__,
    }
    return named if device.type != "cpu" else {**named, "threads": str(asked_threads())}


def _shape(vlm: AdaptiveVLM) -> str:
    """A name for everything that has this model's sizes and switches, whatever its weights."""
    adaptive, tower = vlm.adaptive_config, getattr(vlm.model.config, "vision_config", None)
    raw = (getattr(tower, name, None) for name in _TOWER_SIZES)
    sizes = tuple(tuple(size) if isinstance(size, list) else size for size in raw)
    switches = None if adaptive is None else (adaptive.variant, adaptive.prefix_layers, adaptive.heads_per_switch)
    return f"{type(vlm.model).__name__} {_digest(vlm.spec, sizes, switches)}"


@functools.lru_cache  # asked at every request with a budget in time
def _digest(spec: ModelSpec, sizes: tuple[object, ...], switches: tuple[str, int, int] | None) -> str:
    facts = {"text": asdict(spec), "tower": dict(zip(_TOWER_SIZES, sizes, strict=True)), "adaptive": switches}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def profile_folder() -> Path:
    """Where profiles are kept: $ADALLAVA_PROFILES, or ``adallava/profiles`` in the user's cache folder."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "adallava" / "profiles"


def profile_path(print_of: dict[str, str]) -> Path:
    """The file of a model with a token selection on a device, where ``calibrate`` writes and a budget in time looks."""
    name = f"{print_of['model']}-{print_of['token selection']}-{print_of['device']}"
    return profile_folder() / (re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") + ".json")


def find_profile(print_of: dict[str, str], budget: object) -> DeviceProfile:
    """The profile that ``calibrate`` left; ``ProfileError`` says that there is none."""
    path = profile_path(print_of)
    if not path.exists():
        raise ProfileError(
            f"budget {budget} needs a device profile of this model, and there is none at {path}. Measure one with "
            "'adallava calibrate MODEL' (less than a minute), or write a share such as '60%'."
        )
    return DeviceProfile.load(path)


class Observer(Protocol):
    """What learns from requests, as ``Forecaster`` does."""

    def observe(self, measured: Measured) -> None:
        """What a batch of requests did and took."""


class Profiles:
    """The forecasters of one model: of a profile that was set, or of those that ``calibrate`` left."""

    def __init__(self) -> None:
        self._chosen: Forecaster | None = None
        self._found: dict[str, Forecaster] = {}
        self._recorder: Observer | None = None
        self._meter = CoreMeter()

    @contextlib.contextmanager
    def recorded_by(self, recorder: Observer) -> Iterator[None]:
        """Let ``recorder`` see what each request does and takes."""
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None

    def use(self, profile: DeviceProfile | Forecaster | str | Path | None, *, correct: bool = True) -> None:
        """Take ``profile``, the file that it is in, or a forecaster; None goes back to what ``calibrate`` left.

        correct: follow a device that is busier or quicker than when it was measured.
        """
        if isinstance(profile, str | Path):
            profile = DeviceProfile.load(profile)
        if isinstance(profile, DeviceProfile):
            profile = Forecaster(profile, correct=correct)
        self._chosen = profile
        self._found.clear()

    def get(self, vlm: AdaptiveVLM, selector: Selector, budget: object) -> Forecaster:
        """The forecaster for ``vlm`` as it is now; ``ProfileError`` where there is none or another one is needed."""
        keep_memory()
        print_of = fingerprint(vlm, selector)
        selection = print_of["token selection"]
        # Only what holds is in use: requests are foretold by it from now on.
        found = self._chosen or self._found.get(selection) or Forecaster(find_profile(print_of, budget))
        try:
            found.profile.check(print_of)
        except ProfileError:
            self._found.pop(selection, None)
            raise
        # Whoever comes first on several threads: what one learns, all know.
        return found if self._chosen is not None else self._found.setdefault(selection, found)

    def in_use(self, selector: Selector) -> Forecaster | None:
        """The forecaster that ``use`` set, or that a budget in time or ``get`` has found; None before."""
        return self._chosen or self._found.get(describe_selector(selector))

    def threads(self, vlm: AdaptiveVLM, selector: Selector, *, timed: bool) -> int:
        """CPU threads on which a request is to run; the forecaster in use speaks for that many from now on.

        Those that the program asks for; or, with a budget in time (``timed``) and a forecaster that follows the device,
        as many of them as other programs leave cores for.
        """
        asked, forecaster = asked_threads(), self.in_use(selector)
        if vlm.device.type != "cpu" or forecaster is None:
            return asked
        threads = min(asked, self._meter.free()) if timed and forecaster.correct else asked
        forecaster.on_threads(threads)
        return threads

    def learning(self, selector: Selector) -> bool:
        """Whether anybody wants to know what requests take, stage by stage."""
        return self.in_use(selector) is not None or self._recorder is not None

    def account(self, selector: Selector, measured: Measured, elapsed_ms: float) -> Foretold | None:
        """Tell the forecaster in use and a recorder what a batch did and took; returns what it had been foretold.

        elapsed_ms: time between the call and the decision on the budget. None where no forecaster is in use.
        """
        forecaster, foretold = self.in_use(selector), None
        if forecaster is not None:
            decode = measured.decode if forecaster.profile.decode is not None else None
            step = None if decode is None else forecaster.decode(decode.work)
            foretold = Foretold(forecaster.prefill(measured.prefill.work, elapsed_ms), step)
        for observer in (forecaster, self._recorder):
            if observer is not None:
                observer.observe(measured)
        return foretold
