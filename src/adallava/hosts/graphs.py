"""``DecodeGraphs``: decoding steps of whole layers as CUDA graphs, captured once and replayed as a plan says.

One new token passes through a layer as a dozen small kernels, whose launches take longer than they do. A graph is one
launch. A layer that runs whole does the same in every request, so its graph serves them all: the decoding of a plan is
a list of replays. What a graph reads lies in one place for ever: hidden state, position, mask, and keys and values with
room for ``max_tokens``. Layers that run in part, or for some rows, run as they do without graphs; so does a second
request that decodes at the same time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from adallava.errors import ConfigError

if TYPE_CHECKING:
    from adallava.hosts.model import AdaptiveVLM
    from adallava.hosts.state import RequestState

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Turns work on fixed tensors into what does it again."""
_WARM_UP = 3


def capture_cuda(work: Callable[[], None]) -> Callable[[], None]:
    """Record ``work`` as a CUDA graph; returns its replay. It is run a few times on the way."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def use_graphs(vlm: AdaptiveVLM, max_tokens: int = 2048, capture: Capture = capture_cuda) -> None:
    """Let ``vlm`` decode single requests of up to ``max_tokens`` tokens, prompt and answer, with graphs from now on.

    It costs the memory of a KV cache of that length. capture: how work is recorded; other than CUDA graphs in tests.
    Raises ``ConfigError`` where the model cannot.
    """
    config = vlm.model.config.get_text_config()
    if capture is capture_cuda and vlm.device.type != "cuda":
        raise ConfigError(f"the model is on {vlm.device}, and CUDA graphs are for CUDA. Leave them out.")
    if config._attn_implementation != "sdpa":
        raise ConfigError(
            f"graphs need sdpa attention, the model has {config._attn_implementation}. Load it with "
            "attn_implementation='sdpa'."
        )
    if capture is capture_cuda and _looks_for_outliers(vlm.model):
        raise ConfigError(
            "CUDA graphs cannot hold 8-bit weights whose llm_int8_threshold is above 0: each product waits for the "
            "outliers' positions. Load the model with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)."
        )
    if getattr(config, "sliding_window", None) is not None:
        raise ConfigError("graphs do not know sliding windows, which this model has. Leave them out.")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens!r}, expected a whole number of 1 or more.")
    vlm.graphs = DecodeGraphs(max_tokens, capture)


def _looks_for_outliers(model: nn.Module) -> bool:
    """Whether a product with the model's weights reads a result back to the host (bitsandbytes' mixed 8 bits)."""
    return any(getattr(getattr(module, "state", None), "threshold", 0.0) > 0 for module in model.modules())


@contextlib.contextmanager
def lent(graphs: DecodeGraphs | None, state: RequestState | None, rows: int, tokens: int) -> Iterator[None]:
    """Give the graphs to a request for a while, if there are any, they are free, and the request fits."""
    if graphs is None or state is None or rows != 1 or tokens > graphs.max_tokens or not graphs.lock.acquire(False):
        yield
        return
    try:
        state.graphs = graphs
        yield
    finally:
        state.graphs = None
        graphs.lock.release()


class DecodeGraphs:
    """The graphs of one model's layers, and the tensors that they read and write."""

    def __init__(self, max_tokens: int, capture: Capture) -> None:
        self.max_tokens, self.capture, self.lock, self.length = max_tokens, capture, threading.Lock(), 0
        self._rotary: tuple[Tensor, ...] = ()
        self._layers: dict[int, _FixedLayer] = {}
        self._replays: dict[int, Callable[[], None]] = {}

    def run(self, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """A decoding step of a whole layer: hidden state [1, 1, D] -> [1, 1, D], one tensor that is written again.

        arguments: those of the host's forward.
        """
        index, cache = layer.self_attn.layer_idx, arguments["past_key_values"]
        if index == 0:
            self._begin(hidden, cache.get_seq_length(), arguments)
        if not isinstance(cache.layers[index], _FixedLayer):
            self._adopt(cache, index)
        if hidden is not self.hidden:
            self.hidden.copy_(hidden)
        if index not in self._replays:
            self._replays[index] = self._record(layer, {**arguments, "past_key_values": cache})
        self._replays[index]()
        return self.hidden

    def _begin(self, hidden: Tensor, length: int, arguments: dict[str, Any]) -> None:
        """Put into place what all layers read: position, rotary embedding, and which keys count."""
        if not self._rotary:
            # Like the hidden state, whose type is not that of packed weights.
            self.hidden = torch.zeros_like(hidden)
            self.mask = hidden.new_zeros(1, 1, 1, self.max_tokens, dtype=torch.bool)
            self.position = hidden.new_zeros(1, dtype=torch.long)
            self._rotary = tuple(part.clone() for part in arguments["position_embeddings"])
        for fixed, given in zip(self._rotary, arguments["position_embeddings"], strict=True):
            fixed.copy_(given)
        self.position.fill_(length)
        self.mask.fill_(False)
        given = arguments.get("attention_mask")
        seen = self.mask[..., : length + 1]
        if given is None:
            seen.fill_(True)
        else:
            seen.copy_(given if given.dtype == torch.bool else given == 0)
        self.length = length + 1

    def _adopt(self, cache: Any, index: int) -> None:
        """Take over the keys and values that a prompt left in a layer."""
        held = cache.layers[index]
        if index not in self._layers:
            self._layers[index] = _FixedLayer(self, held.keys, held.values)
        self._layers[index].take(held.keys, held.values)
        cache.layers[index] = self._layers[index]

    def _record(self, layer: Any, arguments: dict[str, Any]) -> Callable[[], None]:
        index = layer.self_attn.layer_idx
        fixed = {**arguments, "attention_mask": self.mask, "position_embeddings": self._rotary}
        fixed["past_key_values"] = _One(index, self._layers[index])
        fixed["position_ids"] = None

        def work() -> None:
            self.hidden.copy_(layer.host_class.forward(layer, self.hidden, **fixed))

        before = self.hidden.clone()
        replay = self.capture(work)
        self.hidden.copy_(before)
        return replay


class _FixedLayer(DynamicLayer):
    """Keys and values [1, heads, max_tokens, head_dim] that stay where they are."""

    def __init__(self, graphs: DecodeGraphs, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.graphs, self.is_initialized = graphs, True
        self.keys, self.values = (
            part.new_zeros(1, part.shape[1], graphs.max_tokens, part.shape[-1]) for part in (keys, values)
        )

    def take(self, keys: Tensor, values: Tensor) -> None:
        self.keys[..., : keys.shape[-2], :] = keys
        self.values[..., : values.shape[-2], :] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a token [1, heads, 1, head_dim] at its position; returns everything, of which the mask shows a part."""
        self.keys.index_copy_(-2, self.graphs.position, key_states)
        self.values.index_copy_(-2, self.graphs.position, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.graphs.length

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.keys.nbytes + self.values.nbytes)


class _One:
    """A cache of one layer, as an attention module sees it."""

    def __init__(self, index: int, layer: _FixedLayer) -> None:
        self.index, self.layer = index, layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert layer_idx == self.index, "a layer was recorded with its own cache"
        return self.layer.update(keys, values)
