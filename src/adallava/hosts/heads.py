"""Attention and MLP of a decoder layer, computed for some of their heads and neurons, or gated head by head.

Nothing of a family's attention or MLP is written out here: transformers' own ``forward`` runs, on a stand-in for the
module whose projections are exchanged for parts of themselves. So rotary embedding, query/key norms, scaling, sliding
windows and activation are always the family's own. Projections into heads and neurons are sliced along rows, those out
of them along columns, as views of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adallava.errors import ConfigError
from adallava.hosts.arch import Decoder
from adallava.hosts.execution import Bundle, Span


def mlp_bounds(width: int, groups: int) -> list[int]:
    """Cut ``width`` neurons into ``groups`` contiguous shares; the first ``width % groups`` have one more.

    Returns the groups + 1 boundaries, as in the released code.
    """
    share, larger = divmod(width, groups)
    return [i * share + min(i, larger) for i in range(groups + 1)]


# -- parts, for inference ---------------------------------------------------------------------------------------------


Parts = dict[str, Callable[[Tensor], Tensor]]
"""Projections of an attention or MLP, each cut down to what is on, by name."""


def head_parts(attention: Any, decoder: Decoder, spans: Sequence[Span]) -> Parts:
    """Projections of an attention for the key/value groups in ``spans``; that out of the heads is without its bias."""
    key_unit = attention.head_dim
    query_unit = key_unit * attention.num_key_value_groups
    units = {"q_proj": query_unit, "k_proj": key_unit, "v_proj": key_unit}
    parts: Parts = {name: _rows(_linear(attention, name), _times(spans, unit)) for name, unit in units.items()}
    out = decoder.attention_out
    return parts | {out: _columns(_linear(attention, out), _times(spans, query_unit))}


def neuron_parts(mlp: Any, decoder: Decoder, spans: Sequence[Span], bounds: Sequence[int]) -> Parts:
    """Projections of an MLP for the neuron shares in ``spans``; that out of the neurons is without its bias."""
    neurons = [(bounds[start], bounds[stop]) for start, stop in spans]
    parts: Parts = {name: _rows(_linear(mlp, name), neurons) for name in decoder.mlp_in}
    return parts | {decoder.mlp_out: _columns(_linear(mlp, decoder.mlp_out), neurons)}


def add_bias(linear: nn.Linear, out: Tensor) -> Tensor:
    """The output bias of a projection, which belongs to no head and is added wherever the layer runs."""
    return out if linear.bias is None else out + linear.bias


def sum_bundles(x: Tensor, bundles: Sequence[Bundle], run: Callable[[Tensor, Bundle, int], Tensor]) -> Tensor:
    """Sum of ``run(rows_of_x, bundle, number)`` over bundles, each put back on the rows it ran on: [R, T, D]."""
    if len(bundles) == 1 and bundles[0].rows is None:
        return run(x, bundles[0], 0)
    total = torch.zeros_like(x)
    for number, bundle in enumerate(bundles):
        if bundle.rows is None:
            total += run(x, bundle, number)
        else:
            total.index_add_(0, bundle.rows, run(x[bundle.rows], bundle, number))
    return total


# -- gates, for training ----------------------------------------------------------------------------------------------


def gated_attention(attention: Any, decoder: Decoder, x: Tensor, gates: Tensor, **kwargs: Any) -> Tensor:
    """Attention output with each group's heads multiplied by its gate, [R, G], before the output projection."""
    width = attention.head_dim * attention.num_key_value_groups
    out = partial(_gated_linear, getattr(attention, decoder.attention_out), gates, [width] * gates.shape[-1])
    return exchanged_forward(attention, {decoder.attention_out: out}, hidden_states=x, **kwargs)[0]


def gated_mlp(mlp: Any, decoder: Decoder, x: Tensor, gates: Tensor, bounds: Sequence[int]) -> Tensor:
    """The whole MLP with each neuron share multiplied by its gate, [R, G], before the output projection."""
    widths = [stop - start for start, stop in pairwise(bounds)]
    out = partial(_gated_linear, getattr(mlp, decoder.mlp_out), gates, widths)
    return exchanged_forward(mlp, {decoder.mlp_out: out}, x)


