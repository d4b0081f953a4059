"""lmms-eval: our model in it, its tasks in a sweep, the mini benchmark as its tasks. Run by `make test-eval`."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2Processor,
    IdeficsConfig,
    IdeficsProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from adallava.budget import Budget, parse_budgets
from adallava.errors import BudgetError, ConfigError, PromptError, ResultExistsError, UnknownNameError

pytest.importorskip("lmms_eval", reason="needs the extra [eval]: make test-eval")
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from adallava.cli import doctor
from adallava.evaluation import lmms_baseline, lmms_chat, lmms_manifest, lmms_tasks
from adallava.evaluation.lmms_baseline import Baseline
from adallava.evaluation.lmms_chat import FAILED
from adallava.evaluation.lmms_mini import METRIC, PREFIX, export
from adallava.evaluation.lmms_plugin import AdaLLaVA
from adallava.evaluation.sweep import SweepSettings, sweep
from adallava.evaluation.tasks import TaskSettings
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Prompt, Request
from adallava.mini.build import build_processor
from adallava.mini.questions import DESCRIBE
from adallava.mini.scenes import sample_scene, to_image
from tiny import tiny_vlm

pytestmark = pytest.mark.lmms
LIMIT, SEED = 12, 3
FAMILIES = ("open", "presence", "description")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    assert export(made, FAMILIES, SEED, LIMIT) == [PREFIX + family for family in FAMILIES]
    return made


@pytest.fixture(scope="module")
def manager(folder):
    return TaskManager("ERROR", include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def vlm():
    return AdaptiveVLM.from_pretrained("mini-L")


def evaluate(model, manager, tasks, **more):
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, verbosity="ERROR", **more)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def settings(**more):
    return SweepSettings(tuple(parse_budgets("60%")), SEED, LIMIT, **more)


def accuracies(rows):
    return {row.name: row.metrics["accuracy"] for row in rows}


# -- the command, end to end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_gives_what_a_sweep_gives(folder, tmp_path, processes):
    out, samples = tmp_path / "out", tmp_path / "samples.jsonl"
    tasks = [PREFIX + family for family in FAMILIES]
    arguments = f"pretrained=mini-L,budget=60%,samples={samples}"
    command = ["--model", "adallava", "--model_args", arguments, "--tasks", ",".join(tasks), "--batch_size", "5"]
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command += ["--device", "cpu"]
    done = subprocess.run(
        [
            sys.executable,
            *several,
            "-m",
            "lmms_eval",
            *command,
            "--include_path",
            str(folder),
            "--output_path",
            str(out),
        ],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = out.rglob("*_results.json")
    told = json.loads(result.read_text())["results"]
    rows = sweep(["mini-L"], settings(tasks=FAMILIES))
    ours = accuracies(rows)
    for family in FAMILIES:
        assert told[PREFIX + family][f"{METRIC},none"] == pytest.approx(ours[family], abs=1e-9), family
    files = [samples] if processes == 1 else [tmp_path / f"samples.rank{rank}.jsonl" for rank in range(processes)]
    kept = [line for file in files for line in lines(file)]
    assert len(kept) == 3 * LIMIT
    assert json.loads(result.read_text())["throughput"]["avg_flops_frac"] == pytest.approx(
        sum(line["flops_frac"] for line in kept) / len(kept)
    )
    assert {(line["task"], line["doc_id"]) for line in kept} == {(task, i) for task in tasks for i in range(LIMIT)}
    for line in kept:
        assert (line["model"], line["budget"], line["mode"], line["failed"]) == ("mini-L", "60%", "learned", False)
        assert line["k"] == 1 and len(line["layers_on"]) == 7 and int(line["plan"], 16)
        assert 0 < line["prefill_flops"] < line["base_prefill_flops"]
        assert 0 < line["first_token_ms"] <= line["total_ms"]
        assert line["predicted_first_token_ms"] is None
    assert {line["batch_rows"] for line in kept} == {5, LIMIT // processes % 5}


def test_the_entry_point_names_the_chat_model(monkeypatch):
    assert get_model("adallava") is AdaLLaVA and get_model("adallava_baseline") is Baseline
    assert AdaLLaVA.is_simple is Baseline.is_simple is False
    (check,) = doctor._lmms_eval()
    assert (check.status, check.detail) == ("ok", "knows --model adallava")
    monkeypatch.setattr(lmms_manifest, "manifests", lambda: 1 / 0)
    (check,) = doctor._lmms_eval()
    assert (check.status, "division by zero" in check.detail) == ("fail", True)


@pytest.mark.parametrize("first", ["evaluation.lmms_plugin", "evaluation.lmms_tasks", "cli.doctor"])
def test_whatever_is_imported_first_the_models_are_known_and_nothing_is_printed(first):
    code = f"""
