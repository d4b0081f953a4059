"""Recordings of PruMerge and PruMerge+: which patches stay, and the merged features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModel

from adallava.hosts.tower import tower_patches
from adallava.parity.tally import Quantity, Tally
from adallava.selection import selector
from adallava.selection.common import Patches

TOLERANCE = 1e-5
SELECTORS = {"prumerge": "prune_merge", "prumerge+": "prune_merge_plus"}


@torch.no_grad()
def replay_prumerge(folder: Path, name: str) -> list[Quantity]:
    """Replay ``folder``: ``prumerge.json``, ``prumerge.safetensors`` and, for whole images, the tower in ``clip``."""
    meta = json.loads((folder / "prumerge.json").read_text(encoding="utf-8"))
    recorded, tally = load_file(folder / "prumerge.safetensors"), Tally(name)
    tower = CLIPVisionModel.from_pretrained(folder / "clip").eval() if (folder / "clip").is_dir() else None
    for entry in meta["inputs"]:
        key = entry["key"]
        if f"{key}.patch_features" in recorded:
            _replay(key, _patches(key, recorded, tower, tally), recorded, tally)
    return tally.rows()


def _patches(key: str, recorded: dict[str, Tensor], tower: Any, tally: Tally) -> Patches:
    """The tower's output where the image was recorded, else the recorded output."""
    names = ("patch_features", "key", "query", "cls_attn")
    features, keys, queries, attention = (
        None if (found := recorded.get(f"{key}.{name}")) is None else found[None] for name in names
    )
    assert features is not None
    if tower is None or f"{key}.pixel_values" not in recorded:
        return Patches(features, keys, queries, attention if queries is None else None)
    patches = tower_patches(tower, recorded[f"{key}.pixel_values"])
    for name, ours, wanted in (
        ("patch features", patches.features, features),
        ("keys", patches.key, keys),
        ("queries", patches.query, queries),
    ):
        if ours is not None and wanted is not None:
            tally.close(name, key, ours, wanted, TOLERANCE)
    return patches


def _replay(key: str, patches: Patches, recorded: dict[str, Tensor], tally: Tally) -> None:
    for name, official in SELECTORS.items():
        chosen = selector(name)
        assert chosen.place == "tower"
        selected = chosen.select(patches)
        tally.same(f"{name} indices", key, selected.indices[0], recorded[f"{key}.{official}_index"])
        tally.close(f"{name} tokens", key, selected.features[0], recorded[f"{key}.{official}"], TOLERANCE)
