"""Baselines of the paper's Table B that transformers has and lmms-eval has not, as one of its chat models.

    lmms-eval --model adallava_baseline --model_args pretrained=Salesforce/blip2-opt-6.7b --tasks pope

Neither kind has a chat template, so their prompts are written here as their model cards have them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import TokenCounts
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from adallava.errors import ConfigError, PromptError
from adallava.evaluation.lmms_chat import DEFAULT_NEW_TOKENS, ChatModel
from adallava.hosts.prompts import Prompt, Request, to_prompt

Made = tuple[Any, dict[str, Any]]
"""Inputs, and further options of generate()."""


def _blip2(processor: Any, prompt: Prompt) -> Made:
    """One picture, and "Question: ... Answer:"."""
    if len(prompt.images) != 1 or len(prompt.messages) != 1:
        there = f"{len(prompt.images)} pictures and {len(prompt.messages)} messages"
        raise PromptError(f"BLIP-2 answers one question about one picture; here are {there}.")
    text = f"Question: {_words(prompt.messages[0])} Answer:"
    return processor(images=prompt.images[0], text=text, return_tensors="pt"), {}


def _idefics(processor: Any, prompt: Prompt) -> Made:
    """A dialogue of User and Assistant, pictures between the words, each turn ended as instructed models know it."""
    known, ids = processor.tokenizer.get_vocab(), processor.tokenizer.convert_tokens_to_ids
    end = _END_OF_TURN if _END_OF_TURN in known else ""
    images = iter(prompt.images)
    # Never two texts side by side: some versions of the processor put a mark of their own between them.
    parts: list[str | Image.Image] = [""]
    for message in prompt.messages:
        _append(parts, "\nAssistant:" if message["role"] == "assistant" else "User:")
        for part in message["content"]:
            _append(parts, next(images) if part["type"] == "image" else part["text"])
        _append(parts, end)
    _append(parts, "\nAssistant:")
    ends = [processor.tokenizer.eos_token_id, *([ids(end)] if end else [])]
    marks = [[ids(mark)] for mark in ("<image>", "<fake_token_around_image>") if mark in known]
    return processor(text=[parts], return_tensors="pt"), {"eos_token_id": ends, "bad_words_ids": marks or None}


_END_OF_TURN = "<end_of_utterance>"


def _append(parts: list[str | Image.Image], part: str | Image.Image) -> None:
    last = parts[-1]
    if isinstance(part, str) and isinstance(last, str):
        parts[-1] = last + part
    else:
        parts.append(part)


def _words(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


PROMPTS: dict[str, Callable[[Any, Prompt], Made]] = {"blip-2": _blip2, "idefics": _idefics}
"""Model type -> how its prompt is written."""


class Baseline(ChatModel[str]):
    """BLIP-2 or IDEFICS, a sample at a time."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
    ) -> None:
        """pretrained: folder or hub id of a model whose type is in ``PROMPTS``; ``ConfigError`` for another."""
        super().__init__(batch_size, device, max_new_tokens)
        kind = AutoConfig.from_pretrained(pretrained).model_type
        if kind not in PROMPTS:
            raise ConfigError(
                f"{pretrained} is a {kind} model, and adallava_baseline has prompts for {', '.join(PROMPTS)}. Try "
                "another model of lmms-eval, or --model adallava."
            )
        self._prompt = PROMPTS[kind]
        self._device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        loaded = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype).to(self._device).eval()
        # In a list, because lmms-eval deletes every module that it finds among a model's attributes.
        self._model, self.processor = [loaded], AutoProcessor.from_pretrained(pretrained)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    def clean(self) -> None:
        """Give the memory back for a judge that runs here."""
        self._model.clear()
        gc.collect()
        torch.cuda.empty_cache()

    def answer(self, requests: Sequence[Request], options: dict[str, Any], task: str) -> list[str | Exception]:
        """Answer one after the other."""
        return [self._one(request, options) for request in requests]

    @torch.no_grad()
    def _one(self, request: Request, options: dict[str, Any]) -> str | Exception:
        try:
            (model,) = self._model
            made, more = self._prompt(self.processor, to_prompt(request))
            inputs = made.to(self._device, model.dtype)
            # What a decoder alone gives begins with its prompt; an encoder has read it apart.
            start = 0 if model.config.get_text_config().is_encoder_decoder else inputs["input_ids"].shape[1]
            answer = model.generate(**inputs, **{**options, **more})[:, start:]
            return self.processor.batch_decode(answer, skip_special_tokens=True)[0].strip()
        except Exception as error:  # whatever a sample can cause; it is counted and logged
            return error.with_traceback(None)

    def result(self, answer: str) -> tuple[str, TokenCounts | None]:
        """The text."""
        return answer, None
