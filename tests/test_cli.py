"""The command line from outside: what it prints, where, and with which exit status."""

import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image
from rich.console import Console
from transformers.utils import logging
from typer.testing import CliRunner

from adallava import __version__
from adallava.cli import demo as demo_module
from adallava.cli.group import Commands
from adallava.cli.main import app
from adallava.cli.sweep import print_tables, split_selections
from adallava.evaluation import sweep as sweep_module
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.questions import FAMILIES, SHOWN, rich_scene
from adallava.mini.scenes import sample_scene, to_image
from adallava.results import read_rows
from tiny import processor, tiny_base, tiny_vlm

QUESTION = "what number is red ?"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    AdaptiveVLM(tiny_base(), processor()).save_pretrained(folder / "base")
    tiny_vlm(variant="L").save_pretrained(folder / "L")
    tiny_vlm(variant="H").save_pretrained(folder / "H")
    to_image(sample_scene("test", 0, 0)).save(folder / "scene.png")
    data = (folder / "scene.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "zero.ppm").write_bytes(b"P6 0 0 255\n")
    (folder / "large.ppm").write_bytes(b"P6 10000 6000 255\n")
    (folder / "bomb.ppm").write_bytes(b"P6 60000 60000 255\n")
    return folder


@pytest.fixture(autouse=True)
def quiet():
    """The command asks libraries for silence before it imports them; here they are imported already."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def ask(root, *arguments, image="scene.png", question=QUESTION, model="L"):
    where = image if image == "none" else root / image
    return call("run", where, question, "--model", root / model, "--max-new-tokens", 3, *arguments)


def assert_error(result, *words):
    """One line on stderr, nothing on stdout, status 2."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


# -- the frame --------------------------------------------------------------------------------------------------------


def test_version_and_help():
    assert call("--version").stdout == f"adallava {__version__}\n"
    result = call("--help")
    assert result.exit_code == 0
    for command in ("run", "demo", "sweep", "train", "doctor"):
        assert command in result.stdout
        assert call(command, "--help").exit_code == 0


def test_help_is_light():
    code = (
        "import sys, adallava.cli.main; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], ["No such command 'rnu'", "Did you mean 'run'?"]),
        (["run", "a.png"], ["Missing argument", "adallava run --help"]),
        (["run", "a.png", "q", "--budgt", "1"], ["--budgt", "--budget"]),
        (["sweep", "mini-L", "--limit", "many"], ["--limit", "integer", "adallava sweep --help"]),
        (["sweep", "mini-L", "--limit", "0"], ["limit is 0", "1 or more"]),
        (["sweep", "mini-L", "--seed", "-1"], ["seed is -1", "0 or more"]),
    ],
)
def test_usage_errors(arguments, words):
    # As the installed command does; the test runner would call the program by the name of its first function.
    result = CliRunner().invoke(app, arguments, prog_name="adallava")
    assert_error(result, *words)


@pytest.mark.parametrize("arguments", [["--debug", "run"], ["run", "--debug"]])
def test_debug_shows_the_traceback(root, arguments):
    result = call(*arguments, root / "none.png", QUESTION)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: there is no image file")


def test_our_own_faults_keep_their_traceback(monkeypatch):
    def invoke(self, ctx):
        raise ZeroDivisionError

    monkeypatch.setattr(Commands, "invoke", invoke)
    assert isinstance(call("doctor").exception, ZeroDivisionError)


# -- run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "unit"), [("L", "4/6 layers on"), ("H", "8/12 switches on")])
def test_run_prints_answer_plan_cost_and_time(root, model, unit):
    result = ask(root, "--budget", "67%", model=model)
    assert result.exit_code == 0, result.stderr
    assert f"{unit}, budget 67%" in result.stdout
    assert "■■■│" in result.stdout
    assert "paper convention" in result.stdout
    assert "ms to the first token" in " ".join(result.stdout.split())
    assert result.stderr == ""


def test_run_json(root):
    told = json.loads(ask(root, "--budget", "67%", "--json").stdout)
    same = AdaptiveVLM.from_pretrained(root / "L").generate(
        root / "scene.png", QUESTION, budget="67%", max_new_tokens=3, do_sample=False
    )
    assert told["answer"] == same.text
    assert told["plan"] == same.plan.to_dict()["rows"][0]
    assert told["prefill_flops"] == same.cost.prefill_flops < told["base_prefill_flops"]
    assert told["flops_convention"] == "paper"
    assert told["new_tokens"] == 3
    assert 0 < told["first_token_ms"] <= told["total_ms"]


