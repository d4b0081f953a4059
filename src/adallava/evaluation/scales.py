"""At which scale the paper is reproduced: which models stand for which line of its tables, and on which tasks.

A model's role is "base", "L", "H", "L-random" (trained under random plans), or variant and token selection,
"H-prumerge+", of one that was trained under it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adallava.errors import ConfigError, did_you_mean
from adallava.evaluation.sweep import label
from adallava.hosts.load import SHIPPED
from adallava.mini.questions import FAMILIES

BASE, L, H = "base", "L", "H"


@dataclass(frozen=True)
class Scale:
    """Models and tasks; raises ``ConfigError`` for values that contradict each other."""

    name: str
    """Also how the folders of its trained models begin: "mini" for mini-L-random."""
    models: Mapping[str, str]
    """Role -> shipped name, folder or hub id; base, L and H at least."""
    tasks: tuple[str, ...]
    """Of Tab. B, and of the figures: families of the mini benchmark, or tasks of lmms-eval."""
    broad_tasks: tuple[str, ...] = ()
    """Of Tab. A; the same tasks where there are none."""
    choosing_tasks: tuple[str, ...] = ()
    """On which the best fixed plan is chosen; none: on the same tasks with other questions, which mini tasks have."""
    designs: Mapping[str, str] = field(default_factory=dict)
    """Of Fig. C: role -> what it says."""
    limit: int | None = None
    """Questions per task and run where nothing else is asked for; None for all."""
    batch_size: int = 8
    """Questions that are answered together."""

    def __post_init__(self) -> None:
        """Check what cannot be."""
        if missing := [role for role in (BASE, L, H) if role not in self.models]:
            raise ConfigError(f"scale {self.name} names no model for {', '.join(missing)}. Name a folder or hub id.")
        if not self.tasks:
            raise ConfigError(f"scale {self.name} has no tasks. Name families such as 'open', or lmms-eval's tasks.")
        if not self.choosing_tasks and set(self.tasks) - set(FAMILIES):
            raise ConfigError(
                f"scale {self.name} has no choosing_tasks: the best fixed plan must be chosen on other questions than "
                "it is tested on. Name tasks that are not among the others."
            )
        if both := set(self.choosing_tasks) & set(self.tasks):
            raise ConfigError(f"scale {self.name} chooses and tests plans on {', '.join(sorted(both))}. Part them.")

    def source(self, role: str, folder: Path | None) -> str | None:
        """Where the model of a role is: in ``folder``, else as named here, else nowhere."""
        if folder is not None and (path := folder / f"{self.name}-{role}").is_dir() and any(path.glob("*.json")):
            return str(path)
        return self.models.get(role)

    def roles(self, folder: Path | None) -> dict[str, str]:
        """The name that a model has in result rows -> its role, of all that are there.

        Raises ``ConfigError`` for two models of one name, whose rows could not be told apart.
        """
        roles = [*self.models, *self.designs, *(f"{variant}-{trained}" for variant in (L, H) for trained in _TRAINED)]
        found = {role: self.source(role, folder) for role in roles}
        named: dict[str, str] = {}
        for role, source in found.items():
            if source is not None and (other := named.setdefault(label(source), role)) != role:
                raise ConfigError(
                    f"the models of {other} and {role} are both called {label(source)!r} in result rows. Rename one of "
                    "the folders."
                )
        return named


_TRAINED = ("random", "prumerge", "prumerge+", "fastv")


_TABLE_B = ("vqav2_val", "scienceqa_img", "textvqa_val", "pope", "mme", "mmbench_en_dev_static")
_TABLE_A = ("gqa", "seedbench", "mmvet", "llava_in_the_wild", "vizwiz_vqa_val")
_CHOOSING = ("gqa", "vizwiz_vqa_val")
_RELEASED = "zhuoyanxu/ada-llava-{}-v1.5-{}"


_PRUMERGE = {"prumerge": "-prumerge", "prumerge+": "-prumerge-plus"}
SCALES = {
    "mini": Scale(
        "mini",
        dict(zip((BASE, L, H), SHIPPED, strict=True)),
        tuple(FAMILIES),
        designs={
            L: "L, 6 switches",
            "L-9-switches": "L, 9 switches",
            H: "H, single heads",
            "H-2-heads": "H, groups of 2 heads",
        },
        limit=300,
        batch_size=64,
    ),
    "7b": Scale(
        "llava-1.5-7b",
        {
            BASE: "llava-hf/llava-1.5-7b-hf",
            **{variant: _RELEASED.format(variant, "7b") for variant in (L, H)},
            **{
                f"{variant}-{selection}": _RELEASED.format(variant, "7b") + ending
                for variant in (L, H)
                for selection, ending in _PRUMERGE.items()
            },
        },
        _TABLE_B,
        _TABLE_A,
        _CHOOSING,
        {
            L: "L, 16 switches",
            "L-24-switches": "L, 24 switches",
            H: "H, groups of 8 heads",
            "H-4-heads": "H, groups of 4 heads",
        },
    ),
}
"""By the name that the command takes."""


def find_scale(text: str) -> Scale:
    """A scale by its name, or from a JSON file with the fields of ``Scale``; ``ConfigError`` says what is wrong."""
    if text in SCALES:
        return SCALES[text]
    path = Path(text)
    if path.suffix != ".json":
        known = ", ".join(SCALES)
        raise ConfigError(f"scale {text!r} is not known.{did_you_mean(text, SCALES)} Known: {known}, or a .json file.")
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the scale {path} cannot be read ({error}). Write a JSON object.") from error
    names = [one.name for one in dataclasses.fields(Scale)]
    if not isinstance(fields, dict) or set(fields) - set(names) or not {"name", "models", "tasks"} <= set(fields):
        raise ConfigError(f"the scale {path} must be a JSON object with name, models and tasks, of {', '.join(names)}.")
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Scale(**{**fields, **lists})
