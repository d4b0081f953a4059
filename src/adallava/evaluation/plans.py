"""How plans are spread over inputs: does the scheduler choose by input, or does it always run the same layers?

Plans are counted under a short key, so that a result file can keep every plan that was run and any statistic can be
made from it later, also over several tasks together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adallava.config import AdaptiveConfig
from adallava.plan import ExecutionPlan, expand_tail


@dataclass
class PlanCounts:
    """How often each plan was run; plans of one shape.

    ``shape`` is [N-P] for variant L (a bit per tail layer) and [N-P, 2, G] for H (tail layer, attention and MLP, gate
    column). ``counts`` maps the bits of a plan in that order, packed into hexadecimal digits, to how often it ran.
    """

    shape: tuple[int, ...]
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def for_config(cls, config: AdaptiveConfig) -> PlanCounts:
        """No plans yet of the model of ``config``."""
        return cls((config.tail_layers,) if config.variant == "L" else (config.tail_layers, 2, config.groups))

    def add(self, plan: ExecutionPlan) -> None:
        """Count a plan of one row."""
        self.counts[self.key_of(plan)] += 1

    @staticmethod
    def key_of(plan: ExecutionPlan) -> str:
        """The key under which a plan of one row is counted."""
        config = plan.config
        bits = plan.layer_on[0, config.prefix_layers :] if config.variant == "L" else plan.tail[0]
        return np.packbits(bits.numpy().reshape(-1)).tobytes().hex()

    def __add__(self, other: PlanCounts) -> PlanCounts:
        """Return the counts of both, of plans of the same shape."""
        assert self.shape == other.shape, "plans of two models are not added"
        return PlanCounts(self.shape, self.counts + other.counts)

    def statistics(self) -> dict[str, Any]:
        """Summarise: how many plans differ, how common the commonest is, how often each switch is on.

        "layer_on_frac": mean share of each tail layer that is on, [N-P]. "column_on_frac", variant H only: share of
        the inputs on which each gate column is on, [N-P, 2, G].
        """
        total = self.counts.total()
        on_frac = sum((self._bits(key) * n for key, n in self.counts.items()), np.zeros(self.shape)) / max(total, 1)
        rounded = np.round(on_frac, 4)
        statistics: dict[str, Any] = {
            "distinct": len(self.counts),
            "top_share": max(self.counts.values(), default=0) / max(total, 1),
            "layer_on_frac": np.round(on_frac.reshape(self.shape[0], -1).mean(1), 4).tolist(),
        }
        return statistics if len(self.shape) == 1 else {**statistics, "column_on_frac": rounded.tolist()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a result file."""
        return {"shape": list(self.shape), "counts": dict(self.counts)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanCounts:
        """Inverse of ``to_dict``."""
        return cls(tuple(data["shape"]), Counter(data["counts"]))

    def plan_of(self, key: str, config: AdaptiveConfig) -> ExecutionPlan:
        """The plan, B = 1, that is counted under ``key``; ``ValueError`` for a key of another shape."""
        size = int(np.prod(self.shape))
        if len(bytes.fromhex(key)) != (size + 7) // 8:
            raise ValueError(f"expected {2 * ((size + 7) // 8)} hexadecimal digits")
        bits = torch.from_numpy(self._bits(key)).bool()
        tail = bits if len(self.shape) == 3 else bits[:, None, None].expand(-1, 2, config.groups)
        return ExecutionPlan(expand_tail(tail[None], config), config)

    def _bits(self, key: str) -> NDArray[np.float64]:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(key), np.uint8), count=int(np.prod(self.shape)))
        return bits.reshape(self.shape).astype(np.float64)  # unpackbits gives bytes, which cannot be summed
