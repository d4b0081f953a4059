"""FLOPs in the *strict* convention: what a FLOP counter that watches the model would count.

2 FLOPs for each multiply-add of matrix products and convolutions, lm_head included, and nothing for softmax, norms,
adds, activation functions, rotary embedding and biases. That is torch's ``FlopCounterMode`` on the transformers model,
to the integer, which the tests hold it to. Attention counts all T * T scores, as the kernels' formulas do. Matrices and
scores cost the same as in the paper's convention, so they are taken from there.

Not counted: what ranks visual tokens, and the latency encoder and scheduler (0.04 GFLOPs of LLaVA-1.5-7B's 8286).
"""

from __future__ import annotations

from typing import Literal

from adallava.cost.flops import Pass, Tokens, decode_step, prefill
from adallava.cost.load import PlanLike
from adallava.cost.spec import CostError, ModelSpec

STRICT = "strict"
Logits = Literal["last", "all"]
_PRODUCTS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qk_matmul", "sv_matmul"}


def strict_prefill_flops(
    spec: ModelSpec,
    plan: PlanLike,
    tokens: Tokens,
    *,
    logits: Logits = "last",
    batch: int = 1,
    tensor_parallel: int = 1,
) -> float:
    """Return the FLOPs of the language model's prefill (strict convention), a whole number unless neurons are split.

    logits: "last" as in generate(), which runs lm_head on one position; "all" as in a plain forward, which runs it on
        every position of the prompt, those included that were dropped on the way.
    The other arguments and the errors are those of ``flops.prefill``.
    """
    if logits not in ("last", "all"):
        raise CostError(f"logits is {logits!r}, expected 'last' (one position, as in generate()) or 'all'.")
    ops = prefill(spec, plan, tokens, batch=batch, tensor_parallel=tensor_parallel)
    positions = 1 if logits == "last" else tokens if isinstance(tokens, int) else max(tokens)
    return _products(ops) + _lm_head(spec, positions * batch, tensor_parallel)


def strict_decode_step_flops(
    spec: ModelSpec, plan: PlanLike, tokens: Tokens, *, batch: int = 1, tensor_parallel: int = 1
) -> float:
    """Return the FLOPs of one decoding step that attends to ``tokens`` positions (strict convention)."""
    ops = decode_step(spec, plan, tokens, batch=batch, tensor_parallel=tensor_parallel)
    return _products(ops) + _lm_head(spec, batch, tensor_parallel)


def _products(ops: Pass) -> float:
    return sum(op.flops * count for op, count in ops.ops if op.name in _PRODUCTS)


def _lm_head(spec: ModelSpec, positions: int, devices: int) -> float:
    flops = 2 * positions * spec.hidden_size * spec.vocab_size
    return flops // devices if flops % devices == 0 else flops / devices
