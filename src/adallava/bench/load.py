"""What a server does under load: requests that come at random, whether or not those before them are done.

The capacity is measured first: how many requests a second the whole model answers when there is always one more. Then,
at multiples of that rate, the same questions come at the same random times under three policies: the governor, which
gives each request what the load allows, and fixed budgets of 100 % and 60 %. Mini models get questions of the mini
benchmark, so that less work shows as fewer right answers; a refused request is no right answer, and not in time. Models
of random weights get a picture of noise and random words, to which there is no right answer.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from adallava.bench import BenchSettings
from adallava.bench.calibrate import CalibrationSettings, calibrate, noise_picture, random_question
from adallava.bench.models import SHAPES, model_named
from adallava.budget import Budget
from adallava.hosts.model import AdaptiveVLM, Request
from adallava.hosts.prompts import Prompt, to_prompt
from adallava.hosts.threads import apart
from adallava.mini.questions import FAMILIES, Item, benchmark
from adallava.mini.scenes import to_image
from adallava.mini.scoring import score
from adallava.results import ResultRow, provenance
from adallava.serving.engine import Engine
from adallava.serving.jobs import Begun, Ended, Event, Failed, Job, Limits, OverloadedError
from adallava.serving.speech import Sampling

LOADS = (0.5, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0)
LOADS_OF_SHAPES = (0.5, 1.0, 1.4, 2.0, 3.0)
"""Of models of random weights, which take longer."""
POLICIES: dict[str, Budget | None] = {
    "governor": None,
    "fixed 100%": Budget.parse("100%"),
    "fixed 60%": Budget.parse("60%"),
}
CALIBRATION_SECONDS = 40.0
REQUESTS_PER_ROUND = 20
"""Of a load are asked ``rounds`` times as many requests."""
OBJECTIVE_OVER_IDLE = 8.0
"""The objective, in median first tokens of the whole model when nobody else is there."""
_TOKENS, _TIMEOUT_S = 6, 600.0
_WORDS = (4, 64)
_SHORT = tuple(family for family in FAMILIES if family != "description")


@dataclass
class Asked:
    """One request, and how it went; ``item`` is the question where the right answer is known."""

    prompt: Prompt
    item: Item | None = None
    at_s: float | None = None
    """When it came, in seconds of its run."""
    begun: Begun | None = None
    ended: Ended | None = None
    refused: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        """Note an event of its job."""
        if isinstance(event, Begun):
            self.begun = event
        elif isinstance(event, Ended | Failed):
            self.ended = event if isinstance(event, Ended) else None
            self.over.set()


def measure(settings: BenchSettings) -> list[ResultRow]:
    """One row for each load and policy."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    vlm = apart(lambda: model_named(settings.model, settings.device))
    asking, loads = (noise, LOADS_OF_SHAPES) if settings.model in SHAPES else (questions, LOADS)
    measured = CalibrationSettings(CALIBRATION_SECONDS, seed=settings.seed)
    profile = apart(lambda: calibrate(vlm, settings.model, measured, save=False))
    count = REQUESTS_PER_ROUND * settings.rounds
    objective = OBJECTIVE_OVER_IDLE * idle_ms(vlm, asking(min(count, 40), settings.seed))
    capacity = capacity_of(vlm, asking(count, settings.seed + 1))
    rows = []
    origin = provenance(device=vlm.device, dtype=next(vlm.model.parameters()).dtype, seed=settings.seed)
    for load in loads:
        arrivals = poisson(count, load * capacity, settings.seed)
        for name, budget in POLICIES.items():
            vlm.profiles.use(profile)  # a fresh forecaster, which has learned nothing of the load before
            asked = asking(count, settings.seed)
            began = time.perf_counter()
            run(vlm, asked, budget, objective, arrivals)
            seconds = time.perf_counter() - began
            config = {"model": settings.model, "load": load, "policy": name, "requests": count}
            told = {"capacity_per_s": capacity, "objective_ms": objective, **_summary(asked, objective, seconds)}
            rows.append(ResultRow("load", told, config, origin))
    return rows


