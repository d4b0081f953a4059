"""``Scheduler``: decides, from the latency token's state after the prefix, which switches are on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from adallava.config import AdaptiveConfig
from adallava.plan import ExecutionPlan
from adallava.scheduling.latency import LatencyEncoder
from adallava.scheduling.sampling import NoiseSource, greedy_gates, random_gates, sample_gates, static_gates

Mode = Literal["learned", "random", "static"]
MODES: tuple[Mode, ...] = ("learned", "random", "static")
_INIT_STD = 0.02


class Scheduler(nn.Module):
    """The latency encoder and the head that scores switches, the only weights this method adds to a model.

    Weights: ``latency_encoder.net.{0,1,3}`` and ``head`` (Linear, hidden_size -> config.num_logits).
    """

    def __init__(self, config: AdaptiveConfig) -> None:
        """Create the layers; the head starts at N(0, 0.02) with zero bias, as in the released code."""
        super().__init__()
        self.config = config
        self.latency_encoder = LatencyEncoder(config.hidden_size, config.latency_dim, config.max_k)
        self.head = nn.Linear(config.hidden_size, config.num_logits)
        self.reset_head()

    def reset_head(self) -> None:
        """Draw the head's weights anew."""
        nn.init.normal_(self.head.weight, std=_INIT_STD)
        nn.init.zeros_(self.head.bias)

    def encode(self, k: Tensor) -> Tensor:
        """Return the latency token of k, int64 [B]: [B, D] in the dtype of the weights."""
        return self.latency_encoder(k)

    def logits(self, state: Tensor) -> Tensor:
        """Score the switches: state [B, D], the latency token's residual stream after the prefix (no norm).

        Returns float32 [B, config.num_logits], computed in float32 even under autocast, so that a plan does not hang
        on the rounding of half precision.
        """
        with torch.autocast(state.device.type, enabled=False):
            return functional.linear(state.float(), self.head.weight.float(), self.head.bias.float())

    def gates(
        self,
        state: Tensor,
        k: Tensor,
        *,
        mode: Mode = "learned",
        training: bool | None = None,
        noise: NoiseSource | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decide the gates [B, L, 2, G] of each row for state [B, D] and k int64 [B].

        mode: "learned"; "random", uniform; "static", fixed by k alone.
        training: float32 gates, for "learned" sampled with straight-through gradients; otherwise bool gates, for
            "learned" the most likely ones. ``self.training`` when None.
        noise, generator: as in ``sample_gates``; the generator also serves "random".
        """
        training = self.training if training is None else training
        if mode == "learned":
            logits = self.logits(state)
            if training:
                return sample_gates(logits, k, self.config, noise=noise, generator=generator)
            return greedy_gates(logits, k, self.config)
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(map(repr, MODES))}.")
        fixed = random_gates(k, self.config, generator) if mode == "random" else static_gates(k, self.config)
        return fixed.float() if training else fixed

    @torch.no_grad()
    def plan(
        self, state: Tensor, k: Tensor, *, mode: Mode = "learned", generator: torch.Generator | None = None
    ) -> ExecutionPlan:
        """Decide the plan of an inference: ``gates`` without training, as a checked ``ExecutionPlan`` on the CPU."""
        return ExecutionPlan(self.gates(state, k, mode=mode, training=False, generator=generator), self.config)
