"""How the mini model is made: the paper's stages, from minutes to an hour each on two cores.

    tower      CLIP-style: scenes against their descriptions, so that the CLS attention comes to mean something
    captions   a LLaVA around that tower, trained to describe
    questions  several questions to a scene; this is the base model
    adaptive   L or H from the base model, with a random budget for every sample

Three controls answer two questions. ``mini-shallow``, the base recipe at the prefix depth: does depth matter?
``mini-L-random`` and ``mini-H-random``, the adaptive stage under random plans (the paper's Fig. D): does the
scheduler? Two ablations cut the switches in another way (Fig. C), and the ``selection`` recipes repeat the adaptive
stage under token selection (Table B, lower half).
Every stage writes into a folder of its own, is skipped where its result is there already, and continues where it was
stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel, LlavaForConditionalGeneration, TrainerCallback

from adallava.data.collate import Collator
from adallava.errors import UnknownNameError, did_you_mean
from adallava.hosts.load import CONFIG_FILE
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.build import build_processor, clip_config, llava_config
from adallava.mini.dataset import ConversationDataset, DescriptionDataset, SceneData
from adallava.mini.questions import FAMILIES, KINDS
from adallava.scheduling.scheduler import Mode
from adallava.training.fit import TrainConfig, fit, write_history

LAYERS = 12
PREFIX_LAYERS = LAYERS // 2
# With random batches colours and places alone tell scenes apart, and the tower never learns a digit (tried). So a
# batch is eight layouts with one scene for each of the fifteen kinds.
TWINS = len(KINDS)
TOWER = TrainConfig(steps=1000, batch_size=8 * TWINS, learning_rate=1e-3, warmup_frac=0.05, order="in_order")
CAPTIONS = TrainConfig(
    steps=600, batch_size=32, learning_rate=1.5e-3, muon_learning_rate=4e-3, warmup_frac=0.05, order="in_order"
)
QUESTIONS = TrainConfig(steps=2400, batch_size=32, learning_rate=1.5e-3, muon_learning_rate=4e-3, order="in_order")
QUESTIONS_PER_SCENE = 10
# In the adaptive stage the plan follows the last question, as at inference. With three questions to a scene, so that
# others dilute it less, what the base model had learned of reading was half lost (docs/LOG.md).
ADAPTIVE = TrainConfig(
    steps=1600, batch_size=32, learning_rate=8e-4, muon_learning_rate=2e-3, warmup_frac=0.05, order="in_order"
)
ADAPTIVE_QUESTIONS = 8
# Slow enough that the choice is open while layers are compared, fast enough that it is made before the stage ends.
HEAD_LEARNING_RATES = {"L": 1.5e-4, "H": 4e-5}
HEADS_PER_SWITCH = 1

Callbacks = list[TrainerCallback] | None


@dataclass(frozen=True)
class _ContrastiveCollator:
    base: Collator

    def __call__(self, samples: list[dict]) -> dict:
        return {**self.base(samples), "return_loss": True}


def scaled(config: TrainConfig, scale: float) -> TrainConfig:
    """The same stage with ``scale`` times the steps, for tests and for short looks."""
    return replace(config, steps=max(2, round(config.steps * scale)))


def train_tower(output: Path, scale: float = 1.0, callbacks: Callbacks = None) -> CLIPModel:
    """Stage 1: contrastive training of the vision tower. Saves a ``CLIPModel`` folder."""
    if (output / "config.json").exists():
        return CLIPModel.from_pretrained(output)
    torch.manual_seed(0)
    tokenizer, config = build_processor().tokenizer, scaled(TOWER, scale)
    model = CLIPModel(clip_config(tokenizer))
    scenes = SceneData(config.steps * config.batch_size, max_objects=(1, 1, 2, 3), twins=TWINS)
    data = DescriptionDataset(tokenizer, scenes)
    fit(model, data, _ContrastiveCollator(Collator(tokenizer.pad_token_id)), config, output, callbacks)
    model.save_pretrained(output)
    return model


@torch.no_grad()
def _silence(model: LlavaForConditionalGeneration) -> None:
    """Let every layer start by adding nothing: otherwise deep models of this size learn slower than shallow ones."""
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def train_language(
    model: LlavaForConditionalGeneration,
    output: Path,
    config: TrainConfig,
    data: SceneData,
    questions: int,
    families: tuple[str, ...] = tuple(FAMILIES),
    callbacks: Callbacks = None,
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


def train_base(output: Path, layers: int = LAYERS, scale: float = 1.0, callbacks: Callbacks = None) -> Path:
    """All three base stages, each skipped where its result is there already; returns the base model's folder."""
    tower = train_tower(output / "tower", scale, callbacks)
    name = "mini-base" if layers == LAYERS else "mini-shallow"
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(llava_config(build_processor().tokenizer, layers))
    _silence(model)
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


