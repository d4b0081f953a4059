"""How tensors are called: pure maps between the names of the released checkpoints and this project's.

"Ours" are the names of transformers' LLaVA (``model.language_model.``, ``model.vision_tower.vision_model.``,
``model.multi_modal_projector.``, ``lm_head.``), and ``scheduler.`` for the adaptive parts. A map is a list of pairs of
prefixes, ours and theirs; the first prefix that fits counts, so the same list reads both ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Pairs = tuple[tuple[str, str], ...]

TOWER = "model.vision_tower.vision_model."
SCHEDULER = "scheduler."
VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
"""Tensors with one row per token of the vocabulary."""

_DECODER: Pairs = (
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
LLAVA: Pairs = ((TOWER, "model.vision_tower.vision_tower.vision_model."), *_DECODER)
ADA_LLAVA: Pairs = (
    ("scheduler.latency_encoder.net.", "scheduler.scheduler_up_proj.net."),
    ("scheduler.head.", "scheduler.mlp_head."),
    *LLAVA,
)
MIPHA: Pairs = ((TOWER, "model.vision_tower.vision_model."), *_DECODER)
TOWER_ALONE: Pairs = ((TOWER, "vision_model."),)
PUBLISHED: Pairs = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    (TOWER, "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
"""The names under which Hugging Face LLaVA checkpoints are published."""

_COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_HISTORY = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?language_model\.model\."), "model.language_model."),
    (re.compile(r"^(vision_tower|multi_modal_projector)\."), r"model.\1."),
    (re.compile(r"^model\.vision_tower\.(?!vision_model\.)"), TOWER),
)


def is_computed(name: str) -> bool:
    """Whether a tensor is one that older libraries saved although it follows from the config; it is dropped."""
    return _COMPUTED.search(name) is not None


def to_ours(name: str, pairs: Pairs) -> str | None:
    """Their name -> ours; None for a name that no pair fits."""
    return _rename(name, ((theirs, ours) for ours, theirs in pairs))


def to_theirs(name: str, pairs: Pairs) -> str | None:
    """Our name -> theirs; None for a name that no pair fits."""
    return _rename(name, pairs)


def normal(name: str) -> str:
    """Any name that versions of transformers gave a LLaVA tensor, in a file or in a module -> our name."""
    for pattern, replacement in _HISTORY:
        name = pattern.sub(replacement, name)
    return name


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    return next((new + name[len(old) :] for old, new in pairs if name.startswith(old)), None)
