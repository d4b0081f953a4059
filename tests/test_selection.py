"""Selectors by name, invariants of all that work on patches, and the baselines."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from adallava.config import TOKEN_SELECTIONS
from adallava.errors import ConfigError, UnknownNameError
from adallava.selection import SELECTORS, describe_selector, parse_selector, selector
from adallava.selection.baselines import Random, evenly_spaced
from adallava.selection.common import Patches, Selected
from adallava.selection.fastv import last_query_attention
from patches import assert_same, generators_of, patches_of, rows_of

TOWER = [
    ("none", {}),
    ("prumerge", {}),
    ("prumerge", {"ratio": 0.3, "neighbours": 3}),
    ("prumerge+", {}),
    ("prumerge+", {"ratio": 0.2}),
    ("prumerge+", {"whole_grid": True}),
    ("random", {"count": 5}),
    ("random", {"ratio": 0.4}),
    ("uniform", {"count": 5}),
    ("uniform", {"ratio": 0.4}),
]
KEEP_ALL = [
    ("none", {}),
    ("prumerge", {"ratio": 1}),
    ("prumerge+", {"ratio": 1.0}),
    ("random", {"ratio": 1}),
    ("random", {"count": 1000}),
    ("uniform", {"ratio": 1}),
    ("uniform", {"count": 1000}),
]


def named(rows):
    return pytest.mark.parametrize(("name", "options"), rows, ids=lambda value: str(value))


# -- names and settings ---------------------------------------------------------------------------------------------


def test_names():
    assert SELECTORS.names() == ["none", "prumerge", "prumerge+", "fastv", "random", "uniform"]
    assert tuple(SELECTORS.names()) == TOKEN_SELECTIONS, "what an adaptive config may name"


@named([*TOWER, ("fastv", {}), ("fastv", {"layer": 3, "rank": 7}), ("fastv", {"ratio": 0.75})])
def test_a_selector_is_its_name_and_settings(name, options):
    built = selector(name, **options)
    assert built.name == name
    assert built.place == ("decoder" if name == "fastv" else "tower")
    assert selector(built.name, **dataclasses.asdict(built)) == built
    assert parse_selector(describe_selector(built)) == built
    for field, value in options.items():
        assert getattr(built, field) == value
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(built, field, value)


def test_selectors_as_text():
    assert parse_selector("fastv: layer=3, ratio = 0.75") == selector("fastv", layer=3, ratio=0.75)
    assert describe_selector(selector("prumerge+", whole_grid=True)) == "prumerge+:whole_grid=True"
    assert describe_selector(selector("prumerge")) == "prumerge"
    for text, words in (("fastv:0.5", "'0.5' where a setting=value"), ("fastv:layer=x", "'x' is no value for layer")):
        with pytest.raises(ConfigError, match=words):
            parse_selector(text)


def test_unknown_names_and_settings():
    with pytest.raises(UnknownNameError, match="unknown token selector 'PruMerge'. Did you mean 'prumerge'?"):
        selector("PruMerge")
    with pytest.raises(ConfigError, match="'prumerge' has no setting 'neighbors'. Did you mean 'neighbours'?"):
        selector("prumerge", neighbors=3)
    with pytest.raises(ConfigError, match="'none' has no setting 'ratio'. Known: none, it has no settings"):
        selector("none", ratio=0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {}, "random needs either count or ratio, but neither is given"),
        ("uniform", {"count": 4, "ratio": 0.5}, r"both are \(count=4, ratio=0.5\)"),
        ("uniform", {"count": 0}, "uniform: count is 0, expected a whole number of 1 or more"),
        ("random", {"count": 2.0}, "count is 2.0, expected a whole number"),
        ("random", {"count": True}, "count is True, expected a whole number"),
        ("random", {"ratio": 0}, "ratio is 0, expected the share of patches to keep, above 0 and up to 1"),
        ("prumerge", {"ratio": 1.1}, "prumerge: ratio is 1.1"),
        ("prumerge", {"ratio": float("nan")}, "ratio is nan"),
        ("prumerge+", {"ratio": "half"}, "prumerge\\+: ratio is 'half'"),
        ("prumerge+", {"ratio": True}, "ratio is True"),
        ("prumerge+", {"neighbours": -1}, "prumerge\\+: neighbours is -1, expected a whole number of 0 or more"),
        ("prumerge+", {"whole_grid": "no"}, "whole_grid is 'no', expected True or False"),
    ],
)
def test_wrong_settings(name, options, message):
    with pytest.raises(ConfigError, match=message):
        selector(name, **options)


def test_the_selector_of_the_docs():
    page = Path(__file__).parents[1] / "docs" / "adding-a-selector.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    with mock.patch.dict(SELECTORS._targets):
        exec(compile(code, str(page), "exec"), {"__name__": "a_new_selector"})
        features = torch.tensor([[[1.0], [-3.0], [2.0], [3.0]], [[4.0], [0.0], [0.0], [0.0]]])
        selected = selector("norm", ratio=0.5).select(Patches(features))
    assert [indices.tolist() for indices in selected.indices] == [[1, 3], [0, 1]]
    assert "norm" not in SELECTORS


def test_listing_names_does_not_import_torch():
    code = "import sys, adallava.selection as s; assert len(s.SELECTORS.names()) == 6 and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


# -- what is handed over --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"features": (4, 8)}, r"features are \[4, 8\], expected \[B, N, C\]"),
        ({"features": (2, 0, 8)}, r"features are \[2, 0, 8\]"),
        ({"features": (2, 4, 8), "query": (2, 4, 8)}, r"query is \[2, 4, 8\], expected \[2, 5, D\]"),
        ({"features": (2, 4, 8), "key": (2, 6, 8)}, r"key is \[2, 6, 8\], expected \[2, 5, D\] or \[2, 4, D\]"),
        (
            {"features": (2, 4, 8), "key": (2, 4, 8), "query": (2, 5, 8)},
            r"key is \[2, 4, 8\], expected \[2, 5, D\] for",
        ),
        ({"features": (2, 4, 8), "key": (1, 5, 8)}, r"key is \[1, 5, 8\]"),
        ({"features": (2, 4, 8), "key": (2, 5, 8), "query": (2, 5, 6)}, "expected one shape"),
        ({"features": (2, 4, 8), "cls_attention": (2, 5)}, r"cls_attention is \[2, 5\], expected \[2, 4\]"),
        (
            {"features": (2, 4, 8), "query": (2, 5, 8), "cls_attention": (2, 4)},
            "query and cls_attention are both given",
        ),
    ],
)
def test_patches_that_do_not_fit(tensors, message):
    with pytest.raises(ValueError, match=message):
        Patches(**{name: torch.zeros(shape) for name, shape in tensors.items()})


@named([row for row in TOWER if row[0].startswith("prumerge")])
def test_prumerge_says_what_it_lacks(name, options):
    patches = patches_of(1, 9)
    assert selector(name, **options).reads_attention
    with pytest.raises(ValueError, match="needs key, and query or cls_attention, but the patches have neither"):
        selector(name, **options).select(Patches(patches.features))
    with pytest.raises(ValueError, match="but the patches have key"):
        selector(name, **options).select(Patches(patches.features, patches.key))


@named([row for row in TOWER if not row[0].startswith("prumerge")])
def test_what_reads_no_attention_works_without(name, options):
    patches = patches_of(2, 9)
    built = selector(name, **options)
    assert not built.reads_attention
    bare = built.select(Patches(patches.features), generators_of((1, 2)))
    assert_same(bare, built.select(patches, generators_of((1, 2))))


# -- invariants of every selector at the tower ----------------------------------------------------------------------


@named(KEEP_ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_keeping_all_is_no_selection(name, options, dtype, n):
    patches = patches_of(3, n, dtype=dtype)
    selected = selector(name, **options).select(patches)
    assert torch.equal(torch.stack(selected.features), patches.features)
    assert torch.equal(torch.stack(selected.indices), torch.arange(n).expand(3, n))


@named(TOWER)
@settings(deadline=None, max_examples=25)
@given(batch=st.integers(1, 4), n=st.integers(1, 70), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_batch_is_its_images(name, options, batch, n, width, seed):
    patches, built = patches_of(batch, n, width, seed), selector(name, **options)
    together = built.select(patches, generators_of(range(batch)))
    alone = [built.select(rows_of(patches, [row]), generators_of([row])) for row in range(batch)]
    assert_same(together, Selected([s.features[0] for s in alone], [s.indices[0] for s in alone]), atol=1e-5)

    order = torch.randperm(batch).tolist()
    permuted = built.select(rows_of(patches, order), generators_of(order))
    assert_same(
        permuted, Selected([together.features[i] for i in order], [together.indices[i] for i in order]), atol=1e-5
    )


@named(TOWER)
@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 70), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_comes_back(name, options, n, seed, dtype):
    patches, built = patches_of(2, n, 5, seed, dtype), selector(name, **options)
    selected = built.select(patches, generators_of((seed, seed)))
    assert_same(selected, built.select(patches, generators_of((seed, seed))))
    for features, indices in zip(selected.features, selected.indices, strict=True):
        kept = len(indices)
        assert 1 <= kept <= n
        assert len(set(indices.tolist())) == kept
        assert 0 <= int(indices.min()) <= int(indices.max()) < n
        assert indices.dtype == torch.int64
        merged = name.startswith("prumerge") and kept < n
        assert features.shape == (kept + merged, 5)
        assert features.dtype == dtype
        if "count" in options:
            assert kept == min(n, options["count"])
        elif name in ("random", "uniform"):
            assert kept == max(1, n * 4 // 10)
        if not name.startswith("prumerge"):
            assert torch.equal(indices, indices.sort().values)


@named(TOWER)
def test_an_empty_batch(name, options):
    assert_same(selector(name, **options).select(patches_of(0, 9), []), Selected([], []))


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


@named(TOWER)
def test_memory(name, options):
    # Few columns make [N, N] the allowance, many make it [B, N, C]; neighbours gathered as [K, 32, C] exceed both.
    for n, width in ((70, 32), (16, 300)):
        patches = patches_of(3, n, width)
        with LargestTensor() as largest:
            selector(name, **(options | ({"ratio": 0.9} if "ratio" in options else {}))).select(patches)
        assert 0 < largest.numel <= max(n * n, 3 * (1 + n) * width)


def test_memory_of_fastv_grows_with_the_tokens_only():
    query, key = torch.randn(2, 4, 8), torch.randn(2, 2, 300, 8)
    image = torch.ones(2, 300, dtype=torch.bool)
    with LargestTensor() as largest:
        selector("fastv").keep(last_query_attention(query, key, image), image)
    assert 0 < largest.numel <= key.numel()


# -- random and uniform ---------------------------------------------------------------------------------------------


def test_random_draws_evenly_and_by_seed():
    patches = Patches(torch.arange(12.0)[None, :, None])
    draws = [Random(count=3).select(patches, generators_of([seed])).indices[0] for seed in range(2000)]
    share = torch.stack([draw.bincount(minlength=12) for draw in draws]).double().mean(0)
    # 0.25 each; the standard error is below 0.01.
    assert (share - 0.25).abs().max() < 0.05
    assert len({tuple(draw.tolist()) for draw in draws}) > 200
    for seed in range(20):
        more = Random(count=7).select(patches, generators_of([seed])).indices[0]
        assert set(draws[seed].tolist()) < set(more.tolist())


def test_random_without_generators_draws_from_torch():
    patches = patches_of(2, 50)
    torch.manual_seed(3)
    first = Random(count=10).select(patches)
    assert not torch.equal(*first.indices)
    torch.manual_seed(3)
    assert_same(first, Random(count=10).select(patches))


def test_random_wants_a_generator_for_each_image():
    with pytest.raises(ValueError, match="1 generators for 2 images, expected one per image"):
        Random(count=2).select(patches_of(2, 5), generators_of([0]))


def test_generators_advance_by_one_draw_per_image():
    generator = torch.Generator().manual_seed(1)
    patches = patches_of(1, 30)
    first, second = (Random(count=8).select(patches, [generator]).indices[0] for _ in range(2))
    assert not torch.equal(first, second)


@given(n=st.integers(1, 3000), data=st.data())
@settings(deadline=None)
def test_uniform_is_even(n, data):
    count = data.draw(st.integers(1, n))
    indices = evenly_spaced(n, count)
    assert len(indices) == count
    steps = indices.diff()
    assert steps.numel() == 0 or n // count <= int(steps.min()) <= int(steps.max()) <= -(-n // count)
    # As much room before the first as after the last, to within one.
    assert abs(int(indices[0]) - (n - 1 - int(indices[-1]))) <= 1


def test_uniform_by_hand():
    assert evenly_spaced(8, 4).tolist() == [1, 3, 5, 7]
    assert evenly_spaced(9, 3).tolist() == [1, 4, 7]
    assert evenly_spaced(5, 1).tolist() == [2]
