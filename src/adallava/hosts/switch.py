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
from adallava.errors import CheckpointError, ConfigError, PromptError
from adallava.hosts.arch import decoder_layers, decoder_of
from adallava.hosts.cache import AdaptiveCache
from adallava.hosts.inputs import embed_images, insert_latency_slot, latency_position, rope_positions
from adallava.hosts.layers import AdaptiveLayer
from adallava.hosts.state import RequestState


def attach(model: Any, config: AdaptiveConfig | None) -> None:
    """Make ``model`` adaptive in place; ``ConfigError`` if ``config`` is not of this model.

    Without a config its layers can drop visual tokens, but none can be off.
    """
    layers = decoder_layers(model)
    if config is not None:
        _check(model, config)
    if is_attached(model):
        raise ConfigError("the model is adaptive already. Detach it first.")
    decoder = decoder_of(model)
    for layer in layers:
        layer.__class__ = _adaptive_class(type(layer), AdaptiveLayer, decoder=decoder)
    model.__class__ = _adaptive_class(type(model), AdaptiveTop)


def _check(model: Any, config: AdaptiveConfig) -> None:
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


def _adaptive_class(host: Any, mixin: Any, **members: Any) -> Any:
    """The subclass of ``host`` with the behaviour of ``mixin``, made once, so that equal hosts have equal classes."""
    if (host, mixin) not in _CLASSES:
        _CLASSES[host, mixin] = _make_class(host, mixin, members)
    return _CLASSES[host, mixin]


def _make_class(host: Any, mixin: Any, members: dict[str, Any]) -> Any:
    """A class with the host's name and forward signature, plus ``ada_state``."""
    behaviour = mixin.adaptive_forward

    @functools.wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return behaviour(self, *args, **kwargs)

    signature = inspect.signature(host.forward)
    parameters = list(signature.parameters.values())
    state = inspect.Parameter("ada_state", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    # generate() and Trainer read the signature to learn what a model accepts.
    vars(forward)["__signature__"] = signature.replace(parameters=[*parameters[:at], state, *parameters[at:]])
    names: dict[str, Any] = {
        "forward": forward,
        "host_class": host,
        "__module__": host.__module__,
        "__doc__": host.__doc__,
        **members,
    }
    return type(host.__name__, (mixin, host), names)


class AdaptiveTop:
    """The top model: puts the slot of the latency token into the prompt and hands the state on."""

    host_class: Any
    training: bool
    config: Any
    model: Any

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
        if ada_state.latency_index is None and ada_state.scheduler is not None:
            kwargs, ada_state.latency_index = insert_latency_slot(kwargs, ada_state.slot_id)
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self._begin_prompt(kwargs, ada_state)
        if hasattr(self.model, "get_rope_index") and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = rope_positions(self.model, kwargs, ada_state)
        return forward(self, **kwargs, ada_state=ada_state)

    def _begin_prompt(self, kwargs: dict[str, Any], state: RequestState) -> None:
        """Tell the request what the prompt is, and put selected visual tokens into it."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        tokens: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        batch, length = tokens.shape[:2]
        state.expand(batch)
        if state.cut is not None:
            text = self.config.get_text_config()
            if "flash" in text._attn_implementation and getattr(text, "sliding_window", None) is not None:
                raise ConfigError(
                    "flash attention counts a sliding window in tokens, not in positions, so it cannot run behind "
                    "dropped tokens. Load the model with attn_implementation='sdpa'."
                )
            looks = state.latency_index
            if looks is None:
                looks = latency_position(batch, length, mask, kwargs.get("labels")) - 1
            image = state.cut.given if ids is None else ids == self.config.image_token_id
            if image is None:
                raise PromptError("a prompt of embeddings does not say which tokens are images. Pass input_ids.")
            state.cut.start(image, looks.to(tokens.device), mask)
        if state.images is not None and ids is not None:
            kwargs["inputs_embeds"] = embed_images(self, ids, state.images)
            kwargs["input_ids"] = kwargs["pixel_values"] = None

    def _give_cache(self, kwargs: dict[str, Any], state: RequestState) -> None:
        """Make the request's own cache where the host would make an ordinary one, and refuse any other."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            wanted = kwargs.get("use_cache")
            wanted = self.config.get_text_config().use_cache if wanted is None else wanted
            # Said explicitly, because hosts that are left to decide would make a cache of their own.
            kwargs["use_cache"] = wanted and not self.training
            if kwargs["use_cache"]:
                kwargs["past_key_values"] = AdaptiveCache(state)
        elif not isinstance(cache, AdaptiveCache):
            raise ConfigError(
                f"a plan needs a KV cache that holds just what it runs, got a {type(cache).__name__}. Leave out "
                "past_key_values, or pass AdaptiveCache(ada_state)."
            )
        elif cache.state is not state:
            raise ConfigError("the KV cache belongs to another request. Start each request with a cache of its own.")
