"""``Answer``: what came out of a request, what it cost, and how long it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria

from adallava.budget import Forecast, ResolvedBudget
from adallava.cost import Cost
from adallava.plan import ExecutionPlan


@dataclass(frozen=True)
class Timing:
    """Measured wall-clock times of the generate() call that a request was part of; a batch shares one.

    ``first_token_ms``: from the prepared inputs to the first new token (vision, prefill, choice of the token).
    ``total_ms``: to the last token. ``prepare_ms``: before that, images and prompt to tensors. ``selection_ms``: of the
    time to the first token, what went by before the budget was resolved: where visual tokens are selected before the
    decoder, their encoding. ``decided_ms``: of it, what went by before the plan was decided; None where nobody asked.
    """

    prepare_ms: float
    first_token_ms: float
    total_ms: float
    new_tokens: int
    selection_ms: float = 0.0
    decided_ms: float | None = None

    @property
    def answered_ms(self) -> float:
        """From the call to the first new token: what a budget in milliseconds is about."""
        return self.prepare_ms + self.first_token_ms

    @property
    def ms_per_token(self) -> float | None:
        """Mean time of a decode step, None where only one token was made."""
        return (self.total_ms - self.first_token_ms) / (self.new_tokens - 1) if self.new_tokens > 1 else None


@dataclass(frozen=True)
class Foretold:
    """What a request was expected to take on a calibrated device: what to hold its ``Timing`` against."""

    first_token: Forecast
    """From the call to the first new token, as ``Timing.answered_ms``."""
    token: Forecast | None
    """Of a mean decoding step, as ``Timing.ms_per_token``; None where there was none, or decoding was not measured."""


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    ``texts`` holds every sequence that generate() returned for it, ``text`` the first. ``budget`` and ``plan`` are
    None for a base model, which has none. ``cost`` follows the paper's convention; ``timing`` is measured.
    """

    text: str
    plan: ExecutionPlan | None
    budget: ResolvedBudget | None
    cost: Cost
    timing: Timing
    prompt_tokens: int
    """Tokens of the prompt, all visual tokens included, without the latency token."""
    texts: list[str] = field(default_factory=list)
    layer_tokens: list[int] = field(default_factory=list)
    """Tokens of the prompt that each layer processed: with the latency token, without dropped visual tokens."""
    foretold: Foretold | None = None
    """Of the batch, where the model's device profile is in use; see ``Profiles``."""


def device_now(device: torch.device) -> float:
    """Seconds of ``time.perf_counter`` at which ``device`` has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch(StoppingCriteria):
    """Notes when each part of a call is over, and each token there; it never stops anything.

    elapsed_ms: what had gone by of the request before this was made.
    """

    def __init__(self, device: torch.device, elapsed_ms: float = 0.0) -> None:
        self._device = device
        self._called = time.perf_counter() - elapsed_ms / 1e3
        self._prepared = self._selected = self._called
        self._decided: float | None = None
        self._tokens: list[float] = []

    def prepared(self) -> None:
        """Note that images and prompt are tensors on the device."""
        self._prepared = self._selected = device_now(self._device)

    def selected(self) -> float:
        """Note that the visual tokens are selected; returns the milliseconds since the call."""
        self._selected = device_now(self._device)
        return 1e3 * (self._selected - self._called)

    def decided(self) -> float:
        """Note that the plan is about to be decided; returns the milliseconds since the call."""
        self._decided = device_now(self._device)
        return 1e3 * (self._decided - self._called)

    def passed_ms(self) -> float:
        """Milliseconds since the call."""
        return 1e3 * (device_now(self._device) - self._called)

    def token(self) -> None:
        """Note that a token is there."""
        self._tokens.append(device_now(self._device))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Note a token; called by generate() after each."""
        self.token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    @property
    def seconds(self) -> list[float]:
        """When each token was there, since the inputs were prepared."""
        return [at - self._prepared for at in self._tokens]

    @property
    def timing(self) -> Timing:
        """The times so far."""
        ready, seconds = self._prepared, self.seconds or [0.0]
        return Timing(
            prepare_ms=1e3 * (ready - self._called),
            first_token_ms=1e3 * seconds[0],
            total_ms=1e3 * seconds[-1],
            new_tokens=len(self._tokens),
            selection_ms=1e3 * (self._selected - ready),
            decided_ms=None if self._decided is None else 1e3 * (self._decided - ready),
        )
