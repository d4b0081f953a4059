"""Gates: never more than k on and exactly k, in every mode, for both variants and grouped queries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adallava.config import AdaptiveConfig, valid_heads_per_switch
from adallava.plan import ExecutionPlan
from adallava.scheduling.sampling import greedy_gates, gumbel_noise, random_gates, sample_gates, static_gates


def make(variant="H", tail=3, heads=8, kv_heads=4, heads_per_switch=4, prefix=2):
    return AdaptiveConfig(
        variant=variant,
        num_layers=prefix + tail,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=8,
        prefix_layers=prefix,
        heads_per_switch=heads_per_switch,
    )


CONFIGS = [
    make("L", tail=6),
    make("H"),
    make("H", kv_heads=8, heads_per_switch=2),
    make("H", kv_heads=8, heads_per_switch=8),
    make("H", kv_heads=2, heads_per_switch=4),
]


@st.composite
def configs(draw):
    heads, kv_heads = draw(st.sampled_from([(4, 4), (8, 2), (6, 6), (8, 4), (8, 8)]))
    size = draw(st.sampled_from(valid_heads_per_switch(heads, kv_heads)))
    return make(draw(st.sampled_from("LH")), draw(st.integers(1, 5)), heads, kv_heads, size, draw(st.integers(1, 3)))


@st.composite
def requests(draw):
    config = draw(configs())
    batch = draw(st.integers(1, 4))
    k = torch.tensor([draw(st.integers(0, config.max_k)) for _ in range(batch)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4, 1e30]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    logits = (torch.randn(batch, config.num_logits, generator=generator) * scale).to(dtype)
    return config, logits, k, generator


@settings(deadline=None, max_examples=60)
@given(requests())
def test_exactly_k_in_every_mode(request):
    config, logits, k, generator = request
    logits.requires_grad_()
    sampled = sample_gates(logits, k, config, generator=generator)
    assert sampled.dtype == torch.float32
    assert set(sampled.detach().unique().tolist()) <= {0.0, 1.0}
    if k.any():
        (sampled * torch.randn(sampled.shape, generator=generator)).sum().backward()
        assert logits.grad.isfinite().all()
        assert not logits.grad[k == 0].any(), "k = 0 gives no gradient"
    for gates in (
        sampled.detach() > 0.5,
        greedy_gates(logits, k, config),
        random_gates(k, config, generator),
        static_gates(k, config),
    ):
        assert ExecutionPlan(gates, config).k == k.tolist()  # the plan checks prefix, layers and halves


def iterative_greedy(logits, k, config):
    """Greedy selection as it is told: k times the best remaining layer, then its best remaining columns."""
    scores = logits.float().view(config.tail_layers, 2, config.groups)
    on = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(k):
        best = max(
            (entry for entry in range(scores.numel()) if not on.flatten()[entry]),
            key=lambda entry: (scores.flatten()[entry].item(), -entry),
        )
        layer = best // (2 * config.groups)
        for half in range(2):
            off = [g for g in range(config.groups) if not on[layer, half, g]]
            off.sort(key=lambda g, row=scores[layer, half]: (-row[g].item(), g))
            on[layer, half, off[: config.groups_per_switch]] = True
    return on


@settings(deadline=None, max_examples=60)
@given(requests(), st.booleans())
def test_greedy_in_closed_form_is_the_iteration(request, with_ties):
    config, logits, k, _ = request
    logits = logits.clamp(-3, 3).round() if with_ties else logits
    gates = greedy_gates(logits, k, config)[:, config.prefix_layers :]
    for row in range(len(k)):
        if config.variant == "L":
            order = sorted(range(config.max_k), key=lambda i, row=row: (-logits[row, i].item(), i))
            assert gates[row, :, 0, 0].nonzero().flatten().tolist() == sorted(order[: k[row]])
        else:
            assert torch.equal(gates[row], iterative_greedy(logits[row], int(k[row]), config))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.variant}{c.num_kv_heads}r{c.heads_per_switch}")
class TestEveryConfig:
    def test_gradient_reaches_every_logit(self, config):
        logits = torch.randn(2, config.num_logits, generator=torch.Generator().manual_seed(0)).requires_grad_()
        k = torch.tensor([1, config.max_k - 1])
        gates = sample_gates(logits, k, config, generator=torch.Generator().manual_seed(1))
        weights = torch.randn(gates.shape, generator=torch.Generator().manual_seed(2))
        (gates * weights).sum().backward()
        # The layer choice alone makes all logits matter, those of the layers that were not picked too.
        assert (logits.grad != 0).all()

    def test_tau_does_not_change_what_is_drawn(self, config):
        logits = torch.randn(4, config.num_logits)
        k = torch.full((4,), config.max_k // 2)
        drawn = [
            sample_gates(logits, k, config, tau=tau, generator=torch.Generator().manual_seed(3)) for tau in (0.5, 50.0)
        ]
        assert torch.equal(*drawn)

    def test_same_seed_same_draw(self, config):
        k = torch.full((8,), config.max_k // 2)
        logits = torch.zeros(8, config.num_logits)
        for draw in (
            lambda g: sample_gates(logits, k, config, generator=g),
            lambda g: random_gates(k, config, g),
        ):
            first, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
            assert torch.equal(first, again)
            assert not torch.equal(first, other)

    def test_static_plans_are_nested(self, config):
        plan = ExecutionPlan(static_gates(torch.arange(config.max_k + 1), config), config)
        for k in range(config.max_k):
            assert (plan.row(k) & plan.row(k + 1)) == plan.row(k)

    def test_random_is_sampling_with_equal_logits(self, config):
        draws, k = 20_000, config.max_k // 2
        ks = torch.full((draws,), k)
        generator = torch.Generator().manual_seed(0)
        means, counts = [], []
        for gates in (
            random_gates(ks, config, generator),
            sample_gates(torch.zeros(draws, config.num_logits), ks, config, generator=generator) > 0.5,
        ):
            plan = ExecutionPlan(gates, config)
            means.append(plan.tail.float().mean(0))
            counts.append(torch.bincount(plan.switches_on.flatten(), minlength=config.switches_per_layer + 1) / draws)
        torch.testing.assert_close(*means, atol=0.03, rtol=0)
        torch.testing.assert_close(*counts, atol=0.06, rtol=0)
        torch.testing.assert_close(means[0], torch.full_like(means[0], k / config.max_k), atol=0.02, rtol=0)


@settings(deadline=None, max_examples=60)
@given(requests(), st.data())
def test_the_last_layers_can_be_decided_again(request, data):
    config, logits, k, _ = request
    layer = data.draw(st.integers(config.prefix_layers, config.num_layers - 1))
    plan = ExecutionPlan(greedy_gates(logits, k, config), config)
    left = torch.tensor(plan.left_from(layer))
    again = greedy_gates(logits, left, config, first_layer=layer)
    assert torch.equal(again[:, layer:], plan.gates[:, layer:]), "what was to run there is what is likeliest there"
    assert not again[:, config.prefix_layers : layer].any()
    room = (config.num_layers - layer) * config.switches_per_layer
    other = torch.tensor([data.draw(st.integers(0, room)) for _ in k])
    assert ExecutionPlan(greedy_gates(logits, other, config, first_layer=layer), config).k == other.tolist()


def test_static_is_spread():
    config = make("L", tail=8)
    rows = ExecutionPlan(static_gates(torch.arange(9), config), config).describe().splitlines()
    assert [row.rpartition("|")[2] for row in rows[:5]] == ["........", ".......#", "...#...#", "...#.#.#", ".#.#.#.#"]
    config = make("H", tail=4, kv_heads=8, heads_per_switch=2)
    assert ExecutionPlan(static_gates(torch.tensor([6]), config), config).describe().endswith("|1212")


def test_infinite_noise_from_a_zero_draw_cannot_happen():
    noise = gumbel_noise(torch.device("cpu"), torch.Generator().manual_seed(0))
    assert noise("layer", 0, (1000, 1000)).isfinite().all()


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.zeros(2, 5), torch.tensor([1, 1]), r"logits are \[2, 5\], expected \[B, 6\]"),
        (torch.zeros(2, 6), torch.tensor([1]), r"k is \[1\], expected one number per row"),
        (torch.zeros(1, 6), torch.tensor([7]), "k is between 7 and 7, expected 0 to 6.*Budget.resolve"),
        (torch.zeros(1, 6), torch.tensor([-1]), "k is between -1 and -1"),
        (torch.zeros(1, 6), torch.tensor([0.5]), "k is torch.float32"),
    ],
)
def test_wrong_arguments(logits, k, message):
    for call in (sample_gates, greedy_gates):
        with pytest.raises(ValueError, match=message):
            call(logits, k, make("L", tail=6))


def test_no_rows():
    config = make("L", tail=6)
    empty = torch.zeros(0, dtype=torch.long)
    assert sample_gates(torch.zeros(0, 6), empty, config).shape == (0, 8, 2, 4)
    assert greedy_gates(torch.zeros(0, 6), empty, config).shape == (0, 8, 2, 4)
