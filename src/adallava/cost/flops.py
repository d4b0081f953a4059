"""FLOPs and bytes of a plan in the *paper* convention, prefill and decode apart.

The AdaLLaVA paper reports what the LLM-Viewer roofline (Yuan et al., 2024, arXiv:2402.16363) says about the language
model. That convention, which everything here follows unless it says otherwise:

- 2 FLOPs per multiply-add, but 1 in lm_head, which runs on one position;
- no causal halving: attention counts all T * T scores; softmax 5, norm 7, add 1 FLOPs per element;
- weights, activations and KV cache take 2 bytes per value, and each op reads its inputs and writes its outputs;
- a part that is off costs nothing, but norms and adds cost their full width in a layer that runs in part, and its
  KV cache is written in full width;
- not counted: embedding, final norm, rotary embedding, vision tower, projector, token selection, scheduler.

So it differs from what a FLOP counter measures (``adallava.cost.strict``): by 0.04 % for LLaVA-1.5-7B at 624 tokens.
Grouped-query attention is counted as it is computed: k and v projections and the KV cache by key/value heads, scores by
query heads.

Under tensor parallelism over N devices everything is per device: matrices, heads with their scores and KV cache, the
activation function and lm_head are cut into N, norms and adds run in full on each device, and what the devices tell
each other (two all-reduces per layer) is not counted. The heads on of a layer that runs in part count as evenly spread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from adallava.cost.load import LayerLoad, PlanLike, as_loads
from adallava.cost.spec import CostError, ModelSpec

CONVENTION = "paper"
BYTES_PER_VALUE = 2  # 16-bit weights, activations and KV cache

Tokens = int | Sequence[int]
"""Prompt length, for all layers or for each one: token selection inside the decoder shortens later layers."""
Stage = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Op:
    """FLOPs and memory traffic of one operator; whole numbers are ints, exact at any size."""

    name: str
    flops: float
    weight_bytes: float = 0
    act_read_bytes: float = 0
    act_write_bytes: float = 0
    kv_read_bytes: float = 0
    kv_write_bytes: float = 0

    @property
    def traffic_bytes(self) -> float:
        """Everything that the operator reads and writes."""
        acts = self.act_read_bytes + self.act_write_bytes
        return self.weight_bytes + acts + self.kv_read_bytes + self.kv_write_bytes


@dataclass(frozen=True)
class Pass:
    """The operators of one forward pass, each with how often it runs."""

    ops: tuple[tuple[Op, int], ...]

    @property
    def flops(self) -> float:
        """FLOPs of the pass."""
        return sum(op.flops * count for op, count in self.ops)

    @property
    def traffic_bytes(self) -> float:
        """Bytes read and written in the pass."""
        return sum(op.traffic_bytes * count for op, count in self.ops)

    @property
    def weight_bytes(self) -> float:
        """Weights that the pass reads: those of what runs, and lm_head."""
        return sum(op.weight_bytes * count for op, count in self.ops)

    @property
    def kv_write_bytes(self) -> float:
        """Keys and values that the pass writes: after a prefill, the KV cache."""
        return sum(op.kv_write_bytes * count for op, count in self.ops)


def prefill(
    spec: ModelSpec,
    plan: PlanLike,
    tokens: Tokens,
    *,
    batch: int = 1,
    tensor_parallel: int = 1,
    flash_onchip_bytes: int | None = None,
) -> Pass:
    """Return the operators of a prefill (paper convention).

    tokens: prompt length T, visual and latency tokens included, or one length per layer.
    batch: rows that all run this plan.
    tensor_parallel: devices that share each layer; the answer is then that of one device.
    flash_onchip_bytes: on-chip memory of a device for flash attention; None for the paper's unfused attention.
    Raises ``PlanError`` for a plan of another model and ``CostError`` for lengths, batches or devices below 1, and for
    devices that do not divide key/value heads and MLP.
    """
    return _run(spec, plan, tokens, "prefill", _Setting(batch, tensor_parallel, flash_onchip_bytes))


def decode_step(
    spec: ModelSpec,
    plan: PlanLike,
    tokens: Tokens,
    *,
    batch: int = 1,
    tensor_parallel: int = 1,
    flash_onchip_bytes: int | None = None,
) -> Pass:
    """Return the operators of one decoding step that attends to ``tokens`` positions (paper convention).

    Arguments and errors as for ``prefill``. A step reads the KV cache of all heads of a layer, also of those off.
    """
    return _run(spec, plan, tokens, "decode", _Setting(batch, tensor_parallel, flash_onchip_bytes))


def prefill_flops(spec: ModelSpec, plan: PlanLike, tokens: Tokens, *, batch: int = 1) -> float:
    """Return the FLOPs of a prefill (paper convention): the paper's column "FLOPs"."""
    return prefill(spec, plan, tokens, batch=batch).flops