import adallava.{first} as first
if hasattr(first, "check_other"): first.check_other("lmms:adallava")
if hasattr(first, "_lmms_eval"): assert [check.status for check in first._lmms_eval()] == ["ok"]
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()):
    from lmms_eval.models import get_model
print(get_model("adallava").__name__, get_model("adallava_baseline").__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "AdaLLaVA Baseline\n"), done.stderr[-2000:]


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_failed_sample_is_counted_and_no_empty_answer(manager, tmp_path, monkeypatch):
    model = AdaLLaVA("mini-L", budget="60%", batch_size=4, samples=str(tmp_path / "s.jsonl"))
    real, asked = model.vlm.generate_batch, []

    def generate_batch(requests, **kwargs):
        asked.append(len(requests))
        if any("left" in request.messages[0]["content"][-1]["text"] for request in requests):
            raise RuntimeError("out of memory")
        return real(requests, **kwargs)

    monkeypatch.setattr(model.vlm, "generate_batch", generate_batch)
    told = evaluate(model, manager, [PREFIX + "open"], log_samples=True)
    answers = [sample["filtered_resps"][0] for sample in told["samples"][PREFIX + "open"]]
    broken = ["left" in sample["doc"]["question"] for sample in told["samples"][PREFIX + "open"]]
    assert 0 < sum(broken) < LIMIT
    assert [answer == FAILED for answer in answers] == broken
    assert "" not in answers
    failed = [line for line in lines(tmp_path / "s.jsonl") if line["failed"]]
    assert len(failed) == len(model.failures) == sum(broken)
    assert {line["error"] for line in failed} == {"RuntimeError: out of memory"}
    assert told["throughput"]["avg_failed_samples"] == sum(broken)


def test_a_broken_model_is_an_error_and_no_zero(manager, monkeypatch, vlm):
    def generate_batch(requests, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(vlm, "generate_batch", generate_batch)
    with pytest.raises(RuntimeError, match="no kernel image"):
        evaluate(AdaLLaVA(vlm, samples="none"), manager, [PREFIX + "open"])


def test_a_sample_that_cannot_be_prepared_fails_alone(vlm):
    model = AdaLLaVA(vlm, budget="60%", batch_size=3, samples="none")
    model.task_dict = {"task": {"test": ["fine", "broken", "film"]}}

    def messages(document):
        if document == "broken":
            raise KeyError("image")
        kind = {"type": "video", "url": "film.mp4"} if document == "film" else None
        words = {"type": "text", "text": "what color is the star ?"}
        return [{"role": "user", "content": [words] if kind is None else [kind, words]}]

    instances = [
        Instance(
            "generate_until",
            ("", messages, {"max_new_tokens": 2}, number, "task", "test"),
            0,
            {"task": "task", "doc_id": number, "repeats": 1},
        )
        for number in range(3)
    ]
    told = [result.text for result in model.generate_until(instances)]
    assert told[0] not in ("", FAILED)
    assert told[1:] == [FAILED, FAILED]
    assert [text.partition(":")[0] for text in model.failures] == ["task 1", "task 2"]
    assert "videos" in model.failures[1]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False, "num_beams": 1}),
        ({"temperature": 0, "top_p": 1.0, "until": ["ASSISTANT:"]}, {"do_sample": False, "num_beams": 1}),
        ({"temperature": 0.2, "do_sample": False}, {"do_sample": False}),
        ({"temperature": 0.2, "top_p": None}, {"do_sample": True, "temperature": 0.2}),
        ({"image_aspect_ratio": "original", "max_new_tokens": 16}, {"max_new_tokens": 16, "num_beams": 1}),
    ],
)
def test_what_a_task_asks_of_decoding(vlm, asked, expected):
    options = AdaLLaVA(vlm, samples="none").decoding(asked)
    assert options.items() >= expected.items()
    assert set(options) <= {"max_new_tokens", "do_sample", "num_beams", "temperature", "top_p"}
    if not options["do_sample"]:
        assert not {"temperature", "top_p"} & set(options)