def test_run_with_a_base_model_several_images_or_none(root):
    told = json.loads(ask(root, "--json", model="base").stdout)
    assert (told["plan"], told["flops_frac"]) == (None, 1.0)
    assert "a base model runs whole" in " ".join(ask(root, model="base").stdout.split())
    one, two = (json.loads(ask(root, "--json", *more).stdout) for more in ([], ["--image", root / "scene.png"]))
    assert two["prompt_tokens"] == one["prompt_tokens"] + 64
    none = json.loads(ask(root, "--json", image="none").stdout)
    assert none["prompt_tokens"] == one["prompt_tokens"] - 64


@pytest.mark.parametrize(("model", "latency"), [("L", 1), ("base", 0)])
def test_run_with_a_token_selection(root, model, latency):
    chosen = ["--token-selection", "fastv:rank=10"]
    told, whole = (json.loads(ask(root, "--json", *more, model=model).stdout) for more in (chosen, []))
    prompt = whole["prompt_tokens"]
    assert (told["token_selection"], told["prompt_tokens"]) == ("fastv:rank=10", prompt)
    assert told["layer_tokens"] == [prompt + latency] * 2 + [prompt - 54 + latency] * 4
    assert (whole["token_selection"], whole["layer_tokens"]) == ("none", [prompt + latency] * 6)
    assert told["flops_frac"] < whole["flops_frac"] == 1
    printed = " ".join(ask(root, *chosen, model=model).stdout.split())
    assert f"visual tokens fastv:rank=10, {prompt - 54} of {prompt} prompt tokens kept, from layer 2 on" in printed


def test_run_tells_of_a_token_selection_only_where_there_is_one(root, tmp_path):
    assert "visual tokens" not in ask(root).stdout
    vlm = AdaptiveVLM.from_pretrained(root / "L", token_selection="uniform:count=5")
    vlm.save_pretrained(tmp_path / "own")
    command = ("run", root / "scene.png", QUESTION, "--model", tmp_path / "own", "--max-new-tokens", 1)
    printed = " ".join(call(*command).stdout.split())
    assert "uniform:count=5, 13 of 72 prompt tokens kept FLOPs" in printed
    assert "visual tokens" not in call(*command, "--token-selection", "none").stdout
    printed = " ".join(ask(root, "--token-selection", "prumerge", image="none").stdout.split())
    assert "visual tokens prumerge, all 8 prompt tokens kept" in printed


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("fastvv", ["unknown token selector 'fastvv'", "Did you mean 'fastv'?"]),
        ("random", ["random needs either count or ratio"]),
        ("fastv:0.5", ["'0.5'", "setting=value"]),
        ("fastv:layr=3", ["no setting 'layr'", "Did you mean 'layer'?"]),
        ("", ["unknown token selector ''"]),
    ],
)
def test_bad_token_selections_are_told_before_a_model_is_loaded(root, chosen, words, monkeypatch):
    monkeypatch.setattr(AdaptiveVLM, "from_pretrained", None)
    assert_error(ask(root, "--token-selection", chosen), *words)


def test_a_token_selection_that_the_model_refuses(root):
    assert_error(ask(root, "--token-selection", "fastv:layer=4"), "fastv:layer=4", "first 3 layers only", "1 to 3")


def test_words_that_the_model_does_not_know(root):
    result = ask(root, "--json", question="what is the man holding ?")
    json.loads(result.stdout)
    assert "does not know 'man', 'holding'" in result.stderr


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("30%", ["30%", "minimum", "50%"]),
        ("nan", ["'nan' is not a budget", "'60%'"]),
        ("abc", ["'abc' is not a budget", "'60%'"]),
        ("60", ["more than the whole model", "Did you mean '60%'?"]),
        ("0", ["not above 0"]),
        ("80 minutes", ["is not a budget", "80 ms"]),
    ],
)
def test_bad_budgets(root, budget, words):
    assert_error(ask(root, "--budget", budget), *words)


def test_a_base_model_has_one_budget(root):
    assert_error(ask(root, "--budget", "60%", model="base"), "base model", "100%")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("missing.png", ["no image file", "missing.png"]),
        ("cut.png", ["cut.png", "truncated"]),
        ("text.png", ["text.png", "cannot be read"]),
        ("zero.ppm", ["zero.ppm"]),
        ("large.ppm", ["large.ppm", "10000 x 6000", "50,000,000"]),
        ("bomb.ppm", ["bomb.ppm", "pixels"]),
        ("", ["no image file"]),
    ],
)
def test_bad_images(root, image, words):
    assert_error(ask(root, image=image), *words)


