"""Which of generate()'s ways of decoding go together with a plan, and which with a budget in time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from adallava.errors import PromptError

DEFAULT_NEW_TOKENS = 128
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


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ``PromptError`` for an option of generate() that does not go with a plan."""
    for name in set(_REFUSED) & {n for n, v in options.items() if v is not None}:
        raise PromptError(f"generate() was given {name}={options[name]!r}: {_REFUSED[name]}. Leave it out.")


def one_sequence(options: Mapping[str, Any]) -> bool:
    """Whether generate() makes one sequence for each request, token by token with a cache, as is measured."""
    several = any((options.get(name) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
    return not several and options.get("use_cache", True)


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
