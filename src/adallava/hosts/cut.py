"""``TokenCut``: image tokens that are dropped inside the decoder, before one layer, in the prefill of a request.

The layer before the cut runs whole, and its attention function is exchanged for one that also works out what a single
token of each prompt looks at: that row is all a ``DecoderSelector`` asks for, so any attention kernel will do. From the
cut on, hidden states, masks, positions and KV cache hold the tokens that stay, at their old positions; behind the last
layer they are put back into their places, so that logits and labels keep the shape of the prompt.

Padding is dropped with them. Rows may keep different numbers of tokens; one that keeps fewer is filled up with dropped
tokens that nobody may see.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adallava.errors import ConfigError, PlanError
from adallava.selection.common import DecoderSelector
from adallava.selection.fastv import last_query_attention

_WATCHING = "adallava_watching"


class TokenCut:
    """The cut of one request: which tokens there are, who looks, and, once decided, which tokens stay (``keep``).

    layers: how many the decoder has. image: bool [B, T], image tokens of a prompt that comes as embeddings.
    """

    def __init__(self, selector: DecoderSelector, layers: int, image: Tensor | None = None) -> None:
        self.selector, self.layer, self.layers, self.given = selector, selector.layer, layers, image
        self.keep: Tensor | None = None  # bool [B, T], of the prompt
        self._image: Tensor | None = None  # bool [B, T]
        self._looks: Tensor | None = None  # int64 [B]
        self._real: Tensor | None = None  # bool [B, T], what is not padding
        self._order: Tensor | None = None  # int64 [B, W], positions that stay, ascending, after those that fill up
        self._stays: Tensor | None = None  # bool [B, W], false for what fills up
        self._ragged = False
        self._past = self._prompt = 0  # tokens in the cache before this forward, tokens of the prompt
        self._short: dict[int, tuple[Any, Any]] = {}

    # -- before the layers ------------------------------------------------------------------------------------------

    def start(self, image: Tensor, looks: Tensor, attention_mask: Tensor | None) -> None:
        """Begin the forward of a whole prompt.

        image: bool [B, T], image tokens. looks: int64 [B], the token whose attention ranks them, the prompt's last.
        attention_mask: [B, T], zero for padding; None without padding.
        """
        self._image, self._looks = image, looks
        self._real = torch.ones_like(image) if attention_mask is None else attention_mask.bool()

    @property
    def decided(self) -> bool:
        """Whether a prompt was ranked."""
        return self.keep is not None

    # -- the layer before the cut -----------------------------------------------------------------------------------

    def watched(self, attention: Any) -> dict[str, Any]:
        """What to exchange in an attention module, so that its forward runs ``_watch``."""
        return {"config": _Exchanged(attention.config), "ada_cut": self}

    @torch.no_grad()
    def rank(self, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
        """Decide which tokens stay, from query [B, H, T, D] and key [B, Hkv, T, D] after rotary embedding; once."""
        if self.decided:
            return
        assert self._looks is not None and self._image is not None and self._real is not None
        rows, tokens = torch.arange(len(query), device=query.device), key.shape[2]
        if isinstance(mask, Tensor) and mask.dim() == 4:
            seen = mask.expand(len(query), *mask.shape[1:])[rows, 0, self._looks, :tokens]
        else:
            position, looks = torch.arange(tokens, device=query.device), self._looks[:, None]
            seen = self._real & (position <= looks)
            if (window := options.get("sliding_window")) is not None:
                seen = seen & (position > looks - window)
        attention = last_query_attention(
            query[rows, :, self._looks], key, seen, scaling=options.get("scaling"), softcap=options.get("softcap")
        )
        self.keep = self.selector.keep(attention, self._image) & self._real

    # -- the layers after it ----------------------------------------------------------------------------------------

    def enter(self, hidden: Tensor, past_tokens: int) -> Tensor:
        """Drop tokens from hidden states [B, T, D] before the cut's layer: [B, W, D]; a decoding step passes as it is.

        past_tokens: tokens in the cache before this forward.
        """
        self._short, self._past = {}, past_tokens
        if past_tokens > 0:
            return hidden
        if self.keep is None:
            raise PlanError("no layer ranked the tokens of this prompt. Start each request with an empty cache.")
        self._prompt = hidden.shape[1]
        # Without a cache the answer so far is part of the prompt; it stays.
        keep = torch.nn.functional.pad(self.keep, (0, self._prompt - self.keep.shape[1]), value=True)
        least, width = torch.stack(keep.sum(1).aminmax()).tolist()  # one wait for the device in a request
        self._ragged = least < width
        self._order = keep.byte().sort(dim=1, stable=True).indices[:, -width:]
        self._stays = keep.gather(1, self._order)
        return hidden.gather(1, self._order[..., None].expand(-1, -1, hidden.shape[-1]))

    def arguments(self, arguments: dict[str, Any], hidden: Tensor, flash: bool) -> dict[str, Any]:
        """The arguments of a layer from the cut on, for the tokens that stay; layers that share one share the result.

        flash: whether the attention function takes a mask [B, T] rather than [B, 1, T, T].
        """
        new = dict(arguments)
        for name in {"attention_mask", "position_embeddings", "position_ids"} & arguments.keys():
            value = arguments[name]
            if id(value) not in self._short or value is None:
                self._short[id(value)] = (value, self._shorten(name, value, hidden, flash))
            new[name] = self._short[id(value)][1]
        return new

    def leave(self, hidden: Tensor) -> Tensor:
        """Put hidden states [B, W, D] behind the last layer back into their places: [B, T, D], zero where dropped."""
        if self._past > 0:
            return hidden
        assert self._order is not None
        whole = hidden.new_zeros(hidden.shape[0], self._prompt, hidden.shape[2])
        return whole.scatter(1, self._order[..., None].expand(-1, -1, hidden.shape[-1]), hidden)

    def where(self, index: Tensor) -> Tensor:
        """Positions int64 [B] of the prompt -> places in the shortened hidden states."""
        assert self._order is not None and self._stays is not None
        return ((self._order == index.to(self._order.device)[:, None]) & self._stays).byte().argmax(1)

    def lengths(self, mask: Tensor) -> list[list[int]]:
        """Tokens that each layer processes, for every row: [B][layers]. mask: [B, T], zero for padding."""
        assert self.keep is not None
        before, after = mask.sum(1).tolist(), self.keep.sum(1).tolist()
        return [[b] * self.layer + [a] * (self.layers - self.layer) for b, a in zip(before, after, strict=True)]

    # -- one argument -----------------------------------------------------------------------------------------------

    def _shorten(self, name: str, value: Any, hidden: Tensor, flash: bool) -> Any:
        if name == "attention_mask":
            return self._mask(value, hidden, flash)
        if self._past > 0 or value is None:
            return value
        assert self._order is not None
        if name == "position_ids":
            # Rotary embeddings were made of them already. Flash attention would take gaps for several packed prompts.
            return torch.arange(hidden.shape[1], device=hidden.device)[None]
        return tuple(_along_tokens(part, self._order) for part in value)

    def _mask(self, mask: Any, hidden: Tensor, flash: bool) -> Any:
        """The mask of the tokens that stay, in the form in which it came; None stands for nothing but causality."""
        assert self._order is not None and self._stays is not None
        if mask is None and not self._ragged:
            return None
        if mask is not None and not isinstance(mask, Tensor):
            raise ConfigError(
                f"tokens cannot be dropped under a {type(mask).__name__}. Load the model with sdpa, eager or flash "
                "attention."
            )
        batch, queries = hidden.shape[:2]
        answered = self._past + queries - self._prompt if self._past else 0
        answer = torch.arange(self._prompt, self._prompt + answered, device=hidden.device).expand(batch, -1)
        columns = torch.cat((self._order, answer), 1)  # [B, C], positions of the keys
        real = torch.cat((self._stays, torch.ones_like(answer, dtype=torch.bool)), 1)
        if flash:
            return real.long() if mask is None else mask.gather(1, columns) * real.to(mask.dtype)
        rows = columns[:, -queries:]  # positions of the queries
        real = real[:, None, None]
        if mask is None:
            return (rows[:, None, :, None] >= columns[:, None, None]) & real
        mask = mask.expand(batch, *mask.shape[1:])
        if not self._past:
            mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], queries, -1))
        return mask & real if mask.dtype == torch.bool else mask.masked_fill(~real, torch.finfo(mask.dtype).min)


def _along_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x [..., 1 or B, T, D] at the positions ``order`` [B, W]: [..., B, W, D]."""
    lead = x.shape[:-3]
    index = order[..., None].expand(*lead, *order.shape, x.shape[-1])
    return x.expand(*lead, len(order), *x.shape[-2:]).gather(-2, index)


# -- the attention function that is watched ---------------------------------------------------------------------------


class _Exchanged:
    """A config that names the watching attention function, and is the model's config in everything else."""

    def __init__(self, config: Any) -> None:
        self._config, self._attn_implementation = config, _WATCHING

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


def _watch(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """Rank the tokens, then run the attention function that the model was loaded with."""
    module.ada_cut.rank(query, key, attention_mask, options)
    whole = module._module
    name = whole.config._attn_implementation
    if name == "eager":  # every family has its own
        function = vars(sys.modules[type(whole).__module__])["eager_attention_forward"]
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    return function(whole, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(_WATCHING, _watch)
