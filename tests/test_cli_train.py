"""``adallava train`` and ``adallava doctor``: recipes run with a bar, stops say how to go on, checks name remedies."""

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from adallava.cli import doctor as doctor_module
from adallava.cli.main import app
from adallava.hosts import load
from adallava.hosts.model import AdaptiveVLM
from adallava.mini import recipe as recipes
from adallava.training.fit import Interrupted
from tiny import processor, tiny_base, tiny_vlm


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def fake_run(monkeypatch):
    """A recipe of one stage that tells its callbacks what the Trainer would."""
    seen = []

    def run(name, output, scale=1.0, callbacks=None):
        seen.append((name, output, scale))
        args, state = SimpleNamespace(output_dir=str(output / "tower" / "checkpoints")), SimpleNamespace()
        state.max_steps, state.global_step = 40, 10
        for callback in callbacks:
            callback.on_train_begin(args, state, None)
            for state.global_step in range(11, 41):
                callback.on_step_end(args, state, None)
                callback.on_log(args, state, None, logs={"loss": 1 / state.global_step})
            callback.on_log(args, state, None, logs={"train_runtime": 1.0})
        return output / name

    monkeypatch.setattr(recipes, "run", run)
    return seen


def test_train(fake_run, tmp_path):
    result = call("train", "mini-L", "--out", tmp_path / "out", "--scale", 0.1)
    assert result.exit_code == 0, result.stderr
    assert fake_run == [("mini-L", tmp_path / "out", 0.1)]
    lines = result.stderr.splitlines()
    assert lines[0] == "tower: step 11/40, loss 0.091"
    assert len(lines) == 15 + 1  # every second step of thirty, and the result
    assert lines[-1] == f"done: {tmp_path / 'out' / 'mini-L'}"


def test_train_bar_on_a_terminal(fake_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    result = call("train", "mini-L", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "40/40" in result.stderr and "0.025" in result.stderr


@pytest.mark.parametrize("error", [Interrupted("stopped"), KeyboardInterrupt()])
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, error):
    def run(*arguments):
        raise error

    monkeypatch.setattr(recipes, "run", run)
    result = call("train", "mini", "--out", tmp_path / "my models", "--scale", 0.5)
    assert result.exit_code == 130
    assert result.stderr.startswith("stopped")
    assert result.stderr.endswith(f"Go on with: adallava train mini --out '{tmp_path}/my models' --scale 0.5\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mini-l"], ["'mini-l'", "Did you mean 'mini-L'?", "mini-shallow"]),
        (["mini", "--scale", "nan"], ["scale is nan"]),
        (["mini", "--scale", "0"], ["scale is 0"]),
    ],
)
def test_train_bad_input(tmp_path, arguments, words):
    result = call("train", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words)
    assert not (tmp_path / "out").exists()


def test_train_into_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in call("train", "mini", "--out", tmp_path / "file").stderr


# -- doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("shipped")
    AdaptiveVLM(tiny_base(), processor()).save_pretrained(root / "mini-base")
    tiny_vlm(variant="L").save_pretrained(root / "mini-L")
    tiny_vlm(variant="H").save_pretrained(root / "mini-H")
    return root


def test_doctor_finds_everything_in_order(models, monkeypatch):
    monkeypatch.setattr(load, "shipped_folder", models.joinpath)
    result = call("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert {"Python", "torch", "transformers", "torchvision", "device", "threads", *load.SHIPPED} <= set(checks)
    assert [check for check in checks.values() if check["status"] == "fail"] == []
    assert result.exit_code == 0
    assert "answers at 100% and 50%" in checks["mini-L"]["detail"]
    assert "answers at 100% in" in checks["mini-base"]["detail"]


def test_doctor_fails_with_a_remedy(models, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "shipped_folder", tmp_path.joinpath)
    result = call("doctor")
    assert result.exit_code == 1
    assert "mini-L is not in this installation" in result.stdout
    assert "adallava train mini" in " ".join(result.stdout.split())
    assert "3 failed" in result.stdout


@pytest.mark.parametrize(
    ("torch_version", "needs", "status"),
    [("2.13.0+cpu", "2.13.0", "fail"), ("2.13.0", "2.11.0", "warn")],  # the first is not importable here
)
def test_doctor_knows_the_torchvision_trouble(monkeypatch, torch_version, needs, status):
    versions = {"torchvision": "0.26.0", "torch": torch_version}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [f"torch=={needs}", "numpy"])
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    (check,) = doctor_module._torchvision()
    assert check.status == status
    assert "pip uninstall torchvision" in check.remedy


def test_doctor_survives_a_check_that_breaks():
    def broken():
        raise RuntimeError("driver too old")
        yield

    (check,) = doctor_module._safe(broken)
    assert (check.name, check.status) == ("broken", "fail")
    assert "driver too old" in check.detail


def test_doctor_names_packages_that_are_missing_or_too_old(monkeypatch):
    declared = ["numpy>=999", "surely-not-installed>=1", "also-not>=2; extra == 'train'", "x; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    checks = [(check.name, check.status, check.remedy) for check in doctor_module._packages()]
    assert checks[0] == ("numpy", "warn", "pip install 'numpy>=999'")
    assert checks[1] == ("surely-not-installed", "fail", "pip install 'surely-not-installed>=1'")
    assert checks[2][:2] == ("also-not", "warn") and "adallava[train]" in checks[2][2]
    assert len(checks) == 3
