"""How budgets in milliseconds hold: idle and beside a busy program, with and without the online correction.

A model is calibrated as a user would, then asked with random budgets. Each request is asked twice, under a forecaster
that learns and under one that keeps to the profile, in random order. Budgets are drawn between what the least and the
whole model are bounded by at that moment: by a forecaster of its own, a scout, which learns from requests that nobody
else sees, each asked just before with all the time it needs. By the profile alone none could be kept beside another
process, and where a machine is shared with others, it would be their work that is measured.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from adallava.bench import BenchSettings
from adallava.bench.calibrate import CalibrationSettings, Recorder, ask, calibrate, random_batches
from adallava.bench.models import model_named
from adallava.bench.peaks import measured_device
from adallava.budget import Budget
from adallava.cost import full_loads, pass_time_ms, plan_loads, prefill, projector_flops, vision_tower_flops
from adallava.cost.calibration import DeviceProfile
from adallava.cost.forecast import Forecaster
from adallava.cost.work import prefill_work
from adallava.errors import BudgetError
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM, Request
from adallava.results import ResultRow, provenance

CALIBRATION_SECONDS = 50.0
_FIRST = 6
"""Requests of a condition that are not counted: a forecaster learns nothing from its first, and a level takes five."""
_ALL_THE_TIME = "1000000 ms"
_SETTLE_SECONDS = 1.0
_CORRECTED = {"profile": False, "corrected": True}


@dataclass(frozen=True)
class _Outcome:
    """One request: what it was allowed, foretold and took, in ms from the call to the first token."""

    budget: float
    expected: float
    """By what was known at the call, for the k that ran."""
    upper: float
    promised: float
    """The bound when the plan was decided, with the time until then known."""
    took: float
    k: int


def measure(settings: BenchSettings) -> list[ResultRow]:
    """One row for each condition and forecaster, and one for each way to foretell the calibration's measurements."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    vlm = model_named(settings.model, settings.device)
    profile = calibrate(vlm, settings.model, CalibrationSettings(CALIBRATION_SECONDS, seed=settings.seed), save=False)
    foretold = _predictions(vlm, profile, settings)
    rows = [_row(settings, vlm, {"part": "prediction", **told}, metrics) for told, metrics in foretold]
    for condition in ("idle", "one core burnt"):
        with _burning(condition != "idle"):
            results, slowdown = _requests(vlm, profile, settings)
        for name, (outcomes, refused) in results.items():
            config: dict[str, object] = {"part": "budgets", "condition": condition, "forecaster": name}
            rows.append(_row(settings, vlm, config, {"slowdown": slowdown, **_summary(outcomes, refused)}))
    return rows


def _asked(seed: int) -> CalibrationSettings:
    """Requests to be judged by: most are about a picture, as users' are."""
    return CalibrationSettings(without_image=8, seed=seed)


def _row(settings: BenchSettings, vlm: AdaptiveVLM, config: dict[str, object], metrics: dict[str, object]) -> ResultRow:
    variant = vlm.adaptive_config.variant if vlm.adaptive_config is not None else None
    origin = provenance(device=vlm.device, dtype=next(vlm.model.parameters()).dtype, seed=settings.seed)
    shown = {**config, "model": settings.model, "variant": variant, "rounds": settings.rounds}
    return ResultRow("latency", metrics, shown, origin)


# -- budgets ----------------------------------------------------------------------------------------------------------


def _requests(
    vlm: AdaptiveVLM, profile: DeviceProfile, settings: BenchSettings
) -> tuple[dict[str, tuple[list[_Outcome], int]], float]:
    """What ``rounds`` requests under random budgets came to, per forecaster, with how many were refused.

    And the slowdown, its median.
    """
    rng = random.Random(settings.seed + 1)
    forecasters = {name: Forecaster(profile, correct=correct) for name, correct in _CORRECTED.items()}
    told: dict[str, list[_Outcome]] = {name: [] for name in forecasters}
    refused = dict.fromkeys(forecasters, 0)
    batches = random_batches(vlm, _asked(settings.seed + 2))
    scout, slowdowns = Forecaster(profile), list[float]()
    for number in range(settings.rounds + _FIRST):
        request = next(batches)[0]
        low, high = _scouted(vlm, scout, request)
        slowdowns.append(scout.slowdown)
        budget = Budget.parse(f"{rng.uniform(low, high):.2f} ms")
        for name in rng.sample(list(forecasters), len(forecasters)):
            vlm.profiles.use(forecasters[name])
            try:
                answer = ask(vlm, [Request(request.question, request.images, budget=budget)], 2)[0]
            except BudgetError:
                refused[name] += number >= _FIRST
                continue
            if number >= _FIRST:
                told[name].append(_outcome(float(budget.ms), answer))
    return {name: (told[name], refused[name]) for name in forecasters}, statistics.median(slowdowns[_FIRST:])


