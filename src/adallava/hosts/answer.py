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
    decoder, their encoding.
    """

    prepare_ms: float
    first_token_ms: float
    total_ms: float
    new_tokens: int
    selection_ms: float = 0.0

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


class Stopwatch(StoppingCriteria):
    """Notes when each token of a generate() call is there; it never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.selected_s = 0.0
        self.seconds: list[float] = []
        self.started = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def selected(self) -> float:
        """Note that the visual tokens are selected; returns the seconds since the start."""
        self.selected_s = self._now() - self.started
        return self.selected_s

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Note the time; called by generate() after each token."""
        self.seconds.append(self._now() - self.started)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def timing(self, prepare_s: float) -> Timing:
        """The times so far."""
        first, last = (self.seconds[0], self.seconds[-1]) if self.seconds else (0.0, 0.0)
        return Timing(1e3 * prepare_s, 1e3 * first, 1e3 * last, len(self.seconds), 1e3 * self.selected_s)
