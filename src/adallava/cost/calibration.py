"""``DeviceProfile``: how long a model takes on one device, fitted from measurements, with an upper bound that holds.

Time is a linear function of the work (``adallava.cost.work``), for each stage apart: a prefill, what is left of it once
the plan is decided, and a decoding step. It is fitted by non-negative least squares on relative errors, reweighted so
that single slow measurements count little. The bound is split-conformal:
measurements that the fit has not seen say by which factor the truth exceeds the fit in 5 % of cases, for each bucket of
predicted time (Lei et al., 2018; Vovk, 2012 for buckets). It holds for requests like those measured, on a device that
is as busy as it was then; ``adallava.cost.forecast`` follows a device that is busier.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adallava.budget import Forecast
from adallava.cost.work import DECODE, PREFILL, TAIL, Work
from adallava.errors import ProfileError

FORMAT_VERSION = 3
LEVEL = 0.95
MINIMUM_HELD_OUT = math.ceil(LEVEL / (1 - LEVEL))  # fewer cannot say what 95 % stay below
MINIMUM_MEASUREMENTS = 2 * MINIMUM_HELD_OUT
_MOST_BUCKETS, _LEAST_IN_BUCKET = 3, 5
_FOLDS = 10
_REWEIGHTINGS = 30


@dataclass(frozen=True)
class Measurement:
    """One measured pass."""

    work: Work
    ms: float


@dataclass(frozen=True)
class Measured:
    """What a batch of requests did and took, stage by stage."""

    prefill: Measurement
    tail: Measurement | None = None
    """Of the prefill, what came after the plan was decided; None where none is, or nobody noted when."""
    decode: Measurement | None = None
    """Its mean decoding step; None where there was none."""


@dataclass(frozen=True)
class StageModel:
    """Milliseconds of one stage, prefill, tail or decode, as a function of its work."""

    coefficients_ms: dict[str, float]
    """Milliseconds of each unit of each feature; none is negative."""
    edges_ms: tuple[float, ...]
    """Where one bucket of predicted times ends and the next begins."""
    factors: tuple[float, ...]
    """Upper bound over prediction, one per bucket."""
    extent: dict[str, tuple[int, int]]
    """Least and most tokens, rows and images that were measured."""
    fitted: int
    """Measurements that the coefficients come from."""
    held_out: int
    """Measurements that the factors come from."""
    mape: float
    """Mean absolute error of the held-out predictions, as a share of the measured time."""
    surprises: tuple[float, ...] = ()
    """Measured over bound of the held-out measurements, ascending: what is normal for this device."""

    def predict_ms(self, work: Work) -> float:
        """Expected milliseconds."""
        return sum(ms * amount for ms, amount in zip(self.coefficients_ms.values(), work.features, strict=True))

    def factor(self, predicted_ms: float) -> float:
        """Upper bound over prediction in the bucket of ``predicted_ms``."""
        return self.factors[sum(predicted_ms >= edge for edge in self.edges_ms)]

    def ends_ms(self, features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Prediction and upper bound of each row of ``features`` [n, F], quicker than one by one."""
        ms = features @ self._by_feature
        if len(self.factors) == 1:
            return ms, ms * self.factors[0]
        return ms, ms * np.array(self.factors)[np.searchsorted(self.edges_ms, ms, side="right")]

    @functools.cached_property
    def _by_feature(self) -> NDArray[np.float64]:
        return np.array(list(self.coefficients_ms.values()))

    def forecast(self, work: Work) -> Forecast:
        """Prediction, upper bound, and a remark where ``work`` is outside what was measured."""
        ms = self.predict_ms(work)
        return Forecast(ms, ms * self.factor(ms), self.remark(work))

    def remark(self, work: Work) -> str | None:
        """What of ``work`` lies outside what was measured."""
        beyond = [
            f"{value} {name}, measured {least} to {most}"
            for name, value in work.extent.items()
            for least, most in [self.extent[name]]
            if not least <= value <= most
        ]
        return f"outside the measured range: {'; '.join(beyond)}" if beyond else None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StageModel:
        """Inverse of ``dataclasses.asdict``, from JSON."""
        lists = {name: tuple(data[name]) for name in ("edges_ms", "factors", "surprises")}
        extent = {name: (least, most) for name, (least, most) in data["extent"].items()}
        return cls(**{**data, **lists, "extent": extent})


