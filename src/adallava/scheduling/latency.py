"""``LatencyEncoder``: k, the number of switches a budget buys, as one vector of the model's width.

Its output is the latency token, which joins the prompt and carries the budget through the prefix layers. The features
are those of the released checkpoints (official formula and layout), because their weights only fit these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_MAX_PERIOD = 10_000.0


class LatencyEncoder(nn.Module):
    """k -> sin/cos features -> LayerNorm, Linear, GELU, Linear -> latency token (paper, latency encoder).

    hidden_size: width D of the model. latency_dim: number of features, even. max_k: largest k of the model.
    """

    def __init__(self, hidden_size: int, latency_dim: int, max_k: int) -> None:
        """Create the layers with torch's default initial weights."""
        super().__init__()
        self.latency_dim = latency_dim
        self.max_k = max_k
        first = nn.Linear(latency_dim, hidden_size)
        self.net = nn.Sequential(nn.LayerNorm(latency_dim), first, nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, k: Tensor) -> Tensor:
        """Encode k, int64 [B] from 0 to max_k; return [B, D] in the dtype of the weights."""
        return self.net(self.features(k).to(next(self.net.parameters()).dtype))

    def features(self, k: Tensor) -> Tensor:
        """Return the features of k, int64 [B]: float32 [B, latency_dim], sines then cosines of 2 pi q w_i.

        q = k / (max_k + 1), so that the full budget is not a full turn, which would look like the empty budget;
        w_i = 10000^(-i / (latency_dim / 2)). Always float32: in bf16 neighbouring k would share features.
        """
        half = self.latency_dim // 2
        index = torch.arange(half, dtype=torch.float32, device=k.device)
        frequencies = torch.exp(index * (-math.log(_MAX_PERIOD) / half))
        angles = (2 * math.pi * k.float() / (self.max_k + 1))[:, None] * frequencies  # [B, half]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
