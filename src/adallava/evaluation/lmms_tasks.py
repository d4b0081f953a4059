"""Tasks of lmms-eval in a sweep: a loaded model is asked one task at one budget, and lmms-eval scores it.

Each task has one main metric, the one that the paper prints where it prints the task. It comes as a share of the best
possible score, so that tasks can be averaged, beside the score in the task's own unit and all its other numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adallava.errors import AdaLlavaError, ConfigError, UnknownNameError, did_you_mean
from adallava.evaluation.tasks import Measured, OnBatch, TaskRun, TaskSettings
from adallava.hosts.model import AdaptiveVLM


@dataclass(frozen=True)
class Metric:
    """How a task is told: its main metric, the best possible score, and questions that count as one."""

    name: str
    out_of: float = 1
    together: int = 1


MAIN = {
    "vqav2_val": Metric("exact_match"),
    "scienceqa_img": Metric("exact_match"),
    "textvqa_val": Metric("exact_match"),
    "pope": Metric("pope_f1_score"),
    "mme": Metric("mme_perception_score", 2000, together=2),  # two questions to a picture
    "mmbench_en_dev": Metric("gpt_eval_score", 100),
    "mmbench_en_dev_static": Metric("gpt_eval_score", 100),
    "gqa": Metric("exact_match"),
    "seedbench": Metric("seed_all"),
    "mmvet": Metric("gpt_eval_score", 100),
    "llava_in_the_wild": Metric("gpt_eval_llava_all", 100),
    "vizwiz_vqa_val": Metric("exact_match"),
}
"""The paper's benchmarks. Of other tasks it is the first metric, out of 1, or out of 100 where it is above 1."""
OTHER = "lmms:"
"""What the source of a model of lmms-eval begins with."""
# 1.96 standard errors on either side hold 95 % of a normal distribution.
_Z = 1.96


def check_tasks(names: Sequence[str], folder: Path | None) -> None:
    """Check that lmms-eval is there and knows the tasks; ``ConfigError`` and ``UnknownNameError`` say what is wrong."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(
            f"{', '.join(names) or 'that'} would be of lmms-eval, which is not installed: pip install 'adallava[eval]'"
        )
    manager = _manager(folder)
    for name in names:
        if name in manager.all_subtasks:
            continue
        if name in (*manager.all_groups, *manager.all_tags):
            members = manager.task_index[name]["task"]
            told = ", ".join(map(str, members)) if isinstance(members, list) else "lmms-eval lists them"
            raise ConfigError(f"{name} is a group of tasks, and a row is about one. Name its tasks: {told}.")
        known = did_you_mean(name, manager.all_subtasks)
        raise UnknownNameError(
            f"there is no task {name!r}, neither here nor in lmms-eval.{known} Tasks of your own: --tasks-folder."
        )


@functools.lru_cache(maxsize=64)
def look_at(name: str, folder: Path | None) -> tuple[int, str]:
    """Questions of a task, and what tells its data and lmms-eval's version from others; its data are loaded for that.

    Raises ``ConfigError`` naming the task where it cannot be loaded, such as for want of a judge's key.
    """
    with _quietly():
        from lmms_eval.tasks import get_task_dict

        try:
            documents = get_task_dict([name], _manager(folder), "chat")[name].eval_docs
        except Exception as error:  # of data sets, networks, judges; the same is said of all
            root = _root(error)
            raise ConfigError(f"the task {name} cannot be loaded: {type(root).__name__}: {root}") from error
    version = importlib.metadata.version("lmms-eval")
    return len(documents), f"lmms-eval {version}, data {getattr(documents, '_fingerprint', len(documents))}"


def _root(error: BaseException) -> BaseException:
    """What an error comes from; tenacity keeps it in the last attempt."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else error.__cause__
    return error if cause is None else _root(cause)


def run_task(vlm: AdaptiveVLM, settings: TaskSettings, on_batch: OnBatch | None = None) -> TaskRun:
    """Ask a model one task of lmms-eval; on_batch: called with the number of questions in each finished batch."""
    with _quietly():
        from adallava.evaluation.lmms_plugin import AdaLLaVA

        lent = AdaLLaVA(
            vlm,
            settings.budget,
            mode=str(settings.mode or "learned"),
            seed=settings.seed,
            batch_size=settings.batch_size,
            token_selection=settings.token_selection,
            samples="none",
            on_batch=on_batch,
        )
    lent.run.measured = _evaluate(lent, settings, "adallava")
    return lent.run


