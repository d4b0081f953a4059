"""transformers' Trainer, with what an adaptive model and LLaVA's data need and nothing else."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer

from adallava.data.collate import INDEX
from adallava.hosts.model import AdaptiveVLM
from adallava.training.optimizer import MuonAdamW
from adallava.training.sampler import LengthGroupedSampler


class Plain(nn.Module):
    """Hides that a model is transformers' own, so that Trainer saves and loads its state dict as it is.

    For a transformers model Trainer writes checkpoints under the names of the published format, which differ from the
    module's for LLaVA; resuming then finds no key, warns, and goes on with random weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """The model's, where DeepSpeed looks for its sizes."""
        return self.model.config

    def forward(self, **inputs: Any) -> Any:
        """The model's forward."""
        return self.model(**inputs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """As on the model."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)


class AdaptiveTrainer(Trainer):
    """A Trainer whose random draws belong to samples, and whose batches hold samples of one kind and length.

    A sample's budget and noise follow from the run's seed, the epoch and its place in the data set alone. So a run
    gives the same losses on one device and on several, and after a stop.
    """

    muon_learning_rate: float | None = None
    head_learning_rate: float | None = None
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Called by Trainer once, before training."""
        if self.optimizer is not None or self.muon_learning_rate is None:
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        args = self.args
        self.optimizer = MuonAdamW(
            self.model,
            self.muon_learning_rate,
            args.learning_rate,
            args.adam_beta2,
            args.weight_decay,
            self.head_learning_rate,
        )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The language-modelling loss of a batch, every sample under a budget of its own."""
        inputs = dict(inputs)
        index = inputs.pop(INDEX, None)
        if index is not None and isinstance(self.accelerator.unwrap_model(model), AdaptiveVLM):
            inputs["seeds"] = self._seeds(index)
        if isinstance(num_items_in_batch, Tensor):
            # A batch of nothing but unusable samples has no tokens to learn; its loss is 0 and not 0 / 0.
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _seeds(self, index: Tensor) -> Tensor:
        epoch = int(self.state.epoch or 0)
        # 32 bits, because torch's generator on the CPU takes no more of a seed.
        return torch.tensor([zlib.crc32(f"{self.args.seed}/{epoch}/{i}".encode()) for i in index.tolist()])

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # All processes draw the same order and take their batches from it in turn.
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(dataset.lengths, step, self.args.seed)
