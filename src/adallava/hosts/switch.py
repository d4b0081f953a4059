"""Attach and detach: make a Hugging Face model adaptive in place by giving its layers another class.

``attach`` assigns ``__class__`` of the top model and of every decoder layer to a subclass of the same name; no module
is wrapped, so parameter names, ``isinstance``, ``output_hidden_states``, checkpointing and ``save_pretrained`` stay as
they were. ``detach`` assigns the old classes back. Without ``ada_state`` an attached model is the model it was.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from adallava.config import AdaptiveConfig
from adallava.errors import CheckpointError, ConfigError
from adallava.hosts.arch import decoder_layers
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.execution import Bundle, LayerRun, Mode
from adallava.hosts.heads import add_bias, attention_heads, gated_mlp, mlp_bounds, mlp_neurons, sum_bundles
from adallava.hosts.inputs import insert_latency_slot
from adallava.hosts.state import RequestState


def attach(model: Any, config: AdaptiveConfig) -> None:
    """Make ``model`` adaptive in place; ``ConfigError`` if ``config`` is not of this model."""
    layers = decoder_layers(model)
    expected = AdaptiveConfig.from_model_config(
        model.config.get_text_config(),
        variant=config.variant,
        prefix_layers=config.prefix_layers,
    )
    for name in ("num_layers", "num_heads", "num_kv_heads", "hidden_size"):
        if getattr(config, name) != getattr(expected, name):
            raise ConfigError(
                f"the adaptive config says {name} = {getattr(config, name)}, the model has {getattr(expected, name)}. "
                "Use the config that was made for this model."
            )
    if is_attached(model):
        raise ConfigError("the model is adaptive already. Detach it first.")
    for layer in layers:
        layer.__class__ = _adaptive_class(type(layer), LlamaLikeLayer)
    model.__class__ = _adaptive_class(type(model), AdaptiveTop)


def detach(model: nn.Module) -> None:
    """Undo ``attach``: afterwards the model has its old classes and gives bit-identical results."""
    if not is_attached(model):
        raise CheckpointError("the model is not adaptive, so there is nothing to detach.")
    for module in (*decoder_layers(model), model):
        module.__class__ = type(module).host_class


def is_attached(model: nn.Module) -> bool:
    """Whether ``attach`` was called on the model."""
    return isinstance(model, AdaptiveTop)


_CLASSES: dict[Any, Any] = {}


def _adaptive_class(host: Any, mixin: Any) -> Any:
    """The subclass of ``host`` with the behaviour of ``mixin``, made once, so that equal hosts have equal classes."""
    if (host, mixin) not in _CLASSES:
        _CLASSES[host, mixin] = _make_class(host, mixin)
    return _CLASSES[host, mixin]


def _make_class(host: Any, mixin: Any) -> Any:
    """A class with the host's name and forward signature, plus ``ada_state``."""
    forward: Any = functools.wraps(host.forward)(mixin.__dict__["adaptive_forward"])
    signature = inspect.signature(host.forward)
    parameters = list(signature.parameters.values())
    state = inspect.Parameter("ada_state", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    # generate() and Trainer read the signature to learn what a model accepts.
    forward.__signature__ = signature.replace(parameters=[*parameters[:at], state, *parameters[at:]])
    names: dict[str, Any] = {
        "forward": forward,
        "host_class": host,
        "__module__": host.__module__,
        "__doc__": host.__doc__,
    }
    return type(host.__name__, (mixin, host), names)


class AdaptiveTop:
    """The top model: puts the slot of the latency token into the prompt and hands the state on."""

    host_class: Any
    training: bool
    config: Any

    def adaptive_forward(self, *args: Any, ada_state: RequestState | None = None, **kwargs: Any) -> Any:
        """The host's forward; ``ada_state`` makes it adaptive, as does a cache that an adaptive prefill filled."""
        cache = kwargs.get("past_key_values")
        if ada_state is None and isinstance(cache, AdaptiveCache):
            ada_state = cache.state
        forward = self.host_class.forward
        if ada_state is None:
            return forward(self, *args, **kwargs)
        if args:
            kwargs = dict(inspect.signature(forward).bind_partial(self, *args, **kwargs).arguments)
            kwargs |= kwargs.pop("kwargs", {})
            kwargs.pop("self")
        self._give_cache(kwargs, ada_state)
        if ada_state.latency_index is None:
            kwargs, ada_state.latency_index = insert_latency_slot(kwargs, ada_state.slot_id)
        return forward(self, **kwargs, ada_state=ada_state)

    def _give_cache(self, kwargs: dict[str, Any], state: RequestState) -> None:
        """Make the request's own cache where the host would make an ordinary one, and refuse any other."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            if not self.training and kwargs.get("use_cache", self.config.get_text_config().use_cache):
                kwargs["past_key_values"] = AdaptiveCache(state)
        elif not isinstance(cache, AdaptiveCache):
            raise ConfigError(
                f"a plan needs a KV cache that holds just what it runs, got a {type(cache).__name__}. Leave out "
                "past_key_values, or pass AdaptiveCache(ada_state)."
            )
        elif cache.state is not state:
            raise ConfigError("the KV cache belongs to another request. Start each request with a cache of its own.")


class LlamaLikeLayer:
    """A decoder layer built as norm, attention, add; norm, gated MLP, add."""

    host_class: Any
    self_attn: Any
    mlp: Any
    training: bool

    def __call__(self, hidden_states: Tensor, *args: Any, ada_state: RequestState | None = None, **kwargs: Any) -> Any:
        """Do what must happen once per forward, outside gradient checkpointing, then run the layer."""
        if ada_state is not None:
            index, prefix = self.self_attn.layer_idx, ada_state.config.prefix_layers
            if index == 0:
                cache = kwargs.get("past_key_values")
                hidden_states = ada_state.place_latency_token(hidden_states, cache.get_seq_length() if cache else 0)
            if index < prefix:
                ada_state = None
            elif index == prefix:
                ada_state.decide(hidden_states, self._gated(ada_state))
        return super().__call__(hidden_states, *args, ada_state=ada_state, **kwargs)  # type: ignore[misc]

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
        if ada_state is None:
            return self.host_class.forward(self, hidden_states, *args, **kw)
        assert not args, "the decoder passes everything but the hidden states by name"
        if ada_state.runs is None:
            return self._gated_forward(hidden_states, ada_state, **kw)
        run = ada_state.run_of(self.self_attn.layer_idx)
        if run.mode is Mode.SKIP:
            return hidden_states
        if run.mode is Mode.FULL:
            return self.host_class.forward(self, hidden_states, **kw)
        x = hidden_states if run.rows is None else hidden_states[run.rows]
        kw = _select_rows(kw, run.rows, len(hidden_states))
        if run.mode is Mode.ROWS:
            out = self.host_class.forward(self, x, **kw)
        else:
            out = self._sliced_forward(x, run, ada_state.config, **kw)
        return out if run.rows is None else hidden_states.index_copy(0, run.rows, out)

    def _gated_forward(self, x: Tensor, state: RequestState, **kw: Any) -> Tensor:
        """Everything is computed, and what a gate of zero covers adds exactly nothing."""
        assert state.gates is not None
        gates = state.gates[:, self.self_attn.layer_idx].to(x.dtype)  # [B, 2, G]
        normed = self.input_layernorm(x)  # type: ignore[attr-defined]
        if state.config.variant == "L":
            attention, _ = self.self_attn(hidden_states=normed, **kw)
            x = x + attention * gates[:, 0, :1, None]
            mlp = self.mlp(self.post_attention_layernorm(x))  # type: ignore[attr-defined]
            return x + mlp * gates[:, 1, :1, None]
        groups = state.config.groups
        on = (gates.detach() > 0.5).any(-1).to(x.dtype)[:, :, None, None]  # [B, 2, 1, 1], for output biases
        out = attention_heads(self.self_attn, normed, [(0, groups)], gates=gates[:, 0], **_attention_args(kw))
        x = x + _with_bias(self.self_attn.o_proj, out, on[:, 0])
        normed = self.post_attention_layernorm(x)  # type: ignore[attr-defined]
        out = gated_mlp(self.mlp, normed, gates[:, 1], mlp_bounds(self.mlp.down_proj.in_features, groups))
        return x + _with_bias(self.mlp.down_proj, out, on[:, 1])

    def _sliced_forward(self, x: Tensor, run: LayerRun, config: AdaptiveConfig, **kw: Any) -> Tensor:
        """Only the heads and neurons that are on, each on the rows that have it on."""
        cache = kw.get("past_key_values")

        def heads(rows: Tensor, bundle: Bundle, number: int) -> Tensor:
            some = _attention_args(_select_rows(kw, bundle.rows, len(x)))
            key = (self.self_attn.layer_idx, number)
            return attention_heads(self.self_attn, rows, bundle.spans, cache=cache, cache_key=key, **some)

        bounds = mlp_bounds(self.mlp.down_proj.in_features, config.groups)
        normed = self.input_layernorm(x)  # type: ignore[attr-defined]
        x = x + add_bias(self.self_attn.o_proj, sum_bundles(normed, run.attention, heads))
        normed = self.post_attention_layernorm(x)  # type: ignore[attr-defined]
        out = sum_bundles(normed, run.mlp, lambda rows, bundle, _: mlp_neurons(self.mlp, rows, bundle.spans, bounds))
        return x + add_bias(self.mlp.down_proj, out)


def _with_bias(linear: nn.Linear, out: Tensor, on: Tensor) -> Tensor:
    return out if linear.bias is None else out + linear.bias * on


def _attention_args(kw: dict[str, Any]) -> dict[str, Any]:
    dropped = ("past_key_values", "use_cache", "position_ids")
    return {name: value for name, value in kw.items() if name not in dropped}


def _select_rows(kw: dict[str, Any], rows: Tensor | None, batch: int) -> dict[str, Any]:
    """Keyword arguments of a decoder layer for some rows: everything that has one entry per row is indexed."""
    if rows is None:
        return kw
    return {name: _select(value, rows, batch) for name, value in kw.items()}


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_select(v, rows, batch) for v in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch:
        return value[rows]
    if type(value).__name__ == "BlockMask":
        raise ConfigError("flex attention cannot run a part of a batch. Load the model with sdpa or eager attention.")
    return value
