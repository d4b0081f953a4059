"""The paper in miniature: attention of the latency token, plan modes, tables, figures, and the whole command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from adallava.budget import Budget
from adallava.cli.main import app
from adallava.cli.reproduce import ITEMS
from adallava.errors import ConfigError
from adallava.evaluation import reproduce
from adallava.evaluation.lmms_tasks import MAIN
from adallava.evaluation.minibench import TaskSettings, run_task
from adallava.evaluation.modes import PlanMode
from adallava.evaluation.plans import PlanCounts
from adallava.evaluation.scales import SCALES, find_scale
from adallava.hosts.load import load
from adallava.hosts.looking import look
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.scenes import sample_scene, to_image
from adallava.plots import figures, items
from adallava.plots.tables import TABLE_A, TABLE_B_COLUMNS, Table, relative, table_b
from adallava.results import ResultRow, read_rows
from tiny import processor, tiny_base, tiny_vlm

PICTURE = to_image(sample_scene("test", 0, 0))


# -- what the latency token looks at ----------------------------------------------------------------------------------


def eager_rows(vlm, question, plan):
    """The same rows from transformers' own eager attention."""
    vlm.model.set_attn_implementation("eager")
    made = vlm.processor(
        text=[
            vlm.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
            )
        ],
        images=[[PICTURE]],
        return_tensors="pt",
    )
    state = vlm.request_state(torch.tensor([plan.k[0]]), plan=plan)
    with torch.no_grad():
        out = vlm(**made, ada_state=state, output_attentions=True)
    return out.attentions


@pytest.mark.parametrize("host", ["llava", "llava-gqa", "mipha"])
def test_attention_is_that_of_the_model(host):
    vlm = tiny_vlm(host)
    seen = look(vlm, PICTURE, "how many ?", budget="67%", max_new_tokens=2)
    plan = seen.answer.plan
    ran = plan.layer_on[0].nonzero().flatten().tolist()
    assert list(seen.attention) == ran
    for layer, row in seen.attention.items():
        assert row.sum() == pytest.approx(1, abs=1e-5)
        assert seen.on_image[layer].shape == (64,)
    assert vlm.model.config.get_text_config()._attn_implementation == "sdpa", "as it was"
    again = vlm.generate(PICTURE, "how many ?", budget="67%", max_new_tokens=2)
    assert again.text == seen.answer.text, "looking changes nothing"
    wanted = [row for row in eager_rows(vlm, "how many ?", plan) if row is not None]
    for layer, attention in zip(ran, wanted, strict=True):
        torch.testing.assert_close(seen.attention[layer], attention[0, :, -1].mean(0), rtol=1e-4, atol=1e-5)


def test_attention_of_some_heads():
    vlm = tiny_vlm(variant="H")
    seen = look(vlm, PICTURE, "how many ?", budget="67%", max_new_tokens=1)
    assert set(range(3)) <= set(seen.attention) <= set(range(6))
    with pytest.raises(ConfigError, match="token_selection='none'"):
        look(vlm, PICTURE, "how many ?", token_selection="fastv")


# -- modes ------------------------------------------------------------------------------------------------------------


def test_modes_are_read_and_written():
    for text in ("learned", "static", "random", "random:3", "fixed:9c"):
        assert str(PlanMode.parse(text)) == text
    assert str(PlanMode.parse("random:0")) == "random"
    for text in ("randm", "static:1", "random:x", "fixed", "learned:2"):
        with pytest.raises(ConfigError, match="is not known"):
            PlanMode.parse(text)


def test_fixed_and_random_plans():
    vlm = tiny_vlm()

    def run(mode, task="open"):
        return run_task(vlm, TaskSettings(task, Budget.parse("67%"), PlanMode.parse(mode), 0, 8, 3))

    learned = run("learned")
    (key, _), *_ = learned.plans.counts.most_common()
    fixed = run(f"fixed:{key}")
    assert dict(fixed.plans.counts) == {key: 8}
    first, other = run("random"), run("random:1")
    assert first.plans == run("random").plans and first.plans != other.plans
    with pytest.raises(ConfigError, match="is no plan of this model"):
        run("fixed:123456")


@pytest.mark.parametrize("variant", ["L", "H"])
def test_plan_keys_go_there_and_back(variant):
    vlm = tiny_vlm(variant=variant)
    counts = PlanCounts.for_config(vlm.adaptive_config)
    plan = vlm.generate(PICTURE, "how many ?", budget="67%", max_new_tokens=1).plan
    counts.add(plan)
    (key,) = counts.counts
    assert torch.equal(counts.plan_of(key, vlm.adaptive_config).gates, plan.gates)


