"""Which of generate()'s ways of decoding go together with a plan, and which with a budget in time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig

from adallava.errors import PromptError

DEFAULT_NEW_TOKENS = 128
_WAYS = ("num_beams", "num_return_sequences", "use_cache")
_REFUSED = {
    "assistant_model": "assisted decoding verifies drafts under another plan",
    "prompt_lookup_num_tokens": "assisted decoding verifies drafts under another plan",
    "assistant_early_exit": "assisted decoding verifies drafts under another plan",
    "custom_generate": "only transformers' own greedy, sampling and beam decoding are supported",
    "cache_implementation": "a plan needs the cache that holds just what it runs",
    "past_key_values": "a plan belongs to one request, whose cache is made here",
    "prefill_chunk_size": "the plan is decided at the end of the prompt, so the prompt is prefilled at once",
    "guidance_scale": "classifier-free guidance runs a second prompt under the same plan",
    "ada_state": "the request state is made here",
}


def read_options(options: Mapping[str, Any], own: GenerationConfig) -> dict[str, Any]:
    """Options of generate() as keywords alone: those of a ``generation_config`` are among them, what is None is not.

    own: the model's generation settings, which say what nobody else does of how many sequences there are and whether
    keys and values are kept. Raises ``PromptError`` for an option that does not go with a plan.
    """
    given = options.get("generation_config") or GenerationConfig()
    if not isinstance(given, GenerationConfig):
        raise PromptError(
            f"generation_config is {given!r}, expected a transformers GenerationConfig. Pass its options as keywords."
        )
    ways = {name: getattr(own, name, None) for name in _WAYS}
    # One that was loaded says where it comes from too, which is no option.
    said = {n: v for n, v in vars(given).items() if n != "transformers_version" and not n.startswith("_")}
    read = {n: v for source in (ways, said, options) for n, v in source.items() if v is not None}
    read.pop("generation_config", None)
    for name in set(_REFUSED) & set(read):
        raise PromptError(f"generate() was given {name}={read[name]!r}: {_REFUSED[name]}. Leave it out.")
    return read


def most_new_tokens(options: Mapping[str, Any], prompt_tokens: int) -> int:
    """Tokens of each answer, at most. prompt_tokens: of the longest prompt, which ``max_length`` counts too."""
    if "max_new_tokens" in options or "max_length" not in options:
        return int(options.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    length = int(options["max_length"])
    if length <= prompt_tokens:
        raise PromptError(
            f"max_length is {length}, and the prompt has {prompt_tokens} tokens. Raise it, or pass max_new_tokens."
        )
    return length - prompt_tokens


def one_sequence(options: Mapping[str, Any]) -> bool:
    """Whether generate() makes one sequence for each request, token by token with a cache, as is measured."""
    several = any((options.get(name) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
    return not several and bool(options.get("use_cache", True))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; a module that is in it already, perhaps shared by threads, is left alone."""
    if not module.training:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()