def _gated_linear(linear: Any, gates: Tensor, widths: Sequence[int], x: Tensor) -> Tensor:
    per_feature = gates.repeat_interleave(torch.tensor(widths, device=gates.device), dim=-1)[:, None]  # [R, 1, F]
    out = linear(x * per_feature.to(x.dtype))
    if linear.bias is None:
        return out
    off = (gates.detach() <= 0.5).all(-1)[:, None, None]  # the bias belongs to no group: it goes with the last one
    return out - linear.bias * off.to(out.dtype)


# -- the stand-in -----------------------------------------------------------------------------------------------------


class _Exchanged:
    """A module as its own forward sees it, some of its attributes being exchanged."""

    def __init__(self, module: nn.Module, parts: dict[str, Any]) -> None:
        self.__dict__.update(parts, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def exchanged_forward(module: nn.Module, parts: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a module's class with some of its attributes exchanged for ``parts``."""
    forward: Any = type(module).forward
    return forward(_Exchanged(module, parts), *args, **kwargs)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = getattr(module, name)
    kind = f"a {type(linear).__module__}.{type(linear).__name__}"
    if not isinstance(linear, nn.Linear):
        remedy = "Merge adapters into the model before you run variant H at less than 100 %."
    elif not _dense(linear):
        kind += f" with weights of type {type(linear.weight).__name__} ({linear.weight.dtype})"
        remedy = "Load the weights without quantization for variant H, or use variant L, which runs whole layers."
    else:
        return linear
    raise ConfigError(f"{name} is {kind}, of which no part can be computed; expected nn.Linear. {remedy}")


def _dense(linear: nn.Linear) -> bool:
    """Whether rows and columns can be taken of the weights: not of those that other libraries pack into integers."""
    weight = linear.weight
    whole = weight.is_floating_point() and weight.shape == (linear.out_features, linear.in_features)
    return whole and type(weight).__module__.partition(".")[0] == "torch"


def _times(spans: Sequence[Span], unit: int) -> list[Span]:
    return [(start * unit, stop * unit) for start, stop in spans]


def _rows(linear: nn.Linear, spans: Sequence[Span]) -> Callable[[Tensor], Tensor]:
    """Output features ``start:stop`` of a linear layer for each span, side by side."""
    weights = [linear.weight[start:stop] for start, stop in spans]
    biases = [None if linear.bias is None else linear.bias[start:stop] for start, stop in spans]
    ends = _ends(spans)

    def run(x: Tensor) -> Tensor:
        if len(spans) == 1:
            return functional.linear(x, weights[0], biases[0])
        if not _in_place(x):
            return torch.cat([functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)
        flat = x.reshape(-1, x.shape[-1])
        out = flat.new_empty(len(flat), ends[-1])
        for weight, bias, (start, stop) in zip(weights, biases, pairwise(ends), strict=True):
            part = out[:, start:stop]
            if bias is None:
                torch.mm(flat, weight.t(), out=part)
            else:
                torch.addmm(bias, flat, weight.t(), out=part)
        return out.view(*x.shape[:-1], -1)

    return run


def _columns(linear: nn.Linear, spans: Sequence[Span]) -> Callable[[Tensor], Tensor]:
    """A linear layer fed with only the input features of ``spans``, given side by side; without its bias."""
    weights = [linear.weight[:, start:stop] for start, stop in spans]
    places = list(pairwise(_ends(spans)))

    def run(x: Tensor) -> Tensor:
        if len(spans) == 1:
            return functional.linear(x, weights[0])
        if not _in_place(x):
            parts = [functional.linear(x[..., a:b], w) for w, (a, b) in zip(weights, places, strict=True)]
            return torch.stack(parts).sum(0)
        flat = x.reshape(-1, x.shape[-1])
        total = torch.mm(flat[:, : places[0][1]], weights[0].t())
        for weight, (start, stop) in zip(weights[1:], places[1:], strict=True):
            torch.addmm(total, flat[:, start:stop], weight.t(), out=total)  # not addmm_, which FLOP counters miss
        return total.view(*x.shape[:-1], -1)

    return run


def _ends(spans: Sequence[Span]) -> list[int]:
    return list(accumulate((stop - start for start, stop in spans), initial=0))


def _in_place(x: Tensor) -> bool:
    """Whether products may be written where they belong, which autograd and autocast do not know."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
