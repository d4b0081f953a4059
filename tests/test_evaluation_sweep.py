"""Sweeps: rows, means, what is checked first, and going on after a stop."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from adallava.budget import Budget, parse_budgets
from adallava.cli.sweep import split_tasks
from adallava.errors import BudgetError, CheckpointError, ConfigError, ResultExistsError, UnknownNameError
from adallava.evaluation import preflight as preflight_module
from adallava.evaluation import sweep as sweep_module
from adallava.evaluation.preflight import preflight
from adallava.evaluation.store import Key, RowStore
from adallava.evaluation.sweep import Listener, SweepSettings, flat, labels, sweep
from adallava.evaluation.tasks import TaskRun
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.questions import FAMILIES
from adallava.results import append_jsonl, read_rows
from released import llava_config
from tiny import processor, tiny_base, tiny_vlm

TASKS = [*FAMILIES, "mean"]
PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "results" / "mini-sweep-seed1.jsonl"


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
        asked.append((settings.task, str(settings.budget), str(settings.mode), settings.token_selection))
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
        run = TaskRun(scores=[1.0, 0.0] if settings.task == "open" else [1.0, 1.0])
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


def test_some_tasks_alone_and_their_mean(folders, tmp_path):
    out = tmp_path / "rows.jsonl"
    few = sweep([str(folders / "L")], settings("67%", tasks=("choice", "open", "choice"), out=out))
    assert [row.name for row in few] == ["choice", "open", "mean"]
    assert few[-1].config["tasks"] == ["choice", "open"]
    more = sweep([str(folders / "L")], settings("67%", tasks=("choice", "open", "presence"), out=out))
    assert more[-1].metrics["n"] == 6
    # The mean of fewer tasks has given way to that of more.
    store = RowStore(out)
    assert store.find(Key("L", "67%", "learned", "none", "mean"), {}).config["tasks"] == ["choice", "open", "presence"]


def test_tasks_of_lmms_eval_need_it(folders):
    if importlib.util.find_spec("lmms_eval") is not None:
        pytest.skip("lmms-eval is installed")
    for models, tasks in (([str(folders / "L")], ("pope", "mme")), (["lmms:instructblip"], ("open",))):
        with pytest.raises(ConfigError, match=r"adallava\[eval\]"):
            sweep(models, settings(tasks=tasks))


def test_lists_of_tasks():
    assert split_tasks("mini") == tuple(FAMILIES)
    assert split_tasks(" pope, open,mini") == ("pope", "open", *FAMILIES)
    with pytest.raises(ConfigError, match="empty entry"):
        split_tasks("pope,,mme")


# -- token selection --------------------------------------------------------------------------------------------------


def test_every_model_runs_every_token_selection(folders):
    listener, chosen = Note(), ("none", "uniform:count=5", "fastv:rank=9")
    rows = sweep([str(folders / "base"), str(folders / "L")], settings("67%", token_selections=chosen), listener)
    means = [row for row in rows if row.name == "mean"]
    names = [(row.config["model"], row.config["budget"], row.config["token_selection"]) for row in means]
    assert names == [(*run, selection) for run in (("base", "100%"), ("L", "67%")) for selection in chosen]
    assert listener.totals[-1] == listener.questions == 6 * 6 * 2
    for whole, uniform, inside in (means[:3], means[3:]):
        prompt = whole.metrics["prompt_tokens"]
        assert [row.metrics["prompt_tokens"] for row in (uniform, inside)] == [prompt] * 2
        left = [row.metrics["last_layer_tokens"] for row in (whole, uniform, inside)]
        assert left == pytest.approx([prompt, prompt - 64 + 5, prompt - 64 + 9])
        assert uniform.metrics["flops_frac"] < inside.metrics["flops_frac"] < whole.metrics["flops_frac"]
    tasks = [row.metrics["prompt_tokens"] for row in rows[:6]]
    assert len(set(tasks)) > 1 and means[0].metrics["prompt_tokens"] == pytest.approx(sum(tasks) / 6)
    assert {"token_selection", "prompt_tokens", "last_layer_tokens"} <= set(flat(rows[0]))


def test_without_a_token_selection_each_model_has_its_own(tmp_path):
    vlm = tiny_vlm()
    vlm.token_selection = "uniform:count=5"
    vlm.save_pretrained(tmp_path / "L")
    own = sweep([str(tmp_path / "L")], settings("67%", limit=1))
    assert {row.config["token_selection"] for row in own} == {"uniform:count=5"}
    assert own[-1].metrics["last_layer_tokens"] == own[-1].metrics["prompt_tokens"] - 64 + 5
    none = sweep([str(tmp_path / "L")], settings("67%", limit=1, token_selections=("none",)))
    assert {row.config["token_selection"] for row in none} == {"none"}
    assert none[-1].metrics["last_layer_tokens"] == none[-1].metrics["prompt_tokens"]


def test_a_further_token_selection_runs_alone(folders, tmp_path, counted):
    out, model = tmp_path / "rows.jsonl", str(folders / "L")
    sweep([model], settings("67%", limit=1, out=out))
    counted.clear()
    both = sweep([model], settings("67%", limit=1, out=out, token_selections=("uniform:count=5", "none")))
    assert counted == [(task, "67%", "learned", "uniform:count=5") for task in FAMILIES]
    assert [row.config["token_selection"] for row in both] == ["uniform:count=5"] * 7 + ["none"] * 7
    counted.clear()
    again = sweep([model], settings("67%", limit=1, out=out, token_selections=("uniform:count=5", "none")))
    assert counted == [] and bare(again) == bare(both)


def test_rows_from_before_token_selection_kept_every_token(folders, tmp_path, counted):
    out, model = tmp_path / "rows.jsonl", str(folders / "L")
    new = sweep([model], settings("67%"))
    for row in new[:4]:
        config = {name: value for name, value in row.config.items() if name != "token_selection"}
        metrics = {name: value for name, value in row.metrics.items() if not name.endswith("_tokens")}
        append_jsonl(out, replace(row, config=config, metrics=metrics))
    before = out.read_bytes()
    counted.clear()
    rows = sweep([model], settings("67%", out=out, token_selections=("none", "uniform:count=5")))
    assert [task for task, *_, chosen in counted if chosen == "none"] == list(FAMILIES)[4:]
    assert out.read_bytes().startswith(before)
    assert bare(rows[4:6]) == bare(new[4:6])
    for old, now in zip(rows[:4], new[:4], strict=True):
        assert old.config == now.config
        assert old.metrics == {**now.metrics, "prompt_tokens": None, "last_layer_tokens": None}
    mean = {**new[6].metrics, "prompt_tokens": None, "last_layer_tokens": None}  # a mean of two tasks would mislead
    assert (rows[6].metrics, rows[6].config) == (mean, new[6].config)


def test_the_published_rows_are_read():
    store = RowStore(PUBLISHED)
    row = store.find(Key("mini-L", "60%", "random", "none", "mean"), {"seed": 1, "limit": 1000})
    assert row.config["token_selection"] == "none" and 0.5 < row.metrics["accuracy"] < 0.6
    assert store.find(Key("mini-L", "60%", "random", "fastv:ratio=0.5", "mean"), {}) is None


@pytest.mark.parametrize("seen", [True, False], ids=["from the folder", "once it is loaded"])
def test_a_token_selection_that_a_model_refuses(folders, counted, monkeypatch, seen):
    if not seen:  # as for a hub id
        monkeypatch.setattr(preflight_module, "_without_weights", lambda folder: None)
    models = [str(folders / "base"), str(folders / "L")]
    with pytest.raises(ConfigError, match="L: token selection 'fastv:layer=4,ratio=0.5' .* first 3 layers only"):
        sweep(models, settings("67%", limit=1, token_selections=("fastv:layer=4",)))
    assert {chosen for *_, chosen in counted} == (set() if seen else {"fastv:layer=4,ratio=0.5"})
    assert len(counted) == (0 if seen else 6)  # the base model has such a layer


def test_what_a_folder_does_not_tell_is_left_to_loading(tmp_path):
    config = llava_config(64, 128, 40, 4, model_type="llava")  # transformers would take it for one of 32 layers
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert preflight(str(tmp_path), (), ("fastv:layer=36",)) is None
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {"model_type": "no such"}}')
    assert preflight(str(tmp_path), (), ("fastv",)) is None


# -- what is refused --------------------------------------------------------------------------------------------------


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
    assert settings().token_selections is None
    chosen = settings(token_selections=("fastv", "fastv:layer=2,ratio=0.5", "uniform: count = 5", "none"))
    assert chosen.token_selections == ("fastv:ratio=0.5", "uniform:count=5", "none")
    with pytest.raises(UnknownNameError, match="Did you mean 'fastv'"):
        settings(token_selections=("none", "fastvv"))
    with pytest.raises(ConfigError, match="needs either count or ratio"):
        settings(token_selections=("random",))
    with pytest.raises(ConfigError, match="no token_selections"):
        settings(token_selections=())


def test_labels(tmp_path):
    for path in ("a/mini-L", "b/mini-L", "c/mini-H"):
        (tmp_path / path).mkdir(parents=True)
    first, second, third = (str(tmp_path / path) for path in ("a/mini-L", "b/mini-L", "c/mini-H"))
    assert labels([first, third, first]) == {"mini-L": first, "mini-H": third}
    assert labels([first, second]) == {first: first, second: second}
    assert labels(["mini-L", first]) == {"mini-L": "mini-L", first: first}
