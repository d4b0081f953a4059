"""Tasks of lmms-eval in a sweep: a loaded model is asked one task at one budget, and lmms-eval scores it.

Each task has one main metric, the one that the paper prints where it prints the task. It comes as a share of the best
possible score, so that tasks can be averaged, beside the score in the task's own unit and all its other numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adallava.errors import ConfigError, UnknownNameError, did_you_mean
from adallava.evaluation.tasks import Measured, OnBatch, TaskRun, TaskSettings
from adallava.hosts.model import AdaptiveVLM

MAIN = {
    "vqav2_val": ("exact_match", 1),
    "scienceqa_img": ("exact_match", 1),
    "textvqa_val": ("exact_match", 1),
    "pope": ("pope_f1_score", 1),
    "mme": ("mme_perception_score", 2000),
    "mmbench_en_dev": ("gpt_eval_score", 100),
    "mmbench_en_dev_static": ("gpt_eval_score", 100),
    "gqa": ("exact_match", 1),
    "seedbench": ("seed_all", 1),
    "mmvet": ("gpt_eval_score", 100),
    "llava_in_the_wild": ("gpt_eval_llava_all", 100),
    "vizwiz_vqa_val": ("exact_match", 1),
}
"""Main metric and best possible score of the paper's benchmarks; of other tasks the first metric, out of 1."""
OTHER = "lmms:"
"""What the source of a model of lmms-eval begins with."""
# 1.96 standard errors on either side hold 95 % of a normal distribution.
_Z = 1.96
_ERRORS = ("stderr", "stderr_clt")


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
def count(name: str, folder: Path | None) -> int:
    """Questions of a task, whose data are loaded for that."""
    from lmms_eval.tasks import get_task_dict

    with _quietly():
        return len(get_task_dict([name], _manager(folder), "chat")[name].eval_docs)


def run_task(vlm: AdaptiveVLM, settings: TaskSettings, on_batch: OnBatch | None = None) -> TaskRun:
    """Ask a model one task of lmms-eval; on_batch: called with the number of questions in each finished batch."""
    from adallava.evaluation.lmms_plugin import AdaLLaVA

    with _quietly():
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
    lent.run.measured = _evaluate(lent, "", settings)
    return lent.run


def run_other(source: str, settings: TaskSettings) -> TaskRun:
    """Ask one of lmms-eval's own models, "lmms:instructblip" or "lmms:qwen_vl:pretrained=Qwen/Qwen-VL", as it is.

    What it costs is not known, and its failures are its own to tell.
    """
    name, _, arguments = source.removeprefix(OTHER).partition(":")
    return TaskRun(measured=_evaluate(name, arguments, settings))


def check_other(source: str) -> None:
    """Raise ``UnknownNameError`` for a model that lmms-eval does not know."""
    check_tasks((), None)
    with _quietly():
        from lmms_eval.models import list_available_models

        known = list_available_models(include_aliases=True)
    name = source.removeprefix(OTHER).partition(":")[0]
    if name not in known:
        raise UnknownNameError(
            f"lmms-eval has no model {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."
        )


def _evaluate(model: Any, arguments: str, settings: TaskSettings) -> Measured:
    from lmms_eval.evaluator import simple_evaluate

    with _quietly(), tempfile.TemporaryDirectory() as submissions:
        told = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=[settings.task],
            task_manager=_manager(settings.folder),
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
    metric, out_of = MAIN.get(task, (first, 1))
    if metric not in scores:
        raise ConfigError(
            f"{task} reports no number for {metric}; it has {', '.join(map(str, numbers)) or 'none'}. Where a judge "
            "scores the answers, lmms-eval needs access to it; see its page on the task."
        )
    n = told["n-samples"][task]["effective"]
    # Of as many answers that are right or wrong: where the task does not tell its error, and, of one odd answer, the
    # least where all scores are the same.
    share, rare = min(1.0, max(0.0, scores[metric] / out_of)), 1 / (n + 1)
    counted, least = (out_of * math.sqrt(p * (1 - p) / n) for p in (share, rare))
    told_error = next((numbers[f"{metric}_{e}"] for e in _ERRORS if _is_number(numbers.get(f"{metric}_{e}"))), counted)
    error = max(told_error, least)
    return Measured(metric, scores[metric], float(out_of), _Z * error, n, scores)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@functools.lru_cache(maxsize=4)
def _manager(folder: Path | None) -> Any:
    from lmms_eval.tasks import TaskManager

    with _quietly():
        return TaskManager("WARNING", include_path=None if folder is None else str(folder))


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