@dataclass(frozen=True)
class DeviceProfile:
    """What was measured of one model on one device; ``fit_profile`` makes it, a JSON file keeps it."""

    model: str
    """What the model was called when it was measured."""
    fingerprint: dict[str, str]
    """What the times depend on: model, device, threads, dtype, attention kernel, versions."""
    prefill: StageModel
    tail: StageModel | None = None
    """Of a prefill, what comes after the plan is decided; None for a base model, which decides none."""
    decode: StageModel | None = None
    """None where a profile was made of first tokens only."""

    def check(self, fingerprint: Mapping[str, str]) -> None:
        """Raise ``ProfileError``, naming each difference, unless ``fingerprint`` is that of the measurement."""
        names = [*self.fingerprint, *(name for name in fingerprint if name not in self.fingerprint)]
        differing = [
            f"{name} was {self.fingerprint.get(name, 'not told')}, now it is {fingerprint.get(name, 'not told')}"
            for name in names
            if self.fingerprint.get(name) != fingerprint.get(name)
        ]
        if differing:
            raise ProfileError(
                f"the device profile of {self.model} does not hold here: {'; '.join(differing)}. Measure again with "
                f"'adallava calibrate {self.model}'."
            )

    def save(self, path: str | Path) -> None:
        """Write JSON, replacing a profile that is there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> DeviceProfile:
        """Read what ``save`` wrote; ``ProfileError`` names the file and what is wrong with it."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version!r}, expected {FORMAT_VERSION}")
            some = {stage: data[stage] and StageModel.from_dict(data[stage]) for stage in ("tail", "decode")}
            return cls(**{**data, "prefill": StageModel.from_dict(data["prefill"]), **some})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProfileError(
                f"{path} is no device profile ({type(error).__name__}: {error}). Make one with 'adallava calibrate'."
            ) from error


def fit_profile(
    model: str, fingerprint: dict[str, str], measured: Sequence[Measured], *, seed: int = 0
) -> DeviceProfile:
    """Fit every stage that was measured; ``ProfileError`` for fewer than ``MINIMUM_MEASUREMENTS`` of one.

    seed: splits the measurements into those to fit and those to hold out.
    """
    tail = [one.tail for one in measured if one.tail is not None]
    decode = [one.decode for one in measured if one.decode is not None]
    return DeviceProfile(
        model,
        fingerprint,
        fit_stage([one.prefill for one in measured], PREFILL, seed=seed),
        fit_stage(tail, TAIL, seed=seed, in_bucket=MINIMUM_HELD_OUT) if tail else None,
        fit_stage(decode, DECODE, seed=seed) if decode else None,
    )


def fit_stage(
    measurements: Sequence[Measurement], features: Sequence[str], *, seed: int = 0, in_bucket: int = _LEAST_IN_BUCKET
) -> StageModel:
    """Fit one stage on half of the measurements, and take its bounds from the other half.

    in_bucket: measurements in each bucket, at least. With few the bound follows what is foretold well or badly, with
    many it is steadier; where nothing can make up for a bound that is wrong, that is worth more (docs/LOG.md).
    """
    if len(measurements) < MINIMUM_MEASUREMENTS:
        raise ProfileError(
            f"{len(measurements)} measurements are too few for an upper bound that holds in {LEVEL:.0%} of cases; "
            f"{MINIMUM_MEASUREMENTS} are needed. Measure longer."
        )
    work = np.array([one.work.features for one in measurements], dtype=np.float64)
    ms = np.array([one.ms for one in measurements], dtype=np.float64)
    if not np.isfinite(ms).all() or ms.min() <= 0:
        raise ProfileError(f"measured times lie between {ms.min():g} and {ms.max():g} ms, expected all above 0.")
    seen, unseen = _halves(work, np.random.default_rng(seed))
    coefficients = _fit(work[seen], ms[seen])
    if not coefficients.any():
        raise ProfileError("the measured times do not depend on the work. Measure again on a quieter machine.")
    predicted = work @ coefficients
    ratios = ms[unseen] / predicted[unseen]
    edges = _edges(predicted[seen], in_bucket)
    bucket = np.searchsorted(edges, predicted[unseen], side="right")
    factors = _factors(_spreads(work[seen], ms[seen], predicted[seen], edges), ratios, bucket)
    names = measurements[0].work.extent
    sizes = {name: [one.work.extent[name] for one in measurements] for name in names}
    return StageModel(
        coefficients_ms=dict(zip(features, coefficients.tolist(), strict=True)),
        edges_ms=tuple(edges),
        factors=tuple(factors.tolist()),
        extent={name: (min(values), max(values)) for name, values in sizes.items()},
        fitted=len(seen),
        held_out=len(unseen),
        mape=float(np.abs(1 - 1 / ratios).mean()),
        surprises=tuple(sorted((ratios / factors[bucket]).tolist())),
    )


