"""LLaVA's training data as it is published: one JSON file of conversations, beside a folder of images.

An entry is ``{"id", "image": "coco/1.jpg" or a list of them or absent, "conversations": [{"from": "human" | "gpt",
"value": "<image>\\nWhat is this?"}, ...]}``, with one ``<image>`` in the human turns for each image. Images are
opened only when a sample is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adallava.errors import DataError

IMAGE = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """One sample: chat messages with typed parts, as processors take them, and the files of their images in order."""

    id: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[str, ...] = ()

    @property
    def words(self) -> int:
        """Words of all turns; what batches are grouped by, as in the released code."""
        return sum(len(p["text"].split()) for m in self.messages for p in m["content"] if p["type"] == "text")


def read_llava_json(path: str | Path) -> list[Conversation]:
    """Read a ``.json`` list or a ``.jsonl`` file of LLaVA conversations.

    Raises ``DataError`` that names the file and the entry: not JSON, a missing or unknown field, roles that do not
    alternate, an answer that is empty, or a number of ``<image>`` other than that of the images.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the data file {path} cannot be read: {error}") from error
    try:
        lines = path.suffix == ".jsonl"
        entries = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not {path.suffix or 'JSON'} ({error}). Pass LLaVA's .json or a .jsonl.") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} holds {type(entries).__name__} {entries!s:.60}, expected a list of conversations.")
    return [_conversation(entry, f"{path}, entry {number}") for number, entry in enumerate(entries)]


def missing_images(conversations: Iterable[Conversation], folder: Path) -> list[str]:
    """The image files that conversations name and ``folder`` has not; each once, in order."""
    names = dict.fromkeys(name for conversation in conversations for name in conversation.images)
    return [name for name in names if not (folder / name).is_file()]


def _conversation(entry: Any, where: str) -> Conversation:
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise DataError(f'{where}: expected an object with a list "conversations", found {entry!s:.100}.')
    image = entry.get("image")
    images = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in images):
        raise DataError(f'{where}: "image" is {image!r}, expected a file name or a list of them.')
    messages = tuple(_message(turn, f"{where}, turn {number}") for number, turn in enumerate(entry["conversations"]))
    _check_order(messages, where)
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != len(images):
        raise DataError(f"{where}: {places} times {IMAGE} for {len(images)} images. Each image needs one place.")
    return Conversation(str(entry.get("id", "")), messages, tuple(images))


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in _ROLES:
        raise DataError(
            f'{where}: expected {{"from": "human" or "gpt", "value": text}}, found {turn!s:.100}. '
            "Convert other formats first."
        )
    role, value = _ROLES[turn["from"]], turn["value"]
    if role != "user":
        if IMAGE in value:
            raise DataError(f"{where}: {IMAGE} stands in a turn of {turn['from']!r}; only human turns have images.")
        parts: list[dict[str, Any]] = []
    else:
        # As in the released code: wherever the mark stands in its turn, the image goes in front of the text.
        parts = [{"type": "image"}] * value.count(IMAGE)
    text = value.replace(IMAGE, "").strip()
    if role == "assistant" and not text:
        raise DataError(f"{where}: the answer is empty. Leave the sample out.")
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def _check_order(messages: tuple[dict[str, Any], ...], where: str) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(f"{where}: the turns are {', '.join(roles) or 'none'}; expected human and gpt in turn.")
