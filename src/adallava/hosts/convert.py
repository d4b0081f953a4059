"""Conversion of checkpoint folders, from the released layouts and back; tensors stream from shard to shard.

A folder appears under its name only when it is complete: it is written beside it and renamed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from adallava.config import AdaptiveConfig
from adallava.errors import CheckpointError, did_you_mean
from adallava.hosts.convert_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    ShardWriter,
    Weights,
    file_of,
    not_on_hub,
    read_json,
    write_json,
    write_tensors,
)
from adallava.hosts.convert_processor import IMAGE_TOKEN, SENTENCEPIECE
from adallava.hosts.convert_read import (
    Foreign,
    Part,
    check_parts,
    expected_shapes,
    read_foreign,
    resized,
    stream,
    total_bytes,
)
from adallava.hosts.convert_towers import check_fits, known_name
from adallava.hosts.formats import FORMATS, IDS, ORIGIN, OWN, Format, detect, export_config
from adallava.hosts.keymaps import PUBLISHED, SCHEDULER, VOCABULARY, is_computed, normal, to_theirs

SHARD_BYTES = 5 * 10**9
Progress = Callable[[int, int], None]
_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", SENTENCEPIECE)


@dataclass(frozen=True)
class Report:
    """What a conversion did. ``nbytes`` is the size of the written weights; formats are named as in ``FORMATS``."""

    source: str
    destination: str
    source_format: str
    format: str
    tensors: int
    nbytes: int
    shards: int
    token_selection: str | None
    notes: tuple[str, ...] = ()


def convert(
    source: str,
    destination: Path,
    *,
    to: str = OWN,
    vision_tower: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Convert a released checkpoint into this project's format, or back; ``destination`` must be new or empty.

    source: folder or hub id. to: "adallava", or one of "official", "llava", "mipha" for a folder in this project's
    format. vision_tower: name of the tower to write into an exported config. shard_bytes: largest file, a larger tensor
    excepted. progress: called with the bytes done and the bytes to do. Raises ``CheckpointError``.
    """
    if to not in (OWN, *FORMATS):
        known = (OWN, *FORMATS)
        raise CheckpointError(f"there is no format {to!r}; known: {', '.join(known)}.{did_you_mean(to, known)}")
    path = file_of(source, "config.json")
    if path is None and not Path(source).is_dir():
        raise not_on_hub(source, "nothing there, or no network")
    if path is None:
        raise CheckpointError(f"{source} has no config.json. Pass a whole checkpoint, not an adapter alone.")
    raw = read_json(path)
    found = detect(raw, source)
    if found is None and to == OWN:
        raise CheckpointError(f"{source} can be loaded as it is. Name a layout to write: --to {', '.join(FORMATS)}.")
    if found is not None and to != OWN:
        raise CheckpointError(
            f"{source} is {found.title}; layouts are converted by way of this project's. Convert it without --to first."
        )
    if found is not None and vision_tower is not None:
        raise CheckpointError("a vision tower can only be named for an exported config; set mm_vision_tower instead.")
    with new_folder(destination) as folder:
        job = _Job(source, destination, folder, shard_bytes, progress)
        if found is not None:
            return _import(read_foreign(source, raw, found), job)
        return _export(source, FORMATS[to], job, vision_tower)


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``destination`` if all goes well, and else leaves nothing."""
    destination = Path(os.path.abspath(destination))
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists and is not an empty folder. Choose another name or remove it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        if destination.exists():
            destination.rmdir()
        folder.rename(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- from the released layouts --------------------------------------------------------------------------------------


@dataclass
class _Job:
    """One conversion on its way: where from, where to, and how much of it is done."""

    source: str
    destination: Path
    folder: Path
    shard_bytes: int
    progress: Progress | None
    tensors: int = 0

    def counted(self, parts: tuple[Part, ...], tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass tensors on, count them, and tell the progress."""
        done, total = 0, total_bytes(parts)
        for name, tensor in tensors:
            yield name, tensor
            self.tensors += 1
            done = min(total, done + tensor.nbytes)
            if self.progress is not None:
                self.progress(done, total)

    def report(
        self, formats: tuple[str, str], adaptive: AdaptiveConfig | None, shards: int, notes: Sequence[str]
    ) -> Report:
        """The report of a finished conversion."""
        selection = adaptive.token_selection if adaptive else None
        nbytes = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        names = (self.source, str(self.destination), *formats)
        return Report(*names, self.tensors, nbytes, shards, selection, tuple(notes))


