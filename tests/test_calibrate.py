"""Calibration for real, on tiny models and in little time: measure, keep, use; in Python and on the command line."""

import json

import pytest
from typer.testing import CliRunner

import adallava
from adallava.bench import BenchSettings
from adallava.bench import calibrate as module
from adallava.bench import latency as bench_module
from adallava.bench.calibrate import CalibrationSettings, Recorder, calibrate, random_batches
from adallava.cli.main import app
from adallava.cost.calibration import MINIMUM_MEASUREMENTS, DeviceProfile
from adallava.errors import ConfigError, ProfileError
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.profiles import FOLDER_VARIABLE, fingerprint, profile_path
from adallava.hosts.threads import CoreMeter
from matrix import IMAGES, options
from tiny import processor, tiny_base, tiny_vlm

QUICK = CalibrationSettings(seconds=2.0, new_tokens=2)


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "profiles"))
    monkeypatch.setattr(module, "_WARM_UP_SECONDS", 0.2)
    # Everywhere: a loaded machine is slow, and how fast it is is not what is tested here.
    monkeypatch.setattr(module.time, "perf_counter", Clock())


class Clock:
    """A clock that a request takes a hundredth of a second on, however busy the machine is; and a bit more with k."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.002
        return self.now


def test_a_profile_is_measured_kept_and_used():
    vlm, seen = tiny_vlm(), []
    profile = calibrate(vlm, "tiny", QUICK, progress=seen.append)
    assert adallava.calibrate is calibrate
    assert seen[-1] == 1.0 and seen == sorted(seen)
    assert profile.fingerprint == fingerprint(vlm)
    for stage in (profile.prefill, profile.decode):
        assert stage.fitted + stage.held_out >= MINIMUM_MEASUREMENTS
        assert stage.extent["rows"] == (1, 1)
    assert profile.prefill.extent["images"] == (0, 1)
    assert DeviceProfile.load(profile_path(profile.fingerprint)) == profile
    for model in (vlm, tiny_vlm()):
        answer = model.generate(IMAGES[0], "how many ?", budget="1 s", **options("llava"))
        assert answer.budget.k == 3
        assert answer.budget.forecast.upper_ms < 1000


def test_batches_and_models_without_switches():
    base = AdaptiveVLM(tiny_base(), processor())
    profile = calibrate(base, "base", CalibrationSettings(2.0, (1, 3), new_tokens=2), save=False)
    assert profile.prefill.extent["rows"] == (1, 3)
    assert not profile_path(profile.fingerprint).exists()
    assert base.generate(IMAGES[0], "how many ?", budget="1 s", **options("llava")).budget is None


def test_requests_cover_every_k_and_length():
    vlm, recorder = tiny_vlm(variant="H"), Recorder()
    batches = random_batches(vlm, CalibrationSettings(words=(4, 40)))
    requests = [next(batches)[0] for _ in range(40)]
    assert {request.budget for request in requests} == set(vlm.reachable_budgets())
    assert {len(request.question.split()) for request in requests} >= {4, 40}
    assert sum(request.images is None for request in requests) == 13
    with vlm.profiles.recorded_by(recorder):
        module.ask(vlm, requests[:1], 3)
    module.ask(vlm, requests[:1], 3)
    (told,) = recorder.measured
    assert 0 < told.tail.ms < told.prefill.ms and told.decode.ms > 0


def test_a_device_that_is_too_slow_is_told_before_and_after(monkeypatch):
    with pytest.raises(ProfileError, match=r"are too few on this device: a request takes about .* Measure for \d+ sec"):
        calibrate(tiny_vlm(), "tiny", CalibrationSettings(seconds=0.05, new_tokens=2))
    monkeypatch.setattr(module, "_warm_up", lambda *args: None)
    with pytest.raises(ProfileError, match="are too few on this device"):
        calibrate(tiny_vlm(), "tiny", CalibrationSettings(seconds=0.05, new_tokens=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seconds": 0}, "seconds is 0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"batch_sizes": ()}, "batch_sizes is"),
        ({"batch_sizes": (0,)}, "batch_sizes is"),
        ({"words": (5, 4)}, "words is"),
        ({"new_tokens": 1}, "new_tokens is 1"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationSettings(**wrong)


def test_without_a_processor_nobody_can_be_asked():
    with pytest.raises(ProfileError, match="has no processor"):
        calibrate(AdaptiveVLM(tiny_base(), None), "base")


def test_the_command_line(tmp_path, monkeypatch):
    tiny_vlm().save_pretrained(tmp_path / "L")
    IMAGES[0].save(tmp_path / "scene.png")
    model, scene = str(tmp_path / "L"), str(tmp_path / "scene.png")

    def call(*arguments):
        return CliRunner().invoke(app, list(arguments))

    ask = ("run", scene, "what number is red ?", "--model", model, "--max-new-tokens", "3", "--budget")
    missing = call(*ask, "1 s")
    assert missing.exit_code == 2 and "needs a device profile" in " ".join(missing.stderr.split())
    monkeypatch.setattr(CoreMeter, "others", lambda self: 0.1)
    shown = call("calibrate", model, "--seconds", "2")
    assert shown.exit_code == 0, shown.stderr
    assert "first token" in shown.stdout and "each token after it" in shown.stdout
    assert "adallava run IMAGE QUESTION" in shown.stdout
    assert "other programs" not in shown.stdout
    monkeypatch.setattr(CoreMeter, "others", lambda self: 1.2)
    assert "other programs took 1.2 cores" in call("calibrate", model, "--seconds", "2").stdout
    told = json.loads(call("calibrate", model, "--seconds", "2", "--json").stdout)
    assert told["cores_of_others"] == 1.2
    assert DeviceProfile.load(told["path"]).fingerprint == told["fingerprint"]
    least, most = told["typical"]["first_token_ms"]
    assert 0 < least <= most
    run = json.loads(call(*ask, "1 s", "--json").stdout)
    assert run["forecast"]["upper_ms"] <= 1000
    assert "forecast" in call(*ask, "1 s").stdout
    assert json.loads(call(*ask, "100%", "--json").stdout)["forecast"] is None
    few = call(*ask, "0.001 ms")
    assert few.exit_code == 2 and "is infeasible: the minimum on this device" in " ".join(few.stderr.split())
    wrong = call("calibrate", model, "--batch", "one")
    assert wrong.exit_code == 2 and "--batch is 'one'" in wrong.stderr


def test_the_benchmark(monkeypatch):
    monkeypatch.setattr(bench_module, "CALIBRATION_SECONDS", 2.0)
    monkeypatch.setattr(bench_module, "_SETTLE_SECONDS", 0.0)
    rows = bench_module.measure(BenchSettings("tiny", rounds=6, threads=1))
    parts = {(row.config["part"], row.config["condition"], row.config["forecaster"]): row.metrics for row in rows}
    assert {forecaster for part, _, forecaster in parts if part == "prediction"} == {
        "profile",
        "in proportion to FLOPs",
        "roofline",
    }
    budgets = {key: metrics for key, metrics in parts.items() if key[0] == "budgets"}
    assert len(budgets) == 4
    for metrics in budgets.values():
        assert metrics["requests"] + metrics["refused"] == 6
        assert 0.2 < metrics["slowdown"] < 20
        assert len(metrics.get("k", [])) == metrics["requests"]
        assert all(0 <= metrics[name] <= 1 for name in ("bound_coverage", "within_frac") if metrics["requests"])
