"""``DeviceProfile``: how long a model takes on one device, fitted from measurements, with an upper bound that holds.

Time is a linear function of the work (``adallava.cost.work``), prefill and decode apart, fitted by non-negative least
squares on relative errors, reweighted so that single slow measurements count little. The bound is split-conformal:
measurements that the fit has not seen say by which factor the truth exceeds the fit in 5 % of cases, for each bucket of
predicted time (Lei et al., 2018; Vovk, 2012 for buckets). It holds for requests like those measured, on a device that
is as busy as it was then; ``adallava.cost.correction`` follows a device that is busier.
"""

from __future__ import annotations

import dataclasses
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
from adallava.cost.work import DECODE, PREFILL, Work
from adallava.errors import ProfileError

FORMAT_VERSION = 2
LEVEL = 0.95
MINIMUM_HELD_OUT = math.ceil(LEVEL / (1 - LEVEL))  # fewer cannot say what 95 % stay below
MINIMUM_MEASUREMENTS = 2 * MINIMUM_HELD_OUT
_MOST_BUCKETS = 3
_REWEIGHTINGS = 30


@dataclass(frozen=True)
class Measurement:
    """One measured pass."""

    work: Work
    ms: float


@dataclass(frozen=True)
class StageModel:
    """Milliseconds of one stage, prefill or decode, as a function of its work."""

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
    ratios: tuple[float, ...] = ()
    """Measured over predicted of the held-out measurements, ascending: what is normal for this device."""

    def predict_ms(self, work: Work) -> float:
        """Expected milliseconds."""
        return sum(ms * amount for ms, amount in zip(self.coefficients_ms.values(), work.features, strict=True))

    def factor(self, predicted_ms: float) -> float:
        """Upper bound over prediction in the bucket of ``predicted_ms``."""
        return self.factors[sum(predicted_ms >= edge for edge in self.edges_ms)]

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
        lists = {name: tuple(data[name]) for name in ("edges_ms", "factors", "ratios")}
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
    decode: StageModel | None
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
            decode = data["decode"] and StageModel.from_dict(data["decode"])
            return cls(**{**data, "prefill": StageModel.from_dict(data["prefill"]), "decode": decode})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProfileError(
                f"{path} is no device profile ({type(error).__name__}: {error}). Make one with 'adallava calibrate'."
            ) from error


def fit_profile(
    model: str,
    fingerprint: dict[str, str],
    prefill: Sequence[Measurement],
    decode: Sequence[Measurement] = (),
    *,
    seed: int = 0,
) -> DeviceProfile:
    """Fit both stages; ``ProfileError`` for fewer than ``MINIMUM_MEASUREMENTS`` of a stage.

    seed: splits the measurements into those to fit and those to hold out.
    """
    return DeviceProfile(
        model,
        fingerprint,
        fit_stage(prefill, PREFILL, seed=seed),
        fit_stage(decode, DECODE, seed=seed) if decode else None,
    )


def fit_stage(measurements: Sequence[Measurement], features: Sequence[str], *, seed: int = 0) -> StageModel:
    """Fit one stage on half of the measurements, and take its bounds from the other half."""
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
    edges = _edges(predicted[seen], predicted[unseen])
    bucket = np.searchsorted(edges, predicted[unseen], side="right")
    names = measurements[0].work.extent
    sizes = {name: [one.work.extent[name] for one in measurements] for name in names}
    return StageModel(
        coefficients_ms=dict(zip(features, coefficients.tolist(), strict=True)),
        edges_ms=tuple(edges),
        factors=tuple(conformal_bound(ratios[bucket == each]) for each in range(len(edges) + 1)),
        extent={name: (min(values), max(values)) for name, values in sizes.items()},
        fitted=len(seen),
        held_out=len(unseen),
        mape=float(np.abs(1 - 1 / ratios).mean()),
        ratios=tuple(sorted(ratios.tolist())),
    )


def _halves(work: NDArray[np.float64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Measurements to fit and to hold out: of any two that are next to each other in size, one each, by lot.

    So the fit knows all sizes, of which there may be few of a kind. The lot does not know the times: what is held out
    remains exchangeable with what is to come.
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


def _edges(seen: NDArray[np.float64], unseen: NDArray[np.float64]) -> list[float]:
    """Edges of as many buckets as leave enough held-out measurements in each; drawn from those already used."""
    for buckets in range(_MOST_BUCKETS, 1, -1):
        edges = np.quantile(seen, np.arange(1, buckets) / buckets).tolist()
        counts = np.bincount(np.searchsorted(edges, unseen, side="right"), minlength=buckets)
        if counts.min() >= MINIMUM_HELD_OUT and all(a < b for a, b in pairwise(edges)):
            return edges
    return []