def test_an_answer_ends_where_the_task_says(vlm):
    model = AdaLLaVA(vlm, samples="none")
    model.task_dict = {"task": {"test": ["one"]}}
    picture, words = {"type": "image", "url": to_image(sample_scene("test", 0, 0))}, {"type": "text", "text": DESCRIBE}
    ask = {"role": "user", "content": [picture, words]}

    def answer(until):
        options = {"max_new_tokens": 24, "until": until}
        instance = Instance(
            "generate_until",
            ("", lambda _: [ask], options, 0, "task", "test"),
            0,
            {"task": "task", "doc_id": 0, "repeats": 1},
        )
        return model.generate_until([instance])[0].text

    whole = answer(None)
    first, comma, _ = whole.partition(",")
    assert comma and answer(",") == answer(["never", ","]) == first
    # What lmms-eval writes where a task says nothing is no end of an answer.
    assert lmms_chat._cut("first\n\nso five", ["\n\n"]) == "first\n\nso five"
    assert lmms_chat._cut("first\n\nso five", ["\n\n", "so"]) == "first"


def test_budgets_selections_and_times(manager, tmp_path, monkeypatch):
    monkeypatch.setenv("ADALLAVA_PROFILES", str(tmp_path))
    with pytest.raises(BudgetError):
        AdaLLaVA("mini-L", budget="10%", samples="none")
    with pytest.raises(ConfigError, match="base model"):
        AdaLLaVA("mini-base", budget="60%", samples="none")
    with pytest.raises(ConfigError, match="batch_size is 'many'"):
        AdaLLaVA("mini-L", batch_size="many", samples="none")
    taken = tmp_path / "taken.jsonl"
    taken.touch()
    with pytest.raises(ResultExistsError, match="name another"):
        AdaLLaVA("mini-L", samples=str(taken))
    out = tmp_path / "fewer.jsonl"
    model = AdaLLaVA("mini-L", 0.6, token_selection='"uniform:count=16"', samples=str(out))
    model.vlm.profiles.use(None)
    evaluate(model, manager, [PREFIX + "presence"], limit=2)
    assert [line["token_selection"] for line in lines(out)] == ["uniform:count=16"] * 2
    assert all(max(line["layer_tokens"]) < line["prompt_tokens"] for line in lines(out))


def test_other_kinds_of_tasks_are_refused(vlm):
    model = AdaLLaVA(vlm, samples="none")
    with pytest.raises(ConfigError, match="likelihood"):
        model.loglikelihood([])
    with pytest.raises(ConfigError, match="several rounds"):
        model.generate_until_multi_round([])


def test_a_lent_model_stays_and_a_loaded_one_goes(vlm):
    lent, own = AdaLLaVA(vlm, samples="none"), AdaLLaVA("mini-L", samples="none")
    lent.clean()
    own.clean()
    assert lent.vlm is vlm
    with pytest.raises(IndexError):
        _ = own.vlm


# -- baselines --------------------------------------------------------------------------------------------------------


