"""Recordings of FastV: how image tokens score in the layer before the cut, and which of them are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from adallava.parity.tally import Quantity, Tally
from adallava.selection.fastv import keep_mask, last_query_attention

SCORES = 1e-6


@torch.no_grad()
def replay_fastv(folder: Path, name: str) -> list[Quantity]:
    """Replay the rankings in ``folder``: ``fastv_A`` and, if there, ``fastv_B``, both on the model in ``llama``."""
    tally = Tally(name)
    meta = json.loads((folder / "fastv_A.json").read_text(encoding="utf-8"))
    recorded = load_file(folder / "fastv_A.safetensors")
    inputs = {key.split(".")[0]: value for key, value in recorded.items() if key.endswith(".inputs_embeds")}
    image = slice(meta["sys_length"], meta["sys_length"] + meta["image_token_length"])
    decoder = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32).eval().model
    for part in ("fastv_A", "fastv_B"):
        if not (folder / f"{part}.json").is_file():
            continue
        tensors = load_file(folder / f"{part}.safetensors")
        for case in json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))["cases"]:
            if "rank" in case:
                layer = case.get("K", meta["agg_layer_K"])
                attention = _attention(decoder, inputs[case["key"].split(".")[0]], layer - 1)
                _compare(f"{part} {case['key']}", case, attention, image, tensors, tally)
    return tally.rows()


def _attention(decoder: Any, embeds: Tensor, layer: int) -> Tensor:
    """What the last token pays the others in ``layer``: [1, H, T] for embeddings [1, T, D]."""
    rotary = decoder.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
    hidden = embeds
    for before in decoder.layers[:layer]:
        hidden = before(hidden, attention_mask=None, position_embeddings=rotary)
    attention = decoder.layers[layer].self_attn
    normed = decoder.layers[layer].input_layernorm(hidden)
    shape = (*normed.shape[:2], -1, attention.head_dim)
    query, key = (proj(normed).view(shape).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    return last_query_attention(query[:, :, -1], key, scaling=attention.scaling)


def _compare(
    where: str, case: dict[str, Any], attention: Tensor, image: slice, recorded: dict[str, Tensor], tally: Tally
) -> None:
    key, tokens = case["key"], attention.shape[2]
    if f"{key}.scores_layerKm1" in recorded:
        tally.close("scores", where, attention.mean(1)[0, image], recorded[f"{key}.scores_layerKm1"], SCORES)
    is_image = torch.zeros(1, tokens, dtype=torch.bool)
    is_image[:, image] = True
    keep = keep_mask(attention, is_image, torch.tensor([case["rank"]]))
    kept = [i for i in keep[0].nonzero()[:, 0].tolist() if is_image[0, i]]
    tally.same("kept image tokens", where, kept, case["prefill_keep"])