def run_other(source: str, settings: TaskSettings) -> TaskRun:
    """Ask one of lmms-eval's own models, "lmms:instructblip" or "lmms:qwen_vl:pretrained=Qwen/Qwen-VL", as it is.

    It answers a question at a time, as many of them only can, unless its arguments say otherwise. What it costs is not
    known, and its failures only where it is one of ours. Raises ``ConfigError`` where it cannot be run.
    """
    name, arguments = _parts(source)
    several = re.search(r"(?:^|,)batch_size=(\d+)", arguments)
    rest = re.sub(r"(?:^|,)batch_size=\d+", "", arguments).strip(",")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with _quietly():
            from lmms_eval.models import get_model

            from adallava.evaluation.lmms_chat import ChatModel

            more = {"batch_size": int(several[1]) if several else 1, "device": device}
            model = get_model(name).create_from_arg_string(rest, more)
        measured = _evaluate(model, settings, name)
    except AdaLlavaError:
        raise
    except Exception as error:  # it is another's code
        root = _root(error)
        raise ConfigError(f"{source} cannot answer {settings.task}: {type(root).__name__}: {root}") from error
    ours = isinstance(model, ChatModel)
    return TaskRun(measured=measured, failures=model.failures if ours else [], failures_told=ours)


def check_other(source: str) -> None:
    """Raise ``UnknownNameError`` for a model that lmms-eval does not know."""
    check_tasks((), None)
    with _quietly():
        from lmms_eval.models import list_available_models

        known = list_available_models(include_aliases=True)
    name, _ = _parts(source)
    if name not in known:
        raise UnknownNameError(f"lmms-eval has no model {name!r}.{did_you_mean(name, known)}")


def _parts(source: str) -> tuple[str, str]:
    name, _, arguments = source.removeprefix(OTHER).partition(":")
    return name, arguments


def _evaluate(model: Any, settings: TaskSettings, name: str) -> Measured:
    with _quietly(), tempfile.TemporaryDirectory() as submissions:
        from lmms_eval.evaluator import simple_evaluate

        told = simple_evaluate(
            model=model,
            tasks=[settings.task],
            # Tasks have prompts of their own for some models, by name.
            task_manager=_manager(settings.folder, name),
            limit=settings.limit,
            batch_size=settings.batch_size,
            log_samples=False,
            verbosity="WARNING",
            cli_args=argparse.Namespace(output_path=submissions, process_with_media=False),
        )
    return _measured(settings.task, told)


def _measured(task: str, told: dict[str, Any]) -> Measured:
    numbers = {name.partition(",")[0]: value for name, value in told["results"][task].items()}
    scores = {
        name: float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float) and "_stderr" not in name and math.isfinite(value)
    }
    listed = [entry["metric"] for entry in told["configs"][task].get("metric_list") or []]
    first = next((name for name in listed if name in scores), "a first metric")
    main = MAIN.get(task) or Metric(first, 1 if scores.get(first, 0) <= 1 else 100)
    if main.name not in scores:
        raise ConfigError(
            f"{task} reports no number for {main.name}; it has {', '.join(map(str, numbers)) or 'none'}. Where a judge "
            "scores the answers, lmms-eval needs access to it; see its page on the task."
        )
    score, out_of = scores[main.name], main.out_of
    if score > out_of:
        raise ConfigError(f"{task} reports {score:g} for {main.name}, more than {out_of:g}: its scale is not known.")
    # Of as many answers that are right or wrong: where the task does not tell the error of this very number, and, of
    # one odd answer, the least where all scores are the same.
    n = told["n-samples"][task]["effective"]
    share, rare, independent = max(0.0, score / out_of), 1 / (n + 1), n / main.together
    counted, least = (out_of * math.sqrt(p * (1 - p) / independent) for p in (share, rare))
    # "stderr_clt" is of single answers from 0 to 1, whatever the number is out of.
    names = [f"{main.name}_stderr", *([f"{main.name}_stderr_clt"] if out_of == 1 else [])]
    error = max(next((numbers[name] for name in names if _is_number(numbers.get(name))), counted), least)
    return Measured(main.name, score, float(out_of), _Z * error, n, scores)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@functools.lru_cache(maxsize=8)
def _manager(folder: Path | None, model: str | None = None) -> Any:
    with _quietly():
        from lmms_eval.tasks import TaskManager

        return TaskManager("WARNING", include_path=None if folder is None else str(folder), model_name=model)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what lmms-eval and its tasks print and log: a sweep has a bar of its own, and its output may be JSON."""
    from loguru import logger

    sink = io.StringIO()
    for name in ("lmms_eval", "adallava"):
        logger.disable(name)
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        for name in ("lmms_eval", "adallava"):
            logger.enable(name)
