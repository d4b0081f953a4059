"""A conversation as a host's own processor writes it, with everything but the answers masked out of the loss.

Prompts of training and of inference come from one place, the processor's chat template, so they cannot differ. Which
tokens are answers follows from where the template puts them: the conversation is rendered up to each answer and again
with it, and the difference is the answer with its end mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adallava.data.conversation import IGNORE_INDEX
from adallava.errors import DataError

_IMAGE_MARKS = ("image_token", "boi_token")
"""What a processor calls the text that stands for an image, which it replaces by one token per patch."""


def encode_chat(
    processor: Any, messages: Sequence[dict[str, Any]], images: Sequence[Any], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode one conversation for training.

    messages: ``[{"role", "content": [parts]}, ...]``, the last one an answer. images: PIL images in the order of their
    places. max_tokens: what is longer is cut off at the end, as the released code does, but never inside an image.

    Returns what the processor makes (``input_ids`` [1, T], ``pixel_values``, ...) with ``labels`` [1, T], -100 outside
    the answers. Raises ``DataError`` where the template cannot be followed, an image does not fit into max_tokens, or
    no token of an answer is left.
    """
    text, spans = _render(processor, messages)
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    special = not (bos is not None and text.startswith(bos))
    inputs = dict(
        processor(
            text=[text], images=[list(images)] if images else None, add_special_tokens=special, return_tensors="pt"
        )
    )
    plain = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    learned = [_inside(start, stop, spans) for start, stop in plain["offset_mapping"]]
    ids = inputs["input_ids"][0].tolist()
    labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    for place, is_learned in zip(_align(processor, plain["input_ids"], ids), learned, strict=True):
        if place is not None and is_learned:
            labels[0, place] = ids[place]
    inputs["labels"] = labels
    return _without_answerless_end(inputs) if max_tokens is None else _cut(processor, inputs, max_tokens)


def encode_plain(
    processor: Any, images: Sequence[Any], caption: str, max_tokens: int | None = None
) -> dict[str, Tensor]:
    """Encode an image and its caption without any prompt, as LLaVA's first stage does for the projector.

    The caption and a line break are learned; otherwise as ``encode_chat``.
    """
    text = processor.image_token * len(images) + caption
    inputs = dict(processor(text=[f"{text}\n"], images=[list(images)], return_tensors="pt"))
    ids = inputs["input_ids"]
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    last = int((ids[0] == image_id).nonzero().max())
    inputs["labels"] = ids.clone()
    inputs["labels"][:, : last + 1] = IGNORE_INDEX
    return inputs if max_tokens is None else _cut(processor, inputs, max_tokens)


def _render(processor: Any, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where its answers are, each with the mark that ends it."""
    end = processor.tokenizer.eos_token or ""
    text, spans, done = "", [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = processor.apply_chat_template(list(messages[:number]), add_generation_prompt=True)
        after = processor.apply_chat_template(list(messages[: number + 1]))
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                "the processor's chat template renders a conversation and its beginning differently, so its answers "
                f"cannot be told from its prompts. Set another processor.chat_template. It gave: {after!r:.200}"
            )
        text += before[len(done) :]
        answer = after[len(before) :]
        # Some templates, such as that of llava-hf's checkpoints, write no end mark: a model trained so never stops.
        answer = answer if not end or end in answer else answer.rstrip() + end
        spans.append((len(text), len(text) + len(answer)))
        text, done = text + answer, after
    return text, spans


def _inside(start: int, stop: int, spans: Sequence[tuple[int, int]]) -> bool:
    return stop > start and any(first < stop and start < last for first, last in spans)


def _align(processor: Any, plain: Sequence[int], expanded: Sequence[int]) -> list[int | None]:
    """Where each token of ``plain`` stands in ``expanded``, which has the many tokens of images; None for an image."""
    marks = {getattr(processor, name, None) for name in _IMAGE_MARKS} - {None}
    image_ids = {processor.tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    places: list[int | None] = []
    runs = _runs(plain, image_ids)
    at = 0
    for number, run in enumerate(runs):
        if number == len(runs) - 1 and number > 0:
            at = len(expanded) - len(run)
        elif number > 0:
            at = _find(run, expanded, at)
        if list(expanded[at : at + len(run)]) != run or at < 0:
            raise DataError("the processor changes the text around images, so answers cannot be found in its tokens.")
        places += [*([None] if number else []), *range(at, at + len(run))]
        at += len(run)
    return places


def _runs(ids: Sequence[int], marks: set[int]) -> list[list[int]]:
    """The tokens before, between and after those in ``marks``."""
    runs: list[list[int]] = [[]]
    for token in ids:
        if token in marks:
            runs.append([])
        else:
            runs[-1].append(token)
    return runs


def _find(run: Sequence[int], ids: Sequence[int], start: int) -> int:
    """Where ``run`` first stands in ids from ``start`` on; -1 if nowhere."""
    return next((i for i in range(start, len(ids) - len(run) + 1) if list(ids[i : i + len(run)]) == list(run)), -1)


def _without_answerless_end(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what stands after the last answer, such as a line break of the template, which nobody learns."""
    learned = (inputs["labels"][0] != IGNORE_INDEX).nonzero()
    if not len(learned):
        raise DataError("no token of an answer is left. Leave the sample out, or allow longer samples.")
    return _first_tokens(inputs, int(learned.max()) + 1)


def _cut(processor: Any, inputs: dict[str, Tensor], max_tokens: int) -> dict[str, Tensor]:
    tokens = inputs["input_ids"].shape[1]
    if tokens > max_tokens:
        image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        images = (inputs["input_ids"][0] == image_id).nonzero()
        if len(images) and int(images.max()) >= max_tokens:
            raise DataError(
                f"its images need {int(images.max()) + 1} tokens and max_tokens is {max_tokens}. Allow longer samples."
            )
    return _without_answerless_end(_first_tokens(inputs, min(tokens, max_tokens)))


def _first_tokens(inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    tokens = inputs["input_ids"].shape[1]
    per_token = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
    return {n: v[:, :count] if n in per_token and v.shape[1] == tokens else v for n, v in inputs.items()}
