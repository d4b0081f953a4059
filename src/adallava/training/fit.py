"""One training stage: transformers' Trainer with this project's defaults, resumable at any moment.

A stage writes checkpoints into ``<output>/checkpoints`` and, when it has ended, what the caller saves into
``<output>``. Starting the same stage again continues from the last checkpoint; Ctrl-C first writes one.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from adallava.training.optimizer import MuonAdamW

log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after its checkpoint was written."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one stage.

    ``in_order`` takes samples as the data set gives them instead of shuffling it. ``muon_learning_rate`` trains the
    layers' matrices with Muon at that peak rate, and the rest with AdamW at ``learning_rate``; then
    ``head_learning_rate`` is that of the scheduler's head. The head reads a residual stream without a norm, whose size
    makes large steps of small ones: at the rate of the rest its choice is settled before anything was compared.
    """

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_frac: float = 0.03
    weight_decay: float = 0.0
    adam_beta2: float = 0.98
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 200
    log_every: int = 20
    gradient_checkpointing: bool = False
    bf16: bool = False
    in_order: bool = False
    muon_learning_rate: float | None = None
    head_learning_rate: float | None = None

    def to_arguments(self, output: Path) -> TrainingArguments:
        """The equivalent ``TrainingArguments``."""
        checkpointing: dict[str, Any] = {}
        if self.gradient_checkpointing:
            checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        return TrainingArguments(
            output_dir=str(output / "checkpoints"),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(self.steps * self.warmup_frac)),
            weight_decay=self.weight_decay,
            adam_beta2=self.adam_beta2,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
            save_steps=self.save_every,
            save_total_limit=2,
            logging_steps=self.log_every,
            bf16=self.bf16,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential" if self.in_order else "random",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
            **checkpointing,
        )


class _StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into "save a checkpoint and stop after this step"; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        try:
            self.before = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not the main thread: Ctrl-C goes elsewhere
            self.before = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


class _Plain(nn.Module):
    """Hides that a model is transformers' own, so that Trainer saves and loads its state dict as it is.

    For a transformers model Trainer writes checkpoints under the names of the published format, which differ from the
    module's for LLaVA; resuming then finds no key, warns, and goes on with random weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """The model's forward."""
        return self.model(**inputs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """As on the model."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)


class _MuonTrainer(Trainer):
    """A Trainer whose optimizer is ``MuonAdamW``."""

    muon_learning_rate: float | None
    head_learning_rate: float | None
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Called by Trainer once, before training."""
        if self.optimizer is None and self.muon_learning_rate is not None:
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


@contextlib.contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Keep the host from filling a KV cache that nobody reads, for a while; a tower's config knows no cache."""
    config: Any = model.config.get_text_config() if hasattr(model, "config") else None
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def fit(
    model: nn.Module,
    dataset: Any,
    collator: Any,
    config: TrainConfig,
    output: Path,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict[str, Any]]:
    """Train for ``config.steps`` steps, continuing from the last checkpoint in ``output`` if there is one.

    Returns the log history. Raises ``Interrupted`` after Ctrl-C, with the checkpoint written.
    """
    output.mkdir(parents=True, exist_ok=True)
    stop = _StopOnInterrupt()
    trainer = (Trainer if config.muon_learning_rate is None else _MuonTrainer)(
        model=_Plain(model) if isinstance(model, PreTrainedModel) else model,
        args=config.to_arguments(output),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[stop, *(callbacks or [])],
    )
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries to stdout; callers bring their own progress
    if isinstance(trainer, _MuonTrainer):
        trainer.muon_learning_rate = config.muon_learning_rate
        trainer.head_learning_rate = config.head_learning_rate
    checkpoints = output / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is not None:
        log.info("continuing from %s", last)
    with _without_cache(model):
        trainer.train(resume_from_checkpoint=last)
    if stop.asked:
        raise Interrupted(f"stopped; the state is in {checkpoints}: start again to go on")
    return list(trainer.state.log_history)
