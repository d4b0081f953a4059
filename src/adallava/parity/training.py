"""Recordings of one training step: with the recorded noise, the same plan, loss and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adallava.budget import Budget
from adallava.data.conversation import IGNORE_INDEX
from adallava.errors import CheckpointError
from adallava.hosts.keymaps import ADA_LLAVA, SCHEDULER, normal, to_ours
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.state import RequestState
from adallava.parity.prompts import IMAGE_ID, expand, image_token_count
from adallava.parity.sampling import PARTS, gumbel
from adallava.parity.tally import Quantity, Tally
from adallava.scheduling.sampling import NoiseSource

TOLERANCE = 1e-4


def replay_training(path: Path, name: str) -> list[Quantity]:
    """Replay the step that ``path`` (``train_*.json``) and the ``.safetensors`` beside it hold."""
    meta = json.loads(path.read_text(encoding="utf-8"))
    recorded, tally = load_file(path.with_suffix(".safetensors")), Tally(name)
    vlm = AdaptiveVLM.from_pretrained(path.parent / meta["checkpoint"], dtype=torch.float32, device="cpu").train()
    assert vlm.adaptive_config is not None
    vlm.model.model.vision_tower.requires_grad_(False)  # the released code freezes it
    k = torch.tensor([Budget.parse(f).resolve(vlm.adaptive_config, clamp=True).k for f in meta["latency"]])
    tally.same("k", name, k.tolist(), meta["units_k"])
    state = vlm.request_state(k, noise=_noise(recorded))
    out = vlm(**_batch(vlm.model, meta["samples"], recorded["pixel_values"]), ada_state=state)
    out.loss.backward()
    _compare_forward(tally, name, out, state, recorded)
    _compare_gradients(tally, vlm, recorded, meta.get("grad_norms", {}))
    return tally.rows()


def _parameters(vlm: AdaptiveVLM) -> dict[str, Tensor]:
    """Parameters of the host and the scheduler by the names of the converted checkpoint."""
    assert vlm.scheduler is not None
    host = {normal(name): parameter for name, parameter in vlm.model.named_parameters()}
    return host | {f"{SCHEDULER}{name}": parameter for name, parameter in vlm.scheduler.named_parameters()}


def _compare_gradients(
    tally: Tally, vlm: AdaptiveVLM, recorded: dict[str, Tensor], norms: dict[str, float | None]
) -> None:
    parameters = _parameters(vlm)

    def gradient(official: str) -> Tensor:
        name = to_ours(official, ADA_LLAVA)
        if name not in parameters:
            raise CheckpointError(f"the recording has a gradient of {official!r}, which the model has not ({name}).")
        parameter = parameters[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    for key, wanted in recorded.items():
        if key.startswith("grad."):
            tally.close("gradients", key, gradient(key.removeprefix("grad.")), wanted, TOLERANCE)
    for key, norm in norms.items():
        tally.close("gradient norms", key, gradient(key).norm(), torch.tensor(norm or 0.0), TOLERANCE)


def _compare_forward(tally: Tally, name: str, out: Any, state: RequestState, recorded: dict[str, Tensor]) -> None:
    assert state.latency_index is not None and state.gates is not None and state.logits is not None
    real = recorded["attention_mask_with_latency"].bool()
    tally.same("latency token position", name, state.latency_index, recorded["latency_token_position"])
    tally.same("plan", name, state.gates > 0.5, recorded["plan"] > 0.5)
    tally.close("gates", name, state.gates, recorded["plan"], 1e-6)
    tally.close("scheduler logits", name, state.logits, recorded["scheduler_logits"], TOLERANCE)
    tally.close("loss", name, out.loss, recorded["loss"].view(()), TOLERANCE)
    if "logits" in recorded:
        tally.close("logits", name, out.logits[real], recorded["logits"][real], TOLERANCE)


def _batch(model: Any, samples: list[dict[str, list[int]]], pixels: Tensor) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels`` [B, T], and the images of the rows that have one.

    The released code wants an image for every row, and gave text-only rows a blank one that nothing reads.
    """
    image_id, tokens = model.config.image_token_id, image_token_count(model)
    ids = [torch.tensor(expand(s["input_ids"], image_id, tokens)) for s in samples]
    labels = [torch.tensor(_expand_labels(s["input_ids"], s["labels"], tokens)) for s in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    filler = int(image_id == 0)  # anything but the image placeholder
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=filler),
        "attention_mask": mask,
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "pixel_values": pixels[torch.tensor([IMAGE_ID in s["input_ids"] for s in samples])],
    }


def _expand_labels(ids: list[int], labels: list[int], tokens: int) -> list[int]:
    pairs = zip(ids, labels, strict=True)
    return [new for i, label in pairs for new in ([IGNORE_INDEX] * tokens if i == IMAGE_ID else [label])]


def _noise(recorded: dict[str, Tensor]) -> NoiseSource:
    """The recorded draws; rows that have all their switches drew nothing, and what they get here has no effect."""

    def draw(part: str, pick: int, shape: tuple[int, ...]) -> Tensor:
        rows = []
        for row in range(shape[0]):
            key = f"exp_noise.s{row}.pick{pick}"
            found = recorded.get(key, recorded.get(f"{key}.{PARTS[part]}"))
            rows.append(torch.zeros(shape[1:]) if found is None else gumbel(found).view(shape[1:]))
        return torch.stack(rows)

    return draw
