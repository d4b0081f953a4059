"""Device profiles on synthetic times: the truth is found, the bound covers what it should, files say what is wrong."""

import json
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest

from adallava.config import AdaptiveConfig
from adallava.cost.calibration import (
    LEVEL,
    MINIMUM_HELD_OUT,
    DeviceProfile,
    Measured,
    Measurement,
    conformal_bound,
    fit_profile,
    fit_stage,
)
from adallava.cost.work import DECODE, PREFILL, TAIL, decode_work, prefill_work, tail_work
from adallava.errors import ProfileError

CONFIG = AdaptiveConfig(variant="L", num_layers=12, num_heads=4, num_kv_heads=4, hidden_size=64, prefix_layers=6)
TRUE = {"fixed": 3.0, "image": 4.0, "token": 0.01, "layer on": 0.4, "unit token": 0.02}
PRINT = {"model": "m", "threads": "2"}


def works(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens, k, image = int(rng.integers(20, 400)), int(rng.integers(0, 7)), int(rng.integers(0, 2))
        yield prefill_work(CONFIG, [[tokens] * 12], [k], image)


def true_ms(work):
    return sum(TRUE.get(name, 0.0) * amount for name, amount in zip(PREFILL, work.features, strict=True))


def times(count, noise=0.0, seed=0):
    rng = np.random.default_rng(seed + 1)
    return [
        Measurement(work, true_ms(work) * float(np.exp(noise * rng.standard_normal()))) for work in works(count, seed)
    ]


def steps(count):
    rng = np.random.default_rng(5)
    made = [decode_work(CONFIG, [[int(rng.integers(20, 400))] * 12], [int(rng.integers(0, 7))]) for _ in range(count)]
    return [Measurement(work, 1 + 0.3 * work.features[DECODE.index("layer on")]) for work in made]


def requests(first, decode=(), tail=()):
    """What so many requests did and took, of which some decoded."""
    return [Measured(*some) for some in zip_longest(first, tail, decode)]


def tails(count, noise=0.0):
    rng, made = np.random.default_rng(7), []
    for _ in range(count):
        work = tail_work(CONFIG, [[int(rng.integers(20, 400))] * 12], [int(rng.integers(0, 7))])
        ms = 1 + 0.4 * work.features[TAIL.index("layer on")] + 0.02 * work.features[TAIL.index("unit token")]
        made.append(Measurement(work, ms * float(np.exp(noise * rng.standard_normal()))))
    return made


def test_exact_times_are_foretold_exactly():
    stage = fit_stage(times(60), PREFILL)
    assert all(ms >= 0 for ms in stage.coefficients_ms.values())
    for work in works(50, seed=9):
        foretold = stage.forecast(work)
        assert foretold.ms == pytest.approx(true_ms(work), rel=1e-6)
        assert foretold.upper_ms == pytest.approx(foretold.ms, rel=1e-6)
    assert stage.mape < 1e-6
    assert stage.fitted + stage.held_out == 60


def test_single_slow_measurements_do_not_bend_the_fit():
    made = [replace(one, ms=one.ms * (6 if i % 12 == 0 else 1)) for i, one in enumerate(times(240))]
    stage = fit_stage(made, PREFILL)
    for work in works(50, seed=9):
        assert stage.predict_ms(work) == pytest.approx(true_ms(work), rel=0.01)
    assert max(stage.factors) > 1.5  # but the bound knows of them


def test_the_bound_covers_what_it_should():
    """Over many calibrations, 95 % of fresh times stay below; a bound that says less, or much more, fails."""
    below = []
    for seed in range(40):
        stage = fit_stage(times(150, noise=0.1, seed=100 * seed), PREFILL, seed=seed)
        below += [one.ms <= stage.forecast(one.work).upper_ms for one in times(100, noise=0.1, seed=100 * seed + 50)]
    assert LEVEL - 0.015 <= np.mean(below) <= LEVEL + 0.02


def test_buckets_know_where_times_are_less_sure():
    rng = np.random.default_rng(3)
    made = []
    for work in works(400):
        noise = 0.3 if true_ms(work) < 15 else 0.01
        made.append(Measurement(work, true_ms(work) * float(np.exp(noise * abs(rng.standard_normal())))))
    stage = fit_stage(made, PREFILL)
    assert len(stage.factors) == 3
    assert list(stage.edges_ms) == sorted(stage.edges_ms)
    assert stage.factors[0] > 1.3 > 1.1 > stage.factors[-1]
    assert stage.factor(0.0) == stage.factors[0] and stage.factor(1e9) == stage.factors[-1]


def test_few_measurements_are_bounded_in_units_of_what_is_usual_for_each_bucket():
    rng = np.random.default_rng(3)
    made = [
        replace(one, ms=one.ms * float(np.exp((0.2 if one.ms < 30 else 0.01) * rng.standard_normal())))
        for one in times(60)
    ]
    stage = fit_stage(made, PREFILL)
    assert stage.held_out < 3 * MINIMUM_HELD_OUT
    assert stage.factors[0] > 1.2 > 1.1 > stage.factors[-1]


def test_conformal_bound_is_the_right_order_statistic():
    values = list(range(1, 20))
    assert conformal_bound(values) == 19
    assert conformal_bound([*values, 20]) == 20
    assert conformal_bound(list(range(1, 40))) == 38
    assert conformal_bound([3, 1, 2], level=0.5) == 2
    with pytest.raises(ProfileError, match="18 values cannot bound the next one with probability 0.95"):
        conformal_bound(values[1:])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (times(37), "37 measurements are too few.*38 are needed"),
        ([*times(60), Measurement(next(works(1)), float("nan"))], "expected all above 0"),
        ([*times(60), Measurement(next(works(1)), 0.0)], "expected all above 0"),
    ],
)
def test_what_cannot_be_fitted(made, message):
    with pytest.raises(ProfileError, match=message):
        fit_stage(made, PREFILL)


