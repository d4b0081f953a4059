"""Who decides the plans of a sweep: the scheduler, a baseline, or one plan for every question.

Written as text, in commands and in result rows: "learned"; "random", and "random:1" for another draw of the same kind;
"static"; and "fixed:9c", one plan by its key (see ``PlanCounts``), which looks at neither image, question nor budget.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from adallava.config import AdaptiveConfig
from adallava.errors import ConfigError, did_you_mean
from adallava.evaluation.plans import PlanCounts
from adallava.plan import ExecutionPlan
from adallava.scheduling.scheduler import MODES

FIXED = "fixed"
NO_MODE = "none"
"""What stands in the mode of a base model's rows: it has no plan to decide."""


@dataclass(frozen=True)
class PlanMode:
    """One way to decide plans; ``str`` writes it as ``parse`` reads it."""

    name: str
    """"learned", "random", "static" or "fixed"."""
    seed: int = 0
    """Of "random": which draw."""
    key: str = ""
    """Of "fixed": the plan."""

    @classmethod
    def parse(cls, text: str) -> PlanMode:
        """Read a mode; ``ConfigError`` says which there are."""
        name, _, more = text.strip().partition(":")
        if name == FIXED and more:
            return cls(name, key=more.lower())
        if name == "random" and (not more or more.isdecimal()):
            return cls(name, seed=int(more or 0))
        if name in MODES and not more:
            return cls(name)
        known = f"{', '.join(MODES)}, random:1 for another draw, fixed:PLAN"
        raise ConfigError(f"mode {text!r} is not known.{did_you_mean(name, MODES)} Known: {known}.")

    def __str__(self) -> str:
        more = self.key if self.name == FIXED else str(self.seed) if self.seed else ""
        return f"{self.name}:{more}" if more else self.name

    def options(self, config: AdaptiveConfig, rows: int, noise: str) -> dict[str, Any]:
        """What ``generate_batch`` takes for this mode, for that many requests.

        noise: text from which random plans are drawn, so that they are the same after a restart.
        """
        if self.name == FIXED:
            return {"plan": self.plan(config).repeat_interleave(rows)}
        own = zlib.crc32((f"{noise}/{self.seed}" if self.seed else noise).encode())
        return {"mode": self.name, "generator": torch.Generator().manual_seed(own)}

    def plan(self, config: AdaptiveConfig) -> ExecutionPlan:
        """The plan of "fixed", B = 1; ``ConfigError`` for a key of another model."""
        try:
            return PlanCounts.for_config(config).plan_of(self.key, config)
        except ValueError as error:
            raise ConfigError(
                f"mode {str(self)!r}: {self.key!r} is no plan of this model ({error}). Take one from the plan_counts "
                "of a sweep's rows."
            ) from error
