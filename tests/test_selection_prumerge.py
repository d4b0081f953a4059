"""PruMerge and PruMerge+: what is kept, what is merged, precision and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adallava.selection import selector
from adallava.selection.baselines import Random
from adallava.selection.common import Patches
from adallava.selection.prumerge import (
    PruMerge,
    PruMergePlus,
    add_grid,
    cls_attention,
    count_outliers,
    merge,
    top_patches,
)
from patches import assert_same, patches_of


def by_hand(features, key, attention, kept, neighbours):
    """PruMerge's merge, patch by patch, in float64."""
    features, key, attention = features.double(), key.double(), attention.double()
    tokens = []
    for i in kept.tolist():
        others = sorted(set(range(len(features))) - {i})
        similarity = torch.nn.functional.cosine_similarity(key[i][None], key[others])
        nearest = [others[j] for j in similarity.argsort(descending=True)[:neighbours].tolist()]
        tokens.append(features[i] + sum((attention[j] * features[j] for j in nearest), torch.zeros_like(features[i])))
    dropped = sorted(set(range(len(features))) - set(kept.tolist()))
    tokens.append(sum((attention[j] * features[j] for j in dropped), torch.zeros_like(features[0])))
    return torch.stack(tokens)


@pytest.mark.parametrize(("n", "neighbours"), [(40, 32), (40, 3), (40, 0), (20, 32), (2, 32)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_merge(n, neighbours, dtype):
    patches = patches_of(1, n, 8, dtype=dtype)
    attention = torch.rand(n, dtype=dtype)
    kept = torch.randperm(n)[: max(1, n // 3)]
    args = patches.features[0], patches.key[0, 1:], attention, kept, neighbours
    merged = merge(*args)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), by_hand(*args), atol={torch.float16: 1e-2}.get(dtype, 1e-5), rtol=1e-3)


def test_cls_attention_is_the_first_row_of_the_whole_matrix():
    patches = patches_of(1, 30, 12)
    query, key = patches.query[0], patches.key[0]
    whole = (query.double() @ key.double().T / 12**0.5).softmax(-1)
    torch.testing.assert_close(cls_attention(query, key).double(), whole[0, 1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["prumerge", "prumerge+"])
def test_query_or_attention_and_keys_with_or_without_cls(name):
    patches, built = patches_of(2, 50), selector(name)
    attention = torch.stack([cls_attention(*pair) for pair in zip(patches.query, patches.key, strict=True)])
    from_query = built.select(patches)
    assert_same(from_query, built.select(Patches(patches.features, patches.key, cls_attention=attention)))
    assert_same(from_query, built.select(Patches(patches.features, patches.key[:, 1:], cls_attention=attention)))


@given(n=st.integers(1, 90), seed=st.integers(0, 999))
@settings(deadline=None)
def test_outliers_and_their_order(n, seed):
    attention = torch.randn(n, generator=torch.Generator().manual_seed(seed)).mul(1.5).softmax(0)
    # Quartiles without torch.quantile: between neighbours of the sorted values.
    ordered = attention.double().sort().values
    low, high = (
        torch.lerp(ordered[int(at)], ordered[min(int(at) + 1, n - 1)], at % 1).item()
        for at in (torch.tensor(0.25 * (n - 1)).double(), torch.tensor(0.75 * (n - 1)).double())
    )
    above = [i for i in range(n) if attention[i].item() > high + 1.5 * (high - low)]
    assert count_outliers(attention) == len(above)
    expected = sorted(above, key=lambda i: -attention[i].item()) or [int(attention.argmax())]
    assert top_patches(attention).tolist() == expected


def test_ties_go_to_the_lower_index():
    attention = torch.ones(60)
    attention[[7, 20, 41]] = 5.0
    assert top_patches(attention, 0.1).tolist() == [7, 20, 41, 0, 1, 2]
    assert top_patches(attention).tolist() == [7, 20, 41]
    # All keys alike: every patch is as near as any other, and the first two are taken.
    features = torch.randn(60, 4)
    merged = merge(features, torch.ones(60, 4), attention, torch.tensor([0, 9]), neighbours=2)
    torch.testing.assert_close(
        merged[:2], features[[0, 9]] + torch.stack((features[1] + features[2], features[:2].sum(0)))
    )


@pytest.mark.parametrize("name", ["prumerge", "prumerge+"])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 256, 577])
def test_an_image_without_outliers_keeps_its_best_patch(name, n):
    patches = Patches(torch.randn(1, n, 4), torch.randn(1, n, 4), cls_attention=torch.full((1, n), 1 / n))
    selected = selector(name).select(patches)
    stride = max(1, n // 3)
    grid = [0, *range(stride, n - 1, stride)] if name == "prumerge+" else [0]
    assert selected.indices[0].tolist() == grid
    assert torch.isfinite(selected.features[0]).all()


@pytest.mark.parametrize(
    ("n", "top", "ratio", "whole", "grid"),
    [
        (24, [3, 16], None, False, [0, 4, 8, 12, 20]),  # 24 // 2 // 3 = 4
        (25, [3, 16], None, False, [0, 4, 8, 12, 20]),
        (25, [3, 16], None, True, [0, 4, 8, 12, 20, 24]),
        (6, [1, 4, 2], None, False, [0, 3]),  # a step of 0 in the released code
        (24, [3, 7], 0.1, False, [5, 15]),  # every tenth, from the middle of the first ten
        (24, [3, 6], 0.3, False, [1, 4, 7, 10, 13, 16, 19, 22]),
        (23, [3, 6], 0.3, True, [1, 4, 7, 10, 13, 16, 19, 22]),
        (23, [3, 6], 0.3, False, [1, 4, 7, 10, 13, 16, 19]),
        (4, [0], 0.01, False, []),
    ],
)
def test_the_grid_of_plus(n, top, ratio, whole, grid):
    assert add_grid(torch.tensor(top), n, ratio, whole=whole).tolist() == [*top, *grid]


@pytest.mark.parametrize(("ratio", "n"), [(None, 37), (1 / 9, 41)])
def test_only_a_whole_grid_reaches_the_last_patch(ratio, n):
    # Three outliers at the start and a step of 37 // 3 // 3 = 4; or four, and a step of 9 from 4 on.
    attention = torch.linspace(1, 0.9, n)
    attention[:3] = 5.0
    patches = Patches(torch.randn(1, n, 4), torch.randn(1, n, 4), cls_attention=attention[None])
    bare, whole = (
        PruMergePlus(ratio=ratio, whole_grid=flag).select(patches).indices[0].tolist() for flag in (False, True)
    )
    assert n - 1 not in bare
    assert whole == [*bare, n - 1]


def test_plus_keeps_what_prumerge_keeps_first():
    patches = patches_of(2, 80)
    for less, more in zip(PruMerge().select(patches).indices, PruMergePlus().select(patches).indices, strict=True):
        assert more[: len(less)].tolist() == less.tolist()
        assert len(more) > len(less)
        grid = more[len(less) :]
        assert grid.tolist() == sorted(grid.tolist())


@pytest.mark.parametrize(("ratio", "n", "kept"), [(0.29, 100, 29), (1 / 3, 576, 192), (0.125, 576, 72), (0.001, 9, 1)])
def test_ratios_are_not_short_by_rounding(ratio, n, kept):
    assert len(PruMerge(ratio=ratio).select(patches_of(1, n)).indices[0]) == kept
    assert len(Random(ratio=ratio).select(patches_of(1, n)).indices[0]) == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["prumerge", "prumerge+"])
def test_half_precision_is_computed_in_single(name, dtype):
    half = patches_of(2, 60, 16, dtype=dtype)
    single = Patches(half.features.float(), half.key.float(), half.query.float())
    low, high = selector(name).select(half), selector(name).select(single)
    for index in range(2):
        assert torch.equal(low.indices[index], high.indices[index])
        assert torch.equal(low.features[index], high.features[index].to(dtype))


def test_autocast_changes_nothing():
    patches = patches_of(2, 60, 16)
    plain = PruMerge().select(patches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(PruMerge().select(patches), plain)


def test_gradients():
    patches = patches_of(1, 30, 4, dtype=torch.float64)
    features, query = patches.features.requires_grad_(), patches.query.requires_grad_()
    key = patches.key.requires_grad_()

    def tokens(*tensors):
        return PruMergePlus(neighbours=4).select(Patches(*tensors)).features[0]

    assert torch.autograd.gradcheck(tokens, (features, key, query))
    assert all(grad.any() for grad in torch.autograd.grad(tokens(features, key, query).sum(), (features, key, query)))
    with torch.no_grad():
        assert not tokens(features, key, query).requires_grad
