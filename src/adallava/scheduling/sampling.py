"""Algorithm 1: from the scheduler's logits and k to gates, in training (sampled) and inference (greedy).

Training picks k switches one by one without replacement, each from Categorical(softmax of what is still off), with
Gumbel-Softmax and the straight-through estimator: the forward value is exactly 0 or 1, the gradient that of the
softmax of every pick. Inference takes the most likely switches; tau and noise play no part there.

Everything is computed in float32, whatever the model's dtype: in half precision logits closer than one rounding step
would tie, and the hard choice must not depend on that. Logits are [B, S] with S ``config.num_logits``, laid out as
[layer] for L and [layer][G attention | G MLP] for H. Gates are [B, L, 2, G] with a prefix of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from adallava.config import AdaptiveConfig
from adallava.plan import expand_tail

NoiseSource = Callable[[str, int, tuple[int, ...]], Tensor]
"""``noise(part, pick, shape)`` -> Gumbel noise [B, ...]; part "layer", then for H also "attention" and "mlp"."""


def sample_gates(
    logits: Tensor,
    k: Tensor,
    config: AdaptiveConfig,
    *,
    tau: float | None = None,
    noise: NoiseSource | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw gates with a gradient (Algorithm 1, eq. A): float32 [B, L, 2, G], every value exactly 0 or 1.

    logits: [B, S]. k: int64 [B], how many switches each row turns on, 0 to ``config.max_k``; rows may differ.
    tau: temperature, ``config.tau`` when None. It smooths the gradient only: the noise is added before the division.
    noise: source of Gumbel noise, for replaying recorded draws; fresh noise when None. It is asked at every pick, in
        the order layer, attention, mlp, for whole batches; what it gives rows that are done has no effect.
    generator: for fresh noise; may live on the CPU while the logits do not, so that a seed means the same everywhere.
    """
    picks = _check(logits, k, config)
    noise = noise or gumbel_noise(logits.device, generator)
    tau = config.tau if tau is None else tau
    pick_one = _pick_layer if config.variant == "L" else _pick_heads
    scores = _tail_view(logits, config)
    gates = torch.zeros_like(scores)
    for pick in range(picks):
        active = pick < k  # [B]
        # Rows that are done pick too, and the pick is dropped. Their k is below the largest, so something is left to
        # pick from: a softmax over nothing would be NaN, and stay NaN in the gradient.
        taken = gates.detach() > 0.5
        step = pick_one(scores, taken, tau, partial(_draw, noise, pick), config)
        gates = gates + torch.where(active[:, None, None, None], step, 0.0)
    return expand_tail(gates.expand(-1, -1, 2, config.groups), config)


def greedy_gates(logits: Tensor, k: Tensor, config: AdaptiveConfig, *, first_layer: int = 0) -> Tensor:
    """Return the most likely gates: bool [B, L, 2, G] for logits [B, S] and k int64 [B].

    first_layer: switches of tail layers before it are not to be had; k is at most those of the layers from it on.

    L: the k largest logits, ties to the lower layer. H: k times the layer with the largest remaining logit, then its
    largest remaining attention and MLP columns. Both are one sort: a layer's j-th visit takes ranks j*r..j*r+r-1 of
    its sorted attention and MLP columns, so the logit that wins it that visit is the larger of the two at rank j*r.
    These keys fall with j, hence the k largest keys of all layers and visits are the greedy choice.
    """
    _check(logits, k, config)
    scores = _tail_view(logits.detach(), config)
    by_rank, rank = _sort_columns(scores)
    keys = by_rank[..., :: config.groups_per_switch if config.variant == "H" else 1].amax(2)  # [B, N-P, visits]
    keys[:, : max(0, first_layer - config.prefix_layers)] = float("-inf")
    visits = _top_k(keys.flatten(1), k).view_as(keys).sum(-1)
    return _gates_of_counts(visits, rank, config)


