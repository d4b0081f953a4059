"""``AdaptiveVLM``: a vision-language model that takes a budget with every request.

It holds an ordinary transformers model (``model``), made adaptive in place, its processor, and the scheduler. As an
``nn.Module`` it is what a Trainer trains; ``generate`` is what everybody else calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from adallava.budget import Budget, ResolvedBudget
from adallava.config import AdaptiveConfig
from adallava.cost import ModelSpec, full_loads, plan_cost, plan_loads, resolve_budget
from adallava.cost.forecast import Forecaster
from adallava.errors import AdaLlavaError, BudgetError, ConfigError, PlanError, PromptError
from adallava.hosts.answer import Answer, Foretold, Stopwatch, Timing
from adallava.hosts.arch import architecture_of, last_device
from adallava.hosts.budgets import Batch, Looks, how_often, measured_of, prompt_lengths
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.cut import TokenCut
from adallava.hosts.decoding import evaluating, most_new_tokens, one_sequence, read_options
from adallava.hosts.graphs import DecodeGraphs, lent
from adallava.hosts.inputs import insert_latency_slot, moved, slot_id
from adallava.hosts.profiles import Profiles
from adallava.hosts.prompts import ImageSource, Message, Prompt, Request, encode, to_prompt
from adallava.hosts.state import RequestState
from adallava.hosts.switch import attach, detach, is_attached
from adallava.hosts.threads import running_on
from adallava.hosts.visual import Selector, as_selector, check_selector, select_images
from adallava.plan import ExecutionPlan
from adallava.scheduling.sampling import row_noise
from adallava.scheduling.scheduler import Mode, Scheduler
from adallava.selection import describe_selector


class AdaptiveVLM(nn.Module):
    """A transformers model, its processor, and (unless it is a plain base model) an adaptive config and scheduler."""

    def __init__(
        self, model: nn.Module, processor: Any, config: AdaptiveConfig | None = None, scheduler: Scheduler | None = None
    ) -> None:
        """Attach ``config`` to ``model`` in place; without a config the model stays as it is and runs at 100 %."""
        super().__init__()
        architecture_of(model)
        if config is None and scheduler is not None:
            raise ConfigError("a scheduler was passed without a config. Pass scheduler.config as config.")
        self.processor, self.adaptive_config = processor, config
        self.mode: Mode = "learned"
        self.profiles = Profiles()
        self.graphs: DecodeGraphs | None = None  # set by ``graphs.use_graphs``
        if config is not None:
            attach(model, config)
            scheduler = scheduler or Scheduler(config)
            reference = next(model.parameters())
            scheduler.to(device=reference.device, dtype=reference.dtype)
        self.model: Any = model
        self.scheduler = scheduler
        self.train(model.training)
        try:
            self.token_selection = config.token_selection if config is not None else "none"
        except AdaLlavaError:
            if config is not None:
                detach(model)
            raise

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> AdaptiveVLM:
        """Load by name ("mini-L", "mini-H", "mini-base"), local folder or hub id; see ``load.load``."""
        from adallava.hosts.load import load

        return load(name, **kwargs)

    @classmethod
    def adapt(cls, model: nn.Module, processor: Any, *, variant: str, **fields: Any) -> AdaptiveVLM:
        """Make a base model adaptive with a fresh scheduler, ready for training.

        fields: further fields of ``AdaptiveConfig``, such as ``prefix_layers`` or ``heads_per_switch``.
        """
        architecture_of(model)
        text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        return cls(model, processor, AdaptiveConfig.from_model_config(text_config, variant=variant, **fields))

    def save_pretrained(
        self, folder: str | Path, *, adapter_only: bool = False, weights: dict[str, Tensor] | None = None
    ) -> None:
        """Write a folder that ``from_pretrained`` reads; ``adapter_only`` leaves out the (named) base model.

        weights: the state dict to write instead of this model's own, whose weights may be spread over devices.
        """
        from adallava.hosts.load import save

        save(self, Path(folder), adapter_only=adapter_only, weights=weights)

    def detach(self) -> nn.Module:
        """Give the base model back as it was; this object cannot be used afterwards."""
        if is_attached(self.model):
            detach(self.model)
        model, self.model, self.scheduler, self.adaptive_config = self.model, None, None, None
        return model

    @property
    def token_selection(self) -> Selector:
        """The selector of visual tokens that requests and training use unless they name another.

        May be set to a selector or its text: "none", "prumerge+", "fastv:layer=3,ratio=0.75"; ``ConfigError`` says why
        one cannot work in this host.
        """
        return self._token_selection

    @token_selection.setter
    def token_selection(self, chosen: str | Selector) -> None:
        self._token_selection = self._selector(chosen)

    def _selector(self, chosen: str | Selector) -> Selector:
        selector = as_selector(chosen)
        check_selector(self.model, selector, self.adaptive_config.prefix_layers if self.adaptive_config else None)
        if selector.name != "none" and not is_attached(self.model):
            attach(self.model, None)  # a base model that drops tokens needs the layers for it, and no more
        return selector

    # -- facts ------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The host's Hugging Face config, which Trainer and others look for here; ours is ``adaptive_config``."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and so the inputs."""
        return self.model.get_input_embeddings().weight.device

    @functools.cached_property  # reading a config takes longer than all else that a budget needs of it
    def spec(self) -> ModelSpec:
        """The model's sizes, for costs, as they are when first asked for."""
        return ModelSpec.from_config(self.model.config)

    def reachable_budgets(self) -> list[Budget]:
        """The smallest budget of each k, ascending; only 100 % for a base model."""
        if self.adaptive_config is None:
            return [Budget.parse(1)]
        return [Budget.of_k(self.adaptive_config, k) for k in range(self.adaptive_config.max_k + 1)]

    def status(self) -> dict[str, Any]:
        """Plain data on what this model is and can do."""
        config, weights = self.adaptive_config, list(self.model.parameters())
        budgets = self.reachable_budgets()
        return {
            "host": type(self.model).__name__,
            "adaptive": config is not None,
            "variant": config.variant if config else None,
            "layers": self.spec.num_layers,
            "prefix_layers": config.prefix_layers if config else self.spec.num_layers,
            "switches": config.max_k if config else 0,
            "minimum_budget": str(budgets[0]),
            "scheduling": self.mode if config else None,
            "parameters": sum(p.numel() for p in weights),
            "adaptive_parameters": sum(p.numel() for p in self.scheduler.parameters()) if self.scheduler else 0,
            "dtype": str(weights[0].dtype).removeprefix("torch."),
            "device": str(self.device),
            "attention": self.model.config._attn_implementation,
            "token_selection": describe_selector(self.token_selection),
        }

    # -- training and raw forwards ----------------------------------------------------------------------------------

    def request_state(self, k: Tensor, **kwargs: Any) -> RequestState:
        """The state of a request with k switches per row, int64 [B]; 0 for a base model. kwargs: ``RequestState``'s."""
        if self.scheduler is None and self.token_selection.name == "none":
            raise ConfigError("this is a base model, which has no switches. Make it adaptive with AdaptiveVLM.adapt.")
        return self._state(self.token_selection, k, **kwargs)

    def _state(self, selector: Selector, k: Tensor, **kwargs: Any) -> RequestState:
        defaults: dict[str, Any] = {"mode": self.mode, "slot_id": self._slot_id()}
        if selector.place == "decoder":
            defaults["cut"] = TokenCut(selector, self.spec.num_layers)
        return RequestState(self.scheduler, k, **{**defaults, **kwargs})

    def forward(
        self,
        *,
        k: Tensor | None = None,
        seeds: Tensor | None = None,
        ada_state: RequestState | None = None,
        **inputs: Any,
    ) -> Any:
        """The host's forward under a budget; sequences come back one token longer, by the latency token.

        Where visual tokens are selected before the decoder, they come back shorter by those that were dropped.

        k: int64 [B], switches on per row. None: in training drawn uniformly from 0 to ``config.max_k`` for each row
            (the paper's random budgets), otherwise everything on. inputs: the host's, with ``labels`` in training.
        seeds: int64 [B], in training one per row: its budget and its Gumbel noise are drawn from that alone, whatever
            rows are beside it. None: from torch's own generator.
        """
        if self.adaptive_config is None and self.token_selection.name == "none":
            return self.model(**inputs)
        if ada_state is None:
            tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            full = self.adaptive_config.max_k if self.adaptive_config is not None else 0
            noise = None
            # Drawn on the CPU, so that a seed draws the same on every device.
            if self.training and seeds is not None:
                generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
                drawn = torch.stack([torch.randint(full + 1, (), generator=generator) for generator in generators])
                noise = row_noise(generators, tokens.device)
            elif self.training:
                drawn = torch.randint(full + 1, (len(tokens),))
            else:
                drawn = torch.full((len(tokens),), full)
            ada_state = self.request_state(drawn if k is None else k, noise=noise)
        seed = int(torch.randint(2**31, ())) if self.training else 0
        inputs, images = select_images(self.model, inputs, self.token_selection, seed)
        if images is not None:
            ada_state.images = images
        return self.model(**inputs, ada_state=ada_state)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """As on the host; the non-reentrant kind, which alone keeps the scheduler's gradient."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def gradient_checkpointing_disable(self) -> None:
        """As on the host."""
        self.model.gradient_checkpointing_disable()

    def _slot_id(self) -> int:
        pad = self.processor.tokenizer.pad_token_id if self.processor is not None else None
        return slot_id(self.model.config, pad)

    # -- answering --------------------------------------------------------------------------------------------------

    def generate(
        self,
        image: ImageSource | Sequence[ImageSource] | None = None,
        question: str | None = None,
        *,
        budget: object = "100%",
        messages: Sequence[Message] | None = None,
        **kwargs: Any,
    ) -> Answer:
        """Answer one question about an image, several images, or none, within a budget.

        budget: "60%", 0.6, ``Budget``: a share of the full model's compute; or FLOPs of the prefill in the paper's
        convention, "2 GFLOPs", which buy less of the model the longer the prompt is; or, once ``calibrate`` has
        measured this device, "80 ms" from this call to the first token, "30 ms/token" for each one after it.
        messages: a conversation instead of a question, as ``[{"role": "user", "content": ...}, ...]``. kwargs:
        ``plan`` (an ``ExecutionPlan`` to obey) and everything transformers' generate() takes for greedy, sampling and
        beam decoding and for streamers.
        Raises ``BudgetError``, ``ImageError``, ``PromptError`` for what cannot be answered.
        """
        return self.generate_batch([Request(question, image, messages, budget)], **kwargs)[0]

    @torch.no_grad()
    def generate_batch(
        self,
        requests: Sequence[Request],
        *,
        plan: ExecutionPlan | None = None,
        mode: Mode | None = None,
        generator: torch.Generator | None = None,
        token_selection: str | Selector | None = None,
        **kwargs: Any,
    ) -> list[Answer]:
        """Answer several requests at once, each at its own budget; a batch gives what single requests give.

        plan: obey this plan, one row per request. mode: "learned", "random" or "static" scheduling (baselines).
        token_selection: which visual tokens to keep, "none", "prumerge", "prumerge+", "fastv", "random:ratio=0.25",
            "uniform:count=16" or a selector; the model's own when None.
        """
        if not requests:
            return []
        kwargs = read_options(kwargs, self.model.generation_config)
        watch = Stopwatch(self.device)
        selector = self.token_selection if token_selection is None else self._selector(token_selection)
        budgets = [self._budget(request.budget) for request in requests]
        clock = self._clock(budgets, selector, kwargs)
        with running_on(self.profiles.threads(self, selector, timed=clock is not None)):
            prompts = [to_prompt(request) for request in requests]
            inputs = moved(encode(self.processor, prompts), self.device, next(self.model.parameters()).dtype)
            prompt_tokens = inputs["attention_mask"].sum(-1).tolist()
            watch.prepared()
            inputs, images = select_images(self.model, inputs, selector)
            latency_tokens = int(self.adaptive_config is not None)
            batch = Batch(
                prompt_lengths(self.model, self.spec.num_layers, inputs, selector, latency_tokens),
                images=sum(len(prompt.images) for prompt in prompts) if images is None else 0,
                elapsed_ms=watch.selected(),
                new_tokens=most_new_tokens(kwargs, max(prompt_tokens)),
            )
            often = how_often(last_device(self.model), mode or self.mode) if plan is None else "once"
            looks = Looks(budgets, self.adaptive_config, self.spec, batch, clock, watch, often=often)
            if self.adaptive_config is not None:
                look = looks if self.profiles.learning(selector) else None
                settings = {"plan": plan, "mode": mode or self.mode, "generator": generator, "images": images}
                state = self._prepare(inputs, looks.resolved, selector, look=look, **settings)
            elif plan is not None or mode is not None:
                raise ConfigError("this is a base model: it follows no plan. Load an adaptive model.")
            elif selector.name != "none":
                state = self._state(selector, torch.zeros(len(requests), dtype=torch.long), images=images)
            else:
                state = None
            options = {**kwargs, "max_new_tokens": batch.new_tokens, "max_length": None}
            options["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), watch])
            if state is not None:
                inputs["ada_state"] = state
                if options.get("use_cache", True):
                    inputs["past_key_values"] = AdaptiveCache(state)
            rows = len(requests) if one_sequence(kwargs) else 0
            with evaluating(self), lent(self.graphs, state, rows, max(map(max, batch.last_lengths)) + 1):
                out = self.model.generate(**inputs, **options)
            sequences = out if isinstance(out, Tensor) else out.sequences
            texts = self._decode(sequences[:, inputs["input_ids"].shape[1] :], len(requests))
            lengths = self._lengths(inputs["attention_mask"], state, len(requests))
            foretold = None
            if one_sequence(kwargs):
                ran = state.plan.k if state is not None and state.plan is not None else [0] * len(requests)
                measured = measured_of(self.adaptive_config, batch, ran, watch.timing)
                foretold = self.profiles.account(selector, measured, batch.elapsed_ms)
            return self._answers(texts, looks.resolved, state, watch.timing, prompt_tokens, lengths, foretold)

    def _budget(self, budget: object) -> Budget:
        """Read a budget; what is wrong with it for any input is told before the images are read."""
        parsed = Budget.parse(budget)
        if parsed.unit == "share":
            resolve_budget(parsed, self.adaptive_config, self.spec, 1)
        return parsed

    def _clock(self, budgets: Sequence[Budget], selector: Selector, options: dict[str, Any]) -> Forecaster | None:
        """What foretells times, where a budget is in milliseconds."""
        timed = next((budget for budget in budgets if budget.timed), None)
        if timed is None:
            return None
        if not one_sequence(options):
            raise BudgetError(
                f"budget {timed} with beams or several answers, whose time is not measured. Leave out num_beams and "
                "num_return_sequences, or write a share such as '60%'."
            )
        return self.profiles.get(self, selector, timed)

    def _prepare(
        self, inputs: dict[str, Any], resolved: Sequence[ResolvedBudget | None], selector: Selector, **kwargs: Any
    ) -> RequestState:
        """Append the latency token's slot to left-padded inputs and make the request's state."""
        new, latency_index = insert_latency_slot(inputs, self._slot_id())
        inputs.update(new)
        batch = len(latency_index)
        k = torch.tensor([r.k for r in resolved if r is not None])
        plan = kwargs.get("plan")
        if plan is not None and len(plan) != batch:
            raise PromptError(f"the plan has {len(plan)} rows for {batch} requests. Pass one row per request.")
        for row, (wanted, allowed) in enumerate(zip(plan.k if plan is not None else [], k.tolist(), strict=False)):
            if wanted > allowed:
                raise PlanError(f"row {row} of the plan runs {wanted} switches, its budget allows {allowed}. Raise it.")
        return self._state(selector, k, latency_index=latency_index, **kwargs)

    def _lengths(self, mask: Tensor, state: RequestState | None, requests: int) -> list[list[int]]:
        """Prompt tokens that each layer processed, for every request; mask: [B, T], zero for padding."""
        if state is None or state.cut is None:
            return [[tokens] * self.spec.num_layers for tokens in mask.sum(-1).tolist()]
        assert state.cut.keep is not None
        each = len(state.cut.keep) // requests
        return state.cut.lengths(mask.repeat_interleave(each, 0))[::each]

    def _decode(self, new_tokens: Tensor, requests: int) -> list[list[str]]:
        texts = [t.strip() for t in self.processor.batch_decode(new_tokens, skip_special_tokens=True)]
        each = len(texts) // requests
        return [texts[i * each : (i + 1) * each] for i in range(requests)]

    def _answers(
        self,
        texts: list[list[str]],
        resolved: Sequence[ResolvedBudget | None],
        state: RequestState | None,
        timing: Timing,
        prompt_tokens: list[int],
        lengths: list[list[int]],
        foretold: Foretold | None,
    ) -> list[Answer]:
        spec, answers = self.spec, []
        for row, (some, budget, tokens) in enumerate(zip(texts, resolved, prompt_tokens, strict=True)):
            plan = None
            if state is not None and state.scheduler is not None:
                assert state.plan is not None
                plan = state.plan.row(row * (len(state.plan) // len(texts)))
            loads = full_loads(spec) if plan is None else plan_loads(spec, plan, 0)
            cost = plan_cost(spec, loads, lengths[row], tokens + (plan is not None))
            answers.append(Answer(some[0], plan, budget, cost, timing, tokens, some, lengths[row], foretold))
        return answers


__all__ = ["AdaptiveVLM", "Answer", "Prompt", "Request"]
