"""Reading released checkpoints: understand and check first, then let the tensors stream through or build the model.

Config, key map, shapes and what goes with them are checked against the model that transformers builds from the config,
before any tensor is read. A checkpoint that does not fit exactly is an error, because a model with some random weights
answers, and answers wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from adallava.config import AdaptiveConfig
from adallava.errors import CheckpointError
from adallava.hosts.convert_files import Weights, file_of, read_json
from adallava.hosts.convert_processor import IMAGE_TOKEN, build_processor, load_tokenizer
from adallava.hosts.convert_towers import Tower, named_tower, siglip_tower
from adallava.hosts.formats import IDS, MIPHA_PHI, ORIGIN, Format, import_adaptive, import_config, vision_tower_name
from adallava.hosts.keymaps import SCHEDULER, TOWER, TOWER_ALONE, VOCABULARY, is_computed, normal, to_ours
from adallava.scheduling.scheduler import Scheduler


@dataclass(frozen=True)
class Part:
    """Tensors of one place: its files, and for each wanted name the new one."""

    weights: Weights
    names: dict[str, str]


def stream(parts: tuple[Part, ...]) -> Iterator[tuple[str, Tensor]]:
    """All tensors under their new names, one shard after the other."""
    for part in parts:
        for name, tensor in part.weights.stream(part.names):
            yield part.names[name], tensor


def total_bytes(parts: tuple[Part, ...]) -> int:
    """Size of all tensors as they are in the files."""
    return sum(part.weights.info[name].nbytes for part in parts for name in part.names)


@dataclass(frozen=True)
class Foreign:
    """A released checkpoint, understood and checked, its tensors not yet read."""

    source: str
    format: Format
    config: Any
    """transformers' config."""
    adaptive: AdaptiveConfig | None
    parts: tuple[Part, ...]
    generation: GenerationConfig
    processor: Any
    """None for a checkpoint without tokenizer."""
    notes: tuple[str, ...] = ()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors under our names, the vocabulary at its new size, one shard after the other."""
        rows = self.config.text_config.vocab_size
        for name, tensor in stream(self.parts):
            yield name, resized(tensor, rows) if name in VOCABULARY else tensor

    @property
    def dtype(self) -> torch.dtype:
        """The type of the language model's weights."""
        return next(i.dtype for i in self.parts[0].weights.info.values() if i.dtype.is_floating_point)


def read_foreign(source: str, raw: dict[str, Any], found: Format) -> Foreign:
    """Understand and check the released checkpoint in ``source``, whose config.json is ``raw``.

    Raises ``CheckpointError`` for what is missing, foreign or misshapen, and for a vision tower that cannot be had.
    """
    weights = Weights(source)
    names = {name: to_ours(name, found.names) for name in weights.info if not is_computed(name)}
    known = {name: new for name, new in names.items() if new is not None}
    tower = _tower(source, raw, found, known)
    loaded = load_tokenizer(source, found.decoder)
    tokenizer, added = loaded if loaded is not None else (None, False)
    token_id = _spare_id(found, raw) if tokenizer is None else tokenizer.get_vocab()[IMAGE_TOKEN]
    config = import_config(found, raw, tower, (token_id, added))
    if path := file_of(source, "tokenizer_config.json"):
        getattr(config, ORIGIN)["tokenizer_config"] = read_json(path)
    if tokenizer is not None and len(tokenizer) - added > raw["vocab_size"]:
        raise CheckpointError(
            f"the tokenizer of {source} has {len(tokenizer) - added} tokens, the model {raw['vocab_size']}. "
            "Use the tokenizer that came with the model."
        )
    adaptive = import_adaptive(raw, config.text_config) if found.adaptive else None
    expected = expected_shapes(found.model_class, config, adaptive)
    parts, notes = _parts(weights, known, expected, tower, bool(raw.get("unfreeze_mm_vision_tower")))
    foreign = [name for name, new in names.items() if new is None]
    check_parts(source, parts, expected, raw["vocab_size"], foreign)
    strategy = config.vision_feature_select_strategy
    processor = None if tokenizer is None else build_processor(tokenizer, tower, raw, strategy)
    if processor is None:
        notes.append("no tokenizer files: the result answers no questions until a tokenizer is added")
    return Foreign(
        source, found, config, adaptive, parts, _generation(source, config, raw, tokenizer), processor, tuple(notes)
    )


def _spare_id(found: Format, raw: dict[str, Any]) -> int:
    """An id that no text has, to mark images where there is no tokenizer to add ``<image>`` to.

    The vocabulary then stays as it is, and with it the loss, in which added words would take part: Llama's id 0 is
    ``<unk>``, which its tokenizer never gives because it falls back on bytes; Phi's last rows belong to no token.
    """
    return 0 if found.decoder == "llama" else raw.get("vocab_size", 1) - 1


def _tower(source: str, raw: dict[str, Any], found: Format, names: dict[str, str]) -> Tower:
    if found is not MIPHA_PHI:
        return named_tower(vision_tower_name(raw), source)
    tower = siglip_tower((raw.get("vision_config") or {}).get("vision_tower") or {})
    # The pooling head and the last norm of SigLIP are not used, but are part of the tower: they are kept if there.
    has_head = any(new.startswith(f"{TOWER}head.") for new in names.values())
    return replace(tower, config={**tower.config, "vision_use_head": has_head})


