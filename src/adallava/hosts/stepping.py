"""A request in single steps, for whoever decides between them what runs next: its prefill, then one token at a time.

``generate`` keeps a batch together from prompt to last token. Here a prompt is prefilled alone, and its row decodes
with whatever rows are there (see ``joining``). Budgets, plans and costs are those of ``generate``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adallava.budget import Budget, ResolvedBudget
from adallava.cost import Cost, plan_cost, plan_loads
from adallava.cost.calibration import Measurement
from adallava.cost.work import Work, decode_work, prefill_work
from adallava.errors import ConfigError
from adallava.hosts.answer import Stopwatch, device_now
from adallava.hosts.arch import last_device
from adallava.hosts.budgets import Batch, Looks, how_often, measured_of, prompt_lengths
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.inputs import insert_latency_slot, moved
from adallava.hosts.joining import Joined, Row, part
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Prompt, encode
from adallava.hosts.visual import select_images


@dataclass(frozen=True)
class Prepared:
    """A prompt as model inputs, before anything of the decoder has run."""

    inputs: dict[str, Any]
    images: list[Tensor] | None
    """Visual tokens that were selected, if any were."""
    prompt_tokens: int
    batch: Batch
    """One row."""

    def work(self, vlm: AdaptiveVLM, k: int) -> Work:
        """What its prefill has to do with k switches on."""
        return prefill_work(vlm.adaptive_config, self.batch.lengths, [k], self.batch.images)

    def step_work(self, vlm: AdaptiveVLM, k: int, rows: int = 1) -> Work:
        """What the last of its decoding steps has to do, among so many rows like it."""
        return decode_work(vlm.adaptive_config, self.batch.last_lengths * rows, [k] * rows)


@dataclass(frozen=True)
class Started:
    """A request after its prefill."""

    row: Row
    logits: Tensor
    """[V], of the first new token."""
    budget: ResolvedBudget
    cost: Cost


def check_steps(vlm: AdaptiveVLM) -> None:
    """Raise ``ConfigError`` where a model cannot be run step by step."""
    if vlm.adaptive_config is None:
        raise ConfigError("this is a base model, which has no switches. Serve an adaptive model, such as 'mini-L'.")
    if vlm.token_selection.place == "decoder":
        raise ConfigError(
            f"{vlm.token_selection.name} drops tokens inside the decoder, so that requests cannot be joined. Choose a "
            "selection before the decoder, such as 'prumerge+', or none."
        )


@torch.no_grad()
def prepare(vlm: AdaptiveVLM, prompt: Prompt, new_tokens: int) -> Prepared:
    """Encode a prompt, and select its visual tokens where the model does. new_tokens: of the answer, at most."""
    inputs = moved(encode(vlm.processor, [prompt]), vlm.device, next(vlm.model.parameters()).dtype)
    tokens = int(inputs["attention_mask"].sum())
    inputs, images = select_images(vlm.model, inputs, vlm.token_selection)
    lengths = prompt_lengths(vlm.model, vlm.spec.num_layers, inputs, vlm.token_selection, 1)
    batch = Batch(lengths, images=len(prompt.images) if images is None else 0, new_tokens=new_tokens)
    return Prepared(inputs, images, tokens, batch)


@torch.no_grad()
def start(vlm: AdaptiveVLM, prepared: Prepared, budget: Budget, elapsed_ms: float = 0.0) -> Started:
    """Prefill a prompt within a budget. elapsed_ms: since the request came. Raises ``BudgetError``."""
    watch = Stopwatch(vlm.device, elapsed_ms)
    clock = vlm.profiles.get(vlm, vlm.token_selection, budget) if budget.timed else None
    batch = replace(prepared.batch, elapsed_ms=elapsed_ms)
    often = how_often(last_device(vlm.model), vlm.mode)
    looks = Looks([budget], vlm.adaptive_config, vlm.spec, batch, clock, watch, often=often)
    (resolved,) = looks.resolved
    assert resolved is not None, "the model is adaptive, as checked before any step"
    inputs, index = insert_latency_slot(prepared.inputs, vlm._slot_id())
    state = vlm.request_state(torch.tensor([resolved.k]), latency_index=index, images=prepared.images, look=looks)
    cache = AdaptiveCache(state)
    watch.prepared()
    out = vlm.model(**inputs, ada_state=state, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = out.logits[0, -1]
    watch.token()
    assert state.plan is not None, "it was decided in the prefill"
    if (observer := vlm.profiles.in_use(vlm.token_selection)) is not None:
        observer.observe(measured_of(vlm.adaptive_config, batch, state.plan.k, watch.timing))
    (row,) = part(Joined(cache, inputs["attention_mask"]))
    tokens = prepared.batch.lengths[0]
    cost = plan_cost(vlm.spec, plan_loads(vlm.spec, state.plan, 0), tokens, prepared.prompt_tokens + 1)
    (resolved,) = looks.resolved
    assert resolved is not None
    return Started(row, logits, resolved, cost)


@torch.no_grad()
def step(vlm: AdaptiveVLM, joined: Joined, tokens: list[int]) -> tuple[Tensor, Joined]:
    """Feed one token to each row: logits [B, V] of the next ones, and the batch with these in its cache."""
    before = joined.mask.sum(1, keepdim=True)
    mask = torch.cat((joined.mask, torch.ones_like(before)), 1)
    inputs: dict[str, Any] = {"input_ids": torch.tensor(tokens, device=mask.device)[:, None], "attention_mask": mask}
    if joined.cache.state.rope_deltas is None:
        # PaliGemma counts from one.
        inputs["position_ids"] = before + int(vlm.model.config.model_type == "paligemma")
    began = device_now(vlm.device)
    out = vlm.model(**inputs, past_key_values=joined.cache, use_cache=True, logits_to_keep=1)
    if (observer := vlm.profiles.in_use(vlm.token_selection)) is not None:
        plan = joined.cache.state.plan
        assert plan is not None, "it was decided in the prefills"
        contexts = [[int(tokens)] * vlm.spec.num_layers for tokens in before[:, 0].tolist()]
        work = decode_work(vlm.adaptive_config, contexts, plan.k)
        observer.observe_step(Measurement(work, 1e3 * (device_now(vlm.device) - began)))
    return out.logits[:, -1], replace(joined, mask=mask)


def counts_positions(vlm: AdaptiveVLM) -> bool:
    """Whether the host counts positions apart from tokens, as Qwen-VL does."""
    return hasattr(vlm.model.model, "get_rope_index")
