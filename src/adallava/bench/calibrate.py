"""Measure a device profile: requests of all sizes, at all k, in random order, through the call that users make."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from adallava.cost.calibration import MINIMUM_MEASUREMENTS, DeviceProfile, Measured, fit_profile
from adallava.errors import ConfigError, ProfileError
from adallava.hosts.answer import Answer
from adallava.hosts.memory import keep_memory
from adallava.hosts.model import AdaptiveVLM, Request
from adallava.hosts.profiles import fingerprint, profile_path

_WORDS = [
    "the",
    "red",
    "blue",
    "green",
    "seven",
    "star",
    "left",
    "right",
    "above",
    "below",
    "how",
    "many",
    "which",
    "of",
    "a",
    "and",
    "is",
    "there",
    "what",
    "two",
]
_PICTURE = 336
_WARM_UP_CALLS = 3
_WARM_UP_SECONDS = 2.0


@dataclass(frozen=True)
class CalibrationSettings:
    """What to measure; ``ConfigError`` for values out of range."""

    seconds: float = 40.0
    """Time to measure for, warm-up not counted."""
    batch_sizes: tuple[int, ...] = (1,)
    """Requests answered together."""
    words: tuple[int, int] = (4, 256)
    """Fewest and most words of a question."""
    without_image: int = 3
    """One request in so many: quickly measured, and what they take says most about what is paid in any case."""
    new_tokens: int = 3
    """Tokens of an answer: the first tells about the prefill, the others about decoding."""
    image: Image.Image | None = None
    """A typical picture; None for noise of 336 x 336. Models that take any resolution depend on it."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 < self.seconds <= 86_400:
            raise ConfigError(f"seconds is {self.seconds!r}, expected a number above 0, of at most a day.")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes is {self.batch_sizes!r}, expected whole numbers of 1 or more.")
        if not 1 <= self.words[0] <= self.words[1]:
            raise ConfigError(f"words is {self.words!r}, expected the fewest and the most words of a question.")
        if self.without_image < 2:
            raise ConfigError(f"without_image is {self.without_image!r}, expected one request in 2 or more.")
        if self.new_tokens < 2:
            raise ConfigError(f"new_tokens is {self.new_tokens!r}, expected 2 or more: decoding is measured too.")


Progress = Callable[[float], None]


class Recorder:
    """Keeps what every request did and took."""

    def __init__(self) -> None:
        self.measured: list[Measured] = []

    def observe(self, measured: Measured) -> None:
        """Keep one batch."""
        self.measured.append(measured)


def calibrate(
    vlm: AdaptiveVLM,
    name: str,
    settings: CalibrationSettings | None = None,
    *,
    progress: Progress | None = None,
    save: bool = True,
) -> DeviceProfile:
    """Measure ``vlm`` on its device, use the profile from now on, and keep it where budgets in time look for it.

    name: what the model is called in messages. progress: called with the share of the time that is over.
    save: False keeps the profile in memory only. Raises ``ProfileError`` where the time is too short for the device.
    """
    settings = settings or CalibrationSettings()
    if vlm.processor is None:
        raise ProfileError(f"{name} has no processor, so it cannot be asked. Load it with its tokenizer.")
    keep_memory()
    vlm.profiles.use(None)
    measured = measure(vlm, settings, progress or (lambda share: None))
    profile = fit_profile(name, fingerprint(vlm), measured, seed=settings.seed)
    if save:
        profile.save(profile_path(profile.fingerprint))
    vlm.profiles.use(profile)
    return profile


def measure(vlm: AdaptiveVLM, settings: CalibrationSettings, progress: Progress) -> list[Measured]:
    """What random requests did and took."""
    batches = random_batches(vlm, settings)
    _warm_up(vlm, batches, settings)
    recorder = Recorder()
    started = time.perf_counter()
    with vlm.profiles.recorded_by(recorder):
        while (passed := time.perf_counter() - started) < settings.seconds:
            progress(passed / settings.seconds)
            ask(vlm, next(batches), settings.new_tokens)
    progress(1.0)
    if len(recorder.measured) < MINIMUM_MEASUREMENTS:
        raise _too_slow(settings.seconds, (time.perf_counter() - started) / len(recorder.measured))
    return recorder.measured


def _warm_up(vlm: AdaptiveVLM, batches: Iterator[list[Request]], settings: CalibrationSettings) -> None:
    """A few requests that are not counted, and a word in time where the others would take too long."""
    started, calls, quickest = time.perf_counter(), 0, math.inf
    while calls < _WARM_UP_CALLS or time.perf_counter() - started < _WARM_UP_SECONDS:
        before = time.perf_counter()
        ask(vlm, next(batches), settings.new_tokens)
        calls, quickest = calls + 1, min(quickest, time.perf_counter() - before)
    if settings.seconds < quickest * MINIMUM_MEASUREMENTS:
        raise _too_slow(settings.seconds, quickest)


def _too_slow(seconds: float, each: float) -> ProfileError:
    return ProfileError(
        f"{seconds:g} seconds are too few on this device: a request takes about {each:.2g} s, and "
        f"{MINIMUM_MEASUREMENTS} are needed for a bound. Measure for {1.5 * each * MINIMUM_MEASUREMENTS:.0f} seconds."
    )


def ask(vlm: AdaptiveVLM, requests: list[Request], new_tokens: int) -> list[Answer]:
    """Answers of exactly ``new_tokens`` tokens each."""
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return vlm.generate_batch(requests, **options)


def random_batches(vlm: AdaptiveVLM, settings: CalibrationSettings) -> Iterator[list[Request]]:
    """Batches without end: sizes, question lengths and k drawn from shuffled decks, so that few suffice to see all."""
    rng = random.Random(settings.seed)
    picture = settings.image or noise_picture(settings.seed)
    least, most = settings.words
    lengths = _deck(rng, sorted({round(least * (most / least) ** (i / 7)) for i in range(8)}))
    budgets = _deck(rng, vlm.reachable_budgets())
    sizes = _deck(rng, settings.batch_sizes)
    pictures = _deck(rng, [picture] * (settings.without_image - 1) + [None])
    while True:
        yield [
            Request(random_question(rng, next(lengths)), next(pictures), budget=next(budgets))
            for _ in range(next(sizes))
        ]


def random_question(rng: random.Random, words: int) -> str:
    """So many everyday words."""
    return " ".join(rng.choices(_WORDS, k=words))


def noise_picture(seed: int) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (_PICTURE, _PICTURE, 3), dtype=np.uint8))


def _deck(rng: random.Random, cards: Any) -> Iterator[Any]:
    while True:
        yield from rng.sample(list(cards), len(cards))
