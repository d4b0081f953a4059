"""The HTTP interface as data: OpenAI's chat completions, with a budget in the request and a plan in the reply."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from adallava.budget import Budget
from adallava.errors import PromptError
from adallava.hosts.prompts import Prompt, Request, to_prompt
from adallava.serving.images import ImagePolicy, read_image
from adallava.serving.jobs import Begun, Ended
from adallava.serving.speech import Sampling

AUTO = "auto"
_MESSAGES, _PARTS, _STOPS = 256, 64, 4
_CHARACTERS = 400_000
"""Of all texts of a request: tokenizing is work, too."""
# Of OpenAI's interface; what is not here is not understood, and these only as far as they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
Text = Annotated[str, StringConstraints(max_length=200_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageURL(_Strict):
    """A picture: a data URL, or an address on a host that the server was told to allow."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture's place among the words."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart | ImagePart], Field(max_length=_PARTS)]
    name: str | None = None


class StreamOptions(_Strict):
    """What a stream ends with."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(0.0, description="0, the default: the likeliest.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    stop: Text | Annotated[list[Text], Field(max_length=_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    budget: str | float | None = Field(
        None,
        description='A share of the model ("60%", 0.6), "5.1 TFLOPs", "80 ms" to the first token, "30 ms/token", or '
        '"auto": what the load allows.',
        examples=["60%", "80 ms", "auto"],
    )
    deadline_ms: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="For the whole answer: how much of the model runs and how many tokens come are chosen for it."
    )

    def check(self) -> None:
        """Raise ``PromptError`` for what OpenAI's interface has and this server has not."""
        for name, value in (self.model_extra or {}).items():
            if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
                raise PromptError(f"{name} = {value!r} is not supported here. Leave it out.")
        if self.budget is not None and self.deadline_ms is not None and self.budget != AUTO:
            raise PromptError("budget and deadline_ms were both given, and each decides how much runs. Give one.")

    def sampling(self, default_tokens: int) -> Sampling:
        """How tokens are chosen."""
        tokens = self.max_completion_tokens or self.max_tokens or default_tokens
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(tokens, self.temperature or 0.0, top_p, stops, self.seed)

    def wanted_budget(self, default: str) -> Budget | None:
        """The budget; None where the server is to decide."""
        wanted = default if self.budget is None else self.budget
        return None if wanted == AUTO or self.deadline_ms is not None else Budget.parse(wanted)

    def prompt(self, policy: ImagePolicy) -> Prompt:
        """Messages and images; ``PromptError`` and ``ImageError`` say what is wrong with them."""
        images, messages = list[Image.Image](), list[dict[str, Any]]()
        self._check_sizes(policy)
        pixels = policy.max_pixels
        for message in self.messages:
            if isinstance(message.content, str):
                messages.append({"role": message.role, "content": message.content})
                continue
            parts: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, TextPart):
                    parts.append({"type": "text", "text": part.text})
                else:
                    images.append(read_image(part.image_url.url, replace(policy, max_pixels=max(1, pixels))))
                    pixels -= images[-1].width * images[-1].height
                    parts.append({"type": "image"})
            messages.append({"role": message.role, "content": parts})
        return to_prompt(Request(images=images, messages=messages))

    def _check_sizes(self, policy: ImagePolicy) -> None:
        parts = [part for message in self.messages if isinstance(message.content, list) for part in message.content]
        texts = [message.content for message in self.messages if isinstance(message.content, str)]
        texts += [part.text for part in parts if isinstance(part, TextPart)]
        if (characters := sum(map(len, texts))) > _CHARACTERS:
            raise PromptError(f"the messages have {characters:,} characters, more than the {_CHARACTERS:,} allowed.")
        if (images := sum(isinstance(part, ImagePart) for part in parts)) > policy.max_images:
            raise PromptError(f"the messages have {images} images, more than the {policy.max_images} allowed.")


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AdaptiveFacts(BaseModel):
    """What ran, and how long it took and was expected to take; times in ms from the request's arrival."""

    budget: str
    k: int = Field(description="Switches on beyond the layers that always run.")
    max_k: int
    plan: list[str] = Field(description="Of each layer that may be off: attention columns, /, MLP columns.")
    layers_on: list[float] = Field(description="Share of each layer that ran.")
    flops: float = Field(description="Of the prefill.")
    flops_frac: float = Field(description="Of the whole model's prefill.")
    queue_ms: float
    first_token_ms: float
    predicted_first_token_ms: float | None = None
    total_ms: float | None = None
    ms_per_token: float | None = None
    remark: str | None = None


class Reply(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The answer."""

    index: int = 0
    message: Reply
    finish_reason: Literal["stop", "length"]


class ChatReply(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    adallava: AdaptiveFacts


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """An error, as OpenAI's clients read it."""

    error: ErrorBody


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "adallava"
    budgets: list[str] = Field(description="The smallest share for each number of switches.")


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """``GET /healthz``."""

    status: Literal["ok", "stopping"]
    waiting: int
    decoding: int


def facts(begun: Begun, ended: Ended | None) -> AdaptiveFacts:
    """What is told of a request beside its answer."""
    config = begun.plan.config
    gates = begun.plan.gates[0].float()
    each = None
    if ended is not None and ended.new_tokens > 1:
        each = (ended.total_ms - begun.first_token_ms) / (ended.new_tokens - 1)
    return AdaptiveFacts(
        budget=str(begun.budget.budget),
        k=begun.plan.k[0],
        max_k=config.max_k,
        plan=begun.plan.to_dict()["rows"][0],
        layers_on=gates.mean((1, 2)).tolist(),
        flops=begun.cost.prefill_flops,
        flops_frac=begun.cost.frac,
        queue_ms=begun.queue_ms,
        first_token_ms=begun.first_token_ms,
        predicted_first_token_ms=begun.predicted_ms,
        total_ms=None if ended is None else ended.total_ms,
        ms_per_token=each,
        remark=begun.remark,
    )


def usage(begun: Begun, new_tokens: int) -> Usage:
    """Tokens of a request."""
    return Usage(
        prompt_tokens=begun.prompt_tokens,
        completion_tokens=new_tokens,
        total_tokens=begun.prompt_tokens + new_tokens,
    )


def new_id() -> str:
    """A name for an answer."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def now() -> int:
    """Unix time."""
    return int(time.time())
