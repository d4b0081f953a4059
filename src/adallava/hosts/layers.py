"""``AdaptiveLayer``: what a decoder layer becomes while its model is adaptive, for every family of decoders.

A layer is gated (training), or cut down to the rows, heads and neurons that a plan has on (inference). How the family
arranges norms and branches is told by its ``Decoder``; what happens inside attention and MLP is the host's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from adallava.errors import ConfigError
from adallava.hosts.arch import Decoder
from adallava.hosts.cache import KeptKV
from adallava.hosts.execution import Bundle, LayerRun, Mode
from adallava.hosts.heads import (
    add_bias,
    exchanged_forward,
    gated_attention,
    gated_mlp,
    head_parts,
    mlp_bounds,
    neuron_parts,
    sum_bundles,
)
from adallava.hosts.state import RequestState

_Branch = Callable[[Tensor], Tensor]


class AdaptiveLayer:
    """A decoder layer that obeys ``ada_state``; without it, the layer it was."""

    host_class: Any
    decoder: Decoder
    self_attn: Any
    mlp: Any
    training: bool

    def __call__(self, hidden_states: Tensor, *args: Any, ada_state: RequestState | None = None, **kwargs: Any) -> Any:
        """Do what must happen once per forward, outside gradient checkpointing, then run the layer."""
        if ada_state is None:
            return super().__call__(hidden_states, *args, **kwargs)  # type: ignore[misc]
        index, cut = self.self_attn.layer_idx, ada_state.cut
        if index == 0:
            cache = kwargs.get("past_key_values")
            hidden_states = ada_state.place_latency_token(hidden_states, cache.get_seq_length() if cache else 0)
        if cut is not None and index >= cut.layer:
            if index == cut.layer:
                hidden_states = cut.enter(hidden_states, ada_state.past_tokens)
            kwargs = cut.arguments(kwargs, hidden_states, "flash" in self.self_attn.config._attn_implementation)
        if index == ada_state.prefix_layers:
            ada_state.decide(hidden_states, self._gated(ada_state))
        elif index > ada_state.prefix_layers and not ada_state.past_tokens:
            ada_state.look_again(index)
        out = super().__call__(hidden_states, *args, ada_state=ada_state, **kwargs)  # type: ignore[misc]
        return cut.leave(out) if cut is not None and index == cut.layers - 1 else out

    def _gated(self, state: RequestState) -> bool:
        if not self.training:
            return bool(state.gated)
        keywords = getattr(getattr(self, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(self, "gradient_checkpointing", False) and keywords.get("use_reentrant"):
            raise ConfigError(
                "gradient checkpointing with use_reentrant=True loses the scheduler's gradient. "
                'Pass gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        return True if state.gated is None else state.gated

    def adaptive_forward(
        self, hidden_states: Tensor, *args: Any, ada_state: RequestState | None = None, **kw: Any
    ) -> Any:
        """The host's forward, gated or cut down as the request's plan says."""
        index = self.self_attn.layer_idx
        cut = None if ada_state is None or ada_state.past_tokens else ada_state.cut
        watched = cut is not None and index == cut.layer - 1
        if ada_state is None or (index < ada_state.prefix_layers and not watched):
            return self._whole(hidden_states, ada_state, *args, **kw)
        assert not args, "the decoder passes everything but the hidden states by name"
        if watched:
            assert cut is not None
            parts = cut.watched(self.self_attn)
            attend = partial(exchanged_forward, self.self_attn, parts, **kw)
            return self._around(hidden_states, lambda h: attend(hidden_states=h)[0], self.mlp)
        if ada_state.runs is None:
            return self._gated_forward(hidden_states, ada_state, **kw)
        run = ada_state.run_of(index)
        if run.mode is Mode.SKIP:
            return hidden_states
        if run.mode is Mode.FULL:
            return self._whole(hidden_states, ada_state, **kw)
        x = hidden_states if run.rows is None else hidden_states[run.rows]
        kw = _select_rows(kw, run.rows, len(hidden_states))
        if run.mode is Mode.ROWS:
            out = self.host_class.forward(self, x, **kw)
        else:
            out = self._sliced_forward(x, run, ada_state, **kw)
        return out if run.rows is None else hidden_states.index_copy(0, run.rows, out)

    def _whole(self, x: Tensor, state: RequestState | None, *args: Any, **kw: Any) -> Any:
        """The host's forward, a decoding step by its graph where the request has them."""
        if state is not None and state.graphs is not None and state.past_tokens and state.cut is None:
            return state.graphs.run(self, x, kw)
        return self.host_class.forward(self, x, *args, **kw)

    def _gated_forward(self, x: Tensor, state: RequestState, **kw: Any) -> Tensor:
        """Everything is computed, and what a gate of zero covers adds exactly nothing."""
        assert state.gates is not None
        gates = state.gates[:, self.self_attn.layer_idx].to(x.dtype)  # [B, 2, G]
        if state.config.variant == "L":
            return self._around(x, lambda h: self.self_attn(hidden_states=h, **kw)[0], self.mlp, gates[..., :1, None])
        bounds, scale = mlp_bounds(self._mlp_out.in_features, state.config.groups), None
        if self.decoder.attention_post_norm is not None:
            # A norm's slope at zero is huge: where all of a branch is off, no gradient may pass through it.
            scale = (gates.detach() > 0.5).any(-1).to(x.dtype)[..., None, None]
        return self._around(
            x,
            lambda h: gated_attention(self.self_attn, self.decoder, h, gates[:, 0], **kw),
            lambda h: gated_mlp(self.mlp, self.decoder, h, gates[:, 1], bounds),
            scale,
        )

    def _sliced_forward(self, x: Tensor, run: LayerRun, state: RequestState, **kw: Any) -> Tensor:
        """Only the heads and neurons that are on, each on the rows that have it on."""
        attention, mlp, decoder = self.self_attn, self.mlp, self.decoder
        bounds = mlp_bounds(self._mlp_out.in_features, state.config.groups)
        step = x.shape[1] == 1 or state.past_tokens > 0
        look, feed = (run.attention, run.mlp) if step else (run.prompt_attention, run.prompt_mlp)
        cache: Any = kw.get("past_key_values")
        kept: list[KeptKV] = []

        def heads(rows: Tensor, bundle: Bundle, number: int) -> Tensor:
            some = _select_rows(kw, bundle.rows, len(x))
            if cache is not None:
                kept.append(KeptKV(bundle))
                some["past_key_values"] = cache.bundle(attention.layer_idx, number) if step else kept[-1]
            key = (attention, step, number)
            if key not in state.parts:
                state.parts[key] = head_parts(attention, decoder, bundle.spans)
            return exchanged_forward(attention, state.parts[key], hidden_states=rows, **some)[0]

        def neurons(rows: Tensor, bundle: Bundle, number: int) -> Tensor:
            key = (mlp, step, number)
            if key not in state.parts:
                state.parts[key] = neuron_parts(mlp, decoder, bundle.spans, bounds)
            return exchanged_forward(mlp, state.parts[key], rows)

        attention_out = getattr(attention, decoder.attention_out)
        out = self._around(
            x,
            lambda h: add_bias(attention_out, sum_bundles(h, look, heads)),
            lambda h: add_bias(self._mlp_out, sum_bundles(h, feed, neurons)),
        )
        if kept and not step:
            cache.keep(attention.layer_idx, run.attention, kept, len(x))
        return out

    def _around(self, x: Tensor, attend: _Branch, feed: _Branch, scale: Tensor | None = None) -> Tensor:
        """The layer around its two branches; ``scale`` [B, 2, 1, 1] multiplies what each of them adds."""
        decoder = self.decoder
        first, second = (None, None) if scale is None else scale.unbind(1)
        normed = self._through("input_layernorm", x)
        attention = self._finish(decoder.attention_post_norm, attend(normed), first)
        if decoder.mlp_norm is None:
            return x + attention + self._finish(decoder.mlp_post_norm, feed(normed), second)
        x = x + attention
        return x + self._finish(decoder.mlp_post_norm, feed(self._through(decoder.mlp_norm, x)), second)

    def _finish(self, norm: str | None, out: Tensor, scale: Tensor | None) -> Tensor:
        out = self._through(self.decoder.dropout, self._through(norm, out))
        return out if scale is None else out * scale

    def _through(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else getattr(self, name)(x)

    @property
    def _mlp_out(self) -> Any:
        return getattr(self.mlp, self.decoder.mlp_out)


def _select_rows(kw: dict[str, Any], rows: Tensor | None, batch: int) -> dict[str, Any]:
    """Keyword arguments of a decoder layer for some rows: everything that has one entry per row is indexed."""
    if rows is None:
        return dict(kw)
    return {name: _select(value, rows, batch) for name, value in kw.items()}


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_select(v, rows, batch) for v in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch:
        return value[rows]
    if type(value).__name__ == "BlockMask":
        raise ConfigError("flex attention cannot run a part of a batch. Load the model with sdpa or eager attention.")
    return value
