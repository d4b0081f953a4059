"""The paper's benchmarks through lmms-eval's own tasks, prompts and scorers, on stand-in data in their columns.

What the model answered in a first run is the truth of the first half of the samples in a second, and of none of the
others: each score is known beforehand. Judges are a stand-in too, on the loopback, with a fixed opinion.
"""

import json
import threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adallava.budget import parse_budgets

pytest.importorskip("lmms_eval", reason="needs the extra [eval]: make test-eval")
import datasets

from adallava.evaluation import lmms_tasks
from adallava.evaluation.lmms_plugin import AdaLLaVA
from adallava.evaluation.sweep import SweepSettings, sweep
from adallava.mini.questions import benchmark
from adallava.mini.scenes import to_image

pytestmark = pytest.mark.lmms
N = 4
"""Samples of each benchmark; a multiple of four, so that each half has whole pairs of MME."""
FIXED = {
    **dict.fromkeys(("pope", "mme"), ("yes", "no")),
    **dict.fromkeys(("scienceqa_img", "mmbench_en_dev", "mmbench_en_dev_static", "seedbench"), tuple("ABCD")),
}
"""Tasks with a few answers only. Asked in their words the mini model names what it sees, so these are put instead."""


@dataclass(frozen=True)
class Sample:
    """What the columns are filled from: a mini scene, a question about it, and its truth."""

    number: int
    picture: object
    question: str
    options: tuple[str, ...]
    truth: str


def vqa(sample):
    return {"question_id": sample.number, "question": sample.question, "image": sample.picture}


def vqav2(sample):
    return vqa(sample) | {"answers": [{"answer": sample.truth, "answer_id": i} for i in range(10)]}


def textvqa(sample):
    return vqa(sample) | {"answers": [sample.truth] * 10, "ocr_tokens": ["stop"]}


def vizwiz(sample):
    return vqa(sample) | {"answers": [sample.truth] * 10, "category": "other"}


def scienceqa(sample):
    columns = {"image": sample.picture, "question": sample.question, "hint": "", "choices": list(sample.options)}
    return columns | {"answer": max(0, "ABCD".find(sample.truth))}


def pope(sample):
    return vqa(sample) | {"answer": sample.truth, "category": "adversarial"}