def _import(foreign: Foreign, job: _Job) -> Report:
    writer, adaptive = ShardWriter(job.folder, job.shard_bytes), dict[str, Tensor]()
    published = foreign.config.model_type == "llava"
    for name, tensor in job.counted(foreign.parts, foreign.tensors()):
        if name.startswith(SCHEDULER):
            adaptive[name.removeprefix(SCHEDULER)] = tensor.contiguous()
        else:
            writer.add((to_theirs(name, PUBLISHED) or name) if published else name, tensor)
    shards = writer.close()
    foreign.config.architectures = [foreign.format.model_class.__name__]
    foreign.config.dtype = foreign.dtype
    foreign.config.save_pretrained(job.folder)
    foreign.generation.save_pretrained(job.folder)
    if foreign.processor is not None:
        foreign.processor.save_pretrained(job.folder)
        _copy(foreign.source, job.folder, (SENTENCEPIECE,))
    if foreign.adaptive is not None:
        foreign.adaptive.to_json_file(job.folder / CONFIG_FILE)
        write_tensors(job.folder / WEIGHTS_FILE, adaptive)
    return job.report((foreign.format.name, OWN), foreign.adaptive, shards, foreign.notes)


def _copy(source: str, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if path := file_of(source, name):
            shutil.copyfile(path, folder / name)


# -- and back -------------------------------------------------------------------------------------------------------


def _export(source: str, target: Format, job: _Job, vision_tower: str | None) -> Report:
    config, adaptive = AutoConfig.from_pretrained(source), adaptive_config(source)
    origin = getattr(config, ORIGIN, None)
    if vision_tower is not None:
        check_fits(vision_tower, config.vision_config)
    elif origin is None:
        vision_tower = known_name(config.vision_config)
    raw = export_config(target, config, adaptive, vision_tower)
    parts = _own_parts(source, target, config, adaptive)
    writer = ShardWriter(job.folder, job.shard_bytes)
    for name, tensor in job.counted(parts, stream(parts)):
        theirs = to_theirs(name, target.names)
        assert theirs is not None, "the names were checked against the model"
        writer.add(theirs, resized(tensor, raw["vocab_size"]) if name in VOCABULARY else tensor)
    shards = writer.close()
    write_json(job.folder / "config.json", raw)
    _export_generation(source, job.folder)
    notes = _export_tokenizer(source, target, job.folder, origin or {})
    if "mm_vision_tower" in raw and not raw.get("unfreeze_mm_vision_tower"):
        notes.append(
            f"the released code reads the vision tower from {raw['mm_vision_tower']!r}, not from the checkpoint"
        )
    return job.report((OWN, target.name), adaptive, shards, notes)


def adaptive_config(source: str) -> AdaptiveConfig | None:
    """The adaptive config of a folder or hub repository, None for a base model."""
    path = file_of(source, CONFIG_FILE)
    return AdaptiveConfig.from_json_file(path) if path else None


def _own_parts(source: str, target: Format, config: Any, adaptive: AdaptiveConfig | None) -> tuple[Part, ...]:
    weights = Weights(source)
    parts = [Part(weights, {name: normal(name) for name in weights.info if not is_computed(name)})]
    if adaptive is not None:
        path = file_of(source, WEIGHTS_FILE)
        if path is None:
            raise CheckpointError(f"{source} has {CONFIG_FILE} but no {WEIGHTS_FILE}. Save the model again.")
        learned = Weights(source, [path])
        parts.append(Part(learned, {name: SCHEDULER + name for name in learned.info}))
    expected = expected_shapes(target.model_class, config, adaptive)
    check_parts(source, tuple(parts), expected, config.text_config.vocab_size, [])
    return tuple(parts)


def _export_generation(source: str, folder: Path) -> None:
    path = file_of(source, "generation_config.json")
    given = read_json(path) if path else {}
    write_json(folder / "generation_config.json", {key: given[key] for key in IDS if key in given})


def _export_tokenizer(source: str, target: Format, folder: Path, origin: dict[str, Any]) -> list[str]:
    """Copy the tokenizer's files, without what the conversion had added or changed."""
    path = file_of(source, "tokenizer.json")
    if path is None:
        return []
    core, settings_path = read_json(path), file_of(source, "tokenizer_config.json")
    settings = origin.get("tokenizer_config") or (read_json(settings_path) if settings_path else {})
    if origin.get("image_token_added"):
        core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] != IMAGE_TOKEN]
    write_json(folder / "tokenizer.json", core)
    write_json(folder / "tokenizer_config.json", settings)
    _copy(source, folder, _TOKENIZER_FILES)
    if target.decoder == "llama" and not (folder / SENTENCEPIECE).exists():
        return [f"no {SENTENCEPIECE}: the released code reads its tokenizer from it; copy it from the base model"]
    return []
