"""Attention and MLP of a Llama-like layer, computed for some of their heads and neurons, or gated head by head.

transformers' own modules run whole. Variant H needs parts, so the few lines between the projections are written out
here, on the same weights: query/key/value/gate/up are sliced along rows and output/down along columns, as views.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.execution import Bundle, Span


def mlp_bounds(width: int, groups: int) -> list[int]:
    """Cut ``width`` neurons into ``groups`` contiguous shares; the first ``width % groups`` have one more.

    Returns the groups + 1 boundaries, as in the released code.
    """
    share, larger = divmod(width, groups)
    return [i * share + min(i, larger) for i in range(groups + 1)]


def _rows(linear: nn.Linear, x: Tensor, spans: Sequence[Span], unit: int) -> Tensor:
    """Output features ``unit * start : unit * stop`` of a linear layer for each span, side by side."""
    parts = [
        functional.linear(
            x,
            linear.weight[start * unit : stop * unit],
            None if linear.bias is None else linear.bias[start * unit : stop * unit],
        )
        for start, stop in spans
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _columns(linear: nn.Linear, x: Tensor, spans: Sequence[Span], unit: int) -> Tensor:
    """A linear layer fed with only the input features of ``spans``, given side by side in x; without its bias."""
    done, total = 0, None
    for start, stop in spans:
        size = (stop - start) * unit
        part = functional.linear(x[..., done : done + size], linear.weight[:, start * unit : stop * unit])
        total = part if total is None else total + part
        done += size
    assert total is not None, "a bundle has at least one span"
    return total


def attention_heads(
    attention: Any,
    x: Tensor,
    spans: Sequence[Span],
    *,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Any,
    cache: AdaptiveCache | None = None,
    cache_key: tuple[int, int] = (0, 0),
    gates: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention output of the key/value groups in ``spans``, before the output bias: [R, T, D] -> [R, T, D].

    gates: [R, G], multiplied onto each group's output before the output projection (training: spans are all groups).
    """
    head_dim, ratio = attention.head_dim, attention.num_key_value_groups
    shape = (*x.shape[:-1], -1, head_dim)
    query = _rows(attention.q_proj, x, spans, head_dim * ratio).view(shape).transpose(1, 2)
    key = _rows(attention.k_proj, x, spans, head_dim).view(shape).transpose(1, 2)
    value = _rows(attention.v_proj, x, spans, head_dim).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if cache is not None:
        key, value = cache.update_bundle(key, value, *cache_key)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    out, _ = attend(
        attention,
        query,
        key,
        value,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )  # [R, T, heads, head_dim]
    if gates is not None:
        out = out * gates.repeat_interleave(ratio, -1)[:, None, :, None].to(out.dtype)
    out = out.reshape(*x.shape[:-1], -1)
    return _columns(attention.o_proj, out, spans, head_dim * ratio)


def mlp_neurons(mlp: Any, x: Tensor, spans: Sequence[Span], bounds: Sequence[int]) -> Tensor:
    """MLP output of the neuron shares in ``spans``, before the output bias: [R, T, D] -> [R, T, D]."""
    neurons = [(bounds[start], bounds[stop]) for start, stop in spans]
    hidden = mlp.act_fn(_rows(mlp.gate_proj, x, neurons, 1)) * _rows(mlp.up_proj, x, neurons, 1)
    return _columns(mlp.down_proj, hidden, neurons, 1)


def gated_mlp(mlp: Any, x: Tensor, gates: Tensor, bounds: Sequence[int]) -> Tensor:
    """The whole MLP with each neuron share multiplied by its gate, [R, G], before the output projection."""
    widths = torch.tensor([stop - start for start, stop in pairwise(bounds)], device=gates.device)
    per_neuron = gates.repeat_interleave(widths, dim=-1)[:, None]  # [R, 1, F]
    hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return functional.linear(hidden * per_neuron.to(hidden.dtype), mlp.down_proj.weight)


def add_bias(linear: nn.Linear, out: Tensor) -> Tensor:
    """The output bias of a projection, which belongs to no head and is added wherever the layer runs."""
    return out if linear.bias is None else out + linear.bias


def sum_bundles(x: Tensor, bundles: Sequence[Bundle], run: Any) -> Tensor:
    """Sum of ``run(rows_of_x, bundle, number)`` over bundles, each put back on the rows it ran on: [R, T, D]."""
    total = torch.zeros_like(x)
    for number, bundle in enumerate(bundles):
        if bundle.rows is None:
            total = total + run(x, bundle, number)
        else:
            total = total.index_add(0, bundle.rows, run(x[bundle.rows], bundle, number))
    return total