def _halves(work: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Measurements to fit and to hold out: of any two that are next to each other in size, one each, by lot.

    So the fit knows all sizes, of which there may be few of a kind. The lot does not know the times, so what is held
    out is still like what is to come.
    """
    size = (work / np.maximum(work.max(0), 1e-300)).sum(1)
    order = np.argsort(size, kind="stable")
    first = rng.integers(0, 2, len(order) // 2)
    at = 2 * np.arange(len(order) // 2)
    seen = order[at + first]
    return seen, np.setdiff1d(order, seen)


def conformal_bound(values: Sequence[float] | NDArray[np.float64], level: float = LEVEL) -> float:
    """Return what the next value, exchangeable with ``values``, stays below with probability ``level``.

    That is their (n + 1) * level smallest, rounded up; ``ProfileError`` where n is too small for it.
    """
    rank = math.ceil((len(values) + 1) * level - 1e-9)
    if rank > len(values):
        raise ProfileError(f"{len(values)} values cannot bound the next one with probability {level:g}.")
    return float(np.sort(np.asarray(values))[rank - 1])


def _fit(work: NDArray[np.float64], ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative coefficients with the least sum of absolute relative errors, by reweighted least squares."""
    from scipy.optimize import nnls

    relative = work / ms[:, None]
    scale = np.where(relative.any(0), relative.max(0), 1.0)
    relative, weights = relative / scale, np.ones(len(ms))
    for _ in range(_REWEIGHTINGS):
        found, _ = nnls(relative * weights[:, None], weights)
        weights = np.maximum(np.abs(relative @ found - 1), 1e-3) ** -0.5
    return np.asarray(found / scale, dtype=np.float64)


def _edges(predicted: NDArray[np.float64], in_bucket: int) -> list[float]:
    """Edges of as many buckets as there are measurements for, equally full."""
    for buckets in range(_MOST_BUCKETS, 1, -1):
        edges = np.quantile(predicted, np.arange(1, buckets) / buckets).tolist()
        counts = np.bincount(np.searchsorted(edges, predicted, side="right"), minlength=buckets)
        if counts.min() >= in_bucket and all(a < b for a, b in pairwise(edges)):
            return edges
    return []


def _spreads(
    work: NDArray[np.float64], ms: NDArray[np.float64], predicted: NDArray[np.float64], edges: list[float]
) -> NDArray[np.float64]:
    """How far off a fit usually is in each bucket: the mean relative error of measurements left out of it.

    The worst tenth is not counted, and one at least: a single slow measurement is no spread.
    """
    errors, fold = np.empty(len(ms)), np.arange(len(ms)) % min(_FOLDS, len(ms))
    for out in range(fold.max() + 1):
        rest = fold != out
        errors[~rest] = np.abs(ms[~rest] / np.maximum(work[~rest] @ _fit(work[rest], ms[rest]), 1e-9) - 1)
    bucket = np.searchsorted(edges, predicted, side="right")
    usual = [np.sort(errors[bucket == each]) for each in range(len(edges) + 1)]
    return np.array([max(1e-4, float(some[: -math.ceil(len(some) / 10)].mean())) for some in usual])


def _factors(
    spreads: NDArray[np.float64], ratios: NDArray[np.float64], bucket: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Upper bound over prediction for each bucket, from the held-out ratios of measured to predicted.

    Where a bucket has too few of its own, those of all are taken in units of their buckets' spreads (Lei et al., 2018,
    section 5.2), so that where the fit is good the bound is close.
    """
    scores = (ratios - 1) / spreads[bucket]
    of_all = conformal_bound(scores)
    own = [scores[bucket == each] for each in range(len(spreads))]
    at_most = [conformal_bound(some) if len(some) >= MINIMUM_HELD_OUT else of_all for some in own]
    return np.asarray(1 + spreads * np.array(at_most), dtype=np.float64)
