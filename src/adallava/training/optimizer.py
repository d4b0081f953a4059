"""Muon for the matrices inside the layers, AdamW for everything else, as one optimizer for the Trainer.

Muon orthogonalises the update of a weight matrix. On the mini model it needs fewer steps than AdamW
for the same loss (docs/LOG.md). Embeddings, norms, biases and heads are no such matrices and stay with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW side by side; a learning-rate schedule drives both.

    lr: peak learning rate of the matrices; adam_lr: of the rest; head_lr: of the scheduler's head, adam_lr when None.
    Muon's steps are scaled to the size of AdamW's.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        adam_lr: float,
        beta2: float,
        weight_decay: float = 0.0,
        head_lr: float | None = None,
    ) -> None:
        matrices: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                matrix = weight.dim() == 2 and ".layers." in name
                (matrices if matrix else head if name.startswith("scheduler.head.") else rest).append(weight)
        adam: list[dict[str, Any]] = [{"params": rest, "lr": adam_lr}]
        if head:
            adam.append({"params": head, "lr": adam_lr if head_lr is None else head_lr})
        self.parts = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, beta2), weight_decay=weight_decay),
        )
        super().__init__([*matrices, *rest, *head], {"lr": lr})
        # The very dictionaries of the parts: what a schedule writes into them is what the parts read.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
