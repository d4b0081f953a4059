"""One task of the mini benchmark: a model, a budget, a family of questions, and what came out.

A sample that raises an error is counted and reported, and scores 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from adallava.evaluation.answering import Answering
from adallava.evaluation.tasks import OnBatch, TaskRun, TaskSettings
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Request
from adallava.mini.questions import FAMILIES, Item, benchmark
from adallava.mini.scenes import to_image
from adallava.mini.scoring import score

DEFAULT_LIMIT = 1000
"""Questions per family, of which there is no end, where nothing is said."""

# The longest right answer of each family. An answer is cut one token after it, where it is wrong already; what a
# description adds to six things is noise, so that one gets room for one thing more.
LONGEST = {
    "open": "yellow triangle",
    "reading": " ".join(["seven"] * 6),
    "presence": "yes",
    "choice": "a",
    "relation": "triangle",
    "description": " , ".join(["bottom-right yellow triangle"] * 7),
}
assert set(LONGEST) == set(FAMILIES)


def run_task(vlm: AdaptiveVLM, settings: TaskSettings, on_batch: OnBatch | None = None) -> TaskRun:
    """Ask a model the questions of one task, in batches; a seed always asks the same questions.

    on_batch: called after each batch with the number of questions in it.
    Raises the error itself where a whole batch fails sample by sample: then the model is at fault, not a sample.
    """
    run = TaskRun.of(vlm)
    # A hub checkpoint may come with sampling switched on; a benchmark decodes greedily.
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "token_selection": settings.token_selection}
    options["max_new_tokens"] = max_new_tokens(vlm, settings.task)
    ask = Answering(vlm, settings.mode, settings.noise)
    for items in _batches(
        benchmark(settings.task, settings.seed, settings.limit or DEFAULT_LIMIT), settings.batch_size
    ):
        requests = [Request(i.question.text, to_image(i.scene), budget=settings.budget) for i in items]
        answers = ask(requests, options)
        if errors := [answer for answer in answers if isinstance(answer, Exception)]:
            if len(errors) == len(items):
                raise errors[0]
            run.failures += [f"{type(error).__name__}: {error}" for error in errors]
        for item, answer in zip(items, answers, strict=True):
            _take(run, item, answer)
        if on_batch is not None:
            on_batch(len(items))
    return run


def max_new_tokens(vlm: AdaptiveVLM, task: str) -> int:
    """Tokens that the longest right answer of a family has with this model's tokenizer, and one more."""
    return len(vlm.processor.tokenizer(LONGEST[task], add_special_tokens=False)["input_ids"]) + 1


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _take(run: TaskRun, item: Item, answer: Answer | Exception) -> None:
    if isinstance(answer, Exception):
        run.scores.append(0.0)
        return
    run.scores.append(score(item.question, answer.text))
    run.add_cost(answer)