def tiny_tokenizer():
    ours = build_processor().tokenizer
    marks = {name: getattr(ours, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(ours.backend_tokenizer), **marks)
    tokenizer.add_tokens(["Question:", "Answer:", "User:", "Assistant:", "<fake_token_around_image>", "<image>"])
    return tokenizer


def tiny_blip2(folder, text="opt"):
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if text == "opt":
        words = OPTConfig(vocab_size=100, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
        words.word_embed_proj_dim = 16
    else:
        words = T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        words.decoder_start_token_id = tokenizer.pad_token_id
    words.bos_token_id, words.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    words.pad_token_id = tokenizer.pad_token_id
    config = Blip2Config(
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        qformer_config={**sizes, "encoder_hidden_size": 16},
        text_config=words,
        num_query_tokens=4,
    )
    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, 4)
    config.image_token_index = config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    save_tiny(config, processor, folder)


def tiny_idefics(folder):
    tokenizer = tiny_tokenizer()
    vision = {"embed_dim": 16, "image_size": 32, "patch_size": 16, "intermediate_size": 16}
    config = IdeficsConfig(
        vocab_size=len(tokenizer),
        additional_vocab_size=0,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        cross_layer_interval=1,
        use_resampler=False,
        vision_config={**vision, "num_hidden_layers": 1, "num_attention_heads": 2},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_tiny(config, IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), tokenizer), folder)


def save_tiny(config, processor, folder):
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.mark.parametrize("make", [tiny_blip2, lambda folder: tiny_blip2(folder, "t5"), tiny_idefics])
def test_baselines_of_transformers_answer(make, folder, tmp_path):
    make(tmp_path)
    source = f"lmms:adallava_baseline:pretrained={tmp_path}"
    row, _ = sweep([source], settings(tasks=(PREFIX + "open",), tasks_folder=folder))
    assert (row.metrics["n"], row.metrics["flops_frac"]) == (LIMIT, None)
    baseline = Baseline(str(tmp_path), device="cpu", max_new_tokens=3)
    picture = to_image(sample_scene("test", 0, 0))
    words = {"type": "text", "text": "what color is the star ?"}
    asked = Request(messages=[{"role": "user", "content": [{"type": "image"}, words]}], images=[picture])
    (text,) = baseline.answer([asked], {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}, "task")
    assert isinstance(text, str) and "color" not in text and "Question" not in text


def test_prompts_of_baselines(tmp_path):
    class Processor:
        tokenizer = tiny_tokenizer()

        def __call__(self, *, text, **_):
            return text

    words = {"type": "text", "text": "what is it ?"}
    picture = to_image(sample_scene("test", 0, 0))
    asked = Prompt([{"role": "user", "content": [{"type": "image"}, words]}], [picture])
    processor = Processor()
    assert lmms_baseline.PROMPTS["blip-2"](processor, asked) == ("Question: what is it ? Answer:", {})
    text, options = lmms_baseline.PROMPTS["idefics"](processor, asked)
    assert text == [["User:", picture, "what is it ?\nAssistant:"]]
    assert options["eos_token_id"] == [processor.tokenizer.eos_token_id] and len(options["bad_words_ids"]) == 2
    processor.tokenizer.add_tokens(["<end_of_utterance>"])
    text, options = lmms_baseline.PROMPTS["idefics"](processor, asked)
    assert text == [["User:", picture, "what is it ?<end_of_utterance>\nAssistant:"]]
    assert len(options["eos_token_id"]) == 2
    with pytest.raises(PromptError, match="one picture; here are 2"):
        lmms_baseline.PROMPTS["blip-2"](processor, Prompt(asked.messages, ["a", "b"]))
    tiny_vlm().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a llava model"):
        Baseline(str(tmp_path), device="cpu")


# -- the sweep --------------------------------------------------------------------------------------------------------


def test_a_sweep_over_both_kinds_of_tasks(folder, tmp_path):
    tasks = (PREFIX + "open", "open", PREFIX + "presence", "presence")
    chosen = settings(tasks=tasks, tasks_folder=folder, modes=("learned", "random"), out=tmp_path / "rows.jsonl")
    rows = sweep(["mini-L"], chosen)
    by_mode = {
        mode: accuracies(row for row in rows if (row.config["model"], row.config["mode"]) == ("mini-L", mode))
        for mode in ("learned", "random")
    }
    for family in ("open", "presence"):
        assert by_mode["learned"][PREFIX + family] == by_mode["learned"][family]
    (task,) = [row for row in rows if row.name == PREFIX + "open" and row.config["mode"] == "learned"]
    (mini,) = [row for row in rows if row.name == "open" and row.config["mode"] == "learned"]
    assert task.metrics["plan_counts"] == mini.metrics["plan_counts"]
    assert task.metrics["flops_frac"] == pytest.approx(mini.metrics["flops_frac"])
    assert (task.metrics["metric"], task.metrics["n"], task.metrics["failed"]) == (METRIC, LIMIT, 0)