def random_gates(k: Tensor, config: AdaptiveConfig, generator: torch.Generator | None = None) -> Tensor:
    """Return gates drawn uniformly: bool [B, L, 2, G] on the device of k, int64 [B].

    The distribution of ``sample_gates`` with equal logits, without its loop: a uniform choice of k of the tail's
    switches says how many each layer gets, and a uniform choice of its columns which ones.
    """
    _check_k(k, config)
    batch = (k.shape[0], config.tail_layers)
    device = generator.device if generator is not None else k.device
    keys = torch.rand(*batch, config.switches_per_layer, generator=generator, device=device).to(k.device)
    columns = torch.rand(*batch, 2, config.groups, generator=generator, device=device).to(k.device)
    visits = _top_k(keys.flatten(1), k).view_as(keys).sum(-1)
    return _gates_of_counts(visits, _sort_columns(columns)[1], config)


def static_gates(k: Tensor, config: AdaptiveConfig) -> Tensor:
    """Return the fixed gates of k, int64 [B]: bool [B, L, 2, G], spread evenly over the tail.

    A plan that looks at neither image nor question, to compare learned plans with. Plans are nested: those of k + 1
    contain those of k. H gives every layer its n-th switch before any layer its n+1-th.
    """
    _check_k(k, config)
    spread = _spread_order(config.tail_layers)
    keys = torch.empty(config.switches_per_layer, config.tail_layers)
    keys[:, spread] = -torch.arange(float(keys.numel())).view_as(keys)
    keys = keys.T.flatten().to(k.device).expand(k.shape[0], -1)  # [B, (N-P) * switches_per_layer]
    visits = _top_k(keys, k).view(k.shape[0], config.tail_layers, -1).sum(-1)
    rank = torch.arange(config.groups, device=k.device).expand(*visits.shape, 2, -1)
    return _gates_of_counts(visits, rank, config)