def test_every_fixed_plan_is_tried_where_they_are_few():
    config = tiny_vlm().adaptive_config  # three layers after the prefix
    keys = reproduce.candidates(config, Budget.parse("67%"), "mini-L", [])
    assert len(keys) == len(set(keys)) == 3
    counts = PlanCounts.for_config(config)
    assert all(counts.plan_of(key, config).k == [1] for key in keys)


# -- tables and figures -----------------------------------------------------------------------------------------------


def test_tables_are_written():
    table = Table(("model", "a_b"), (("L, 60%", "84.6 ± 0.8"), ('say "x"', "1")))
    head, rule, *body = table.to_markdown().splitlines()
    assert (head, rule) == ("| model | a_b |", "| --- | ---: |")
    assert body == ["| L, 60% | 84.6 ± 0.8 |", '| say "x" | 1 |']
    assert table.to_csv().splitlines()[1] == '"L, 60%",84.6 ± 0.8'
    assert r"L, 60\% & 84.6 $\pm$ 0.8 \\" in table.to_latex() and r"a\_b" in table.to_latex()


def test_the_papers_numbers():
    assert TABLE_A["L", "60%"][3] == 46.3
    whole = table_b("none")
    assert set(whole) == set(table_b("prumerge+")) and len(whole) == 7
    assert whole["H", "60%"] == (74.2, 68.1, 48.7, 85.0, 1489.6, 64.8)
    assert all(len(values) == len(TABLE_B_COLUMNS) for values in whole.values())
    assert table_b("fastv") == {}
    assert relative(whole["base", "100%"], whole["base", "100%"]) == 1
    assert 0.9 < relative(whole["L", "60%"], whole["base", "100%"]) < 1


def row(model, budget, accuracy, mode="learned", task="mean", selection="none"):
    config = {"model": model, "budget": budget, "mode": mode, "token_selection": selection}
    share = float(budget.rstrip("%")) / 100
    metrics = {"accuracy": accuracy, "interval": 0.01, "flops_frac": share, "plans": None}
    metrics |= {"prefill_flops": 2.5e9 * share, "roofline_ms": 0.5 * share}
    return ResultRow(task, metrics, config)


def rows():
    made = [row("mini-base", "100%", 0.9, "none", task) for task in ("open", "reading", "mean")]
    for budget, accuracy in (("100%", 0.9), ("85%", 0.88), ("60%", 0.8)):
        made += [row(m, budget, accuracy, task=t) for m in ("mini-L", "mini-H") for t in ("open", "reading", "mean")]
        made += [row("mini-L", budget, accuracy - 0.01 * n, mode) for n, mode in ((1, "random"), (3, "random:1"))]
    return [*made, row("mini-L", "60%", 0.79, "fixed:20")]


ROLES = {"mini-base": "base", "mini-L": "L", "mini-H": "H"}


def test_items_show_what_was_measured():
    runs = items.Runs(rows(), ROLES)
    (ours, paper) = items.table_a(runs).tables
    assert ours.columns == ("model", "open", "reading", "mean")
    assert ours.rows[-1] == ("AdaLLaVA-L, 60%", *["80.0 ± 1.0"] * 3)
    assert paper.rows[-1] == ("AdaLLaVA-L-7B, 60%", "58.7", "59.8", "23.9", "46.3", "44.8")
    (table,) = items.table_b_item(runs).tables
    lines = {line[0] + line[2]: line for line in table.rows}
    assert lines["AdaLLaVA-H60%"][3:6] == ("1.5", "60.0", "0.3")
    assert lines["AdaLLaVA-H60%"][-2] == "88.9" and lines["AdaLLaVA-H60%"][-1] == "96.4"
    (found,) = items.content(runs).tables
    assert found.rows == (("AdaLLaVA-L", "60%", "80.0 ± 1.0", "79.0 ± 1.0", "+1.0", "-", "-"),)
    figure = items.fig_d(runs).figures["random"]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert set(labels) == {"learned", "random plans, same weights, mean of 2 draws"}
    (spread,) = [shape for shape in figure.axes[0].collections if shape.get_alpha() == 0.25]
    assert spread.get_paths()[0].vertices[:, 1].min() == pytest.approx(77)
    assert figure.axes[0].get_xlabel() == "Budget (% of the base model's FLOPs)"
    lines = items.fig_c(runs, SCALES["mini"].designs).figures["switches"].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in lines] == ["L, 6 switches", "H, single heads"], "the ablations were not run"
    assert items.fig_b(runs).figures["tasks"].axes[0].get_title() == "Accuracy relative to the base model (%)"


