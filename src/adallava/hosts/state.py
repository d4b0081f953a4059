"""``RequestState``: everything one request carries through the model, from budget to plan.

It travels as the keyword argument ``ada_state`` of ``forward`` to every decoder layer, so that nothing is kept on the
model and several requests can run in threads at once. Layer 0 puts the latency token in, the first layer after the
prefix decides the plan, the later ones obey it, and decide what is left of it anew where the clock says so. A request
may also select visual tokens, of a base model too, which has no scheduler: then nothing is put in and nothing decided,
and everything runs.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from adallava.config import AdaptiveConfig
from adallava.errors import PlanError
from adallava.hosts.cut import TokenCut
from adallava.hosts.execution import LayerRun, compile_plan
from adallava.hosts.heads import Parts
from adallava.plan import ExecutionPlan
from adallava.scheduling.sampling import NoiseSource, greedy_gates
from adallava.scheduling.scheduler import Mode, Scheduler

if TYPE_CHECKING:
    from adallava.hosts.graphs import DecodeGraphs


class Look(Protocol):
    """Whoever follows the clock while a prompt runs."""

    @property
    def each_layer(self) -> bool:
        """Whether to be asked before each layer beyond the prefix, not before the first of them only."""

    def __call__(self, layer: int, left: list[int]) -> list[int]:
        """How many switches each row [B] may still run, of ``left`` ones that it was to run from ``layer`` on."""

    def decided(self) -> None:
        """Note that the first of these layers can begin."""


class RequestState:
    """One request: budget k per row, where the latency token is, and, once decided, the gates or the plan.

    scheduler: None for a base model. k: int64 [B].
    latency_index: int64 [B], position of the latency token in the prompt; None until it is put in.
    plan: a plan to obey instead of the scheduler's. mode: who decides, see ``Scheduler.gates``.
    slot_id: token id that holds the latency token's place in input_ids; any but an image placeholder.
    gated: compute everything and multiply by gates (training) rather than skip; None: as the layers' ``training``.
    cut: drops image tokens inside the decoder. images: [M, D] for each row, what its image placeholders stand for where
        tokens were selected before the decoder; None: the host encodes the pictures itself.
    look: asked again and again how much may run; a ``plan`` to obey stays as it is.
    """

    def __init__(
        self,
        scheduler: Scheduler | None,
        k: Tensor,
        *,
        mode: Mode = "learned",
        plan: ExecutionPlan | None = None,
        latency_index: Tensor | None = None,
        gated: bool | None = None,
        slot_id: int = 0,
        noise: NoiseSource | None = None,
        generator: torch.Generator | None = None,
        cut: TokenCut | None = None,
        images: list[Tensor] | None = None,
        look: Look | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.cut, self.images, self.look = cut, images, look
        self.k, self.mode, self.latency_index, self.gated = k, mode, latency_index, gated
        self.slot_id, self.noise, self.generator = slot_id, noise, generator
        self.forced = plan
        self.logits: Tensor | None = None
        self.gates: Tensor | None = None
        self.plan: ExecutionPlan | None = None
        self.runs: tuple[LayerRun, ...] | None = None
        self.rope_deltas: Tensor | None = None  # see ``inputs.rope_positions``
        self.parts: dict[tuple[nn.Module, bool, int], Parts] = {}  # by half of a layer, stage and bundle; made once
        self.graphs: DecodeGraphs | None = None  # lent to the request while it decodes
        self.past_tokens = 0  # tokens in the cache before this forward
        if plan is not None and plan.config != self.config:
            raise PlanError(f"the plan is for {plan.config}, the model is {self.config}. Make the plan for this model.")

    @classmethod
    def decided_by(cls, scheduler: Scheduler, plan: ExecutionPlan) -> RequestState:
        """The state of requests that are decoding already, under ``plan``, one row each."""
        device = next(scheduler.parameters()).device
        state = cls(scheduler, torch.tensor(plan.k), latency_index=torch.zeros(len(plan), dtype=torch.long))
        state.gates, state.plan, state.runs = plan.gates.to(device), plan, compile_plan(plan, device)
        return state

    @property
    def config(self) -> AdaptiveConfig:
        """The scheduler's config."""
        assert self.scheduler is not None, "a base model has no adaptive config"
        return self.scheduler.config

    @property
    def prefix_layers(self) -> int:
        """Layers that always run; more than there are for a base model."""
        return sys.maxsize if self.scheduler is None else self.config.prefix_layers

    @property
    def decided(self) -> bool:
        """Whether the plan has been decided."""
        return self.gates is not None

    def place_latency_token(self, hidden_states: Tensor, past_tokens: int) -> Tensor:
        """Put the latency tokens into the embeddings [B, T, D] that enter layer 0; decode steps pass unchanged."""
        self.past_tokens = past_tokens
        if self.scheduler is None:
            return hidden_states
        if past_tokens > 0:
            if not self.decided:
                raise PlanError(
                    f"the KV cache already holds {past_tokens} tokens, but this request has no plan yet. A plan "
                    "belongs to one request: start each request with an empty cache."
                )
            return hidden_states
        batch, tokens, _ = hidden_states.shape
        assert self.latency_index is not None, "the top model sets the position before its layers run"
        if int(self.latency_index.max()) >= tokens:
            raise PlanError(
                f"the latency token stands at position {int(self.latency_index.max())} of a prompt of {tokens} tokens "
                "in this forward. Prompts cannot be prefilled in chunks: pass the whole prompt at once."
            )
        rows = torch.arange(batch, device=hidden_states.device)
        token = self.scheduler.encode(self.k.to(hidden_states.device)).to(hidden_states.dtype)
        return hidden_states.index_put((rows, self.latency_index.to(hidden_states.device)), token)

    def decide(self, hidden_states: Tensor, gated: bool) -> None:
        """Decide the plan from the residual stream [B, T, D] after the prefix; once, later calls change nothing."""
        if self.decided:
            return
        if self.look is not None:
            self.k = torch.tensor(self.look(self.prefix_layers, self.k.tolist()))
        batch = hidden_states.shape[0]
        assert self.latency_index is not None
        rows = torch.arange(batch, device=hidden_states.device)
        index = self.latency_index.to(hidden_states.device)
        # The residual stream may have lost tokens before the prefix ended.
        state = hidden_states[rows, index if self.cut is None else self.cut.where(index)]
        k = self.k.to(hidden_states.device)
        if self.forced is not None:
            gates = self.forced.gates.to(hidden_states.device)
        else:
            gates = self._scheduled(state, k, gated)
        self.gates = gates
        if not gated:
            self.plan = ExecutionPlan(gates > 0.5, self.config)
            self.runs = compile_plan(self.plan, hidden_states.device)
        if self.look is not None and self.look.each_layer:
            self.look.decided()

    def look_again(self, layer: int) -> None:
        """Decide the layers from ``layer`` on anew where more may run there by now, or less, than was planned."""
        if self.look is None or not self.look.each_layer or self.plan is None or self.forced is not None:
            return
        left = self.plan.left_from(layer)
        k = self.look(layer, left)
        if k == left:
            return
        assert self.logits is not None and self.gates is not None and self.runs is not None, "it is decided"
        wanted = torch.tensor(k, device=self.gates.device)
        rest = greedy_gates(self.logits, wanted, self.config, first_layer=layer)[:, layer:]
        self.gates = torch.cat((self.gates[:, :layer], rest), 1)
        self.plan = ExecutionPlan(self.gates > 0.5, self.config)
        self.k = torch.tensor(self.plan.k)
        self.runs = self.runs[:layer] + compile_plan(self.plan, self.gates.device, layer)

    def _scheduled(self, state: Tensor, k: Tensor, gated: bool) -> Tensor:
        assert self.scheduler is not None
        self.logits = self.scheduler.logits(state)
        training = gated and self.scheduler.training
        gates = self.scheduler.gates(
            state, k, mode=self.mode, training=training, noise=self.noise, generator=self.generator
        )
        if training:
            # Rows with k = 0 and the random mode give the head no gradient; distributed training wants one anyway.
            gates = gates + 0.0 * self.logits.sum()
        return gates

    def run_of(self, layer: int) -> LayerRun:
        """What ``layer`` has to do in a skipped run."""
        assert self.runs is not None, "runs are compiled when a plan is decided for skipping"
        return self.runs[layer]

    def expand(self, batch: int) -> None:
        """Follow generate(), which repeats every sample for beams and for several answers before the prefill."""
        if self.images is not None and len(self.images) < batch:
            each = batch // len(self.images)
            self.images = [image for image in self.images for _ in range(each)]
        given = len(self.k)
        if given == batch:
            return
        if batch % given:
            raise PlanError(f"{given} budgets for {batch} rows. Pass one budget, or one for each row.")
        repeats = batch // given
        self.k = self.k.repeat_interleave(repeats)
        if self.latency_index is not None and len(self.latency_index) == given:
            self.latency_index = self.latency_index.repeat_interleave(repeats)
        if self.forced is not None:
            self.forced = self.forced.repeat_interleave(repeats)
