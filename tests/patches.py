"""Random images for token selectors, and how two results are compared."""

import dataclasses

import torch

from adallava.selection.common import Patches, Selected


def patches_of(batch, n, width=6, seed=0, dtype=torch.float32):
    """Random images whose CLS attention is uneven, as a tower's is."""
    generator = torch.Generator().manual_seed(seed)
    features, key, query = (torch.randn(batch, rows, width, generator=generator) for rows in (n, 1 + n, 1 + n))
    return Patches(features.to(dtype), (2 * key).to(dtype), query.to(dtype))


def rows_of(patches, rows):
    """The named images of a batch, in that order."""
    given = dataclasses.asdict(patches).items()
    return Patches(**{name: None if tensor is None else tensor[rows] for name, tensor in given})


def generators_of(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_same(left: Selected, right: Selected, atol: float = 0.0):
    """The same tokens; features may differ by ``atol``, where products of other shapes round otherwise."""
    assert len(left.features) == len(right.features) == len(left.indices) == len(right.indices)
    for pair in zip(left.indices, right.indices, strict=True):
        assert torch.equal(*pair)
    for pair in zip(left.features, right.features, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=atol)