def test_outside_the_measured_range_is_told():
    stage = fit_stage(times(60), PREFILL)
    assert stage.forecast(next(works(1))).remark is None
    far = prefill_work(CONFIG, [[4000] * 12] * 3, [1, 1, 1], 5)
    remark = stage.forecast(far).remark
    assert "outside the measured range: 4000 tokens, measured" in remark
    assert "3 rows, measured 1 to 1; 5 images, measured 0 to 1" in remark


def test_files(tmp_path):
    profile = fit_profile("mini", PRINT, requests(times(80, noise=0.05), steps(60), tails(80)))
    path = tmp_path / "deep" / "profile.json"
    profile.save(path)
    assert DeviceProfile.load(path) == profile
    first_only = fit_profile("mini", PRINT, requests(times(80, noise=0.05)))
    first_only.save(path)
    assert DeviceProfile.load(path) == first_only
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]
    data = json.loads(path.read_text())
    for broken in ("{", "[]", "{}", json.dumps({**data, "format_version": 9}), json.dumps({**data, "more": 1})):
        path.write_text(broken)
        with pytest.raises(ProfileError, match=r"profile.json is no device profile .*adallava calibrate"):
            DeviceProfile.load(path)
    with pytest.raises(ProfileError, match="is no device profile"):
        DeviceProfile.load(tmp_path / "none.json")


def test_a_profile_of_another_setting_is_refused_in_a_sentence():
    profile = fit_profile("mini-L", PRINT, requests(times(60)))
    profile.check(dict(PRINT))
    with pytest.raises(ProfileError, match=r"of mini-L does not hold here: threads was 2, now it is 1. Measure again"):
        profile.check({**PRINT, "threads": "1"})
    with pytest.raises(ProfileError, match="threads was 2, now it is not told; dtype was not told, now it is bf16"):
        profile.check({"model": "m", "dtype": "bf16"})
