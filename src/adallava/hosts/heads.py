"""Attention and MLP of a decoder layer, computed for some of their heads and neurons, or gated head by head.

Nothing of a family's attention or MLP is written out here: transformers' own ``forward`` runs, on a stand-in for the
module whose projections are exchanged for parts of themselves. So rotary embedding, query/key norms, scaling, sliding
windows and activation are always the family's own. Projections into heads and neurons are sliced along rows, those out
of them along columns, as views of the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
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


def some_heads(attention: Any, decoder: Decoder, x: Tensor, spans: Sequence[Span], **kwargs: Any) -> Tensor:
    """Attention output of the key/value groups in ``spans``, before the output bias: [R, T, D] -> [R, T, D].

    kwargs: everything else that the attention's forward takes; ``past_key_values`` must hold just these heads.
    """
    key_unit = attention.head_dim
    query_unit = key_unit * attention.num_key_value_groups
    units = {"q_proj": query_unit, "k_proj": key_unit, "v_proj": key_unit}
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(_rows, _linear(attention, name), spans, unit) for name, unit in units.items()
    }
    out = decoder.attention_out
    parts[out] = partial(_columns, _linear(attention, out), spans, query_unit)
    return exchanged_forward(attention, parts, hidden_states=x, **kwargs)[0]


def some_neurons(mlp: Any, decoder: Decoder, x: Tensor, spans: Sequence[Span], bounds: Sequence[int]) -> Tensor:
    """MLP output of the neuron shares in ``spans``, before the output bias: [R, T, D] -> [R, T, D]."""
    neurons = [(bounds[start], bounds[stop]) for start, stop in spans]
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(_rows, _linear(mlp, name), neurons, 1) for name in decoder.mlp_in
    }
    parts[decoder.mlp_out] = partial(_columns, _linear(mlp, decoder.mlp_out), neurons, 1)
    return exchanged_forward(mlp, parts, x)


def add_bias(linear: nn.Linear, out: Tensor) -> Tensor:
    """The output bias of a projection, which belongs to no head and is added wherever the layer runs."""
    return out if linear.bias is None else out + linear.bias


def sum_bundles(x: Tensor, bundles: Sequence[Bundle], run: Callable[[Tensor, Bundle, int], Tensor]) -> Tensor:
    """Sum of ``run(rows_of_x, bundle, number)`` over bundles, each put back on the rows it ran on: [R, T, D]."""
    total = torch.zeros_like(x)
    for number, bundle in enumerate(bundles):
        if bundle.rows is None:
            total = total + run(x, bundle, number)
        else:
            total = total.index_add(0, bundle.rows, run(x[bundle.rows], bundle, number))
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
    if not isinstance(linear, nn.Linear):
        raise ConfigError(
            f"{name} is a {type(linear).__module__}.{type(linear).__name__}, of which no part can be computed; "
            "expected nn.Linear. Merge adapters into the model before you run variant H at less than 100 %."
        )
    return linear


def _rows(linear: nn.Linear, spans: Sequence[Span], unit: int, x: Tensor) -> Tensor:
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


def _columns(linear: nn.Linear, spans: Sequence[Span], unit: int, x: Tensor) -> Tensor:
    """A linear layer fed with only the input features of ``spans``, given side by side in x; without its bias."""
    done, total = 0, None
    for start, stop in spans:
        size = (stop - start) * unit
        part = functional.linear(x[..., done : done + size], linear.weight[:, start * unit : stop * unit])
        total = part if total is None else total + part
        done += size
    assert total is not None, "a bundle has at least one span"
    return total
