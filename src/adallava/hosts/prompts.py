"""Requests: an image or several or none, a question or a conversation, a budget; and how they become model input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import PaliGemmaProcessor

from adallava.errors import PromptError
from adallava.hosts.images import ImageSource, load_image

Message = dict[str, Any]
_KINDS = ("image", "video", "boi")


@dataclass(frozen=True)
class Request:
    """One thing to answer. Give ``question`` or ``messages``; ``images`` may be one image, several, or none."""

    question: str | None = None
    images: ImageSource | Sequence[ImageSource] | None = None
    messages: Sequence[Message] | None = None
    budget: object = "100%"


@dataclass(frozen=True)
class Prompt:
    """A request as chat messages with typed parts, and its images in the order of their places."""

    messages: list[Message]
    images: list[Image.Image] = field(default_factory=list)


def to_prompt(request: Request) -> Prompt:
    """Check a request and bring it into one form; ``PromptError`` or ``ImageError`` say what is wrong with it."""
    images = [load_image(source) for source in _as_list(request.images)]
    if (request.question is None) == (request.messages is None):
        raise PromptError("pass either a question or messages, one of the two.")
    messages = request.messages or ([] if request.question is None else [_user(request.question)])
    checked = [_message(message, number) for number, message in enumerate(messages)]
    if not checked or checked[-1]["role"] != "user":
        raise PromptError("the last message must be the user's: it is the one to answer.")
    places = sum(part["type"] == "image" for message in checked for part in message["content"])
    if places == 0 and images:
        first = next(message for message in checked if message["role"] == "user")
        first["content"][:0] = [{"type": "image"}] * len(images)
    elif places != len(images):
        raise PromptError(f"the messages have {places} image places, but {len(images)} images were passed.")
    return Prompt(checked, images)


def _user(question: str) -> Message:
    return {"role": "user", "content": question}


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _message(message: Any, number: int) -> Message:
    """One message with its content as a list of text and image parts."""
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise PromptError(f'message {number} is {message!r}; expected {{"role": ..., "content": ...}}.')
    content, role = message["content"], message["role"]
    if role not in ("user", "assistant", "system"):
        raise PromptError(f"message {number} has the role {role!r}; expected user, assistant or system.")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple) or not all(isinstance(p, dict) and "type" in p for p in parts):
        raise PromptError(f"the content of message {number} is {content!r}; expected text or a list of typed parts.")
    for part in parts:
        if part["type"] == "text" and isinstance(part.get("text"), str):
            continue
        if part["type"] != "image":
            raise PromptError(f"message {number} has the part {part!r}; expected a text or an image place.")
    text = " ".join(p["text"] for p in parts if p["type"] == "text")
    if not text.strip():
        raise PromptError(f"message {number} ({role}) has no text. Ask a question.")
    return {"role": role, "content": [dict(part) for part in parts]}


def encode(processor: Any, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Prompts -> ``input_ids`` and ``attention_mask`` [B, T], left-padded, and all else that the processor makes.

    That is ``pixel_values`` of all images and, by host, their sizes or grids and the types of the tokens.
    Raises ``PromptError`` for what the processor cannot make inputs of.
    """
    if processor is None:
        raise PromptError(
            "this model was loaded without a processor, because its folder has no tokenizer files. Put tokenizer.json, "
            "or tokenizer.model, beside the checkpoint and load it again; or pass input_ids to the model itself."
        )
    if getattr(processor, "chat_template", None) is None:
        raise PromptError(
            "the processor has no chat template. Set processor.chat_template, or save one as chat_template.jinja "
            "beside the checkpoint."
        )
    for number, prompt in enumerate(prompts):
        _check_text(processor, prompt)
        if isinstance(processor, PaliGemmaProcessor) and not prompt.images:
            raise PromptError(f"request {number} has no image, and PaliGemma answers about images only. Pass one.")
    texts = [processor.apply_chat_template(prompt.messages, add_generation_prompt=True) for prompt in prompts]
    bos = processor.tokenizer.bos_token
    # A template that writes the first token itself must not get a second one from the tokenizer.
    starts = bos is not None and all(text.startswith(bos) for text in texts)
    # One list per prompt, because some processors treat an image that is alone in its prompt in another way.
    images = [prompt.images for prompt in prompts]
    try:
        inputs = processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=not starts,
            return_tensors="pt",
        )
    except ValueError as error:
        raise PromptError(f"{type(processor).__name__} cannot make model inputs of the prompts: {error}") from error
    return {name: value for name, value in inputs.items() if name != "labels"}  # PaliGemma's makes labels, all ignored


def _check_text(processor: Any, prompt: Prompt) -> None:
    """Refuse texts that contain a token which marks an image or video."""
    marks = {getattr(source, f"{kind}_token", None) for source in (processor, processor.tokenizer) for kind in _KINDS}
    texts = [part["text"] for message in prompt.messages for part in message["content"] if part["type"] == "text"]
    for text in texts:
        for mark in marks - {None}:
            if mark in text:
                raise PromptError(f"the text {text!r} contains {mark!r}, which marks an image. Pass images separately.")
