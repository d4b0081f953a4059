"""``Forecaster``: a device profile that follows the device: what requests took corrects what the next are foretold.

A profile is of a device as busy as it was when it was measured. When other programs take cores, everything takes longer
by a factor that the next few requests show. So the forecast is the profile's times a level, the median of the last few
ratios of measured to foretold; and the upper bound is the profile's times that level times the largest surprise of the
last twenty requests: the next one is larger in one case of twenty-one, as long as surprises are exchangeable.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import replace

from adallava.budget import Forecast
from adallava.cost.calibration import MINIMUM_HELD_OUT, DeviceProfile, StageModel, conformal_bound
from adallava.cost.work import Work
from adallava.errors import ProfileError

# Chosen on recorded times of the mini models and a 16-layer model of width 1024, idle and beside a busy program
# (docs/LOG.md): a longer median is slower to notice, a longer window slower to forgive.
_LEVEL_OF = 5
_SURPRISES = MINIMUM_HELD_OUT + 1
_BUSY = 1.1


class Correction:
    """How much longer one stage takes than its profile says, from the requests so far."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_LEVEL_OF)
        # Measured over bound. Until something else is known, the profile's bound is right.
        self._surprises: deque[float] = deque([1.0] * _SURPRISES, maxlen=_SURPRISES)

    @property
    def level(self) -> float:
        """Measured over foretold, lately; 1 until a few requests were seen."""
        return statistics.median(self._ratios) if len(self._ratios) == _LEVEL_OF else 1.0

    @property
    def bound(self) -> float:
        """Upper bound over the profile's bound."""
        return self.level * conformal_bound(list(self._surprises))

    def observe(self, measured_ms: float, foretold: Forecast) -> None:
        """Learn from a request that the profile, uncorrected, foretold like this."""
        self._surprises.append(measured_ms / (foretold.upper_ms * self.level))
        self._ratios.append(measured_ms / foretold.ms)


class Forecaster:
    """Forecasts of one model on one device. ``correct`` False keeps to the profile, whatever is observed."""

    def __init__(self, profile: DeviceProfile, *, correct: bool = True) -> None:
        self.profile, self.correct = profile, correct
        self._corrections: dict[str, Correction] = {"prefill": Correction(), "decode": Correction()}
        self._cold = True

    def prefill(self, work: Work, elapsed_ms: float = 0.0) -> Forecast:
        """Time to the first token of a request that has been worked on for ``elapsed_ms`` already."""
        foretold = self._forecast("prefill", work)
        return replace(foretold, ms=foretold.ms + elapsed_ms, upper_ms=foretold.upper_ms + elapsed_ms)

    def decode(self, work: Work) -> Forecast:
        """Time of one decoding step."""
        return self._forecast("decode", work)

    def plain_ms(self, stage: str, work: Work) -> float:
        """The profile's upper bound of "prefill" or "decode", without any correction."""
        return self._model(stage).forecast(work).upper_ms

    def observe(self, prefill: Work, first_ms: float, decode: Work | None = None, step_ms: float | None = None) -> None:
        """Learn from a request: what it did, and the time of its prefill and of its mean decoding step.

        The first request of a process pays for what none after it does, so it teaches nothing.
        """
        if self._cold:
            self._cold = False
            return
        self._corrections["prefill"].observe(first_ms, self.profile.prefill.forecast(prefill))
        if decode is not None and step_ms is not None and self.profile.decode is not None:
            self._corrections["decode"].observe(step_ms, self.profile.decode.forecast(decode))

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
        if stage == "prefill":
            return self.profile.prefill
        if self.profile.decode is None:
            raise ProfileError(
                f"the device profile of {self.profile.model} was made of first tokens only. Measure decoding too: "
                f"'adallava calibrate {self.profile.model}'."
            )
        return self.profile.decode
