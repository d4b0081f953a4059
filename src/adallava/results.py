"""Result files: what was measured, with where it came from.

Every number that the project publishes comes from a file written here. So a row carries the versions, commit, device
and seed that made it, a file appears complete or not at all, and no file is overwritten unless that is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adallava import __version__
from adallava.errors import ResultExistsError


@dataclass(frozen=True)
class ResultRow:
    """One measurement: what it is, what it was made with, its numbers and its provenance."""

    name: str
    """What was measured, such as a task or a benchmark."""
    metrics: dict[str, Any]
    """The numbers, with their units in the names; finite."""
    config: dict[str, Any] = field(default_factory=dict)
    """What it was made with: model, budget, token selection, settings."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it came from; see ``provenance``."""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ResultRow:
        """Inverse of ``to_dict``."""
        known = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(data, dict) or "name" not in data or "metrics" not in data or set(data) - set(known):
            raise ValueError(f"not a result row: {data!r:.200}. Expected an object with {', '.join(known)}.")
        return cls(**data)


def provenance(*, device: object = "cpu", dtype: object = None, seed: int | None = None) -> dict[str, Any]:
    """Describe this run: versions, git commit, machine, threads; and the device, dtype and seed it used.

    device: "cpu", "cuda:0" or a ``torch.device``. dtype: text or a ``torch.dtype``. What cannot be found is None.
    """
    return {
        "adallava": __version__,
        "commit": _git_commit(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": device_name(str(device)),
        "threads": _threads(),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "seed": seed,
    }


@functools.cache
def device_name(device: str) -> str | None:
    """Return what the makers call a device, "cpu" or "cuda:0"; None where that cannot be found."""
    torch = sys.modules.get("torch")
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device)) if torch and torch.cuda.is_available() else None
    try:  # platform.processor() is empty on most Linux systems
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or None


def write_json(path: str | Path, rows: Iterable[ResultRow], *, overwrite: bool = False) -> None:
    """Write the rows as one JSON list, all or nothing; raise ``ResultExistsError`` if the file exists."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise ResultExistsError(f"{path} exists. Result files are kept: choose another name, or pass overwrite=True.")
    text = _dumps([row.to_dict() for row in rows], indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: os.replace is atomic within one file system only.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp keeps files to their owner; results are for sharing
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def append_jsonl(path: str | Path, row: ResultRow) -> None:
    """Add one row as a line to a JSONL file, making the file if need be. Rows before it are never touched."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_dumps(row.to_dict()) + "\n")


def read_rows(path: str | Path) -> list[ResultRow]:
    """Read what ``write_json`` or ``append_jsonl`` wrote; raise ``ValueError`` naming the file and place."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return [ResultRow.from_dict(item) for item in json.loads(text)]
        return [ResultRow.from_dict(json.loads(line)) for line in text.splitlines() if line.strip()]
    except ValueError as error:  # also what json raises
        raise ValueError(f"{path} is not a result file ({error}). Write it with write_json or append_jsonl.") from error


def _dumps(data: object, indent: int | None = None) -> str:
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"a result holds NaN or infinity, which JSON has no word for: {data!r:.300}. Use None."
        ) from error


def _version(package: str) -> str | None:
    # A loaded module knows better than the metadata, which an install from source may lack.
    if package in sys.modules:
        return str(getattr(sys.modules[package], "__version__", None))
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout that this file runs from, with "+" if tracked files were changed."""
    root = Path(__file__).resolve().parents[2]
    # Installed into an environment that lies inside some other repository, git would answer with that one's commit.
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else os.cpu_count()
