"""Conversations as token ids, with everything but the answers masked out of the loss.

A conversation is encoded piece by piece (system text, user turn, answer, end mark), so the mask follows from which
piece a token came from and never from searching the text. Pieces are cached: the mini data asks the same questions
about thousands of scenes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PromptFormat:
    """The fixed pieces around user and assistant turns; the defaults are those of LLaVA-1.5."""

    user: str = "USER:"
    assistant: str = "ASSISTANT:"
    image: str = "<image>"


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation, and labels of the same length (-100 where the loss does not look)."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], learn: bool) -> None:
        """Append a piece; ``learn`` says whether its tokens are targets."""
        self.input_ids.extend(ids)
        self.labels.extend(ids if learn else [IGNORE_INDEX] * len(ids))


class ConversationEncoder:
    """Turns lists of (question, answer) into ``Encoded``, for one tokenizer and prompt format."""

    def __init__(self, tokenizer: Any, image_tokens: int, prompt: PromptFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.prompt = prompt or PromptFormat()
        self.piece = functools.lru_cache(maxsize=100_000)(self._piece)

    def _piece(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def __call__(self, turns: Sequence[tuple[str, str]], images: int = 1) -> Encoded:
        """Encode turns; the first user turn is preceded by ``images`` runs of image placeholder tokens."""
        prompt, encoded = self.prompt, Encoded()
        encoded.add([self.tokenizer.bos_token_id], learn=False)
        for number, (question, answer) in enumerate(turns):
            encoded.add(self.piece(prompt.user), learn=False)
            if number == 0:
                encoded.add(self.piece(prompt.image) * (self.image_tokens * images), learn=False)
            encoded.add(self.piece(question), learn=False)
            encoded.add(self.piece(prompt.assistant), learn=False)
            encoded.add([*self.piece(answer), self.tokenizer.eos_token_id], learn=True)
        return encoded
