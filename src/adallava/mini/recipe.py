"""How the mini model is made: the paper's stages, each a few minutes on two cores.

    tower      CLIP-style: scenes against their descriptions, so that the CLS attention comes to mean something
    captions   a LLaVA around that tower, trained to describe
    questions  several questions to a scene; this is the base model

The adaptive stages (``mini-L``, ``mini-H``) start from the base. ``shallow`` is the control that asks whether depth
matters: the same recipe with the prefix depth alone. Every stage can be stopped and continued.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import CLIPModel, LlavaForConditionalGeneration, TrainerCallback

from adallava.data.collate import Collator
from adallava.mini.build import build_processor, clip_config, llava_config
from adallava.mini.dataset import ConversationDataset, DescriptionDataset, SceneData
from adallava.mini.questions import FAMILIES
from adallava.training.fit import TrainConfig, fit

log = logging.getLogger(__name__)

LAYERS = 12
PREFIX_LAYERS = LAYERS // 2
TOWER = TrainConfig(steps=1600, batch_size=128, learning_rate=1e-3, warmup_frac=0.05)
CAPTIONS = TrainConfig(steps=800, batch_size=32, learning_rate=1.5e-3, warmup_frac=0.1)
QUESTIONS = TrainConfig(steps=2600, batch_size=32, learning_rate=1.5e-3)
QUESTIONS_PER_SCENE = 12


@dataclass(frozen=True)
class _ContrastiveCollator:
    base: Collator

    def __call__(self, samples: list[dict]) -> dict:
        return {**self.base(samples), "return_loss": True}


def scaled(config: TrainConfig, scale: float) -> TrainConfig:
    """The same stage with ``scale`` times the steps, for tests and for short looks."""
    return replace(config, steps=max(2, round(config.steps * scale)))


def train_tower(output: Path, scale: float = 1.0, callbacks: list[TrainerCallback] | None = None) -> CLIPModel:
    """Stage 1: contrastive training of the vision tower. Saves a ``CLIPModel`` folder."""
    if (output / "config.json").exists():
        return CLIPModel.from_pretrained(output)
    torch.manual_seed(0)
    tokenizer, config = build_processor().tokenizer, scaled(TOWER, scale)
    model = CLIPModel(clip_config(tokenizer))
    data = DescriptionDataset(tokenizer, SceneData(config.steps * config.batch_size, max_objects=(1, 2, 4, 4)))
    fit(model, data, _ContrastiveCollator(Collator(tokenizer.pad_token_id)), config, output, callbacks)
    model.save_pretrained(output)
    return model


def train_language(
    model: LlavaForConditionalGeneration,
    output: Path,
    config: TrainConfig,
    data: SceneData,
    questions: int,
    families: tuple[str, ...] = tuple(FAMILIES),
    callbacks: list[TrainerCallback] | None = None,
) -> LlavaForConditionalGeneration:
    """Stages 2 and 3: language modelling on conversations about scenes. Saves a LLaVA folder with its processor."""
    if (output / "config.json").exists():
        return LlavaForConditionalGeneration.from_pretrained(output)
    processor = build_processor()
    dataset = ConversationDataset(processor.tokenizer, data, questions, families)
    fit(model, dataset, Collator(processor.tokenizer.pad_token_id, mask_padding=False), config, output, callbacks)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return model


def train_base(
    output: Path, layers: int = LAYERS, scale: float = 1.0, callbacks: list[TrainerCallback] | None = None
) -> Path:
    """All three base stages, each skipped where its result is there already; returns the base model's folder."""
    tower = train_tower(output / "tower", scale, callbacks)
    name = "base" if layers == LAYERS else f"base-{layers}-layers"
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(llava_config(build_processor().tokenizer, layers))
    model.model.vision_tower.load_state_dict(tower.vision_model.state_dict())
    captions, questions = scaled(CAPTIONS, scale), scaled(QUESTIONS, scale)
    model = train_language(
        model,
        output / f"{name}-captions",
        captions,
        SceneData(captions.steps * captions.batch_size, seed=1, max_objects=(2, 4, 6)),
        questions=1,
        families=("description",),
        callbacks=callbacks,
    )
    train_language(
        model,
        output / name,
        questions,
        SceneData(questions.steps * questions.batch_size, seed=2, max_objects=(4, 6, 6, 6)),
        QUESTIONS_PER_SCENE,
        callbacks=callbacks,
    )
    return output / name