def _scouted(vlm: AdaptiveVLM, scout: Forecaster, request: Request) -> tuple[float, float]:
    """What ``scout`` bounds this request by, of the least and of the whole model, when it has seen it run whole."""
    vlm.profiles.use(scout)
    answer = ask(vlm, [Request(request.question, request.images, budget=_ALL_THE_TIME)], 2)[0]
    config, timing = vlm.adaptive_config, answer.timing
    selector = vlm.token_selection
    encoded = selector.place == "tower" and selector.name != "none"  # when the budget is looked at
    images = int(request.images is not None and not encoded)
    least, whole = (
        scout.prefill(
            prefill_work(config, [answer.layer_tokens], [k], images), timing.prepare_ms + timing.selection_ms
        ).upper_ms
        for k in (0, config.max_k if config is not None else 0)
    )
    return least, whole


def _outcome(budget: float, answer: Answer) -> _Outcome:
    assert answer.foretold is not None and answer.budget is not None and answer.budget.forecast is not None
    first, took = answer.foretold.first_token, answer.timing.answered_ms
    return _Outcome(budget, first.ms, first.upper_ms, answer.budget.forecast.upper_ms, took, answer.budget.k)


def _summary(outcomes: Sequence[_Outcome], refused: int) -> dict[str, object]:
    if not outcomes:
        return {"requests": 0, "refused": refused}
    promised = [o for o in outcomes if o.promised <= o.budget]  # the others ran at k = 0, with a remark
    return {
        "requests": len(outcomes),
        "refused": refused,
        "mape": statistics.fmean(abs(o.expected - o.took) / o.took for o in outcomes),
        "bound_coverage": statistics.fmean(o.took <= o.upper for o in outcomes),
        "within_frac": statistics.fmean(o.took <= o.budget for o in outcomes),
        "promised_frac": len(promised) / len(outcomes),
        "within_promised_frac": statistics.fmean(o.took <= o.budget for o in promised) if promised else None,
        "use": statistics.fmean(o.took / o.budget for o in outcomes),
        "mean_k": statistics.fmean(o.k for o in outcomes),
        "ms": [[o.budget, o.expected, o.upper, o.promised, o.took] for o in outcomes],
        "k": [o.k for o in outcomes],
    }


# -- conditions -------------------------------------------------------------------------------------------------------


@contextmanager
def _burning(wanted: bool) -> Iterator[None]:
    """Another process that keeps one core busy."""
    if not wanted:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=_burn, daemon=True)
    process.start()
    time.sleep(_SETTLE_SECONDS)
    try:
        yield
    finally:
        process.kill()
        process.join()


def _burn() -> None:
    for _ in itertools.count():
        pass


# -- predictions ------------------------------------------------------------------------------------------------------


def _predictions(
    vlm: AdaptiveVLM, profile: DeviceProfile, settings: BenchSettings
) -> Iterator[tuple[dict[str, object], dict[str, object]]]:
    """Errors of three ways to foretell fresh prefills: the profile, time in proportion to FLOPs, and the roofline."""
    batches = random_batches(vlm, _asked(settings.seed + 4))
    recorder, flops, roofline, spec = Recorder(), list[float](), list[float](), vlm.spec
    device = measured_device(vlm.device, next(vlm.model.parameters()).dtype)
    with vlm.profiles.recorded_by(recorder):
        for requests in itertools.islice(batches, settings.rounds):
            answer = ask(vlm, requests, 2)[0]
            loads = full_loads(spec) if answer.plan is None else plan_loads(spec, answer.plan, 0)
            done = prefill(spec, loads, answer.layer_tokens)
            vision = vision_tower_flops(spec) + projector_flops(spec) if requests[0].images is not None else 0
            flops.append(done.flops + vision)
            roofline.append(pass_time_ms(done, device) + 1e3 * vision / device.fp16_flops_per_s)
    prefills = [one.prefill for one in recorder.measured]
    took = [one.ms for one in prefills]
    each = statistics.median(ms / some for ms, some in zip(took, flops, strict=True))
    ways = {
        "profile": [profile.prefill.predict_ms(one.work) for one in prefills],
        "in proportion to FLOPs": [each * some for some in flops],
        "roofline": roofline,
    }
    for name, foretold in ways.items():
        errors = [abs(ms - true) / true for ms, true in zip(foretold, took, strict=True)]
        yield {"condition": "idle", "forecaster": name}, {"requests": len(took), "mape": statistics.fmean(errors)}
