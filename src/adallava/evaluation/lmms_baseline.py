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


def _blip2(processor: Any, prompt: Prompt) -> Any:
    """One picture, and "Question: ... Answer:"."""
    if len(prompt.images) != 1 or len(prompt.messages) != 1:
        raise PromptError(f"BLIP-2 answers one question about one picture; here are {len(prompt.images)} pictures.")
    text = f"Question: {_words(prompt.messages[0])} Answer:"
    return processor(images=prompt.images[0], text=text, return_tensors="pt")


def _idefics(processor: Any, prompt: Prompt) -> Any:
    """A dialogue of User and Assistant, pictures between the words."""
    images = iter(prompt.images)
    parts: list[str | Image.Image] = []
    for message in prompt.messages:
        parts.append("\nAssistant:" if message["role"] == "assistant" else "User:")
        parts += [next(images) if part["type"] == "image" else part["text"] for part in message["content"]]
    # A processor of the instructed models puts their mark between two texts.
    return processor(text=[[*parts, "\nAssistant:"]], return_tensors="pt")


def _words(message: dict[str, Any]) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


PROMPTS: dict[str, Callable[[Any, Prompt], Any]] = {"blip-2": _blip2, "idefics": _idefics}
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
            inputs = self._prompt(self.processor, to_prompt(request)).to(self._device, model.dtype)
            # What a decoder alone gives begins with its prompt; an encoder has read it apart.
            start = 0 if model.config.get_text_config().is_encoder_decoder else inputs["input_ids"].shape[1]
            made = model.generate(**inputs, **options)[:, start:]
            return self.processor.batch_decode(made, skip_special_tokens=True)[0].strip()
        except Exception as error:  # whatever a sample can cause; it is counted and logged
            return error

    def result(self, answer: str) -> tuple[str, TokenCounts | None]:
        """The text."""
        return answer, None
