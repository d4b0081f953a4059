"""Finds recordings in a folder and replays each by its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from adallava.errors import CheckpointError
from adallava.parity.fastv import replay_fastv
from adallava.parity.mipha import replay_mipha
from adallava.parity.official import replay_official
from adallava.parity.prumerge import replay_prumerge
from adallava.parity.sampling import replay_sampling
from adallava.parity.tally import Quantity
from adallava.parity.training import replay_training

Replay = Callable[[Path, str], list[Quantity]]

KINDS: dict[str, tuple[Replay, bool]] = {
    "golden.json": (replay_official, True),
    "sampling.json": (replay_sampling, True),
    "train_*.json": (replay_training, False),
    "prumerge.json": (replay_prumerge, True),
    "fastv_A.safetensors": (replay_fastv, True),
    "mipha.json": (replay_mipha, True),
}
"""The file that marks a recording -> its replay, and whether that takes the file's folder or the file itself."""


def find_recordings(root: Path) -> list[tuple[Path, str, Replay]]:
    """The recordings in ``root`` and below: what to replay, its name, and how; ``CheckpointError`` if there is none."""
    if not root.is_dir():
        raise CheckpointError(f"{str(root)!r} is no folder. Pass a folder of recordings.")
    found = sorted(_found(root), key=lambda entry: str(entry[0]))
    if not found:
        raise CheckpointError(f"{str(root)!r} holds no recordings: no file is named {', '.join(KINDS)}.")
    return found


def _found(root: Path) -> Iterator[tuple[Path, str, Replay]]:
    for pattern, (replay, takes_folder) in KINDS.items():
        for path in root.rglob(pattern):
            subject = path.parent if takes_folder else path
            name = subject.relative_to(root) if subject != root else Path(root.name)
            yield subject, str(name.with_suffix("")), replay