def decode_step_flops(spec: ModelSpec, plan: PlanLike, tokens: Tokens, *, batch: int = 1) -> float:
    """Return the FLOPs of one decoding step that attends to ``tokens`` positions (paper convention)."""
    return decode_step(spec, plan, tokens, batch=batch).flops


def layer_flops(spec: ModelSpec, load: LayerLoad, tokens: int) -> float:
    """Return what one layer adds to ``prefill_flops`` of one row of ``tokens`` positions; lm_head is in no layer."""
    return sum(op.flops for op in _layer_ops(spec, load, _Shape(tokens, tokens, 1))) if load.runs else 0


def footprint_bytes(
    spec: ModelSpec,
    plan: PlanLike,
    tokens: Tokens,
    *,
    stage: Stage = "prefill",
    batch: int = 1,
    tensor_parallel: int = 1,
) -> float:
    """Return the memory that a pass needs, in bytes (paper convention).

    That is weights and KV cache of the layers that run, and the activations that the last of them writes. lm_head,
    embedding and vision tower are left out, and all activations of the layer count as alive at once.
    stage: "prefill", or "decode" for one step with ``tokens`` positions in the KV cache.
    """
    running = _running(spec, plan, tokens, _Setting(batch, tensor_parallel))
    held: float = 0
    for (load, length), count in Counter(running).items():
        ops = _layer_ops(spec, load, _Shape(length, length, batch, devices=tensor_parallel))
        held += count * sum(op.weight_bytes + op.kv_write_bytes for op in ops)
    if not running:
        return held
    load, length = running[-1]
    last = _layer_ops(spec, load, _Shape(length if stage == "prefill" else 1, length, batch, devices=tensor_parallel))
    return held + sum(op.act_write_bytes for op in last)


# -- one pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """How a pass runs, apart from what."""

    batch: int = 1
    tensor_parallel: int = 1
    flash_onchip_bytes: int | None = None


@dataclass(frozen=True)
class _Shape:
    """Query positions, key positions and batch of one layer's pass, and the devices that share it."""

    queries: int
    keys: int
    batch: int
    decode: bool = False
    flash_onchip_bytes: int | None = None
    devices: int = 1

    @property
    def rows(self) -> int:
        """Positions that linear layers process."""
        return self.batch * self.queries


def _run(spec: ModelSpec, plan: PlanLike, tokens: Tokens, stage: Stage, setting: _Setting) -> Pass:
    ops: list[tuple[Op, int]] = []
    decode, batch, devices = stage == "decode", setting.batch, setting.tensor_parallel
    # Layers alike are counted once: a plan has few different layers, and generate() asks for many passes.
    for (load, length), count in Counter(_running(spec, plan, tokens, setting)).items():
        shape = _Shape(1 if decode else length, length, batch, decode, setting.flash_onchip_bytes, devices)
        ops += [(op, count) for op in _layer_ops(spec, load, shape)]
    ops.append((_on_one_device(_lm_head(spec, batch), devices), 1))
    return Pass(tuple(ops))


def _running(spec: ModelSpec, plan: PlanLike, tokens: Tokens, setting: _Setting) -> list[tuple[LayerLoad, int]]:
    loads = as_loads(spec, plan)
    lengths = [tokens] * len(loads) if isinstance(tokens, int) else list(tokens)
    if len(lengths) != len(loads):
        raise CostError(f"tokens has {len(lengths)} lengths, but the model has {len(loads)} layers. Give one for each.")
    devices = setting.tensor_parallel
    counts = [("batch", setting.batch), ("tensor_parallel", devices), *(("tokens", length) for length in lengths)]
    for name, value in counts:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CostError(f"{name} is {value!r}, expected a whole number of 1 or more.")
    if spec.num_kv_heads % devices or spec.intermediate_size % devices:
        fits = [n for n in range(1, spec.num_kv_heads + 1) if not (spec.num_kv_heads % n or spec.intermediate_size % n)]
        raise CostError(
            f"tensor_parallel is {devices}, which does not divide the {spec.num_kv_heads} key/value heads and the "
            f"{spec.intermediate_size} MLP neurons of a layer. Choose one of {', '.join(map(str, fits))}."
        )
    return [(load, length) for load, length in zip(loads, lengths, strict=True) if load.runs]


def _layer_ops(spec: ModelSpec, load: LayerLoad, shape: _Shape) -> list[Op]:
    ops: list[Op] = []
    if load.heads_on:
        ops += [*_projections(spec, load, shape), *_attention(spec, load, shape), *_norm_and_add("attn", spec, shape)]
    if load.mlp_frac:
        ops += [*_mlp(spec, load, shape), *_norm_and_add("mlp", spec, shape)]
    return ops if shape.devices == 1 else [_on_one_device(op, shape.devices) for op in ops]


# What of an operator stays whole on each device: the input of a matrix that is cut along its outputs, the output (a sum
# that is then exchanged) of one that is cut along its inputs.
_WHOLE_INPUT = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"}
_WHOLE_OUTPUT = {"o_proj", "down_proj"}
_WHOLE = {"attn_norm", "attn_add", "mlp_norm", "mlp_add"}


