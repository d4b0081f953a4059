"""Recordings of FastV: how image tokens score in the layer before the cut, which are kept, and what is then answered.

The released variants differ after the first token. Dropping once, in the prefill, is what this package does
("hf_cache"). Ranking anew at every step without a cache ("nocache") is replayed as a new request for each step. Ranking
anew with a cache whose tokens are only masked ("mask_cache") has no counterpart here beyond its prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.cut import TokenCut
from adallava.hosts.state import RequestState
from adallava.hosts.switch import attach
from adallava.parity.prompts import greedy
from adallava.parity.tally import Quantity, Tally
from adallava.selection.fastv import FastV, last_query_attention

SCORES = 1e-6
LOGITS = 1e-4


@torch.no_grad()
def replay_fastv(folder: Path, name: str) -> list[Quantity]:
    """Replay ``folder``: ``fastv_A`` and, if there, ``fastv_B``, both on the model in ``llama``."""
    tally = Tally(name)
    meta = json.loads((folder / "fastv_A.json").read_text(encoding="utf-8"))
    recorded = load_file(folder / "fastv_A.safetensors")
    inputs = {key.split(".")[0]: value for key, value in recorded.items() if key.endswith(".inputs_embeds")}
    image = torch.zeros(1, next(iter(inputs.values())).shape[1], dtype=torch.bool)
    image[:, meta["sys_length"] : meta["sys_length"] + meta["image_token_length"]] = True
    model = _host(folder / "llama")
    for part in ("fastv_A", "fastv_B"):
        if not (folder / f"{part}.json").is_file():
            continue
        tensors = load_file(folder / f"{part}.safetensors")
        for case in json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))["cases"]:
            embeds = inputs[case["key"].split(".")[0]]
            replay = _Case(f"{part} {case['key']}", case, tensors, model, embeds, image, tally)
            replay.run(case.get("K", meta["agg_layer_K"]))
    return tally.rows()


def _host(folder: Path) -> Any:
    """The recorded language model as the decoder of a host; its vision tower is never used."""
    language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=language.config.to_dict())
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    attach(model, None)
    return model.eval()


class _Case:
    """One recorded prompt under one setting."""

    def __init__(self, where: str, case: dict[str, Any], recorded: dict[str, Tensor], model: Any, *inputs: Any) -> None:
        self.where, self.case, self.model = where, case, model
        self.embeds, self.image, self.tally = inputs
        prefix = f"{case['key']}."
        self.recorded = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}

    def run(self, layer: int) -> None:
        """Compare everything that is recorded."""
        if "rank" not in self.case:
            self._compare_answer(greedy(self.model, self._steps, inputs_embeds=self.embeds, attention_mask=self._mask))
            return
        self.selector = FastV(layer, rank=self.case["rank"])
        self._compare_scores(layer - 1)
        state = self._state(self.embeds)
        logits = self.model(inputs_embeds=self.embeds, ada_state=state, use_cache=False).logits[0]
        self._compare_kept(state, self.case["prefill_keep"])
        keep = state.cut.keep[0] if state.cut is not None and state.cut.keep is not None else self.image[0]
        if "kept_prompt_logits" in self.recorded:
            self._close("prompt logits", logits[keep], self.recorded["kept_prompt_logits"])
        if "prompt_logits" in self.recorded:
            self._close("prompt logits", logits[keep], self.recorded["prompt_logits"][keep])
        if self.case["key"].endswith("nocache"):
            self._compare_answer(self._rank_every_step())
        elif self.case["key"].endswith("hf_cache"):
            state = self._state(self.embeds)
            request = {"ada_state": state, "past_key_values": AdaptiveCache(state), "attention_mask": self._mask}
            self._compare_answer(greedy(self.model, self._steps, inputs_embeds=self.embeds, **request))

    @property
    def _steps(self) -> int:
        return len(self.recorded["step_logits"])

    @property
    def _mask(self) -> Tensor:
        return torch.ones(self.embeds.shape[:2], dtype=torch.long)

    def _state(self, embeds: Tensor) -> RequestState:
        answered = embeds.shape[1] - self.image.shape[1]
        image = torch.nn.functional.pad(self.image, (0, answered))
        cut = TokenCut(self.selector, self.model.config.text_config.num_hidden_layers, image)
        return RequestState(None, torch.zeros(1, dtype=torch.long), cut=cut)

    def _rank_every_step(self) -> tuple[list[int], Tensor]:
        embeds, ids, steps = self.embeds, [], []
        for step in range(self._steps):
            state = self._state(embeds)
            steps.append(self.model(inputs_embeds=embeds, ada_state=state, use_cache=False).logits[0, -1])
            self._compare_kept(state, self.recorded["keep"][step].tolist())
            ids.append(int(steps[-1].argmax()))
            embeds = torch.cat((embeds, self.model.get_input_embeddings()(torch.tensor([ids[-1:]]))), 1)
        return ids, torch.stack(steps)

    def _compare_answer(self, answer: tuple[list[int], Tensor]) -> None:
        ids, steps = answer
        if (wanted := self.case.get("generated_ids")) is not None:
            self.tally.same("generated ids", self.where, ids, wanted)
        self._close("step logits", steps, self.recorded["step_logits"])

    def _compare_kept(self, state: RequestState, wanted: list[int]) -> None:
        assert state.cut is not None and state.cut.keep is not None
        kept = state.cut.keep[:, : self.image.shape[1]] & self.image
        self.tally.same("kept image tokens", self.where, kept[0].nonzero()[:, 0].tolist(), wanted)

    def _compare_scores(self, layer: int) -> None:
        if (wanted := self.recorded.get("scores_layerKm1")) is not None:
            attention = _attention(self.model.model.language_model, self.embeds, layer)
            self.tally.close("scores", self.where, attention.mean(1)[0, self.image[0]], wanted, SCORES)

    def _close(self, name: str, ours: Tensor, wanted: Tensor) -> None:
        self.tally.close(name, self.where, ours, wanted, LOGITS)


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
