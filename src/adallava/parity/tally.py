"""What a replay finds: for every quantity how often it was compared, its largest difference and its tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXACT = 0.0


@dataclass
class Quantity:
    """One row of a parity report."""

    recording: str
    """Folder or file of the recording, relative to the folder that was asked for."""
    name: str
    """What is compared."""
    tolerance: float
    """The largest difference allowed; 0 for what must be identical."""
    count: int = 0
    """How many recorded tensors or lists were compared."""
    difference: float = 0.0
    """The largest absolute difference of any element; infinite where shapes or lists differ, and for NaN."""
    worst: str = ""
    """The case with that difference."""

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


class Tally:
    """Collects the quantities of one recording."""

    def __init__(self, recording: str) -> None:
        self.recording = recording
        self._rows: dict[str, Quantity] = {}

    def close(self, name: str, case: str, ours: Tensor, recorded: Tensor, tolerance: float) -> None:
        """Compare two tensors of one shape, element by element, in float64."""
        if ours.shape != recorded.shape:
            self._note(name, case, float("inf"), tolerance)
            return
        difference = (ours.detach().double() - recorded.double()).abs()
        self._note(name, case, float(difference.max()) if difference.numel() else 0.0, tolerance)

    def same(self, name: str, case: str, ours: Any, recorded: Any) -> None:
        """Compare what must be identical: tensors of whole numbers or flags, or lists."""
        if isinstance(ours, Tensor) and isinstance(recorded, Tensor):
            equal = torch.equal(ours.long().cpu(), recorded.long().cpu())
        else:
            equal = ours == recorded
        self._note(name, case, 0.0 if equal else float("inf"), EXACT)

    def rows(self) -> list[Quantity]:
        """The quantities, in the order in which they first came up."""
        return list(self._rows.values())

    def _note(self, name: str, case: str, difference: float, tolerance: float) -> None:
        row = self._rows.setdefault(name, Quantity(self.recording, name, tolerance))
        row.count += 1
        if math.isnan(difference):
            difference = float("inf")
        if difference > row.difference:
            row.difference, row.worst = difference, case


def all_ok(rows: Sequence[Quantity]) -> bool:
    """Whether anything was compared and everything is within its tolerance."""
    return bool(rows) and all(row.ok for row in rows)
