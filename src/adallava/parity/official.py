"""Recordings of official AdaLLaVA checkpoints: plan, logits and greedy answer of every prompt and budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from adallava.budget import Budget
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.inputs import insert_latency_slot, slot_id
from adallava.hosts.model import AdaptiveVLM
from adallava.parity.prompts import greedy, prompt_inputs
from adallava.parity.tally import Quantity, Tally

LOGITS = 1e-4
STATE = 1e-4
FEATURES = 1e-5


@torch.no_grad()
def replay_official(folder: Path, name: str) -> list[Quantity]:
    """Replay ``folder``: ``golden.json``, ``golden.safetensors`` and the official ``checkpoint`` folder."""
    meta = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    recorded = load_file(folder / "golden.safetensors")
    vlm = AdaptiveVLM.from_pretrained(folder / "checkpoint", dtype=torch.float32, device="cpu")
    tally, prompts = Tally(name), {}
    for prompt in meta["inputs"]:
        key = prompt["key"]
        pixels, features = (recorded.get(f"{key}.{what}") for what in ("pixel_values", "image_features"))
        if pixels is not None and f"{key}.image_features" in recorded:
            ours = torch.stack(list(vlm.model.get_image_features(pixels).pooler_output))
            tally.close("image features", key, ours, recorded[f"{key}.image_features"], FEATURES)
        prompts[key] = prompt_inputs(vlm.model, prompt["input_ids"], pixels, features)
    for case in meta["cases"]:
        _Case(vlm, case, recorded, tally).replay(prompts[case["input"]])
    return tally.rows()


class _Case:
    """One prompt at one budget."""

    def __init__(self, vlm: AdaptiveVLM, case: dict[str, Any], recorded: dict[str, Tensor], tally: Tally) -> None:
        assert vlm.adaptive_config is not None and vlm.scheduler is not None
        self.vlm, self.scheduler, self.config = vlm, vlm.scheduler, vlm.adaptive_config
        self.case, self.key, self.recorded, self.tally = case, case["key"], recorded, tally
        self.k = torch.tensor([Budget.parse(case["latency"]).resolve(self.config, clamp=True).k])

    def replay(self, prompt: dict[str, Any]) -> None:
        """Compare everything that the recording holds of this case."""
        self._latency_token()
        for gated in (False, True):
            self._prefill(prompt, gated)
        self._answer(prompt)

    def close(self, name: str, what: str, ours: Tensor, tolerance: float) -> None:
        """Compare with the recorded tensor ``what``, if there is one."""
        if f"{self.key}.{what}" in self.recorded:
            self.tally.close(name, self.key, ours, self.recorded[f"{self.key}.{what}"], tolerance)

    def _latency_token(self) -> None:
        encoder = self.scheduler.latency_encoder
        self.close("latency features", "latency_sincos", encoder.features(self.k)[0], FEATURES)
        self.close("latency token", "latency_embedding", self.scheduler.encode(self.k)[0], FEATURES)

    def _prefill(self, prompt: dict[str, Any], gated: bool) -> None:
        how = "gated" if gated else "skipped"
        state = self.vlm.request_state(self.k, gated=gated)
        out = self.vlm(**prompt, ada_state=state, output_hidden_states=True, use_cache=False)
        assert state.latency_index is not None and state.logits is not None and state.gates is not None
        at = int(state.latency_index[0])
        tokens = out.logits.shape[1]
        self.tally.same("latency token position", self.key, at, self.case["latency_token_position"])
        self.tally.same("prompt length", self.key, tokens, self.case["prompt_len_with_latency"])
        plan = state.gates[0] > 0.5
        if f"{self.key}.plan" in self.recorded:
            self.tally.same(f"plan, {how}", self.key, plan, self.recorded[f"{self.key}.plan"])
        executed = plan.flatten(1).any(1).nonzero()[:, 0].tolist()
        self.tally.same("executed layers", self.key, executed, self.case["executed_layers_prefill"])
        prefix = self.config.prefix_layers
        self.close("latency token's state", "latency_token_hidden", out.hidden_states[prefix][0, at], STATE)
        self.close("scheduler logits", "scheduler_logits", state.logits[0], LOGITS)
        self._layers(out.hidden_states, executed, how)
        logits = out.logits[0]
        for what, ours in (("prompt_logits", logits), ("prefill_last_logits", logits[-1])):
            self.close(f"{what.replace('_', ' ')}, {how}", what, ours, LOGITS)

    def _layers(self, hidden_states: Any, executed: list[int], how: str) -> None:
        """Outputs of the executed layers at the last position; the last layer's is not given out before its norm."""
        wanted = self.recorded.get(f"{self.key}.hidden_last_pos")
        for row, layer in enumerate(executed if wanted is not None else []):
            if layer + 1 < self.config.num_layers:
                assert wanted is not None
                ours = hidden_states[layer + 1][0, -1]
                self.tally.close(f"layer outputs, {how}", f"{self.key} layer {layer}", ours, wanted[row], STATE)

    def _answer(self, prompt: dict[str, Any]) -> None:
        inputs, index = insert_latency_slot(prompt, slot_id(self.vlm.model.config, None))
        state = self.vlm.request_state(self.k, latency_index=index)
        wanted = self.case["generated_ids"]
        cache = AdaptiveCache(state)
        ids, logits = greedy(self.vlm.model, len(wanted), **inputs, ada_state=state, past_key_values=cache)
        self.tally.same("generated ids", self.key, ids, wanted)
        self.close("logits of each decoded token", "step_logits", logits, LOGITS)