def test_the_training_curve():
    losses = [ResultRow("train", {"step": n, "loss": 3 / n}) for n in range(1, 101)]
    axes = items.fig_a(losses).figures["training"].axes[0]
    (raw, smooth) = axes.get_lines()
    assert raw.get_ydata()[0] == 3 and len(smooth.get_ydata()) == 98 and axes.get_ylim()[0] == 0


def test_pictures_of_plans_and_attention():
    plan = ResultRow("plan", {"layer_frac": [1, 1, 0.5, 0], "prefix_layers": 2}, {"budget": "60%", "model": "L"})
    axes = figures.plans([plan, plan]).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["60%", "60%"]
    grid = np.full((8, 8), 1 / 128)
    attention = [
        ResultRow("attention", {"image": grid.tolist()}, {"question": "how many red things ?", "layer": n})
        for n in range(5)
    ]
    shown = figures.overlays(np.zeros((72, 72, 3)), attention)
    assert [a.get_title() for a in shown.axes[:3]] == ["the picture", "how many red things ?", "how many red things ?"]
    assert figures.layers(attention).axes[3].get_title() == "layer 3\n50 % on it"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    AdaptiveVLM(tiny_base(), processor()).save_pretrained(folder / "mini-base")
    for variant in "LH":
        tiny_vlm(variant=variant).save_pretrained(folder / f"mini-{variant}")
    return folder


def test_everything_is_reproduced(folder, tmp_path, monkeypatch):
    for module in ("hosts.load", "evaluation.preflight"):
        monkeypatch.setattr(f"adallava.{module}.shipped_folder", folder.joinpath)
    monkeypatch.setattr(reproduce, "BUDGETS", ("100%", "67%", "50%"))
    monkeypatch.setattr(reproduce, "PAPER_BUDGETS", ("100%", "67%"))
    monkeypatch.setattr(reproduce, "SELECTIONS", ("none", "uniform:ratio=0.25"))
    monkeypatch.setattr(reproduce, "DRAWS", 2)
    monkeypatch.setattr(reproduce, "CANDIDATES", 3)
    monkeypatch.setattr(reproduce, "_few", lambda settings: 1)
    history = tmp_path / "training.json"
    history.write_text(json.dumps([{"name": "train", "metrics": {"step": n, "loss": 1.0}} for n in (1, 2)]))
    command = ["reproduce", "all", "--out", str(tmp_path / "out"), "--limit", "2", "--training", str(history)]
    command += ["--batch-size", "16"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    made = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {"table-a", "table-b", "table-c", "content"}
    assert {f"{name}.{ending}" for name in tables for ending in ("md", "csv", "tex")} <= made
    for name in set(ITEMS) - tables:
        assert {path.suffix for path in (tmp_path / "out").glob(f"{name}-*")} == {".png", ".svg"}, name
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(f'<section id="{name}">' in page for name in ITEMS) and "http" not in page
    sweep = (tmp_path / "out" / "results" / "sweep.jsonl").read_bytes()
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert again.exit_code == 0
    assert (tmp_path / "out" / "results" / "sweep.jsonl").read_bytes() == sweep, "nothing is measured twice"
    assert load("mini-L").adaptive_config.num_layers == 6


def test_points_are_told_as_points():
    points = {"accuracy": 0.75, "interval": 0.01, "out_of": 2000.0, "score": 1500.0, "flops_frac": 1, "plans": None}
    made = [replace(row("a-base", "100%", 0, "none", task), metrics=points) for task in ("mme", "mean")]
    (table, _) = items.table_a(items.Runs([*made, row("stranger", "100%", 1)], {"a-base": "base"})).tables
    assert table.columns[1] == "mme" and table.rows[0][1] == "1500.0 ± 20.0"
    (table,) = items.table_b_item(items.Runs(made, {"a-base": "base"})).tables
    assert table.rows[0][3:7] == ("-", "100.0", "-", "1500.0")


def test_a_scale_of_ones_own(folder, tmp_path, monkeypatch):
    """Other models, tasks of their own for Tab. A and for the search of the best plan, and a picture."""
    monkeypatch.setattr(reproduce, "BUDGETS", ("100%", "67%", "50%"))
    monkeypatch.setattr(reproduce, "PAPER_BUDGETS", ("100%", "67%"))
    monkeypatch.setattr(reproduce, "_few", lambda settings: 1)
    models = {role: str(folder / f"mini-{role}") for role in ("base", "L", "H")}
    scale = {"name": "own", "models": models, "tasks": ["open", "choice"], "broad_tasks": ["reading"]}
    scale |= {"choosing_tasks": ["presence"], "limit": 2, "designs": {"L": "three switches"}}
    (tmp_path / "own.json").write_text(json.dumps(scale))
    PICTURE.save(tmp_path / "photo.png")
    out = tmp_path / "out"
    command = ["reproduce", "table-a", "content", "fig-c", "fig-e", "--scale", str(tmp_path / "own.json")]
    command += ["--out", str(out), "--image", str(tmp_path / "photo.png"), "--question", "how many ?"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    tasks = {name: {one.name for one in read_rows(out / "results" / f"{name}.jsonl")} - {"mean"} for name in FILES}
    assert tasks == {"sweep": {"open", "choice"}, "broad": {"reading"}, "choosing": {"presence"}}
    head = (out / "table-a.md").read_text().splitlines()[0]
    assert head == "| model | reading | mean |"
    page = (out / "index.html").read_text()
    assert "<h1>AdaLLaVA, own</h1>" in page and "how many ?" in page
    assert (out / "fig-e-plans-L.png").is_file() and not (out / "table-b.md").exists()


FILES = ("sweep", "broad", "choosing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": {"base": "x", "L": "y"}}, "names no model for H"),
        ({"tasks": []}, "has no tasks"),
        ({"tasks": ["pope"]}, "has no choosing_tasks"),
        ({"choosing_tasks": ["open", "gqa"]}, "chooses and tests plans on open"),
        ({"size": 7}, "must be a JSON object with name, models and tasks"),
    ],
)
def test_bad_scales(change, words, tmp_path):
    path = tmp_path / "scale.json"
    good = {"name": "own", "models": dict.fromkeys(("base", "L", "H"), "x"), "tasks": ["open"]}
    path.write_text(json.dumps(good))
    assert find_scale(str(path)).tasks == ("open",)
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(ConfigError, match=words):
        find_scale(str(path))


