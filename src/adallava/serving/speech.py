"""From logits to text, for one answer: which token comes next, what of the text may be shown, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adallava.errors import PromptError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the likeliest, as ``generate`` does by default."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends; they are not part of it."""
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the values; raise ``PromptError``."""
        if self.max_new_tokens < 1:
            raise PromptError(f"max_tokens is {self.max_new_tokens}, expected 1 or more.")
        if not 0 <= self.temperature <= 2:
            raise PromptError(f"temperature is {self.temperature}, expected 0 to 2.")
        if not 0 < self.top_p <= 1:
            raise PromptError(f"top_p is {self.top_p}, expected more than 0 and at most 1.")
        if not all(self.stop):
            raise PromptError("stop has an empty text, at which every answer would end. Leave it out.")


class Speech:
    """One answer as it grows."""

    def __init__(self, sampling: Sampling, decode: Callable[[Sequence[int]], str], end_ids: frozenset[int]) -> None:
        """decode: token ids to text, without special tokens. end_ids: tokens that end an answer."""
        self.sampling, self.tokens = sampling, list[int]()
        self.finish_reason: str | None = None
        self._decode, self._end_ids = decode, end_ids
        self._shown, self._cut = 0, False
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._text = ""

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._text.strip()

    def choose(self, logits: Tensor) -> int:
        """The next token, of logits [V]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        above = logits.double().cpu()
        above -= above.max()  # so that a temperature near zero cannot make them infinite
        shares = torch.softmax(above / self.sampling.temperature, 0)
        if self.sampling.top_p < 1:
            ordered, order = shares.sort(descending=True)
            # The smallest set of likeliest tokens whose shares reach top_p: what lies before the first of the rest.
            beyond = ordered.cumsum(0) - ordered >= self.sampling.top_p
            shares[order[beyond]] = 0
        return int(torch.multinomial(shares, 1, generator=self._generator))

    def say(self, token: int) -> str:
        """Take a token; returns what it adds to the text that may be shown."""
        self.tokens.append(token)
        if token in self._end_ids:
            self.finish_reason = "stop"
        else:
            self._text = self._decode(self.tokens)
            ends = [at for mark in self.sampling.stop if (at := self._text.find(mark)) >= 0]
            if ends:
                self._text, self.finish_reason = self._text[: min(ends)], "stop"
            elif len(self.tokens) >= self.sampling.max_new_tokens:
                self.finish_reason = "length"
        return self._show()

    def _show(self) -> str:
        """What has not been shown yet and will not change: no half characters, no beginning of a stop text."""
        text = self._text.strip() if self.finish_reason is not None else self._text.lstrip()
        safe = len(text)
        if self.finish_reason is None:
            safe = len(text.rstrip(_UNFINISHED))
            for mark in self.sampling.stop:
                lengths = range(min(len(mark), safe), 0, -1)
                safe -= next((n for n in lengths if mark.startswith(text[safe - n : safe])), 0)
            safe = len(text[:safe].rstrip())  # the answer may end here, and ends without spaces
        new = text[self._shown : safe]
        self._shown = max(self._shown, safe)
        return new
