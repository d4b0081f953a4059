"""Recordings of Mipha: image features, logits and greedy answers of the base model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from adallava.hosts.model import AdaptiveVLM
from adallava.parity.prompts import greedy, prompt_inputs
from adallava.parity.tally import Quantity, Tally

FEATURES = 1e-5
LOGITS = 1e-4


@torch.no_grad()
def replay_mipha(folder: Path, name: str) -> list[Quantity]:
    """Replay ``folder``: ``mipha.json``, ``mipha.safetensors`` and the ``checkpoint`` folder."""
    meta = json.loads((folder / "mipha.json").read_text(encoding="utf-8"))
    recorded, tally = load_file(folder / "mipha.safetensors"), Tally(name)
    model = AdaptiveVLM.from_pretrained(folder / "checkpoint", dtype=torch.float32, device="cpu").model
    for case in meta["cases"]:
        key = case["key"]
        pixels, features = (recorded.get(f"{key}.{what}") for what in ("pixel_values", "image_features"))
        if pixels is not None and features is not None:
            ours = torch.stack(list(model.get_image_features(pixels).pooler_output))
            tally.close("image features", key, ours, features, FEATURES)
        inputs = prompt_inputs(model, case["input_ids"], pixels, features)
        logits = model(**inputs).logits[0]
        tally.same("prompt length", key, len(logits), case["prompt_len"])
        ids, steps = greedy(model, len(case["generated_ids"]), **inputs)
        tally.same("generated ids", key, ids, case["generated_ids"])
        for what, ours in (("prompt_logits", logits), ("step_logits", steps)):
            if (wanted := recorded.get(f"{key}.{what}")) is not None:
                tally.close(what.replace("_", " "), key, ours, wanted, LOGITS)
    return tally.rows()
