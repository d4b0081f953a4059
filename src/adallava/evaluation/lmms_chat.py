"""A chat model of lmms-eval: requests in batches, what a task asks of decoding, and samples that fail.

A sample that fails is answered with ``FAILED``, which no task takes for a right answer, and is counted and logged.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from adallava.errors import ConfigError, DataError
from adallava.evaluation.tasks import OnBatch
from adallava.hosts.prompts import Request

FAILED = "[failed]"
"""The answer of a sample that failed: no yes, no number and no option's letter."""
DEFAULT_NEW_TOKENS = 1024
"""For tasks that leave the length of an answer open, as lmms-eval's own models have it."""
_HOPELESS = 8
"""So many failures, and not one answer: then the model is at fault and not the samples."""
# What a task may ask of generate(); everything else in its settings is for other models.
_DECODING = ("max_new_tokens", "num_beams", "do_sample", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
_SAMPLING = ("temperature", "top_p", "top_k")

Answered = TypeVar("Answered")


class ChatModel(lmms, abc.ABC, Generic[Answered]):
    """What every model of ours in lmms-eval does; a model itself says how requests are answered."""

    is_simple = False

    def __init__(
        self, batch_size: int | str, device: str | None, max_new_tokens: int, on_batch: OnBatch | None = None
    ) -> None:
        """on_batch: told how many questions are answered, in place of a progress bar."""
        super().__init__()
        self.batch_size = _whole("batch_size", batch_size)
        self.max_new_tokens = _whole("max_new_tokens", max_new_tokens)
        self.on_batch = on_batch
        self.accelerator = Accelerator(cpu=device == "cpu")
        # As lmms-eval itself counts: accelerate knows of one process where several share CPUs without its launcher.
        self._rank = int(os.environ.get("RANK", self.accelerator.process_index))
        self._world_size = int(os.environ.get("WORLD_SIZE", self.accelerator.num_processes))
        self.failures: list[str] = []
        self._ignored: set[str] = set()

    @abc.abstractmethod
    def answer(self, requests: Sequence[Request], options: dict[str, Any], task: str) -> list[Answered | Exception]:
        """One answer or error for each request; options: of generate()."""

    @abc.abstractmethod
    def result(self, answer: Answered) -> tuple[str, TokenCounts | None]:
        """The text of an answer, and how many tokens it took."""

    def took(self, which: dict[str, Any], answer: Answered | Exception, rows: int) -> None:
        """Told of each sample, once; which: its task, split and number. rows: requests that were answered with it."""

    def finished(self) -> None:
        """Told when all requests of a call are answered."""

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused: what is evaluated are generated answers."""
        raise ConfigError(_other_kind(requests, "by the likelihood of given answers"))

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: a plan belongs to one prompt."""
        raise ConfigError(_other_kind(requests, "in several rounds"))

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request; those that go together in batches."""
        results: dict[int, GenerationResult] = {}
        succeeded, failed = 0, len(self.failures)
        with tqdm(total=len(requests), desc="adallava", disable=self._rank != 0 or self.on_batch is not None) as bar:
            for numbers in _batches(requests, self.batch_size):
                batch = [requests[number] for number in numbers]
                answers = self._answers(batch)
                for number, instance, answer in zip(numbers, batch, answers, strict=True):
                    results[number] = self._result(instance, answer, len(batch))
                    succeeded += not isinstance(answer, Exception)
                first = next((answer for answer in answers if isinstance(answer, Exception)), None)
                if first is not None and not succeeded and len(results) >= min(_HOPELESS, len(requests)):
                    raise first
                bar.update(len(batch))
                if self.on_batch is not None:
                    self.on_batch(len(batch))
        if new := self.failures[failed:]:
            logger.error(f"{len(new)} of {len(requests)} samples failed and count as wrong; the first: {new[0]}")
        self.finished()
        return [results[number] for number in range(len(requests))]

    def _answers(self, batch: Sequence[Instance]) -> list[Answered | Exception]:
        """Samples that cannot be prepared fail before the others are answered together."""
        prepared = [self._request(instance) for instance in batch]
        asked = [request for request in prepared if isinstance(request, Request)]
        options = self.decoding(batch[0].args[2])
        answered = iter(self.answer(asked, options, batch[0].args[4]) if asked else [])
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
            return Request(messages=messages, images=images)
        except Exception as error:  # an image that cannot be read, a field that is missing: it is reported
            return error

    def decoding(self, asked: dict[str, Any]) -> dict[str, Any]:
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

    def _result(self, instance: Instance, answer: Answered | Exception, rows: int) -> GenerationResult:
        _, _, asked, number, task, split = instance.args
        # Clones of a sample, made to give every process as many, are answered and count for nothing.
        if not (instance.metadata or {}).get("__padding_only__"):
            if isinstance(answer, Exception):
                self.failures.append(f"{task} {number}: {type(answer).__name__}: {answer}")
            self.took({"task": task, "split": split, "doc_id": number}, answer, rows)
        if isinstance(answer, Exception):
            return GenerationResult(FAILED)
        text, counts = self.result(answer)
        return GenerationResult(_cut(text, asked.get("until")), counts)


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
    """The text up to the first of the words at which a task wants it to end.

    A blank line alone is what lmms-eval writes where a task says nothing: it ends examples in a prompt, and here it
    would cut long answers.
    """
    if until == ["\n\n"]:
        return text
    for end in [until] if isinstance(until, str) else until or []:
        text = text.split(end)[0] if end else text
    return text


def _other_kind(requests: Sequence[Instance], how: str) -> str:
    tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
    return f"{tasks} asks {how}, which AdaLLaVA does not do. Choose tasks that generate their answers at once."


def _whole(name: str, value: object) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name} is {value!r}, expected a whole number of 1 or more.")
    return number