def test_models_of_one_name_are_refused_before_anything_runs(tmp_path):
    for role in "LH":
        (tmp_path / role / "final").mkdir(parents=True)
    models = {"base": "mini-base", "L": str(tmp_path / "L" / "final"), "H": str(tmp_path / "H" / "final")}
    (tmp_path / "own.json").write_text(json.dumps({"name": "own", "models": models, "tasks": ["open"]}))
    arguments = ["reproduce", "table-b", "--scale", str(tmp_path / "own.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "L and H are both called 'final'" in " ".join(result.stderr.split())


def test_scales_that_come_with_the_package(tmp_path):
    for name in ("7", "8b"):
        with pytest.raises(ConfigError, match=r"not known\..*Known: mini, 7b"):
            find_scale(name)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_scale(str(tmp_path / "none.json"))
    full = find_scale("7b")
    assert full.models["H-prumerge+"] == "zhuoyanxu/ada-llava-H-v1.5-7b-prumerge-plus"
    assert {*full.tasks, *full.broad_tasks, *full.choosing_tasks} <= set(MAIN)
    (tmp_path / "llava-1.5-7b-L-random").mkdir()
    (tmp_path / "llava-1.5-7b-L-random" / "adaptive_config.json").touch()
    roles = full.roles(tmp_path)
    assert roles["llava-1.5-7b-L-random"] == "L-random" and roles["llava-hf/llava-1.5-7b-hf"] == "base"
    assert set(SCALES["mini"].roles(None)) == {"mini-base", "mini-L", "mini-H"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fig-e", "--image", "photo.png"], "pass --image and --question together"),
        (["fig-z"], "there is no item 'fig-z'; known: all, table-a"),
        (["fig-a"], "fig-a is drawn from a run's training.json. Pass --training FILE."),
    ],
)
def test_bad_items(arguments, words, tmp_path):
    result = CliRunner().invoke(app, ["reproduce", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
