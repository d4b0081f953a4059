"""``Forecaster``: a device profile that follows the device: what requests took corrects what the next are foretold.

A profile is of a device as busy as it was when it was measured. When other programs take cores, everything takes longer
by a factor that the next few requests show. So the forecast is the profile's times a level, the median of the last few
ratios of measured to foretold. The upper bound is the profile's times that level times what surprises stay below: the
conformal bound of those of the last twenty requests and of twenty that stand for the profile's own measurements, none
of them above its bound. So one slow request is not taken for the rule, and two are, for twenty requests. On a device
that is unlike what it was, this is the second largest of twenty, which nine in ten stay below.

What is left of a prefill when its plan is decided is foretold apart, and corrected apart. Nobody can make up for what
is wrong with the last look, so its bound is the largest of the forty.

Requests that run on fewer CPU threads than were measured are corrected apart: at first as if time were in inverse
proportion to threads, which it is at worst, then by what they took.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adallava.budget import Forecast
from adallava.cost.calibration import LEVEL, DeviceProfile, Measured, Measurement, StageModel, conformal_bound
from adallava.cost.work import Work
from adallava.errors import ProfileError

# Chosen on recorded times of the mini models and a 16-layer model of width 1024, idle and beside a busy program
# (docs/LOG.md): a longer median is slower to notice, a longer window slower to forgive.
_LEVEL_OF = 5
_SURPRISES = _CALM = 20
_BUSY = 1.1
_LAST_LEVEL = 0.975
_MISSING = {"tail": "the time after the plan", "decode": "decoding"}


@dataclass(frozen=True)
class Tails:
    """Forecasts of what is left of a prefill, of several k."""

    ms: list[float]
    upper_ms: list[float]


class Correction:
    """How much longer one stage takes than its profile says, from the requests so far.

    calm: measured over bound, of the profile's own measurements. first: measured over foretold, before any request.
    covered: share of the surprises that the bound is to cover.
    """

    def __init__(self, calm: Sequence[float], first: float = 1.0, covered: float = LEVEL) -> None:
        self._calm, self._first, self._covered = list(calm), first, covered
        self._ratios: deque[float] = deque(maxlen=_LEVEL_OF)
        self._surprises = deque(self._calm, maxlen=_SURPRISES)
        self._note()

    def observe(self, measured_ms: float, foretold: Forecast) -> None:
        """Learn from a request that the profile, uncorrected, foretold like this."""
        self._surprises.append(measured_ms / (foretold.upper_ms * self.level))
        self._ratios.append(measured_ms / foretold.ms)
        self._note()

    def _note(self) -> None:
        # Once per request; a request asks for them many times, and a small model's would notice.
        self.level = statistics.median(self._ratios) if len(self._ratios) == _LEVEL_OF else self._first
        """Measured over foretold, lately; what was taken for granted until a few requests were seen."""
        self.bound = self.level * conformal_bound([*self._calm, *self._surprises], self._covered)
        """Upper bound over the profile's bound."""


class Forecaster:
    """Forecasts of one model on one device. ``correct`` False keeps to the profile, whatever is observed."""

    def __init__(self, profile: DeviceProfile, *, correct: bool = True) -> None:
        self.profile, self.correct = profile, correct
        self._corrections = self._fresh()
        self._threads = self._measured_on
        self._learned = {self._threads: self._corrections}
        self._cold = True

    @property
    def _measured_on(self) -> int:
        """CPU threads of the profile; 1 on another device."""
        return int(self.profile.fingerprint.get("threads", 1))

    def on_threads(self, threads: int) -> None:
        """Foretell, and learn from, requests that run on so many CPU threads from now on.

        What was learned of more threads is forgotten when they are free again: others had taken some of them then.
        """
        if threads not in self._learned or threads > self._threads:
            self._learned[threads] = self._fresh(max(1.0, self._measured_on / threads))
        self._corrections, self._threads = self._learned[threads], threads

    @property
    def slowdown(self) -> float:
        """How much longer prefills take than the profile says, lately."""
        return self._corrections["prefill"].level if self.correct else 1.0

    def prefill(self, work: Work, elapsed_ms: float = 0.0) -> Forecast:
        """Time to the first token of a request that has been worked on for ``elapsed_ms`` already."""
        return _later(self._forecast("prefill", work), elapsed_ms)

    def tails(self, features: NDArray[np.float64]) -> Tails:
        """Times from the decision on a plan to the first token; what is unusual is told of the whole prefill only.

        features: ``cost.work.tail_features``, [n, 7].
        """
        ms, upper = self._model("tail").ends_ms(features)
        if not self.correct:
            return Tails(ms.tolist(), upper.tolist())
        correction = self._corrections["tail"]
        return Tails((ms * correction.level).tolist(), (upper * correction.bound).tolist())

    def decode(self, work: Work) -> Forecast:
        """Time of one decoding step."""
        return self._forecast("decode", work)

    def plain_ms(self, stage: str, work: Work) -> float:
        """The profile's upper bound of "prefill" or "decode", without any correction."""
        return self._model(stage).forecast(work).upper_ms

    def observe(self, measured: Measured) -> None:
        """Learn from a request. The first of a process pays for what none after it does, so it teaches nothing."""
        if self._cold:
            self._cold = False
            return
        self._learn("prefill", measured.prefill)
        self._learn("tail", measured.tail)
        self._learn("decode", measured.decode)

    def observe_step(self, measured: Measurement) -> None:
        """Learn from a decoding step."""
        self._learn("decode", measured)

    def _learn(self, stage: str, measured: Measurement | None) -> None:
        if measured is not None and stage in self._corrections:
            self._corrections[stage].observe(measured.ms, self._model(stage).forecast(measured.work))

    def _forecast(self, stage: str, work: Work) -> Forecast:
        plain = self._model(stage).forecast(work)
        if not self.correct:
            return plain
        correction = self._corrections[stage]
        busy = f"the device takes {correction.level:.1f} times as long as when it was measured"
        remarks = [plain.remark] if plain.remark else []
        remarks += [busy] if correction.level > _BUSY else []
        return Forecast(plain.ms * correction.level, plain.upper_ms * correction.bound, "; ".join(remarks) or None)

    def _model(self, stage: str) -> StageModel:
        model = self._models[stage]
        if model is None:
            raise ProfileError(
                f"the device profile of {self.profile.model} was made without {_MISSING[stage]}. Measure it too: "
                f"'adallava calibrate {self.profile.model}'."
            )
        return model

    @property
    def _models(self) -> dict[str, StageModel | None]:
        profile = self.profile
        return {"prefill": profile.prefill, "tail": profile.tail, "decode": profile.decode}

    def _fresh(self, first: float = 1.0) -> dict[str, Correction]:
        return {
            stage: Correction(_calm(model), first, _LAST_LEVEL if stage == "tail" else LEVEL)
            for stage, model in self._models.items()
            if model is not None
        }


def _later(foretold: Forecast, elapsed_ms: float) -> Forecast:
    return replace(foretold, ms=foretold.ms + elapsed_ms, upper_ms=foretold.upper_ms + elapsed_ms)


def _calm(model: StageModel) -> list[float]:
    """Measured over bound, of measurements that stand for all that the bound comes from; alone, they give it again."""
    known = model.surprises or (1.0,)
    return [min(1.0, known[(2 * i + 1) * len(known) // (2 * _CALM)]) for i in range(_CALM)]