def test_bad_answer_length(root):
    result = call("run", root / "scene.png", QUESTION, "--model", root / "L", "--max-new-tokens", 0)
    assert_error(result, "--max-new-tokens is 0", "1 or more")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_questions(root, question):
    assert_error(ask(root, question=question), "question", "empty")


def test_unknown_models(root):
    assert_error(call("run", root / "scene.png", QUESTION, "--model", "mini-l"), "'mini-l'", "Did you mean 'mini-L'?")
    assert_error(call("run", root / "scene.png", QUESTION, "--model", root / "no"), "neither a folder nor one of")


# -- demo -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo_module, "REPETITIONS", 1)
    monkeypatch.setattr(demo_module, "MAX_NEW_TOKENS", 3)


def models(root):
    return [part for name in ("L", "base", "H") for part in ("--model", root / name)]


def test_demo(root, tmp_path, quick):
    out = tmp_path / "report.html"
    result = call("demo", *models(root), "--budgets", "100%,67%", "--out", out, "--seed", 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("right answer: ") == len(SHOWN)
    assert result.stdout.count("67%") == 2 * len(SHOWN)
    assert "■■■│" in result.stdout
    page = out.read_text(encoding="utf-8")
    assert page.count("<tr") == len(SHOWN) * (1 + 5)
    assert page.index("base") < page.index(">L<")  # the base model comes first
    assert "seed 4" in page


def test_demo_on_the_users_image_and_questions(root, tmp_path, quick):
    out = tmp_path / "report.html"
    result = call(
        "demo", "--model", root / "L", "--budgets", "67%", "--out", out,
        "--image", root / "scene.png", "--question", "what is <b> ?",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "right answer" not in result.stdout
    assert "what is &lt;b&gt; ?" in out.read_text(encoding="utf-8")
    assert "does not know" in result.stderr


def test_demo_questions_are_the_seeds():
    scene, questions = rich_scene(7)
    assert [q.family for q in questions] == list(SHOWN)
    assert (scene, questions) == rich_scene(7) != rich_scene(8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budgets", "100%,,60%"], ["empty entry"]),
        (["--question", " "], ["empty"]),
        (["--image", "missing.png"], ["missing.png"]),
        (["--model", "mini-l"], ["Did you mean 'mini-L'?"]),
    ],
)
def test_demo_bad_input(root, tmp_path, arguments, words):
    assert_error(call("demo", "--out", tmp_path / "r.html", "--model", root / "L", *arguments), *words)
    assert_error(call("demo", "--out", tmp_path, "--model", root / "L"), "is a folder")
    assert_error(call("demo", "--out", tmp_path / "r.html", "--model", root / "L", "--budgets", "30%"), "L: ", "50%")
    assert list(tmp_path.iterdir()) == []


# -- sweep ------------------------------------------------------------------------------------------------------------


def test_sweep_json(root):
    result = call("sweep", root / "base", root / "L", "--budgets", "100%,67%", "--limit", 1, "--json", "--seed", 5)
    rows = json.loads(result.stdout)
    assert len(rows) == 3 * 7
    assert [row["task"] for row in rows[:7]] == [*FAMILIES, "mean"]
    for row in rows:
        assert {"model", "budget", "task", "accuracy", "n", "interval", "low", "high"} <= set(row)
        assert (row["seed"], row["provenance"]["seed"]) == (5, 5)
    assert "base is a base model" in result.stderr


def test_sweep_table_and_restart(root, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    command = (
        "sweep",
        root / "L",
        root / "H",
        "--budgets",
        "67%",
        "--limit",
        1,
        "--out",
        out,
        "--mode",
        "learned,static",
    )
    real, asked = sweep_module.run_task, []

    def run_task(*arguments):
        asked.append(arguments)
        if len(asked) == 9:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sweep_module, "run_task", run_task)
    stopped = call(*command)
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert f"in {out}; the same command goes on" in stopped.stderr.splitlines()[-1]
    result = call(*command)
    assert result.exit_code == 0, result.stderr
    assert len(asked) == 9 + (24 - 8)
    assert result.stdout.count("static") == 4  # L and H, in both tables
    for word in ("mean", *FAMILIES, "plans", "commonest"):
        assert word in result.stdout
    assert_error(call(*command, "--seed", 1), "seed 0", "seed 1")


def test_sweep_over_token_selections(root, tmp_path):
    command = ["sweep", root / "base", root / "L", "--budgets", "67%", "--limit", 1, "--out", tmp_path / "rows.jsonl"]
    command += ["--token-selection", "none,fastv:layer=3,rank=9", "--token-selection", "uniform:count=5"]
    result = call(*command)
    assert result.exit_code == 0, result.stderr
    accuracy, plans = result.stdout.split("Plans of all tasks")
    for table in (accuracy, plans):
        assert "tokens" in table
        for chosen in ("none", "fastv:layer=3,rank=9", "uniform:count=5"):
            assert table.count(chosen) == 2
    rows = [row for row in json.loads(call(*command, "--json").stdout) if row["task"] == "mean"]
    assert [row["token_selection"] for row in rows] == ["none", "fastv:layer=3,rank=9", "uniform:count=5"] * 2
    for row in rows:
        assert f" {row['last_layer_tokens']:.0f} of {row['prompt_tokens']:.0f} " in plans
    assert rows[2]["last_layer_tokens"] == rows[2]["prompt_tokens"] - 59
    assert "base 100% uniform:count=5 mean: " in result.stderr
    assert "base 100% mean: " in result.stderr
    narrow = io.StringIO()
    print_tables(read_rows(tmp_path / "rows.jsonl"), Console(file=narrow, width=80))
    numbers = re.compile(r"[0-9]+\.[0-9]%?|[0-9]+ of [0-9]+")
    assert numbers.findall(narrow.getvalue()) == numbers.findall(result.stdout)  # none is folded
    assert narrow.getvalue().count("uniform:count=5") == 4
    plain = call(*command[:-4]).stdout
    assert "tokens" not in plain and " of " not in plain.split("Plans of all tasks")[1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("none", ["none"]),
        (" prumerge+ , fastv", ["prumerge+", "fastv"]),
        ("fastv:layer=3,ratio=0.75,none", ["fastv:layer=3,ratio=0.75", "none"]),
        ("none,fastv:layer=3, ratio=0.75,random:count=4", ["none", "fastv:layer=3,ratio=0.75", "random:count=4"]),
    ],
)
def test_lists_of_token_selections(text, parts):
    assert split_selections(text) == parts