def mme(sample):
    return vqa(sample) | {"question_id": str(sample.number // 2), "answer": sample.truth, "category": "existence"}


def mmbench(sample):
    columns = {"index": sample.number, "image": sample.picture, "question": sample.question, "hint": "nan"}
    columns |= {"answer": sample.truth, "category": "color", "L2-category": "look", "source": "drawn", "split": "dev"}
    return columns | dict(zip("ABCD", sample.options, strict=True))


def gqa(sample):
    return {
        "id": str(sample.number),
        "imageId": str(sample.number),
        "question": sample.question,
        "answer": sample.truth,
    }


def gqa_picture(sample):
    return {"id": str(sample.number), "image": sample.picture}


def seedbench(sample):
    kind, pictures = ("video", 3) if sample.number % 2 else ("image", 1)
    columns = {"question_id": str(sample.number), "data_type": kind, "image": [sample.picture] * pictures}
    columns |= {f"choice_{letter}": option for letter, option in zip("abcd", sample.options, strict=True)}
    return columns | {"question": sample.question, "answer": sample.truth}


def mmvet(sample):
    return vqa(sample) | {"question_id": f"v1_{sample.number}", "answer": sample.truth, "capability": "ocr,math"}


def llava_wild(sample):
    category = ("conv", "detail", "complex", "conv")[sample.number % 4]
    return vqa(sample) | {"caption": "a drawing", "gpt_answer": sample.truth, "category": category}


# The repository that lmms-eval names and its configuration: columns, family of questions, split.
DATA = {
    ("VQAv2", None): (vqav2, "open", "validation"),
    ("ScienceQA", "ScienceQA-IMG"): (scienceqa, "choice", "test"),
    ("textvqa", None): (textvqa, "reading", "validation"),
    ("POPE", None): (pope, "presence", "test"),
    ("MME", None): (mme, "presence", "test"),
    ("MMBench", "en"): (mmbench, "choice", "dev"),
    ("GQA", "testdev_balanced_instructions"): (gqa, "relation", "testdev"),
    ("GQA", "testdev_balanced_images"): (gqa_picture, "relation", "testdev"),
    ("SEED-Bench", None): (seedbench, "choice", "test"),
    ("MMVet", None): (mmvet, "description", "test"),
    ("llava-bench-in-the-wild", None): (llava_wild, "description", "train"),
    ("VizWiz-VQA", None): (vizwiz, "open", "val"),
}


def samples(family):
    for number, item in enumerate(benchmark(family, 5, N)):
        question, *options = item.question.text.split(" (")
        options = [option.partition(") ")[2].strip(" ,?") for option in options]
        yield Sample(number, to_image(item.scene), question, (*options, *["none"] * 4)[:4], item.question.answer)


class StandIn:
    """``datasets.load_dataset`` for the paper's benchmarks; ``truths``: by repository, in place of the real ones."""

    def __init__(self):
        self.truths = {}

    def __call__(self, path, name=None, *_, split=None, **__):
        repository = path.rpartition("/")[2]
        columns, family, only = DATA[repository, name]
        truths = self.truths.get(repository, {})
        rows = [columns(replace(one, truth=truths.get(one.number, one.truth))) for one in samples(family)]
        made = datasets.Dataset.from_list(rows)
        return made if split else datasets.DatasetDict({only: made})


class Judge(BaseHTTPRequestHandler):
    """Chat completions: half a point for MM-Vet, 8 against 6 for LLaVA-Wild, none of the options for MMBench."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = str(asked["messages"])
        self.server.asked.append(text)
        opinion = "8 6\nso so" if "[Context]" in text else "0.5" if "Ground truth" in text else "E"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": opinion}}
        body = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]}
        sent = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


# Of each task: where its data are, and its score where half of the answers are right.
BENCHMARKS = {
    "vqav2_val": ("VQAv2", 0.5),
    "scienceqa_img": ("ScienceQA", 0.5),
    "textvqa_val": ("textvqa", 0.5),
    "pope": ("POPE", 0.5),
    "mme": ("MME", 100),  # of the 200 points of a category: one pair of two has all, the other none
    "mmbench_en_dev": ("MMBench", 50),
    "mmbench_en_dev_static": ("MMBench", 50),
    "gqa": ("GQA", 0.5),
    "seedbench": ("SEED-Bench", 0.5),
    "mmvet": ("MMVet", 50),  # the judge's opinion
    "llava_in_the_wild": ("llava-bench-in-the-wild", 75),  # the judge's, 6 of 8
    "vizwiz_vqa_val": ("VizWiz-VQA", 0.5),
}


@pytest.fixture(scope="module")
def judge():
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def measured(judge):
    """Rows of the second run by task; the judge's questions are those of both."""
    kept = {}
    real = AdaLLaVA.generate_until

    def generate_until(self, requests):
        told = real(self, requests)
        for request, result in zip(requests, told, strict=True):
            *_, number, task, _ = request.args
            fixed = FIXED.get(task)
            result.text = fixed[number % len(fixed)] if fixed else result.text
            kept[task, number] = result.text
        return told

    with pytest.MonkeyPatch.context() as patch:
        made = StandIn()
        patch.setattr(datasets, "load_dataset", made)
        patch.setattr(AdaLLaVA, "generate_until", generate_until)
        patch.setenv("OPENAI_API_KEY", "none")
        patch.setenv("OPENAI_API_URL", f"http://127.0.0.1:{judge.server_port}/v1")
        settings = SweepSettings(tuple(parse_budgets("60%")), seed=0, limit=N, tasks=tuple(lmms_tasks.MAIN))
        sweep(["mini-L"], settings)
        for (task, number), answer in kept.items():
            others = [other for other in FIXED.get(task, ("nothing",)) if other != answer]
            truths = made.truths.setdefault(BENCHMARKS[task][0], {})
            truths[number] = answer if number < N // 2 else others[0]
        lmms_tasks.look_at.cache_clear()  # it has counted the first run's data
        return {row.name: row for row in sweep(["mini-L"], settings)}


@pytest.mark.parametrize("task", BENCHMARKS)
def test_the_score_of_a_benchmark_is_that_of_its_answers(task, measured):
    row, score = measured[task], BENCHMARKS[task][1]
    assert row.metrics["score"] == pytest.approx(score), row.metrics["scores"]
    assert row.metrics["accuracy"] == pytest.approx(score / lmms_tasks.MAIN[task].out_of)
    assert (row.metrics["n"], row.metrics["failed"]) == (N, 0)
    assert 0.5 < row.metrics["flops_frac"] < 0.65


def test_every_benchmark_was_run(measured):
    assert BENCHMARKS.keys() == lmms_tasks.MAIN.keys() == measured.keys() - {"mean"}


def test_judges_saw_the_answers(measured, judge):
    assert sum("Ground truth" in text for text in judge.asked) == 2 * N
    assert sum("[Context]" in text for text in judge.asked) == 2 * N
    assert not [text for text in judge.asked if "[failed]" in text]
