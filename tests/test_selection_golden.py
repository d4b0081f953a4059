"""Parity with recordings of the released PruMerge and FastV code: the same tokens are kept, with the same values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adallava.selection import selector
from adallava.selection.common import Patches
from adallava.selection.fastv import last_query_attention
from adallava.selection.prumerge import count_outliers

GOLDEN = Path(__file__).parent / "golden"
PRUMERGE = load_file(GOLDEN / "prumerge" / "prumerge.safetensors")
PRUMERGE_META = {row["key"]: row for row in json.loads((GOLDEN / "prumerge" / "prumerge.json").read_text())["inputs"]}
IMAGES = sorted({key.partition(".")[0] for key in PRUMERGE} & set(PRUMERGE_META))
FASTV = load_file(GOLDEN / "fastv" / "ranking.safetensors")
LAYOUT = json.loads((GOLDEN / "fastv" / "fastv_A.json").read_text())
RANKINGS = [
    (letter, case["key"])
    for letter in "AB"
    for case in json.loads((GOLDEN / "fastv" / f"fastv_{letter}.json").read_text())["cases"]
    if f"{letter}.{case['key']}.scores_layerKm1" in FASTV
]


def test_recordings_were_found():
    assert IMAGES
    assert len(RANKINGS) == 12


def recorded_patches(key):
    names = ("patch_features", "key", "cls_attn")
    features, keys, attention = (PRUMERGE[f"{key}.{name}"][None] for name in names)
    return Patches(features, keys, cls_attention=attention)


@pytest.mark.parametrize("image", IMAGES)
def test_outliers(image):
    assert count_outliers(PRUMERGE[f"{image}.cls_attn"]) == PRUMERGE_META[image]["outliers"]


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(("name", "recorded"), [("prumerge", "prune_merge"), ("prumerge+", "prune_merge_plus")])
def test_prumerge(image, name, recorded):
    selected = selector(name).select(recorded_patches(image))
    assert torch.equal(selected.indices[0], PRUMERGE[f"{image}.{recorded}_index"])
    torch.testing.assert_close(selected.features[0], PRUMERGE[f"{image}.{recorded}"], atol=1e-5, rtol=0)


def settings_of(key):
    """The recorded name holds K (2 where it is left out) and R, the share dropped."""
    parts = key.split(".", 1)[1].replace(".hf", " hf").replace(".mask", " mask").split()[0]
    layer, _, ratio = parts.rpartition("R")
    return int(layer.strip("K.") or LAYOUT["agg_layer_K"]), float(ratio)


@pytest.mark.parametrize(("letter", "key"), RANKINGS, ids="/".join)
@pytest.mark.parametrize("by", ["ratio", "rank"])
def test_fastv(letter, key, by):
    layer, ratio = settings_of(key)
    source = f"{key.partition('.')[0]}.K{layer}"
    attention = last_query_attention(FASTV[f"{source}.query"][None], FASTV[f"{source}.key"][None])
    first, images = LAYOUT["sys_length"], LAYOUT["image_token_length"]
    span = slice(first, first + images)
    recorded = FASTV[f"{letter}.{key}.scores_layerKm1"]
    torch.testing.assert_close(attention[0, :, span].mean(0), recorded, atol=1e-6, rtol=0)

    image = torch.zeros(1, attention.shape[-1], dtype=torch.bool)
    image[:, span] = True
    kept = FASTV[f"{letter}.{key}.keep"][0]
    fastv = selector("fastv", layer=layer, **({"ratio": ratio} if by == "ratio" else {"rank": len(kept)}))
    keep = fastv.keep(attention, image)
    assert torch.equal((keep & image)[0].nonzero()[:, 0], kept)
    assert keep[~image].all()