def test_sweep_tells_of_failed_samples(root, monkeypatch):
    real = AdaptiveVLM.generate_batch

    def generate_batch(self, requests, **kwargs):
        if any("color" in request.question for request in requests):
            raise RuntimeError("odd sample")
        return real(self, requests, **kwargs)

    monkeypatch.setattr(AdaptiveVLM, "generate_batch", generate_batch)
    result = call("sweep", root / "L", "--budgets", "67%", "--limit", 6, "--json")
    failed = {row["task"]: row["failed"] for row in json.loads(result.stdout)}
    assert failed["mean"] == sum(n for task, n in failed.items() if task != "mean") > 0
    assert "questions failed" in result.stderr and "odd sample" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mini-l"], ["Did you mean 'mini-L'?"]),
        (["--budgets", "67%,nan"], ["'nan' is not a budget"]),
        (["--budgets", "30%"], ["minimum", "50%"]),
        (["--mode", "lerned"], ["Did you mean 'learned'?"]),
        (["--token-selection", "none,fastvv"], ["Did you mean 'fastv'?"]),
        (["--token-selection", "none,,fastv"], ["'none,,fastv'", "empty entry"]),
        (["--token-selection", ""], ["empty entry"]),
        (["--token-selection", "fastv,layer=3"], ["'layer=3'", "after a selection and a colon"]),
        (["--token-selection", "ratio=0.5"], ["'ratio=0.5'", "after a selection and a colon"]),
        (["--token-selection", "fastv:layer=4"], ["L: ", "first 3 layers only"]),
    ],
)
def test_sweep_bad_input(root, arguments, words):
    assert_error(call("sweep", root / "L", *arguments), *words)


def test_an_unwritable_file(root):
    assert_error(call("sweep", root / "L", "--limit", 1, "--budgets", "100%", "--out", root / "scene.png" / "x.jsonl"))


@pytest.mark.parametrize("size", [(72, 72), (10, 200)])
def test_picture_in_the_terminal(size):
    from adallava.cli.show import picture_text

    image = Image.new("RGB", size, "red")
    console = Console(force_terminal=True, color_system="truecolor")
    assert set(picture_text(image, console, 12).plain) <= {"▀", "\n"}
    assert picture_text(image, Console(force_terminal=False, color_system=None)) is None
