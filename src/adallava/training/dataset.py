"""LLaVA conversations as training samples: images opened when a sample is asked for, and losses of data told.

A sample that cannot be used, because its image is damaged or its answer does not fit, is never replaced by another
one. It keeps its place in the batch as a single token without a label, which adds nothing to the loss; it is counted,
logged, and written to a file beside the checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from adallava.data.collate import INDEX
from adallava.data.llava_json import Conversation
from adallava.data.masking import encode_chat, encode_plain
from adallava.errors import AdaLlavaError, DataError
from adallava.hosts.images import load_image

log = logging.getLogger(__name__)

_IMAGE_WORDS = 128  # what an image counts for among words, as in the released code
_NOTHING = -100


class LlavaDataset(Dataset):
    """Samples ``{"input_ids" [T], "labels" [T], "sample_index", "pixel_values"?, ...}`` of LLaVA conversations.

    plain: image and caption only, without a prompt: the data of the projector's stage.
    unusable: JSONL file to which samples that cannot be used are added; None to log them only. Several worker
        processes may write to it, and a sample that comes back in the next epoch is written again.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        folder: Path,
        processor: Any,
        *,
        max_tokens: int | None = 2048,
        plain: bool = False,
        unusable: Path | None = None,
    ) -> None:
        self.conversations, self.folder, self.processor = conversations, folder, processor
        self.max_tokens, self.plain, self.unusable = max_tokens, plain, unusable

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def lengths(self) -> list[int]:
        """About how long each sample is; of one without images negative, so that batches hold one kind or the other."""
        return [c.words + _IMAGE_WORDS * len(c.images) if c.images else -max(1, c.words) for c in self.conversations]

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversation = self.conversations[index]
        try:
            images = [load_image(self.folder / name) for name in conversation.images]
            sample = self._encode(conversation, images)
        except AdaLlavaError as error:
            self._report(index, conversation, error)
            return {"input_ids": [self.processor.tokenizer.pad_token_id], "labels": [_NOTHING], INDEX: index}
        rows = {n: v[0] if n in ("input_ids", "labels") or n.endswith("type_ids") else v for n, v in sample.items()}
        rows.pop("attention_mask", None)
        return {**rows, INDEX: index}

    def _encode(self, conversation: Conversation, images: list[Any]) -> dict[str, Any]:
        if not self.plain:
            return encode_chat(self.processor, conversation.messages, images, self.max_tokens)
        if not images:
            raise DataError("a caption without an image teaches the projector nothing. Leave the sample out.")
        caption = conversation.messages[-1]["content"][-1]["text"]
        return encode_plain(self.processor, images, caption, self.max_tokens)

    def _report(self, index: int, conversation: Conversation, error: Exception) -> None:
        log.warning("sample %d (%s) is left out: %s", index, conversation.id, error)
        if self.unusable is None:
            return
        line = json.dumps({"index": index, "id": conversation.id, "images": conversation.images, "error": str(error)})
        # One write in append mode, so that lines of several workers do not mix.
        handle = os.open(self.unusable, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, f"{line}\n".encode())
        finally:
            os.close(handle)