def test_failures_of_ours_are_in_the_rows_and_those_of_others_unknown(folder, tmp_path, monkeypatch):
    tiny_blip2(tmp_path)
    real = lmms_baseline.PROMPTS["blip-2"]

    def prompt(processor, asked):
        if "left" in asked.messages[0]["content"][-1]["text"]:
            raise RuntimeError("out of memory")
        return real(processor, asked)

    monkeypatch.setitem(lmms_baseline.PROMPTS, "blip-2", prompt)
    task = PREFIX + "open"
    rows = sweep(
        [f"lmms:adallava_baseline:pretrained={tmp_path}", "lmms:dummy"], settings(tasks=(task,), tasks_folder=folder)
    )
    ours, mean, theirs, _ = rows
    assert 0 < ours.metrics["failed"] == mean.metrics["failed"] < LIMIT
    assert "out of memory" in ours.metrics["failures"][0]
    assert theirs.metrics["failed"] is None and theirs.metrics["failures"] == []
    with pytest.raises(ConfigError, match=f"lmms:adallava_baseline:pretrained=nowhere cannot answer {task}"):
        sweep(["lmms:adallava_baseline:pretrained=nowhere"], settings(tasks=(task,), tasks_folder=folder))


def test_a_lent_model_keeps_its_own_token_selection(folder, vlm):
    run = lmms_tasks.run_task(
        vlm, TaskSettings(PREFIX + "open", Budget.parse(1), None, 0, 2, 2, "uniform:count=16", folder)
    )
    assert max(run.last_layer_tokens) < min(run.prompt_tokens) - 40
    assert vlm.token_selection.name == "none"


