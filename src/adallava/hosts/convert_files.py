"""Files of checkpoints: find them in a folder or on the hub, read their tensors shard by shard, write shards.

Names, shapes and dtypes of all tensors are known before the data of any is read, so that a checkpoint can be checked
first, and so that at no time more than one shard is held. ``.bin`` files are pickles; they are read with torch's
``weights_only``, which makes tensors and refuses everything else.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from adallava.errors import CheckpointError

CONFIG_FILE = "adaptive_config.json"
WEIGHTS_FILE = "adaptive.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Reader = Callable[[str], Tensor]


def file_of(source: str, name: str) -> str | None:
    """A file of a folder or hub repository, None if it is not there; ``CheckpointError`` where the hub is not."""
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise not_on_hub(source, str(error).splitlines()[0]) from error


def not_on_hub(source: str, reason: str, remark: str = "") -> CheckpointError:
    """The error for a name that is neither a folder nor to be had from the hub."""
    return CheckpointError(
        f"{source!r} is no local folder, and the hub does not give it ({reason}). Check the name or the network."
        f"{remark}"
    )


def read_json(path: str) -> dict[str, Any]:
    """A JSON object; ``CheckpointError`` names the file that holds none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise CheckpointError(f"{path} is not JSON ({error}). Copy or download it again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, expected a JSON object. Use a whole checkpoint.")
    return data


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights:
    """The tensors of a checkpoint by name; data is read only by ``stream``."""

    def __init__(self, source: str, paths: Sequence[str] | None = None) -> None:
        """Read the headers of all shards, or of ``paths``; ``CheckpointError`` for what is missing or damaged."""
        self.source = source
        self.info: dict[str, TensorInfo] = {}
        self.shards: dict[str, list[str]] = {}
        for path in _shards(source) if paths is None else paths:
            with _reading(path) as (info, _):
                self.shards[path] = list(info)
                self.info.update(info)

    def stream(self, wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The wanted tensors, one shard after the other."""
        some = set(wanted)
        for path, names in self.shards.items():
            if here := [name for name in names if name in some]:
                with _reading(path) as (_, read):
                    for name in here:
                        yield name, read(name)


def _shards(source: str) -> list[str]:
    """Paths of the shards, in the order of the index."""
    for single, index in ((SINGLE, INDEX), (_BIN, _BIN_INDEX)):
        if index_path := file_of(source, index):
            return [_shard(source, index, name) for name in _indexed(index_path)]
        if path := file_of(source, single):
            return [path]
    raise CheckpointError(
        f"{source} has no weights: none of {SINGLE}, {INDEX}, {_BIN}, {_BIN_INDEX}. Use a whole checkpoint; a LoRA or "
        "a projector alone must first be merged into its base model."
    )


def _indexed(path: str) -> list[str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of names to files. Copy or download it again.")
    return list(dict.fromkeys(weight_map.values()))


def _shard(source: str, index: str, name: str) -> str:
    if Path(name).name != name:
        raise CheckpointError(f"{index} of {source} names the shard {name!r}, expected a file beside it.")
    path = file_of(source, name)
    if path is None:
        raise CheckpointError(f"{index} of {source} names the shard {name}, which is missing. Copy or download it.")
    return path


@contextlib.contextmanager
def _reading(path: str) -> Iterator[tuple[dict[str, TensorInfo], Reader]]:
    """A shard's contents and a function that reads one of its tensors; ``CheckpointError`` if it is damaged."""
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                yield {name: _header(path, name, file.get_slice(name)) for name in file.keys()}, file.get_tensor  # noqa: SIM118
        else:
            tensors = _load_bin(path)
            yield {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}, tensors.__getitem__
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or truncated ({error}). Copy or download it again.") from error


def _header(path: str, name: str, piece: Any) -> TensorInfo:
    dtype = _DTYPES.get(piece.get_dtype())
    if dtype is None:
        raise CheckpointError(f"{path}: {name} is of type {piece.get_dtype()}; known: {', '.join(_DTYPES)}.")
    return TensorInfo(tuple(piece.get_shape()), dtype)


def _load_bin(path: str) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        # Only files in torch's zip format can be mapped into memory; older ones are read whole, one shard at a time.
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged. It is not unpickled, because that could run foreign code. "
            "Use a checkpoint in safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise CheckpointError(f"{path} is damaged or truncated ({reason}). Copy or download it again.") from error
    if not isinstance(data, dict) or not all(isinstance(t, Tensor) for t in data.values()):
        raise CheckpointError(f"{path} is not a plain dict of tensors. Use a checkpoint that save_pretrained wrote.")
    return data


class ShardWriter:
    """Writes tensors into safetensors files of at most ``max_bytes``, and the index where there is more than one."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; a shard that it would overfill is written first."""
        if self.pending and sum(t.nbytes for t in self.pending.values()) + tensor.nbytes > self.max_bytes:
            self._flush()
        # safetensors refuses tensors that share memory, as tied ones of a .bin file do.
        shared = {t.untyped_storage().data_ptr() for t in self.pending.values()}
        tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in shared else tensor
        self.pending[name] = tensor.contiguous()
        self.total_bytes += tensor.nbytes

    def close(self) -> int:
        """Write what is left, give the files their final names, and return how many there are."""
        if self.pending:
            self._flush()
        count = len(self.shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        if count > 1:
            weight_map = {key: name for name, keys in zip(names, self.shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / INDEX, index)
        return count

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        write_tensors(self._part(len(self.shards)), self.pending)
        self.shards.append(list(self.pending))
        self.pending = {}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that the user's umask decides who may read; safetensors alone lets only the owner."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
