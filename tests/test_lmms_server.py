"""lmms-eval's own client for OpenAI's interface, against ``adallava serve``. Run by `make test-eval`."""

import pytest

pytest.importorskip("lmms_eval", reason="needs the extra [eval]: make test-eval")
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from adallava.bench.soak import running_server
from adallava.evaluation.lmms_mini import METRIC, PREFIX, export

pytestmark = pytest.mark.lmms
FAMILIES, SEED, LIMIT = ("open", "presence"), 3, 12


def answers_of(results):
    return {
        (task, sample["doc_id"]): sample["filtered_resps"]
        for task, samples in results["samples"].items()
        for sample in samples
    }


def test_lmms_eval_asks_the_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the side file of the model is written
    tasks = export(tmp_path, FAMILIES, SEED, LIMIT)
    assert tasks == [PREFIX + family for family in FAMILIES]
    common = {"tasks": tasks, "verbosity": "ERROR", "log_samples": True}

    def manager():
        return TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)

    with running_server("mini-L", "--budget", "60%", "--threads", "1") as (_, url):
        args = f"model=mini-L,base_url={url}/v1,api_key=none,num_concurrent=4,max_retries=1"
        asked = simple_evaluate(model="openai", model_args=args, task_manager=manager(), **common)
    direct = simple_evaluate(
        model="adallava", model_args="pretrained=mini-L,budget=0.6", task_manager=manager(), **common
    )
    assert answers_of(asked) == answers_of(direct) and len(answers_of(asked)) == len(tasks) * LIMIT
    for task in tasks:
        key = f"{METRIC},none"
        assert asked["results"][task][key] == direct["results"][task][key]