def train_adaptive(
    base: Path,
    output: Path,
    variant: str,
    mode: Mode = "learned",
    token_selection: str = "none",
    scale: float = 1.0,
    callbacks: Callbacks = None,
    **fields: Any,
) -> Path:
    """The adaptive stage from the base model in ``base``; mode "random" trains under random plans.

    fields: of ``AdaptiveConfig``, where they are not those of the shipped models.
    """
    if (output / CONFIG_FILE).exists():
        return output
    torch.manual_seed(3)
    model, processor = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32), build_processor()
    usual: dict[str, Any] = {"prefix_layers": PREFIX_LAYERS, "token_selection": token_selection}
    if variant == "H":
        usual["heads_per_switch"] = HEADS_PER_SWITCH
    vlm = AdaptiveVLM.adapt(model, processor, variant=variant, **{**usual, **fields})
    vlm.mode = mode
    config = replace(scaled(ADAPTIVE, scale), head_learning_rate=HEAD_LEARNING_RATES[variant])
    data = SceneData(config.steps * config.batch_size, seed=3)
    dataset = ConversationDataset(processor.tokenizer, data, ADAPTIVE_QUESTIONS)
    collator = Collator(processor.tokenizer.pad_token_id, mask_padding=False)
    outcome = fit(vlm, dataset, collator, config, output, callbacks)
    vlm.save_pretrained(output)
    about = {"variant": variant, "mode": mode, "token_selection": token_selection, "steps": config.steps}
    write_history(outcome.history, about, config.seed, output)
    return output


def _base(output: Path, scale: float, callbacks: Callbacks) -> Path:
    return train_base(output, LAYERS, scale, callbacks)


def _shallow(output: Path, scale: float, callbacks: Callbacks) -> Path:
    return train_base(output, PREFIX_LAYERS, scale, callbacks)


def _longer(output: Path, scale: float, callbacks: Callbacks) -> Path:
    """The base model on what L and H were trained on, as long as they were: what they gain from that alone."""
    base, config, name = train_base(output, LAYERS, scale, callbacks), scaled(ADAPTIVE, scale), "mini-base-longer"
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    data = SceneData(config.steps * config.batch_size, seed=3)
    train_language(model, output / name, config, data, ADAPTIVE_QUESTIONS, callbacks=callbacks)
    return output / name


def _adaptive(
    name: str, variant: str, mode: Mode = "learned", token_selection: str = "none", **fields: Any
) -> Callable[..., Path]:
    def train(output: Path, scale: float, callbacks: Callbacks) -> Path:
        base = train_base(output, LAYERS, scale, callbacks)
        return train_adaptive(base, output / name, variant, mode, token_selection, scale, callbacks, **fields)

    return train


def _several(*names: str) -> Callable[..., Path]:
    def train(output: Path, scale: float, callbacks: Callbacks) -> Path:
        for name in names:
            RECIPES[name].train(output, scale, callbacks)
        return output

    return train


@dataclass(frozen=True)
class Recipe:
    """A named training run: what it makes, and how."""

    about: str
    train: Callable[..., Path]


# FastV needs no training; one model is trained under it to see the difference.
_SELECTION = {
    f"mini-{variant}-{name}": (variant, name)
    for variant, name in (("L", "prumerge"), ("L", "prumerge+"), ("H", "prumerge"), ("H", "prumerge+"), ("L", "fastv"))
}
RECIPES = {
    "mini": Recipe("the base model, then L and H: what the package ships", _several("mini-base", "mini-L", "mini-H")),
    "mini-base": Recipe("the base model: tower, captions, questions", _base),
    "mini-L": Recipe("AdaLLaVA-L from the base model", _adaptive("mini-L", "L")),
    "mini-H": Recipe("AdaLLaVA-H from the base model", _adaptive("mini-H", "H")),
    "mini-L-random": Recipe("control: the L stage under random plans", _adaptive("mini-L-random", "L", "random")),
    "mini-H-random": Recipe("control: the H stage under random plans", _adaptive("mini-H-random", "H", "random")),
    "mini-shallow": Recipe("control: the base recipe with only the prefix depth", _shallow),
    "mini-base-longer": Recipe("control: the base model trained on for as long as L and H", _longer),
    "mini-L-9-switches": Recipe(
        "ablation: a prefix of three layers (the paper's Fig. C)", _adaptive("mini-L-9-switches", "L", prefix_layers=3)
    ),
    "mini-H-2-heads": Recipe(
        "ablation: switches of two heads (the paper's Fig. C)", _adaptive("mini-H-2-heads", "H", heads_per_switch=2)
    ),
    "mini-selection": Recipe("all stages under token selection", _several(*_SELECTION)),
    **{
        name: Recipe(f"AdaLLaVA-{variant} under {chosen}", _adaptive(name, variant, "learned", chosen))
        for name, (variant, chosen) in _SELECTION.items()
    },
}


def run(name: str, output: Path, scale: float = 1.0, callbacks: Callbacks = None) -> Path:
    """Run a recipe by name into ``output``, with ``scale`` times its steps; returns the folder of the result."""
    if name not in RECIPES:
        raise UnknownNameError(
            f"there is no recipe {name!r}; known: {', '.join(RECIPES)}.{did_you_mean(name, RECIPES)}"
        )
    return RECIPES[name].train(output, scale, callbacks)


def export(source: Path, target: Path) -> None:
    """Write a trained model as the package ships it: half precision, without its training state."""
    vlm = AdaptiveVLM.from_pretrained(source, dtype=torch.float16, device="cpu")
    vlm.save_pretrained(target)
