"""Do milliseconds follow FLOPs? The adaptive model against the plain one, side by side, at whole and partial budgets.

Prompts are text of 624 tokens, so that what is measured is the decoder: a vision tower costs the same at any budget.
Each measure is a ratio of times (or bytes), beside the share that it should be and what is allowed on top.
"""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, StoppingCriteriaList

from adallava.bench import BenchSettings
from adallava.bench.models import random_llava, random_processor
from adallava.bench.timing import in_rounds, set_up
from adallava.budget import Budget
from adallava.cost import LayerLoad, ModelSpec, full_loads, plan_loads, prefill_flops
from adallava.hosts.answer import Stopwatch, device_now
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.graphs import Capture, capture_cuda, use_graphs
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Request, encode, to_prompt
from adallava.plan import ExecutionPlan, expand_tail
from adallava.results import ResultRow, provenance

PROMPT_TOKENS, NEW_TOKENS, BATCH = 624, 33, 8
HEADS_PER_SWITCH = 4
# What is slow is measured in fewer rounds, but in three at least; what is allowed one percent in more, because the
# median of nine ratios that scatter by four percent cannot tell it.
_FEWER, _LEAST, _MORE = 2, 3, 4

Sample = Mapping[str, float]
"""Milliseconds of one round of one thing, by what was timed."""


@dataclass(frozen=True)
class Measure:
    """One line of the suite."""

    name: str
    ratio: float
    share: float
    """What the ratio should be."""
    allowance: float | None
    """What it may exceed the share by; None where nothing is promised."""
    more: dict[str, Any] = field(default_factory=dict)

    def row(self, benchmark: str, config: Mapping[str, Any], origin: dict[str, Any]) -> ResultRow:
        """As a result row."""
        held = None if self.allowance is None else self.ratio <= self.share + self.allowance
        numbers = {"ratio": self.ratio, "share": self.share, "allowance": self.allowance, "held": held}
        return ResultRow(benchmark, {**numbers, **self.more}, {"measure": self.name, **config}, origin)


def measure(settings: BenchSettings) -> list[ResultRow]:
    """One row per measure: the ratio, its share, the allowance, whether it held, and medians in milliseconds."""
    device, dtype = set_up(settings)
    suite = Suite(random_llava(settings.model, device, dtype), settings)
    measures = [*suite.single(), *suite.batched(), *suite.memory(), *suite.training(), *suite.loading()]
    if device.type == "cuda":
        measures += suite.graphed()  # last, because graphs stay
    config = {"model": settings.model, "prompt_tokens": suite.tokens, "new_tokens": NEW_TOKENS}
    config |= {"seed": settings.seed}
    origin = provenance(device=device, dtype=dtype, seed=settings.seed)
    return [each.row("speed", config, origin) for each in measures]


