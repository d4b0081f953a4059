"""Sweeps: rows, means, what is checked first, and going on after a stop."""

import json
import math

import pytest

from adallava.budget import Budget, parse_budgets
from adallava.errors import BudgetError, CheckpointError, ConfigError, ResultExistsError
from adallava.evaluation import sweep as sweep_module
from adallava.evaluation.sweep import Listener, SweepSettings, flat, labels, sweep
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.questions import FAMILIES
from adallava.results import read_rows
from tiny import processor, tiny_base, tiny_vlm

TASKS = [*FAMILIES, "mean"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    AdaptiveVLM(tiny_base(), processor()).save_pretrained(root / "base")
    tiny_vlm(variant="L").save_pretrained(root / "L")
    tiny_vlm(variant="H").save_pretrained(root / "H")
    return root


@pytest.fixture
def counted(monkeypatch):
    """The tasks that are really run."""
    asked, real = [], sweep_module.run_task

    def run_task(vlm, settings, on_batch=None):
        asked.append((settings.task, str(settings.budget), settings.mode))
        return real(vlm, settings, on_batch)

    monkeypatch.setattr(sweep_module, "run_task", run_task)
    return asked


def settings(budgets="100%,67%", limit=2, **kwargs):
    return SweepSettings(tuple(parse_budgets(budgets)), limit=limit, **kwargs)


def bare(rows):
    return [(row.name, row.metrics, row.config) for row in rows]


class Note(Listener):
    def __init__(self):
        self.notes, self.totals, self.questions, self.rows = [], [], 0, []

    def on_total(self, questions):
        self.totals.append(questions)

    def on_questions(self, count):
        self.questions += count

    def on_note(self, text):
        self.notes.append(text)

    def on_row(self, row):
        self.rows.append(row)


def test_rows(folders):
    listener = Note()
    rows = sweep([str(folders / "base"), str(folders / "H")], settings(), listener)
    keys = [(row.config["model"], row.config["budget"], row.config["mode"], row.name) for row in rows]
    expected = [("base", "100%", "none"), ("H", "100%", "learned"), ("H", "67%", "learned")]
    assert keys == [(*run, task) for run in expected for task in TASKS]
    assert listener.rows == rows
    assert listener.totals[-1] == listener.questions == 3 * 6 * 2
    assert listener.notes == ["base is a base model: it runs at 100% only, so 67% is skipped."]
    assert {row.provenance["seed"] for row in rows} == {0}
    for row in rows:
        metrics = row.metrics
        assert metrics["low"] <= metrics["accuracy"] <= metrics["high"]
        assert metrics["n"] == (12 if row.name == "mean" else 2)
        assert (metrics["plans"] is None) == (row.config["model"] == "base")
    assert rows[-1].metrics["flops_frac"] == pytest.approx(2 / 3, abs=0.02)
    item = json.loads(json.dumps(flat(rows[-1])))
    assert {"model", "budget", "mode", "task", "accuracy", "n", "interval", "low", "high", "provenance"} <= set(item)
    assert "plan_counts" not in item


def test_the_mean_weighs_tasks_alike(folders, monkeypatch):
    def run_task(vlm, settings, on_batch=None):
        run = sweep_module.TaskRun(scores=[1.0, 0.0] if settings.task == "open" else [1.0, 1.0])
        run.flops_fracs = [1.0, 1.0]
        return run

    monkeypatch.setattr(sweep_module, "run_task", run_task)
    *tasks, mean = sweep([str(folders / "base")], settings("100%"))
    assert mean.metrics["accuracy"] == pytest.approx(5.5 / 6)
    assert mean.metrics["interval"] == pytest.approx(math.sqrt(sum(t.metrics["interval"] ** 2 for t in tasks)) / 6)


def test_a_stopped_sweep_goes_on(folders, tmp_path, counted, monkeypatch):
    whole = sweep([str(folders / "L")], settings(modes=("learned", "random"), out=tmp_path / "whole.jsonl"))
    every = list(counted)
    counting = sweep_module.run_task

    def stop(vlm, task_settings, on_batch=None):
        if len(counted) == 9:
            raise KeyboardInterrupt
        return counting(vlm, task_settings, on_batch)

    counted.clear()
    out = tmp_path / "cut.jsonl"
    monkeypatch.setattr(sweep_module, "run_task", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep([str(folders / "L")], settings(modes=("learned", "random"), out=out))
    assert len(read_rows(out)) == 10  # nine tasks and the mean of the first six
    with out.open("a") as file:
        file.write('{"name": "choice", "metr')  # as if killed while writing
    monkeypatch.setattr(sweep_module, "run_task", counting)
    counted.clear()
    again = sweep([str(folders / "L")], settings(modes=("learned", "random"), out=out))
    assert counted == every[9:]
    assert bare(again) == bare(whole)
    assert bare(read_rows(out)) == bare(whole)
    counted.clear()
    assert bare(sweep([str(folders / "L")], settings(modes=("learned", "random"), out=out))) == bare(whole)
    assert counted == []


@pytest.mark.parametrize(("change", "match"), [({"seed": 1}, "seed 0.*seed 1"), ({"limit": 3}, "limit 2.*limit 3")])
def test_rows_of_other_settings_are_not_mixed(folders, tmp_path, change, match):
    out = tmp_path / "rows.jsonl"
    sweep([str(folders / "L")], settings("67%", out=out))
    before = out.read_bytes()
    with pytest.raises(ResultExistsError, match=match):
        sweep([str(folders / "L")], settings("67%", out=out, **change))
    assert out.read_bytes() == before


def test_a_model_trained_anew_is_noticed(folders, tmp_path):
    out = tmp_path / "rows.jsonl"
    tiny_vlm().save_pretrained(tmp_path / "L")
    sweep([str(tmp_path / "L")], settings("100%", out=out))
    other = tiny_vlm()
    other.scheduler.head.bias.data += 1
    other.save_pretrained(tmp_path / "L")
    with pytest.raises(ResultExistsError, match="with weights"):
        sweep([str(tmp_path / "L")], settings("100%", out=out))


@pytest.mark.parametrize("text", ["notes, no newline", '{"a": 1}', "[1, 2]\n", '{"name": "x", "metrics": {}}\n'])
def test_other_files_are_left_alone(folders, tmp_path, text):
    out = tmp_path / "notes.txt"
    out.write_text(text)
    with pytest.raises(ResultExistsError, match="not the output of a sweep"):
        sweep([str(folders / "L")], settings(out=out))
    assert out.read_text() == text


def test_mistakes_are_found_before_the_first_model_runs(folders, counted):
    good = str(folders / "L")
    with pytest.raises(CheckpointError, match="Did you mean 'mini-L'"):
        sweep([good, "mini-l"], settings())
    with pytest.raises(BudgetError, match=r"H: budget 30% is below the minimum of this model, 50%"):
        sweep([str(folders / "base"), str(folders / "H")], settings("100%,30%"))
    assert counted == []


def test_settings():
    assert settings("60%,0.6,3/5").budgets == (Budget.parse("60%"),)
    for name, value in [("limit", 0), ("seed", -1), ("batch_size", 0), ("limit", True)]:
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            settings(**{name: value})
    with pytest.raises(ConfigError, match="Did you mean 'random'"):
        settings(modes=("randm",))
    with pytest.raises(ConfigError, match="no modes"):
        settings(modes=())


def test_labels(tmp_path):
    for path in ("a/mini-L", "b/mini-L", "c/mini-H"):
        (tmp_path / path).mkdir(parents=True)
    first, second, third = (str(tmp_path / path) for path in ("a/mini-L", "b/mini-L", "c/mini-H"))
    assert labels([first, third, first]) == {"mini-L": first, "mini-H": third}
    assert labels([first, second]) == {first: first, second: second}
    assert labels(["mini-L", first]) == {"mini-L": "mini-L", first: first}
