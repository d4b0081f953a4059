"""Training samples drawn on the fly: sample ``i`` is a pure function of (split, seed, i), so resuming repeats none."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from adallava.data.conversation import ConversationEncoder
from adallava.mini.build import IMAGE_TOKENS
from adallava.mini.questions import DESCRIBE, FAMILIES, ask
from adallava.mini.scenes import Scene, Split, render, sample_scene


def to_pixels(picture: np.ndarray) -> torch.Tensor:
    """[72, 72, 3] bytes -> float [1, 3, 72, 72] in [-1, 1], exactly what the mini image processor makes of a scene."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float().div_(127.5).sub_(1.0)


@dataclass(frozen=True)
class SceneData:
    """Which scenes a data set draws: ``size`` of them.

    ``max_objects`` is a curriculum: the first of ``len(max_objects)`` equal parts of the set shows at most
    ``max_objects[0]`` things in a scene, and so on. ``twins`` as in ``sample_scene``.
    """

    size: int
    seed: int = 0
    split: Split = "train"
    max_objects: tuple[int, ...] = (6,)
    twins: int = 1

    def scene(self, index: int) -> Scene:
        """Scene ``index`` of the set."""
        part = index * len(self.max_objects) // self.size
        return sample_scene(self.split, self.seed, index, self.max_objects[part], self.twins)


class DescriptionDataset(Dataset):
    """Scenes and their descriptions as ``{"input_ids", "pixel_values"}``, for the contrastive stage."""

    def __init__(self, tokenizer: Any, data: SceneData) -> None:
        self.tokenizer, self.data = tokenizer, data

    def __len__(self) -> int:
        return self.data.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.data.scene(index)
        ids = [*self.tokenizer.encode(scene.describe()), self.tokenizer.eos_token_id]
        return {"input_ids": ids, "pixel_values": to_pixels(render(scene))}


class ConversationDataset(Dataset):
    """Scenes with several questions in one conversation as ``{"input_ids", "labels", "pixel_values"}``."""

    def __init__(
        self, tokenizer: Any, data: SceneData, questions: int, families: tuple[str, ...] = tuple(FAMILIES)
    ) -> None:
        self.encode, self.data = ConversationEncoder(tokenizer, IMAGE_TOKENS), data
        self.questions, self.families = questions, families

    def __len__(self) -> int:
        return self.data.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        data = self.data
        scene = data.scene(index)
        rng = random.Random(f"adallava-mini/ask/{data.split}/{data.seed}/{index}")
        questions = ask(scene, rng, self.questions, self.families)
        turns = [(q.text, q.answer) for q in questions] or [(DESCRIBE, scene.describe())]
        encoded = self.encode(turns)
        return {
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "pixel_values": to_pixels(render(scene)),
        }