class Suite:
    """The models that are compared, which share one set of weights, and the measures.

    packed: size of a weight of a layer, over that of any other value.
    """

    def __init__(self, base: LlavaForConditionalGeneration, settings: BenchSettings, packed: float = 1.0) -> None:
        self.base, self.settings, self.packed = base, settings, packed
        self.processor = random_processor(base)
        layers = base.config.text_config.num_hidden_layers
        self.tokens = min(PROMPT_TOKENS, base.config.text_config.max_position_embeddings - NEW_TOKENS - 1)
        prefix = layers // 2
        self.adjacent = min(HEADS_PER_SWITCH, base.config.text_config.num_attention_heads // 2)
        self.vlms = {
            "L": self._adapt(variant="L", prefix_layers=prefix),
            "H": self._adapt(variant="H", prefix_layers=prefix, heads_per_switch=self.adjacent),
        }
        self.spec = self.vlms["L"].spec
        self.generator = torch.Generator().manual_seed(settings.seed)

    def _adapt(self, **fields: Any) -> AdaptiveVLM:
        return AdaptiveVLM.adapt(_twin(self.base), self.processor, **fields).eval()

    def _requests(self, budgets: Sequence[object]) -> list[Request]:
        return [Request(" ".join(["word"] * self.tokens), budget=budget) for budget in budgets]

    # -- one request --------------------------------------------------------------------------------------------------

    def single(self) -> list[Measure]:
        """Prefill and decoding of one request, at whole and partial budgets, and a static model of the same depth."""
        layers = self.spec.num_layers
        shares = {"75%": 3 * layers // 4, "50%": layers // 2}
        things: dict[str, Callable[[], Sample]] = {"plain": partial(self.plain, self.base, 1)}
        for name in ("100%", *shares):
            things[f"L {name}"] = self.asking("L", (name,))
        things["H 100%"] = self.asking("H", ("100%",))
        # The same share of heads and neurons, in groups or scattered as the scheduler may choose them.
        things["H 75%"] = self.asking("H", ("75%",), self._half_heads(self.adjacent))
        things["H 75%, free heads"] = self.asking("H", ("75%",), self._half_heads(1))
        for name, depth in shares.items():
            things[f"static {name}"] = partial(self.plain, _twin(self.base, depth), 1)
        told = self.rounds(things)

        whole: dict[str, Callable[[], Sample]] = {"plain": partial(self.plain, self.base, 1, new_tokens=1)}
        whole |= {f"{v} 100%": self.asking(v, ("100%",), new_tokens=1) for v in ("L", "H")}
        first = in_rounds(whole, _MORE * self.settings.rounds, self.settings.seed)

        loads = {"L 75%": self.loads("L", "75%"), "L 50%": self.loads("L", "50%"), "H 75%": self.loads("H", "75%")}
        flops = {name: self.flops_share([load]) for name, load in loads.items()}
        made = [
            self.ratio(f"{name}, {stage}", rounds, name, "plain", stage, 1.0, 0.01)
            for name in ("L 100%", "H 100%")
            for stage, rounds in (("prefill", first), ("decode", told))
        ]
        made += [
            self.ratio("L 75%, prefill", told, "L 75%", "plain", "prefill", flops["L 75%"], 0.02),
            self.ratio("L 50%, prefill", told, "L 50%", "plain", "prefill", flops["L 50%"], 0.02),
            self.ratio("H 75%, prefill", told, "H 75%", "plain", "prefill", flops["H 75%"], 0.04),
            self.ratio("L 50%, decode", told, "L 50%", "plain", "decode", self.bytes_share([loads["L 50%"]]), 0.03),
            self.ratio("H 75%, decode", told, "H 75%", "plain", "decode", self.bytes_share([loads["H 75%"]]), 0.06),
        ]
        made += [
            self.ratio(f"H 75%, free heads over groups, {stage}", told, "H 75%, free heads", "H 75%", stage, 1.0, 0.10)
            for stage in ("prefill", "decode")
        ]
        # What a user could have instead: a model of that depth, for one budget only. Nothing is promised of it.
        made += [
            self.ratio(f"static model of {depth} layers, {stage}", told, f"static {name}", "plain", stage, share, None)
            for name, depth in shares.items()
            for stage, share in (("prefill", flops[f"L {name}"]), ("decode", self.bytes_share([loads[f"L {name}"]])))
        ]
        return made

    def batched(self) -> list[Measure]:
        """A batch of requests with budgets from half to whole, over the same batch of the plain model."""
        made = []
        for variant in ("L", "H"):
            config = self.vlms[variant].adaptive_config
            assert config is not None, "these are adaptive"
            budgets = [Budget.of_k(config, round(row * config.max_k / (BATCH - 1))) for row in range(BATCH)]
            things: dict[str, Callable[[], Sample]] = {
                "plain": partial(self.plain, self.base, BATCH),
                "mixed": self.asking(variant, budgets),
            }
            told = self.rounds(things, few=True)
            loads = [self.loads(variant, budget) for budget in budgets]
            flops, moved = self.flops_share(loads), self.bytes_share(loads)
            name = f"{variant}, {BATCH} requests at 50 to 100%"
            made += [
                self.ratio(f"{name}, prefill", told, "mixed", "plain", "prefill", flops, 0.03),
                self.ratio(f"{name}, decode", told, "mixed", "plain", "decode", moved, 0.03),
            ]
        return made

    def memory(self) -> list[Measure]:
        """Bytes of the KV cache after a prefill, over those of the plan."""
        made = []
        for variant, budget in (("L", "50%"), ("H", "75%")):
            cache = self.filled((variant, budget), 1)
            state = cache.state
            assert state.plan is not None, "it was decided in the prefill"
            heads = sum(load.heads_on for load in plan_loads(self.spec, state.plan, 0)) // self.spec.heads_per_kv_head
            size = next(self.base.parameters()).element_size()
            # Keys and values of the prompt and the latency token.
            expected = 2 * heads * self.spec.head_dim * size * (self.tokens + 1)
            ratio = cache.nbytes / expected
            made.append(Measure(f"{variant} {budget}, KV bytes", ratio, 1.0, 0.0, {"bytes": cache.nbytes}))
        return made

    def training(self) -> list[Measure]:
        """A step of fine-tuning, forward and backward, of the adaptive over the plain model."""
        ids = torch.randint(3, self.spec.vocab_size - 1, (1, self.tokens), generator=self.generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        inputs = _moved(inputs, self.base.device)

        def step(model: nn.Module) -> Callable[[], Sample]:
            def run() -> Sample:
                model.train()
                started = device_now(self.base.device)
                model(**inputs).loss.backward()
                taken = 1e3 * (device_now(self.base.device) - started)
                model.zero_grad(set_to_none=True)
                model.eval()
                return {"step": taken}

            return run

        things = {"plain": step(self.base), "L": step(self.vlms["L"]), "H": step(self.vlms["H"])}
        told = self.rounds(things)
        return [self.ratio(f"{v}, training step", told, v, "plain", "step", 1.0, 0.08) for v in ("L", "H")]

    def loading(self) -> list[Measure]:
        """Loading a checkpoint of ours over transformers' loading of the same weights, processor included."""
        from transformers import AutoProcessor

        with tempfile.TemporaryDirectory() as folder:
            self.vlms["L"].save_pretrained(folder)
            dtype, device = self.base.dtype, str(self.base.device)

            def plain() -> Sample:
                started = device_now(self.base.device)
                model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
                AutoProcessor.from_pretrained(folder)
                taken = 1e3 * (device_now(self.base.device) - started)
                del model
                gc.collect()
                return {"load": taken}

            def ours() -> Sample:
                started = device_now(self.base.device)
                vlm = AdaptiveVLM.from_pretrained(folder, dtype=dtype, device=device)
                taken = 1e3 * (device_now(self.base.device) - started)
                del vlm
                gc.collect()
                return {"load": taken}

            told = self.rounds({"plain": plain, "ours": ours})
        return [self.ratio("loading", told, "ours", "plain", "load", 1.0, 0.10)]

    def graphed(self, capture: Capture = capture_cuda) -> list[Measure]:
        """Decoding with one graph per whole layer, replayed as the plan says, over the plain model's."""
        use_graphs(self.vlms["L"], self.tokens + 1 + NEW_TOKENS, capture)
        names = ("100%", "50%")
        things: dict[str, Callable[[], Sample]] = {"plain": partial(self.plain, self.base, 1)}
        told = self.rounds(things | {name: self.asking("L", (name,)) for name in names})
        shares = [self.bytes_share([self.loads("L", name)]) for name in names]
        return [
            self.ratio(f"L {name} with graphs, decode", told, name, "plain", "decode", share, 0.03)
            for name, share in zip(names, shares, strict=True)
        ]

    # -- one thing, once ----------------------------------------------------------------------------------------------

    def plain(self, model: LlavaForConditionalGeneration, rows: int, new_tokens: int = NEW_TOKENS) -> Sample:
        """The plain Hugging Face model, as a user would run it."""
        inputs = self._inputs(rows)
        watch = Stopwatch(model.device)
        watch.prepared()
        model.generate(**inputs, **_decoding(watch, new_tokens))
        return _times(watch)

    def asking(
        self,
        variant: str,
        budgets: Sequence[object],
        plan: ExecutionPlan | None = None,
        new_tokens: int = NEW_TOKENS,
    ) -> Callable[[], Sample]:
        """A variant, as a user would ask it; a prompt for each budget."""
        vlm, requests = self.vlms[variant], self._requests(budgets)

        def run() -> Sample:
            watch = Stopwatch(vlm.device)
            watch.prepared()
            timing = vlm.generate_batch(requests, plan=plan, **_decoding(watch, new_tokens))[0].timing
            return {**_times(watch), "prefill": timing.first_token_ms}

        return run

    def filled(self, way: tuple[str, str], rows: int) -> AdaptiveCache:
        """The KV cache of a variant at a budget after the prefill of so many rows."""
        vlm = self.vlms[way[0]]
        state = vlm.request_state(torch.tensor([Budget.parse(way[1]).resolve(vlm.adaptive_config).k] * rows))  # type: ignore[arg-type]
        cache = AdaptiveCache(state)
        with torch.no_grad():
            vlm.model(**self._inputs(rows), ada_state=state, past_key_values=cache, logits_to_keep=1)
        return cache

    def _inputs(self, rows: int) -> dict[str, Any]:
        return _moved(encode(self.processor, [to_prompt(r) for r in self._requests(["100%"] * rows)]), self.base.device)

    def rounds(self, things: Mapping[str, Callable[[], Sample]], *, few: bool = False) -> dict[str, list[Sample]]:
        """Samples of each thing, once per round, or in a part of the rounds where they are slow."""
        rounds = self.settings.rounds
        fewer = min(rounds, max(_LEAST, rounds // _FEWER))
        return in_rounds(things, fewer if few else rounds, self.settings.seed)

    # -- what it should be --------------------------------------------------------------------------------------------

    def ratio(
        self,
        name: str,
        told: Mapping[str, Sequence[Sample]],
        of: str,
        over: str,
        stage: str,
        share: float,
        allowance: float | None,
    ) -> Measure:
        """The median over rounds of one time over another's in the same round."""
        ours, theirs = ([sample[stage] for sample in told[each]] for each in (of, over))
        more = {
            "rounds": len(ours),
            "median_ms": statistics.median(ours),
            "reference_ms": statistics.median(theirs),
            "ms": ours,
            "reference": theirs,
        }
        return Measure(
            name, statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), share, allowance, more
        )

    def loads(self, variant: str, budget: object) -> tuple[LayerLoad, ...]:
        """What runs at a budget, of the plan that this model chooses for the prompt."""
        answer = self.vlms[variant].generate_batch(self._requests([budget]), max_new_tokens=1)[0]
        return plan_loads(self.spec, answer.plan, 0, whole_neurons=True)

    def flops_share(self, loads: Sequence[tuple[LayerLoad, ...]]) -> float:
        """FLOPs of the prefills of these rows, latency tokens included, over those of as many plain ones."""
        whole = prefill_flops(self.spec, full_loads(self.spec), self.tokens)
        return sum(prefill_flops(self.spec, load, self.tokens + 1) for load in loads) / (len(loads) * whole)

    def bytes_share(self, loads: Sequence[tuple[LayerLoad, ...]]) -> float:
        """Bytes that a decoding step of these rows reads, over those of as many plain ones."""
        whole = [full_loads(self.spec)] * len(loads)
        ours, theirs = (
            step_bytes(self.spec, some, tokens, self.packed)
            for some, tokens in ((loads, self.tokens + 1), (whole, self.tokens))
        )
        return ours / theirs

    def _half_heads(self, adjacent: int) -> ExecutionPlan:
        """A plan with half of the heads of every switchable layer, drawn in groups of so many ``adjacent`` ones."""
        config = self.vlms["H"].adaptive_config
        assert config is not None, "these are adaptive"
        tail = torch.zeros(1, config.tail_layers, 2, config.groups, dtype=torch.bool)
        for gates in tail.view(-1, config.groups // adjacent, adjacent):
            gates[torch.randperm(len(gates), generator=self.generator)[: len(gates) // 2]] = True
        return ExecutionPlan(expand_tail(tail, config), config)


def step_bytes(spec: ModelSpec, loads: Sequence[tuple[LayerLoad, ...]], context: int, packed: float = 1.0) -> float:
    """Values that a decoding step of a batch reads: weights once, and each row's own KV cache.

    loads: one per row. Of each layer the weights are those of the row that runs most of it, which is what any row runs
    where one of them runs it whole. context: tokens in the cache. packed: size of such a weight over that of any other
    value. In units of one value, whatever its bytes.
    """
    width, kv = spec.hidden_size, spec.num_kv_heads * spec.head_dim
    attention = 2 * width * (spec.num_heads * spec.head_dim + kv)
    mlp = (3 if spec.gated_mlp else 2) * width * spec.intermediate_size
    total = float(width * spec.vocab_size)
    for layer in zip(*loads, strict=True):
        heads = [Fraction(load.heads_on, spec.num_heads) for load in layer]
        total += packed * float(max(heads) * attention + max(load.mlp_frac for load in layer) * mlp)
        total += float(sum(heads) * 2 * kv * context)
    return total


def _twin(base: LlavaForConditionalGeneration, layers: int | None = None) -> LlavaForConditionalGeneration:
    """A model of its own over the same weights, of its first ``layers`` where given."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    twin = copy.deepcopy(base, shared)
    if layers is not None:
        decoder = twin.model.language_model
        decoder.layers = decoder.layers[:layers]
        twin.config.text_config.num_hidden_layers = decoder.config.num_hidden_layers = layers
    return twin


def _decoding(watch: Stopwatch, new_tokens: int) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return {**options, "stopping_criteria": StoppingCriteriaList([watch])}


def _times(watch: Stopwatch) -> Sample:
    """Milliseconds to the first token, and of the middle one of all steps after it, if any, so that no pause counts."""
    steps = [1e3 * (after - before) for before, after in pairwise(watch.seconds)]
    return {"prefill": 1e3 * watch.seconds[0]} | ({"decode": statistics.median(steps)} if steps else {})


def _moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in inputs.items()}