def gumbel_noise(device: torch.device, generator: torch.Generator | None = None) -> NoiseSource:
    """Return a source of fresh standard Gumbel noise, float32, drawn where the generator lives."""

    def draw(part: str, pick: int, shape: tuple[int, ...]) -> Tensor:
        exponential = torch.empty(shape, device=generator.device if generator is not None else device)
        # An exponential draw can round to zero, whose logarithm is infinite.
        exponential.exponential_(generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
        return -exponential.log().to(device)

    return draw


def row_noise(generators: Sequence[torch.Generator], device: torch.device) -> NoiseSource:
    """Return a source of Gumbel noise whose row b comes from ``generators[b]`` alone.

    What a sample draws then depends neither on the samples beside it nor on the device that it trains on.
    """
    sources = [gumbel_noise(torch.device("cpu"), generator) for generator in generators]

    def draw(part: str, pick: int, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([source(part, pick, shape[1:]) for source in sources]).to(device)

    return draw


# -- one pick of Algorithm 1 ------------------------------------------------------------------------------------------

_Draw = Callable[[str, Tensor], Tensor]


def _draw(noise: NoiseSource, pick: int, part: str, like: Tensor) -> Tensor:
    return noise(part, pick, tuple(like.shape)).to(like)


def _pick_layer(scores: Tensor, taken: Tensor, tau: float, draw: _Draw, config: AdaptiveConfig) -> Tensor:
    flat = scores.flatten(1)  # [B, N-P]
    picked = _straight_through(flat, taken.flatten(1), draw("layer", flat), tau, 1)
    return picked.view_as(scores)


def _pick_heads(scores: Tensor, taken: Tensor, tau: float, draw: _Draw, config: AdaptiveConfig) -> Tensor:
    flat = scores.flatten(1)  # [B, (N-P) * 2 * G]
    entry = _straight_through(flat, taken.flatten(1), draw("layer", flat), tau, 1)
    layer = entry.view_as(scores).sum((2, 3))[:, :, None, None]  # [B, N-P, 1, 1], one-hot over layers
    # The product, not an index: the columns' logits then carry gradient to the choice of the layer as well.
    columns = (scores * layer).sum(1)  # [B, 2, G]
    column_taken = (taken & (layer.detach() > 0.5)).any(1)
    halves = []
    for half, part in enumerate(("attention", "mlp")):
        noise = draw(part, columns[:, half])
        halves.append(_straight_through(columns[:, half], column_taken[:, half], noise, tau, config.groups_per_switch))
    return layer * torch.stack(halves, dim=1)[:, None]


def _straight_through(scores: Tensor, taken: Tensor, noise: Tensor, tau: float, count: int) -> Tensor:
    """Pick the ``count`` largest of [B, n]: forward exactly 0/1, gradient that of softmax((scores + noise) / tau)."""
    z = ((scores + noise) / tau).masked_fill(taken, float("-inf"))
    # From z, not from the softmax: with far-apart scores probabilities underflow to ties at zero.
    hard = torch.zeros_like(z).scatter(-1, z.topk(count, dim=-1).indices, 1.0)
    soft = z.softmax(-1)
    # soft - soft.detach() is exactly zero, so this is exactly `hard`; (hard - soft.detach()) + soft need not be.
    return hard + (soft - soft.detach())


# -- shared -----------------------------------------------------------------------------------------------------------


def _tail_view(logits: Tensor, config: AdaptiveConfig) -> Tensor:
    """[B, S] -> float32 [B, N-P, 2, G] for H, [B, N-P, 1, 1] for L."""
    shape = (2, config.groups) if config.variant == "H" else (1, 1)
    return logits.float().reshape(logits.shape[0], config.tail_layers, *shape)


def _sort_columns(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the last axis, largest first, ties to the lower index; return the values and each entry's rank."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values, order.argsort(dim=-1)


def _top_k(keys: Tensor, k: Tensor) -> Tensor:
    """Return bool [B, n], true for the k[b] largest keys of row b; ties to the lower index."""
    return _sort_columns(keys)[1] < k[:, None]


def _gates_of_counts(visits: Tensor, rank: Tensor, config: AdaptiveConfig) -> Tensor:
    """Turn on, in each tail layer, the columns of lowest rank that ``visits`` [B, N-P] switches cover."""
    tail = rank < (visits * config.groups_per_switch)[:, :, None, None]  # [B, N-P, 2, G], or [B, N-P, 1, 1] for L
    return expand_tail(tail.expand(-1, -1, 2, config.groups), config)


def _spread_order(n: int) -> list[int]:
    """Order 0..n-1 so that every beginning is spread out: the last, the middle, the quarters (van der Corput)."""
    order: dict[int, None] = {}
    step = 0
    while len(order) < n:
        digits = f"{step:b}"[::-1]  # step mirrored at the binary point: 0, 1/2, 1/4, 3/4, ...
        order[n - 1 - (int(digits, 2) * n >> len(digits))] = None
        step += 1
    return list(order)


def _check(logits: Tensor, k: Tensor, config: AdaptiveConfig) -> int:
    if logits.dim() != 2 or logits.shape[1] != config.num_logits:
        raise ValueError(f"logits are {list(logits.shape)}, expected [B, {config.num_logits}] for this model.")
    if k.shape != logits.shape[:1]:
        raise ValueError(f"k is {list(k.shape)}, expected one number per row of logits, [{logits.shape[0]}].")
    return _check_k(k, config)


def _check_k(k: Tensor, config: AdaptiveConfig) -> int:
    """Return the largest k; raise ``ValueError`` unless k is integer [B] between 0 and ``config.max_k``."""
    if k.dim() != 1 or k.is_floating_point() or k.dtype == torch.bool:
        raise ValueError(f"k is {k.dtype} {list(k.shape)}, expected int64 [B]. Take it from Budget.resolve.")
    if k.numel() == 0:
        return 0
    low, high = (int(x) for x in k.aminmax())
    if low < 0 or high > config.max_k:
        raise ValueError(f"k is between {low} and {high}, expected 0 to {config.max_k}. Take it from Budget.resolve.")
    return high