def _on_one_device(op: Op, devices: int) -> Op:
    if devices == 1 or op.name in _WHOLE:
        return op
    whole = (
        {"act_read_bytes"} if op.name in _WHOLE_INPUT else {"act_write_bytes"} if op.name in _WHOLE_OUTPUT else set()
    )
    sizes = {name: value for name, value in vars(op).items() if name not in {"name", *whole}}
    parts: dict[str, Any] = {name: _exact(Fraction(value) / devices) for name, value in sizes.items()}
    return replace(op, **parts)


def _projections(spec: ModelSpec, load: LayerLoad, shape: _Shape) -> list[Op]:
    share = Fraction(load.heads_on, spec.num_heads)
    width, q_width = spec.hidden_size, spec.num_heads * spec.head_dim
    kv_width = spec.num_kv_heads * spec.head_dim
    return [
        _linear("q_proj", width, q_width, share, shape),
        _linear("k_proj", width, kv_width, share, shape, to_cache=True),
        _linear("v_proj", width, kv_width, share, shape, to_cache=True),
        _linear("o_proj", q_width, width, share, shape),
    ]


def _mlp(spec: ModelSpec, load: LayerLoad, shape: _Shape) -> list[Op]:
    width, inner, share = spec.hidden_size, spec.intermediate_size, load.mlp_frac
    # The convention takes the activation function at the model's width, not at the MLP's.
    values = shape.rows * width * share
    acts = BYTES_PER_VALUE * values
    gate = [_linear("gate_proj", width, inner, share, shape)] if spec.gated_mlp else []
    return [
        *gate,
        _linear("up_proj", width, inner, share, shape),
        Op("mlp_act", _exact(2 * values), act_read_bytes=_exact(2 * acts), act_write_bytes=_exact(acts)),
        _linear("down_proj", inner, width, share, shape),
    ]


def _linear(name: str, inputs: int, outputs: int, share: Fraction, shape: _Shape, to_cache: bool = False) -> Op:
    written = BYTES_PER_VALUE * shape.rows * outputs
    return Op(
        name,
        flops=_exact(2 * shape.rows * inputs * outputs * share),
        weight_bytes=_exact(BYTES_PER_VALUE * inputs * outputs * share),
        act_read_bytes=_exact(BYTES_PER_VALUE * shape.rows * inputs * share),
        act_write_bytes=0 if to_cache else _exact(written * share),
        kv_write_bytes=written if to_cache else 0,  # full width, also where heads are off
    )


def _attention(spec: ModelSpec, load: LayerLoad, shape: _Shape) -> list[Op]:
    heads = load.heads_on
    scores = shape.rows * shape.keys * heads
    score_bytes = BYTES_PER_VALUE * scores
    query_bytes = BYTES_PER_VALUE * shape.rows * heads * spec.head_dim
    # A decoding step reads the cache of all heads, a prefill that of the heads on.
    kv_heads = spec.num_kv_heads if shape.decode else heads // spec.heads_per_kv_head
    kv_bytes = BYTES_PER_VALUE * shape.batch * shape.keys * kv_heads * spec.head_dim
    matmul = 2 * scores * spec.head_dim
    if shape.flash_onchip_bytes is not None:
        blocks = _flash_blocks(spec, shape.queries, shape.flash_onchip_bytes)
        return [Op("flash_attention", 2 * matmul + 5 * scores, 0, query_bytes, 2 * score_bytes, 2 * blocks * kv_bytes)]
    return [
        Op("qk_matmul", matmul, 0, query_bytes, score_bytes, kv_bytes),
        Op("sv_matmul", matmul, 0, score_bytes, query_bytes, kv_bytes),
        Op("softmax", 5 * scores, 0, score_bytes, score_bytes),
    ]


def _flash_blocks(spec: ModelSpec, queries: int, onchip_bytes: int) -> int:
    """Blocks of query rows, for each of which keys and values are read again (FlashAttention-2, arXiv:2307.08691)."""
    block_rows = min(math.ceil(onchip_bytes / (BYTES_PER_VALUE * spec.head_dim)), spec.head_dim)
    return math.ceil(queries / block_rows)


def _norm_and_add(block: str, spec: ModelSpec, shape: _Shape) -> list[Op]:
    values = shape.rows * spec.hidden_size
    size = BYTES_PER_VALUE * values
    return [Op(f"{block}_norm", 7 * values, 0, size, size), Op(f"{block}_add", values, 0, size, size)]


def _lm_head(spec: ModelSpec, batch: int) -> Op:
    width, vocab = spec.hidden_size, spec.vocab_size
    values = BYTES_PER_VALUE * batch
    return Op("lm_head", batch * width * vocab, BYTES_PER_VALUE * width * vocab, values * width, values * vocab)


def _exact(value: int | Fraction) -> float:
    """Return an int where ``value`` is whole, which it is for every real model, and the nearest float otherwise."""
    return value.numerator if value.denominator == 1 else float(value)