def expected_shapes(model_class: Any, config: Any, adaptive: AdaptiveConfig | None) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of every tensor of a model, which is built without memory for it."""
    with torch.device("meta"):
        shapes = {normal(name): tuple(t.shape) for name, t in model_class(config).state_dict().items()}
        if adaptive is not None:
            shapes |= {SCHEDULER + name: tuple(t.shape) for name, t in Scheduler(adaptive).state_dict().items()}
    return shapes


def _parts(
    weights: Weights, names: dict[str, str], expected: dict[str, tuple[int, ...]], tower: Tower, trained: bool
) -> tuple[tuple[Part, ...], list[str]]:
    """The checkpoint, and, if its own tower is incomplete, the tower that it names."""
    wanted = {name for name in expected if name.startswith(TOWER)}
    have = {new for new in names.values() if new.startswith(TOWER)}
    if wanted <= have:
        return (Part(weights, names),), []
    missing = f"{weights.source} holds {len(wanted & have)} of the {len(wanted)} tensors of its vision tower"
    if trained:
        raise CheckpointError(
            f"{missing}, and unfreeze_mm_vision_tower says that the tower was trained, so that no other will do. "
            "Use a complete checkpoint."
        )
    if tower.where is None:
        raise CheckpointError(f"{missing}, and names no other place for them. Use a complete checkpoint.")
    try:
        apart = Weights(tower.where)
    except CheckpointError as error:
        raise CheckpointError(
            f"{missing}, and the tower that mm_vision_tower names, {tower.where!r}, cannot be read: {error}"
        ) from error
    tower_names = {name: new for name in apart.info if (new := to_ours(name, TOWER_ALONE)) in wanted}
    rest = {name: new for name, new in names.items() if new not in have}
    note = f"the vision tower was read from {tower.where}: {missing}"
    return (Part(weights, rest), Part(apart, {n: t for n, t in tower_names.items() if t is not None})), [note]


def check_parts(
    source: str, parts: tuple[Part, ...], expected: dict[str, tuple[int, ...]], vocabulary: int, foreign: list[str]
) -> None:
    """Raise ``CheckpointError`` unless the parts hold exactly what is expected, with ``vocabulary`` rows of tokens."""
    shapes = {new: part.weights.info[name].shape for part in parts for name, new in part.names.items()}
    rows = {name: (vocabulary, *expected[name][1:]) for name in VOCABULARY if name in expected}
    wanted = expected | rows
    misshapen = [(n, shapes[n], wanted[n]) for n in shapes.keys() & wanted.keys() if shapes[n] != wanted[n]]
    back = {new: name for part in parts for name, new in part.names.items()}
    foreign = [*foreign, *(back[new] for new in shapes.keys() - wanted.keys())]
    check_keys(source, wanted.keys() - shapes.keys(), foreign, misshapen)


def check_keys(source: str, missing: Any, foreign: Any, misshapen: Any) -> None:
    """Raise ``CheckpointError`` with an example of each problem, if there is one."""
    problems = [
        f"{len(keys)} {what}, such as {sorted(map(str, keys))[0]}"
        for keys, what in ((missing, "keys are missing"), (foreign, "keys are foreign"), (misshapen, "shapes differ"))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit its config: {'; '.join(problems)}. Use a complete checkpoint.")


def _generation(source: str, config: Any, raw: dict[str, Any], tokenizer: Any) -> GenerationConfig:
    """The tokens that begin and end answers, and those that are no words: ``<image>`` and what fills the vocabulary."""
    path = file_of(source, "generation_config.json")
    given = read_json(path) if path else {}
    ids = {n: _first(given.get(n), raw.get(n), getattr(tokenizer, n, None)) for n in IDS}
    no_words = set(range(raw["vocab_size"], config.text_config.vocab_size))
    if tokenizer is not None:
        no_words.add(config.image_token_id)
    return GenerationConfig(**ids, suppress_tokens=sorted(no_words) or None)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def resized(tensor: Tensor, rows: int) -> Tensor:
    """Rows of a vocabulary trimmed, or filled with the mean of all: its logit is never the largest."""
    have = tensor.shape[0]
    if rows <= have:
        return tensor[:rows]
    mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - have, *tensor.shape[1:])])


def load_foreign(foreign: Foreign, dtype: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Build the model in memory, which holds each weight once, and return it with the scheduler's weights.

    dtype: a torch dtype, or "auto" for the checkpoint's own. kwargs go to transformers' ``from_pretrained``.
    """
    dtype = foreign.dtype if dtype == "auto" else dtype
    # Copies: a view of the file would change, or crash the process, when somebody writes the file.
    state = {name: tensor.to(dtype, copy=True) for name, tensor in foreign.tensors()}
    learned = {name.removeprefix(SCHEDULER): state.pop(name) for name in [*state] if name.startswith(SCHEDULER)}
    model, info = foreign.format.model_class.from_pretrained(
        None, config=foreign.config, state_dict=state, dtype=dtype, output_loading_info=True, **kwargs
    )
    check_keys(foreign.source, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    model.generation_config = foreign.generation
    return model, learned
