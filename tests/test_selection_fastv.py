"""FastV's ranking: how many stay, which, and the one row of attention it needs."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adallava.errors import ConfigError
from adallava.selection.fastv import FastV, keep_mask, last_query_attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "rank": 4}, "ratio=0.5 and rank=4 are both given"),
        ({"layer": 0}, "layer is 0, expected a whole number of 1 or more, because tokens are ranked by the attention"),
        ({"layer": 2.0}, "layer is 2.0"),
        ({"layer": True}, "layer is True"),
        ({"rank": -1}, "fastv: rank is -1, expected a whole number of 0 or more"),
        ({"ratio": 1.5}, "ratio is 1.5, expected the share of tokens to drop, from 0 to 1"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": "0.5"}, "ratio is '0.5'"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        FastV(**options)


def test_the_papers_settings_are_the_default():
    assert FastV() == FastV(layer=2, ratio=0.5)
    assert FastV(rank=3).ratio is None


@given(n=st.lists(st.integers(0, 3000), min_size=1, max_size=5), ratio=st.floats(0, 1))
@example(n=[15], ratio=0.9)  # 1.4999999999999998 stay, which is 1.5 and rounds to 2 in float32
def test_count_is_pythons_round(n, ratio):
    assert FastV(ratio=ratio).kept(torch.tensor(n)).tolist() == [round(m * (1 - ratio)) for m in n]


def test_count_by_rank():
    assert FastV(rank=6).kept(torch.tensor([0, 5, 6, 7])).tolist() == [0, 5, 6, 6]


def prompts(batch, heads, tokens, seed, share=0.5):
    """Attention with many ties, and image tokens scattered as in rows with several images."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(0, 4, (batch, heads, tokens), generator=generator) / 8
    return attention, torch.rand(batch, tokens, generator=generator) < share


@settings(deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 999),
    ratio=st.sampled_from([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.1]),
)
def test_keep(batch, heads, tokens, seed, ratio, share):
    attention, image = prompts(batch, heads, tokens, seed, share)
    fastv = FastV(ratio=ratio)
    keep = fastv.keep(attention, image)
    assert keep.dtype == torch.bool
    assert keep[~image].all()
    for row in range(batch):
        places = image[row].nonzero()[:, 0].tolist()
        scores = attention[row].mean(0).tolist()
        best = sorted(places, key=lambda place: (-scores[place], place))[: round(len(places) * (1 - ratio))]
        assert (keep[row] & image[row]).nonzero()[:, 0].tolist() == sorted(best)
    # Alone, in another order, and again: the same.
    assert torch.equal(torch.cat([fastv.keep(attention[i : i + 1], image[i : i + 1]) for i in range(batch)]), keep)
    order = torch.randperm(batch)
    assert torch.equal(fastv.keep(attention[order], image[order]), keep[order])
    if ratio == 0:
        assert keep.all()


def test_left_padding_moves_the_mask_and_no_more():
    attention, image = prompts(1, 2, 20, seed=1)
    keep = FastV(ratio=0.6).keep(attention, image)
    # Padding with more attention than anything else, which a wrong mask would take for image tokens.
    padded = FastV(ratio=0.6).keep(
        torch.cat((torch.full((1, 2, 7), 9.0), attention), -1), torch.cat((torch.zeros(1, 7).bool(), image), -1)
    )
    assert padded[:, :7].all()
    assert torch.equal(padded[:, 7:], keep)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), float("-inf")])
def test_the_count_survives_attention_that_is_not_a_number(worst):
    attention, image = prompts(3, 2, 20, seed=2)
    attention[0] = worst
    attention[1, :, 4:9] = worst
    keep = keep_mask(attention, image, torch.tensor([3, 4, 5]))
    assert (keep & image).sum(1).tolist() == [3, 4, 5]
    assert keep[~image].all()


def test_heads_are_averaged_in_single_precision():
    # In half precision 1 + 2**-12 is 1 and the two tokens tie.
    attention = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 2**-11, 0.0]]], dtype=torch.float16)
    keep = keep_mask(attention, torch.tensor([[True, True, False]]), torch.tensor([1]))
    assert keep.tolist() == [[False, True, True]]


def test_wrong_shapes():
    attention, image = prompts(2, 3, 8, seed=0)
    for wrong in (image[:1], image[:, :4], image.long()):
        with pytest.raises(ValueError, match="expected \\[B, H, T\\] and bool \\[B, T\\]"):
            keep_mask(attention, wrong, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="Give the one row of attention"):
        keep_mask(attention[:, :, None], image, torch.tensor([1, 1]))


# -- the row of attention -------------------------------------------------------------------------------------------


def layer_of(batch=3, heads=6, key_heads=2, tokens=9, width=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(batch, heads, tokens, width, generator=generator)
    key = torch.randn(batch, key_heads, tokens, width, generator=generator)
    return query.to(dtype), key.to(dtype)


def whole_attention(query, key, mask, scaling):
    """[B, H, T, T] the long way: key heads repeated, causal, in float64."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.double() @ key.double().mT * scaling
    allowed = torch.ones(scores.shape[-2:]).tril().bool() & mask[:, None, None]
    return scores.masked_fill(~allowed, -1e300).softmax(-1)


@pytest.mark.parametrize(("heads", "key_heads"), [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kind", ["bool", "int", "float", "none"])
def test_the_last_row_of_attention(heads, key_heads, scaling, kind):
    query, key = layer_of(heads=heads, key_heads=key_heads)
    seen = torch.ones(3, 9, dtype=torch.bool)
    if kind != "none":
        seen[0, :2] = seen[1, :5] = False
    additive = torch.zeros(3, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = {"bool": seen, "int": seen.long(), "float": additive, "none": None}[kind]
    row = last_query_attention(query[:, :, -1], key, mask, scaling=scaling)
    expected = whole_attention(query, key, seen, scaling or 0.5)[:, :, -1]
    torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=0)
    assert not row[~seen[:, None].expand_as(row)].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    query, key = layer_of(dtype=dtype)
    low = last_query_attention(query[:, :, -1], key)
    assert low.dtype == torch.float32
    assert torch.equal(low, last_query_attention(query[:, :, -1].float(), key.float()))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(low, last_query_attention(query[:, :, -1], key))


def test_a_row_that_sees_nothing_is_finite():
    query, key = layer_of()
    row = last_query_attention(query[:, :, -1], key, torch.zeros(3, 9, dtype=torch.bool))
    torch.testing.assert_close(row, torch.full_like(row, 1 / 9))


def test_shapes_of_the_row():
    query, key = layer_of()
    last = query[:, :, -1]
    for wrong in (key[:2], key[..., :3], key[:, :1].expand(-1, 4, -1, -1)):
        with pytest.raises(ValueError, match="H a multiple of Hkv"):
            last_query_attention(last, wrong)
    with pytest.raises(ValueError, match=r"mask is \[3, 1, 9, 9\], expected \[3, 9\]. Of a mask"):
        last_query_attention(last, key, torch.zeros(3, 1, 9, 9))
