"""AdaLLaVA as a chat model of lmms-eval, found through the entry point ``lmms_eval.models``.

    lmms-eval --model adallava --model_args pretrained=mini-L,budget=85% --tasks pope --batch_size 8

Beside lmms-eval's own results a side file tells what each sample cost and took, and which plan it ran. A sample that
fails is answered with ``FAILED``, which no task takes for a right answer, and is counted, logged and in the side file.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from adallava.budget import Budget
from adallava.errors import ConfigError, DataError, ProfileError
from adallava.evaluation.answering import Answering
from adallava.evaluation.modes import NO_MODE, PlanMode
from adallava.evaluation.preflight import check_budgets
from adallava.evaluation.samples import SampleFile
from adallava.evaluation.tasks import OnBatch, TaskRun, mean_of
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Request
from adallava.selection import describe_selector

FAILED = "[failed]"
"""The answer of a sample that failed: no yes, no number and no option's letter."""
DEFAULT_NEW_TOKENS = 1024
"""For tasks that leave the length of an answer open, as lmms-eval's own models have it."""
_HOPELESS = 8
"""So many failures, and not one answer: then the model is at fault and not the samples."""
# What a task may ask of generate(); everything else in its settings is for other models.
_DECODING = ("max_new_tokens", "num_beams", "do_sample", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
_SAMPLING = ("temperature", "top_p", "top_k")


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    return ModelManifest("adallava", chat_class_path="adallava.evaluation.lmms_plugin.AdaLLaVA")


class AdaLLaVA(lmms):
    """One model at one budget."""

    is_simple = False

    def __init__(
        self,
        pretrained: str | AdaptiveVLM = "mini-L",
        budget: object = "100%",
        mode: str = "learned",
        token_selection: str | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        samples: str | None = None,
        on_batch: OnBatch | None = None,
    ) -> None:
        """Load a model, or take one, to answer at ``budget``.

        pretrained: shipped name, folder or hub id. mode: who decides the plans, see ``PlanMode``; seed: draws random
        ones. samples: the side file, "none" for none; by default a new one, named after model, budget and time.
        on_batch: told how many questions are answered, in place of a progress bar. Raises what ``from_pretrained``
        raises, ``BudgetError``, ``ConfigError``, and ``ResultExistsError`` for a side file that exists.
        """
        super().__init__()
        self.batch_size = _whole("batch_size", batch_size)
        self.max_new_tokens = _whole("max_new_tokens", max_new_tokens)
        self.budget, self.seed, self.on_batch = Budget.parse(_unquoted(budget)), seed, on_batch
        selection, chosen = _unquoted(token_selection), PlanMode.parse(_unquoted(mode))
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        if isinstance(pretrained, AdaptiveVLM):
            vlm, label, self._lent = pretrained, "model", True
        else:
            extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
            where = str(self.accelerator.device) if several else device
            vlm, label, self._lent = (
                AdaptiveVLM.from_pretrained(pretrained, device=where, dtype=dtype, **extra),
                pretrained,
                False,
            )
        if vlm.adaptive_config is None and self.budget.fraction != 1:
            raise ConfigError(f"{label} is a base model and runs at 100% only. Leave out the budget.")
        if vlm.adaptive_config is not None and self.budget.unit == "share":
            check_budgets(label, vlm.adaptive_config, [self.budget])
        if selection is not None:
            vlm.token_selection = selection
        self.mode = chosen if vlm.adaptive_config is not None else None
        # In a list, because lmms-eval deletes every module that it finds among a model's attributes.
        self._vlm = [vlm]
        self._answering: dict[str, Answering] = {}
        self._ignored: set[str] = set()
        self._look_for_profile()
        about = {
            "model": label,
            "budget": str(self.budget),
            "mode": str(self.mode or NO_MODE),
            "token_selection": describe_selector(vlm.token_selection),
        }
        self.samples = None if samples == "none" else SampleFile(self._path(samples, label), about)
        self.run = TaskRun.of(vlm)
        self._tokens, self._seconds = 0, 0.0

    @property
    def vlm(self) -> AdaptiveVLM:
        """The model; gone after an evaluation that lmms-eval loaded it for."""
        return self._vlm[0]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.vlm.device if self._vlm else self.accelerator.device

    def clean(self) -> None:
        """Give the memory back for a judge that runs here; a model that was lent stays."""
        if not self._lent:
            self._vlm.clear()
            self._answering.clear()
            gc.collect()
            torch.cuda.empty_cache()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused: budgets are of generated answers."""
        raise ConfigError(_other_kind(requests, "by the likelihood of given answers"))

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: a plan belongs to one prompt."""
        raise ConfigError(_other_kind(requests, "in several rounds"))

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request; those that go together in batches."""
        results: dict[int, GenerationResult] = {}
        succeeded, failed = 0, len(self.run.failures)
        with tqdm(total=len(requests), desc="adallava", disable=self._rank != 0 or self.on_batch is not None) as bar:
            for numbers in _batches(requests, self.batch_size):
                batch = [requests[number] for number in numbers]
                answers = self._answer(batch)
                for number, instance, answer in zip(numbers, batch, answers, strict=True):
                    results[number] = self._result(instance, answer, len(batch))
                    succeeded += isinstance(answer, Answer)
                first = next((answer for answer in answers if isinstance(answer, Exception)), None)
                if first is not None and not succeeded and len(results) >= min(_HOPELESS, len(requests)):
                    raise first
                bar.update(len(batch))
                if self.on_batch is not None:
                    self.on_batch(len(batch))
        if len(self.run.failures) > failed:
            logger.error(
                f"{len(self.run.failures) - failed} of {len(requests)} samples failed and count as wrong; the first: "
                f"{self.run.failures[failed]}" + ("" if self.samples is None else f". All are in {self.samples.path}.")
            )
        self._log_metrics()
        return [results[number] for number in range(len(requests))]

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _answer(self, batch: Sequence[Instance]) -> list[Answer | Exception]:
        """Answers or errors; samples that cannot be prepared fail before the others are answered together."""
        prepared = [self._request(instance) for instance in batch]
        asked = [request for request in prepared if isinstance(request, Request)]
        task, options = batch[0].args[4], self._options(batch[0].args[2])
        answering = self._answering.setdefault(
            task, Answering(self.vlm, self.mode, f"{task}/{self.budget}/{self.seed}/{self._rank}")
        )
        started = time.perf_counter()
        answered = iter(answering(asked, options) if asked else [])
        self._seconds += time.perf_counter() - started
        return [next(answered) if isinstance(request, Request) else request for request in prepared]

    def _request(self, instance: Instance) -> Request | Exception:
        _, doc_to_messages, _, number, task, split = instance.args
        try:
            chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
            images, videos, audios = chat.extract_media()
            if videos or audios:
                raise DataError(f"{task} has videos or sound, and only images and text can be answered.")
            messages = [
                {
                    "role": message.role,
                    "content": [
                        {"type": "image"} if part.type == "image" else {"type": "text", "text": part.text}
                        for part in message.content
                    ],
                }
                for message in chat.messages
            ]
            return Request(messages=messages, images=images, budget=self.budget)
        except Exception as error:  # an image that cannot be read, a field that is missing: it is reported
            return error

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What a task wants of decoding; at a temperature of 0, or where it says so, greedy."""
        options = {name: asked[name] for name in _DECODING if asked.get(name) is not None}
        options.setdefault("max_new_tokens", self.max_new_tokens)
        options["do_sample"] = bool(options.get("do_sample", (asked.get("temperature") or 0) > 0))
        if options["do_sample"]:
            options |= {name: asked[name] for name in _SAMPLING if asked.get(name) is not None}
        options.setdefault("num_beams", 1)
        if new := set(asked) - {*_DECODING, *_SAMPLING, "until"} - self._ignored:
            self._ignored |= new
            logger.info(f"settings of the task that are for other models are ignored: {', '.join(sorted(new))}")
        return options

    def _result(self, instance: Instance, answer: Answer | Exception, rows: int) -> GenerationResult:
        _, _, asked, number, task, split = instance.args
        # Clones of a sample, made to give every process as many, are answered and count for nothing.
        if not (instance.metadata or {}).get("__padding_only__"):
            if isinstance(answer, Exception):
                self.run.failures.append(f"{task} {number}: {type(answer).__name__}: {answer}")
            else:
                self.run.add_cost(answer, self.vlm.spec)
            if self.samples is not None:
                self.samples.add({"task": task, "split": split, "doc_id": number}, answer, rows)
        if isinstance(answer, Exception):
            return GenerationResult(FAILED)
        self._tokens += (made := len(self.vlm.processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"]))
        return GenerationResult(_cut(answer.text, asked.get("until")), TokenCounts(answer.prompt_tokens, made))

    # -- around it ----------------------------------------------------------------------------------------------------

    def _look_for_profile(self) -> None:
        """Times are foretold where this device is calibrated; a budget in time says itself what is missing."""
        try:
            self.vlm.profiles.get(self.vlm, self.vlm.token_selection, self.budget)
        except ProfileError:
            if self.budget.timed:
                raise
            logger.info("times are measured, and not foretold: this model is not calibrated here (adallava calibrate)")

    def _path(self, samples: str | None, label: str) -> Path:
        if samples is None:
            name = f"{Path(label).name}-{self.budget}-{datetime.now():%Y%m%d-%H%M%S}".replace("/", "-").replace(" ", "")
            samples = f"adallava-samples-{name}.jsonl"
        path = Path(samples)
        return path.with_name(f"{path.stem}.rank{self._rank}{path.suffix}") if self._world_size > 1 else path

    def _log_metrics(self) -> None:
        """Numbers beside the score that lmms-eval writes into its results; it averages them over processes."""
        if not self.run.flops_fracs:
            return
        log_metrics(
            total_gen_tokens=self._tokens,
            total_elapsed_time=self._seconds,
            avg_speed=self._tokens / self._seconds if self._seconds else 0.0,
            additional_metrics={
                "failed_samples": len(self.run.failures),
                "flops_frac": mean_of(self.run.flops_fracs),
                "prompt_tokens": mean_of(self.run.prompt_tokens),
            },
        )


def _batches(requests: Sequence[Instance], size: int) -> Iterator[list[int]]:
    """Numbers of requests to answer together: neighbours of one task that want the same of decoding."""
    batch: list[int] = []
    for number, request in enumerate(requests):
        if batch and (len(batch) == size or _kind(requests[batch[0]]) != _kind(request)):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _kind(instance: Instance) -> tuple[Any, ...]:
    _, _, options, _, task, split = instance.args
    return task, split, options


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first of the words at which a task wants it to end."""
    for end in [until] if isinstance(until, str) else until or []:
        text = text.split(end)[0] if end else text
    return text


def _other_kind(requests: Sequence[Instance], how: str) -> str:
    tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
    return f"{tasks} asks {how}, which AdaLLaVA does not do. Choose tasks that generate their answers at once."


def _unquoted(value: Any) -> Any:
    """An argument without the quotes that keep its commas together on lmms-eval's command line."""
    return value.strip("\"'") if isinstance(value, str) else value


def _whole(name: str, value: object) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name} is {value!r}, expected a whole number of 1 or more.")
    return number
