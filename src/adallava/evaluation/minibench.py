"""One task of the mini benchmark: a model, a budget, a family of questions, and what came out.

A sample that raises an error is counted and reported, and scores 0; it never becomes a silent empty answer. A batch
that fails is cut in halves until the samples that fail stand alone, so that one bad sample, or a batch too large for
the device, costs a few more passes and not the whole task.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from adallava.budget import Budget
from adallava.evaluation.modes import PlanMode
from adallava.evaluation.plans import PlanCounts
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Request
from adallava.mini.questions import FAMILIES, Item, benchmark
from adallava.mini.scenes import to_image
from adallava.mini.scoring import score

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class TaskSettings:
    """What to ask: ``limit`` questions of one family about scenes drawn from ``seed``, at one budget."""

    task: str
    budget: Budget
    mode: PlanMode | None
    """Who decides the plans; None for a base model."""
    seed: int
    limit: int
    batch_size: int = 64
    token_selection: str | None = None
    """Which visual tokens the model keeps, such as "fastv:layer=3"; None for the model's own selection."""


@dataclass
class TaskRun:
    """What came out of one task."""

    scores: list[float] = field(default_factory=list)
    """One score in [0, 1] per question, 0 for a failed one."""
    failures: list[str] = field(default_factory=list)
    """The error of each question that failed."""
    flops_fracs: list[float] = field(default_factory=list)
    """Share of the base model's prefill FLOPs, for each answered question (paper convention)."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Tokens of each answered prompt before any is dropped, without the latency token."""
    last_layer_tokens: list[int] = field(default_factory=list)
    """Tokens of it that are left in the last layer, without the latency token."""
    plans: PlanCounts | None = None
    """The plans that were run; None for a base model."""


def run_task(vlm: AdaptiveVLM, settings: TaskSettings, on_batch: Callable[[int], None] | None = None) -> TaskRun:
    """Ask a model the questions of one task, in batches; a seed always asks the same questions.

    on_batch: called after each batch with the number of questions in it.
    Raises the error itself where a whole batch fails sample by sample: then the model is at fault, not a sample.
    """
    config = vlm.adaptive_config
    run = TaskRun(plans=None if config is None else PlanCounts.for_config(config))
    # A hub checkpoint may come with sampling switched on; a benchmark decodes greedily.
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "token_selection": settings.token_selection}
    options["max_new_tokens"] = max_new_tokens(vlm, settings.task)
    ask = _Answering(vlm, settings, options)
    for items in _batches(benchmark(settings.task, settings.seed, settings.limit), settings.batch_size):
        requests = [Request(i.question.text, to_image(i.scene), budget=settings.budget) for i in items]
        answers = ask(requests)
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


class _Answering:
    """Answers batches of one task; random plans go on from batch to batch."""

    def __init__(self, vlm: AdaptiveVLM, settings: TaskSettings, options: dict[str, Any]) -> None:
        self.vlm, self.settings, self.options = vlm, settings, options
        self.generator: Any = None

    def __call__(self, requests: Sequence[Request]) -> list[Answer | Exception]:
        """One answer or error per request."""
        try:
            return list(self.vlm.generate_batch(requests, **self.options, **self._plans(len(requests))))
        except Exception as error:  # whatever a sample can cause; it is reported, see run_task
            if len(requests) == 1:
                return [error]
            log.warning("a batch of %d failed (%s: %s): trying its halves", len(requests), type(error).__name__, error)
            middle = len(requests) // 2
            return self(requests[:middle]) + self(requests[middle:])

    def _plans(self, rows: int) -> dict[str, Any]:
        config, settings = self.vlm.adaptive_config, self.settings
        if settings.mode is None or config is None:
            return {}
        options = settings.mode.options(config, rows, f"{settings.task}/{settings.budget}/{settings.seed}")
        if "generator" in options:
            self.generator = options["generator"] = self.generator or options["generator"]
        return options


def _take(run: TaskRun, item: Item, answer: Answer | Exception) -> None:
    if isinstance(answer, Exception):
        run.scores.append(0.0)
        return
    run.scores.append(score(item.question, answer.text))
    run.flops_fracs.append(answer.cost.frac)
    run.prompt_tokens.append(answer.prompt_tokens)
    # The latency token is not counted, so that models with and without one can be compared.
    run.last_layer_tokens.append(answer.layer_tokens[-1] - (answer.plan is not None))
    if run.plans is not None and answer.plan is not None:
        run.plans.add(answer.plan)