def questions(count: int, seed: int) -> list[Asked]:
    """As many questions of each family, about scenes of their own, in random order."""
    items = [item for family in _SHORT for item in benchmark(family, seed, -(-count // len(_SHORT)))]
    random.Random(seed).shuffle(items)
    return [Asked(to_prompt(Request(item.question.text, to_image(item.scene))), item) for item in items[:count]]


def noise(count: int, seed: int) -> list[Asked]:
    """Random words about a picture of noise, which is what a model of random weights can be asked."""
    rng, picture = random.Random(seed), noise_picture(seed)
    return [Asked(to_prompt(Request(random_question(rng, rng.randint(*_WORDS)), picture))) for _ in range(count)]


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which requests come, as a Poisson process."""
    rng = random.Random(seed)
    at, made = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        made.append(at)
    return made


def run(
    vlm: AdaptiveVLM,
    asked: Sequence[Asked],
    budget: Budget | None,
    objective: float | None = None,
    arrivals: Sequence[float] | None = None,
    *,
    each: bool = False,
    over: threading.Event | None = None,
) -> Sequence[Asked]:
    """Ask everything and wait for the answers.

    arrivals: seconds at which requests come, all at once when None; each: only when the one before is done; over: when
    set, nothing more is asked and nothing waited for.
    """
    over = over or threading.Event()
    limits, began = Limits(queue=len(asked), timeout_s=_TIMEOUT_S), time.perf_counter()
    with Engine(vlm, limits, objective) as engine:
        for number, one in enumerate(asked):
            if arrivals is not None:
                over.wait(max(0.0, began + arrivals[number] - time.perf_counter()))
            if over.is_set():
                return asked
            one.at_s = time.perf_counter() - began
            try:
                engine.submit(Job(one.prompt, Sampling(_TOKENS), one, budget))
            except OverloadedError:
                one.refused = True
                one.over.set()
            if each:
                one.over.wait(_TIMEOUT_S)
        for one in asked:
            one.over.wait(_TIMEOUT_S)
    return asked


def idle_ms(vlm: AdaptiveVLM, asked: Sequence[Asked]) -> float:
    """Median time to the first token of the whole model when nobody else is there."""
    run(vlm, asked, POLICIES["fixed 100%"], each=True)
    return statistics.median(one.begun.first_token_ms for one in asked if one.begun)


def capacity_of(vlm: AdaptiveVLM, asked: Sequence[Asked]) -> float:
    """Requests a second that the whole model answers when there is always one more."""
    began = time.perf_counter()
    run(vlm, asked, POLICIES["fixed 100%"])
    return len(asked) / (time.perf_counter() - began)


def _summary(asked: Sequence[Asked], objective: float, seconds: float) -> dict[str, object]:
    answered = [one for one in asked if one.begun is not None and one.ended is not None]
    first = np.array([one.begun.first_token_ms for one in answered if one.begun])
    within = [one for one in answered if one.begun and one.begun.first_token_ms <= objective]
    right = [score(one.item.question, one.ended.text) for one in answered if one.ended and one.item]
    accepted = [one for one in asked if not one.refused]
    told: dict[str, object] = {
        "refused_frac": 1 - len(accepted) / len(asked),
        "within_frac": len(within) / len(asked),
        "within_accepted_frac": len(within) / len(accepted) if accepted else None,
        "goodput_per_s": len(within) / seconds,
        "answered": len(answered),
        "accuracy": sum(right) / len(right) if right else None,
        "right_frac": sum(right) / len(asked) if asked[0].item else None,
        "mean_budget_frac": statistics.fmean(one.begun.plan.fraction[0] for one in answered if one.begun)
        if answered
        else None,
    }
    for name, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        told[f"first_token_ms_{name}"] = float(np.percentile(first, share)) if len(first) else None
    return told
