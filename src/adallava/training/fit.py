"""One training stage: transformers' Trainer with this project's defaults, resumable at any moment.

A stage writes checkpoints into ``<output>/checkpoints`` and, when it has ended, what the caller saves into
``<output>``. Starting the same stage again continues from the last checkpoint; Ctrl-C first writes one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from adallava.results import ResultRow, provenance, write_json
from adallava.training.trainer import AdaptiveTrainer, Plain

log = logging.getLogger(__name__)

HISTORY = "training.json"
"""The losses of a stage with their provenance, a result file beside the model."""
Order = Literal["random", "in_order", "by_length"]
_STRATEGIES = {"random": "random", "in_order": "sequential", "by_length": "group_by_length"}


@dataclass(frozen=True)
class Outcome:
    """What a stage made."""

    history: list[dict[str, Any]]
    """What was logged: losses, learning rates, steps."""
    weights: dict[str, Any] | None
    """All weights, on the first process, where they are spread over devices; None where the model has them."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after its checkpoint was written."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one stage.

    ``batch_size`` is that of one device and one pass; a step takes ``accumulate`` of them on each device.
    ``order``: "random", "in_order" takes samples as the data set gives them, "by_length" groups them by its
    ``lengths``. ``muon_learning_rate`` trains the layers' matrices with Muon at that peak rate, and the rest with AdamW
    at ``learning_rate``; then ``head_learning_rate`` is that of the scheduler's head. The head reads a residual stream
    without a norm, whose size makes large steps of small ones: at the rate of the rest its choice is settled before
    anything was compared.
    ``workers``: processes that load data. ``tensorboard``: write its logs into ``<output>/logs``. ``deepspeed``,
    ``fsdp``: settings for several devices, as ``TrainingArguments`` takes them; ``fsdp`` is its ``fsdp_config``.
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
    order: Order = "random"
    muon_learning_rate: float | None = None
    head_learning_rate: float | None = None
    accumulate: int = 1
    workers: int = 0
    tensorboard: bool = False
    deepspeed: dict[str, Any] | None = None
    fsdp: dict[str, Any] | None = None

    def to_arguments(self, output: Path) -> TrainingArguments:
        """The equivalent ``TrainingArguments``."""
        more: dict[str, Any] = {}
        if self.gradient_checkpointing:
            more |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if self.deepspeed is not None:
            more["deepspeed"] = self.deepspeed
        if self.fsdp is not None:
            more |= {"fsdp": True, "fsdp_config": self.fsdp}
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
            gradient_accumulation_steps=self.accumulate,
            bf16=self.bf16,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy=_STRATEGIES[self.order],
            remove_unused_columns=False,
            dataloader_num_workers=self.workers,
            dataloader_persistent_workers=self.workers > 0,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="tensorboard" if self.tensorboard else "none",
            **more,
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
) -> Outcome:
    """Train for ``config.steps`` steps, continuing from the last whole checkpoint in ``output`` if there is one.

    Raises ``Interrupted`` after Ctrl-C, with the checkpoint written.
    """
    output.mkdir(parents=True, exist_ok=True)
    stop = _StopOnInterrupt()
    trainer = AdaptiveTrainer(
        model=Plain(model) if isinstance(model, PreTrainedModel) else model,
        args=config.to_arguments(output),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[stop, *(callbacks or [])],
    )
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries to stdout; callers bring their own progress
    trainer.muon_learning_rate = config.muon_learning_rate
    trainer.head_learning_rate = config.head_learning_rate
    checkpoints = output / "checkpoints"
    last = last_checkpoint(checkpoints)
    if last is not None:
        log.info("continuing from %s", last)
    with _without_cache(model):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if stop.asked:
        raise Interrupted(f"stopped; the state is in {checkpoints}: start again to go on")
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    return Outcome(list(trainer.state.log_history), weights)


def write_history(history: Sequence[dict[str, Any]], about: dict[str, Any], seed: int, output: Path) -> None:
    """Write the losses of a stage as a result file, one row per logged step; ``about`` says what was trained."""
    origin = provenance(device="cuda:0" if torch.cuda.is_available() else "cpu", seed=seed)
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    losses = [{name: entry[name] for name in names if name in entry} for entry in history if "loss" in entry]
    write_json(output / HISTORY, [ResultRow("train", metrics, about, origin) for metrics in losses], overwrite=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None.

    Trainer writes ``trainer_state.json`` last, so that a checkpoint during which the process was killed lacks it.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
