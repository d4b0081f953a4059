"""The online correction on made-up requests: it follows the device, forgives, and can be left off."""

import numpy as np
import pytest

from adallava.cost.calibration import Measured, Measurement, fit_profile
from adallava.cost.forecast import Forecaster
from adallava.cost.work import prefill_work
from adallava.errors import ProfileError
from test_cost_calibration import CONFIG, PRINT, requests, steps, tails, times, true_ms

WORK = prefill_work(CONFIG, [[100] * 12], [3], 1)
STEP, TAIL_WORK = steps(1)[0].work, tails(1)[0].work
TAIL = np.array([TAIL_WORK.features])


def forecaster(correct=True, decode=True, tail=True):
    measured = requests(times(150, noise=0.03), steps(60) if decode else (), tails(150, 0.03) if tail else ())
    made = Forecaster(fit_profile("m", PRINT, measured), correct=correct)
    made.observe(Measured(Measurement(WORK, 1e6)))  # the first of a process, which teaches nothing
    return made


def test_an_idle_device_is_foretold_as_it_was_measured():
    made = forecaster()
    before = made.prefill(WORK)
    assert before == made.profile.prefill.forecast(WORK)
    for _ in range(30):
        made.observe(Measured(Measurement(WORK, before.ms)))
    after = made.prefill(WORK)
    assert after.ms == pytest.approx(before.ms)
    assert after.upper_ms <= before.upper_ms
    assert after.remark is None


def test_a_busy_device_is_followed_and_forgiven():
    made, calm = forecaster(), forecaster().prefill(WORK)
    for _ in range(5):
        made.observe(Measured(Measurement(WORK, 2 * calm.ms)))
    busy = made.prefill(WORK)
    assert busy.ms == pytest.approx(2 * calm.ms)
    assert busy.upper_ms > 2 * calm.ms
    assert "takes 2.0 times as long as when it was measured" in busy.remark
    for _ in range(30):
        made.observe(Measured(Measurement(WORK, calm.ms)))
    again = made.prefill(WORK)
    assert again.ms == pytest.approx(calm.ms)
    assert again.upper_ms <= 1.01 * calm.upper_ms


@pytest.mark.parametrize(("slow", "bounded"), [([1], False), ([10], False), ([10, 15], True)])
def test_one_slow_request_is_no_rule_and_two_are_for_twenty_requests(slow, bounded):
    made, calm = forecaster(), forecaster().prefill(WORK)
    for i in range(20):
        made.observe(Measured(Measurement(WORK, calm.ms * (5 if i in slow else 1))))
        if len(slow) == 1:
            assert made.prefill(WORK).upper_ms < 2 * calm.ms
    assert made.prefill(WORK).ms == pytest.approx(calm.ms)
    assert (made.prefill(WORK).upper_ms >= 4.9 * calm.ms) == bounded
    for _ in range(20):
        made.observe(Measured(Measurement(WORK, calm.ms)))
    assert made.prefill(WORK).upper_ms <= calm.upper_ms


def test_stages_are_followed_apart():
    made = forecaster()
    first, last, each = made.prefill(WORK), made.tails(TAIL).ms[0], made.decode(STEP)
    for _ in range(6):
        made.observe(
            Measured(Measurement(WORK, first.ms), Measurement(TAIL_WORK, 2 * last), Measurement(STEP, 3 * each.ms))
        )
    assert made.prefill(WORK).ms == pytest.approx(first.ms)
    assert made.tails(TAIL).ms[0] == pytest.approx(2 * last)
    assert made.decode(STEP).ms == pytest.approx(3 * each.ms)


def test_without_correction_nothing_is_learnt():
    made = forecaster(correct=False)
    before = made.prefill(WORK)
    for _ in range(30):
        made.observe(Measured(Measurement(WORK, 3 * before.ms)))
    assert made.prefill(WORK) == before


def test_time_that_went_by_is_added():
    made = forecaster()
    assert made.prefill(WORK, 7.5).ms == pytest.approx(made.prefill(WORK).ms + 7.5)
    assert made.prefill(WORK, 7.5).upper_ms == pytest.approx(made.prefill(WORK).upper_ms + 7.5)
    assert made.prefill(WORK).ms == pytest.approx(true_ms(WORK), rel=0.05)


def test_stages_are_corrected_apart():
    made = forecaster()
    first, last = made.prefill(WORK), made.tails(TAIL).ms[0]
    for _ in range(20):
        made.observe(Measured(Measurement(WORK, first.ms), Measurement(TAIL_WORK, 2 * last)))
    assert made.prefill(WORK).ms == pytest.approx(first.ms)
    assert made.tails(TAIL).ms[0] == pytest.approx(2 * last)


def test_the_last_look_remembers_the_slowest_of_twenty():
    made = forecaster()
    first, last = made.prefill(WORK), made.tails(TAIL).ms[0]
    for i in range(20):
        made.observe(
            Measured(Measurement(WORK, first.ms * (1 + i // 19)), Measurement(TAIL_WORK, last * (1 + i // 19)))
        )
    assert made.prefill(WORK).upper_ms < 2 * first.ms
    assert made.tails(TAIL).upper_ms[0] == pytest.approx(2 * last)


def test_a_profile_without_a_stage_says_so():
    with pytest.raises(ProfileError, match="of m was made without decoding. Measure it too"):
        forecaster(decode=False).decode(STEP)
    with pytest.raises(ProfileError, match="of m was made without the time after the plan"):
        forecaster(tail=False).tails(TAIL)