def test_rows_of_other_data_are_not_taken_for_these(folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    sweep(["mini-L"], settings(tasks=(PREFIX + "presence",), tasks_folder=folder, out=out))
    export(tmp_path / "other", ("presence",), SEED + 1, LIMIT)
    with pytest.raises(ResultExistsError, match="task_data"):
        sweep(["mini-L"], settings(tasks=(PREFIX + "presence",), tasks_folder=tmp_path / "other", out=out))


def test_what_cannot_be_loaded_is_named(tmp_path, folder):
    export(tmp_path, ("open",), 0, 1)
    (tmp_path / f"{PREFIX}open.parquet").unlink()
    with pytest.raises(ConfigError, match=f"the task {PREFIX}open cannot be loaded: .*open.parquet"):
        sweep(["mini-L"], settings(tasks=(PREFIX + "open",), tasks_folder=tmp_path))


def test_models_of_lmms_eval_go_through_the_same_sweep(folder):
    tasks = (PREFIX + "open", PREFIX + "presence")
    rows = sweep(["mini-L", "lmms:dummy"], settings(tasks=tasks, tasks_folder=folder))
    others = [row for row in rows if row.config["model"] == "lmms:dummy"]
    assert [row.name for row in rows] == [*tasks, "mean"] * 2
    assert {(row.config["budget"], row.config["mode"]) for row in others} == {("100%", "none")}
    assert [(row.metrics["accuracy"], row.metrics["flops_frac"]) for row in others] == [(0, None)] * 3


def test_a_stopped_sweep_goes_on(folder, tmp_path, monkeypatch):
    chosen = settings(tasks=(PREFIX + "open",), tasks_folder=folder, out=tmp_path / "rows.jsonl")
    first = sweep(["mini-L"], chosen)
    monkeypatch.setattr(lmms_tasks, "_evaluate", lambda *_: pytest.fail("it was measured already"))
    assert [row.metrics for row in sweep(["mini-L"], chosen)] == [row.metrics for row in first]


def test_what_is_wrong_is_told_before_anything_runs(folder, tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'pope'"):
        sweep(["mini-L"], settings(tasks=("popee",)))
    with pytest.raises(ConfigError, match="is a group of tasks"):
        sweep(["mini-L"], settings(tasks=("vqav2",)))
    with pytest.raises(UnknownNameError, match="Did you mean 'instructblip'"):
        sweep(["lmms:instructblib"], settings(tasks=(PREFIX + "open",), tasks_folder=folder))
    with pytest.raises(ConfigError, match="export-tasks"):
        sweep(["lmms:dummy"], settings(tasks=("open",)))
    with pytest.raises(ResultExistsError, match="Choose another folder"):
        export(folder, ("open",), 0, 1)
    with pytest.raises(UnknownNameError, match="opened"):
        export(tmp_path, ("opened",), 0, 1)


# -- the paper's benchmarks  ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_tasks():
    return lmms_tasks._manager(None)


@pytest.mark.parametrize("task", lmms_tasks.MAIN)
def test_the_papers_benchmarks_are_there_with_their_metrics(all_tasks, task, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # what judges the answers is made as soon as the task is read
    config = all_tasks._get_config(task)
    listed = [metric["metric"] for metric in config["metric_list"]]
    assert lmms_tasks.MAIN[task].name in listed
    assert config["output_type"] == "generate_until"


@pytest.mark.parametrize(
    ("told", "score", "interval"),
    [
        ({"exact_match,none": 0.5, "exact_match_stderr,none": 0.1}, 0.5, 0.196),
        ({"exact_match,none": 0.5, "exact_match_stderr,none": "N/A"}, 0.5, 0.098),
        ({"exact_match,none": 1.0, "exact_match_stderr,none": 0.0}, 1.0, 0.0196),
    ],
)
def test_the_interval_of_a_score(told, score, interval):
    result = {"results": {"gqa": told}, "configs": {"gqa": {}}, "n-samples": {"gqa": {"effective": 100}}}
    measured = lmms_tasks._measured("gqa", result)
    assert (measured.metric, measured.score, measured.n) == ("exact_match", score, 100)
    assert measured.interval == pytest.approx(interval, rel=0.02)


def test_points_are_a_share_of_the_best_score():
    told = {"mme_perception_score,none": 1500.0, "mme_cognition_score,none": 300.0}
    told |= {"mme_perception_score_stderr_clt,none": 0.009}  # of single answers, not of points
    result = {"results": {"mme": told}, "configs": {"mme": {}}, "n-samples": {"mme": {"effective": 2374}}}
    measured = lmms_tasks._measured("mme", result)
    assert (measured.score, measured.out_of) == (1500.0, 2000.0)
    assert measured.scores == {"mme_perception_score": 1500.0, "mme_cognition_score": 300.0}
    assert measured.interval == pytest.approx(1.96 * 2000 * (0.75 * 0.25 / 1187) ** 0.5)


def test_the_scale_of_other_tasks():
    def measured(score):
        configs = {"other": {"metric_list": [{"metric": "points"}]}}
        told = {"other": {"points,none": score}}
        return lmms_tasks._measured(
            "other", {"results": told, "configs": configs, "n-samples": {"other": {"effective": 9}}}
        )

    assert [measured(score).out_of for score in (0.5, 1.0, 58.0)] == [1, 1, 100]
    with pytest.raises(ConfigError, match="reports 1200 for points, more than 100"):
        measured(1200.0)


def test_a_missing_judge_is_said():
    told = {"gpt_eval_score,none": "N/A", "alias": "mmvet"}
    result = {"results": {"mmvet": told}, "configs": {"mmvet": {}}, "n-samples": {"mmvet": {"effective": 5}}}
    with pytest.raises(ConfigError, match="a judge"):
        lmms_tasks._measured("mmvet", result)


def test_tiny_models_with_random_weights_run_too(folder, tmp_path):
    tiny_vlm(variant="H").save_pretrained(tmp_path / "tiny-H")
    chosen = SweepSettings((Budget.parse("67%"),), SEED, 3, tasks=(PREFIX + "presence",), tasks_folder=folder)
    row, _ = sweep([str(tmp_path / "tiny-H")], chosen)
    assert row.metrics["n"] == 3 and row.metrics["flops_frac"] == pytest.approx(2 / 3, abs=0.02)
    assert Path(row.config["model"]).name == "tiny-H"
