"""Answers to batches of benchmark questions: who decides the plans, and what becomes of a question that fails.

A sample that raises an error is counted and reported; it never becomes a silent empty answer. A batch that fails is cut
in halves until the samples that fail stand alone, so that one bad sample, or a batch too large for the device, costs a
few more passes and not the whole task.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from adallava.evaluation.modes import PlanMode
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Request

log = logging.getLogger(__name__)


class Answering:
    """Answers batches of one task; random plans go on from batch to batch."""

    def __init__(self, vlm: AdaptiveVLM, mode: PlanMode | None, noise: str) -> None:
        """Decide plans by ``mode``, None for a base model; noise: text from which random plans are drawn."""
        self.vlm, self.mode, self.noise = vlm, mode, noise
        self._generator: Any = None

    def __call__(self, requests: Sequence[Request], options: dict[str, Any]) -> list[Answer | Exception]:
        """One answer or error per request; options: of ``generate_batch``."""
        try:
            return list(self.vlm.generate_batch(requests, **options, **self._plans(len(requests))))
        except Exception as caught:  # whatever a sample can cause; it is reported by the caller
            # Without its traceback, which would keep the failed batch's memory while the halves are tried.
            error = caught.with_traceback(None)
        if len(requests) == 1:
            return [error]
        log.warning("a batch of %d failed (%s: %s): trying its halves", len(requests), type(error).__name__, error)
        middle = len(requests) // 2
        return self(requests[:middle], options) + self(requests[middle:], options)

    def _plans(self, rows: int) -> dict[str, Any]:
        if self.mode is None or self.vlm.adaptive_config is None:
            return {}
        options = self.mode.options(self.vlm.adaptive_config, rows, self.noise)
        if "generator" in options:
            self._generator = options["generator"] = self._generator or options["generator"]
        return options
