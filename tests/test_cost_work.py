"""Features of measured time: what depends on the plan is the mean over all plans of k switches, exactly."""

import itertools

import pytest

from adallava.config import AdaptiveConfig
from adallava.cost.work import DECODE, PREFILL, TAIL, decode_work, prefill_work, tail_features, tail_work
from adallava.errors import PlanError


def config(variant="L", layers=5, prefix=2, heads=4):
    return AdaptiveConfig(
        variant=variant,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=16,
        prefix_layers=prefix,
        heads_per_switch=1 if variant == "H" else None,
    )


def named(names, work):
    return dict(zip(names, work.features, strict=True))


def runs(bits):
    return sum(1 for on, _ in itertools.groupby(bits) if on)


@pytest.mark.parametrize("variant", ["L", "H"])
def test_what_depends_on_the_plan_is_the_mean_over_all_plans(variant):
    made = config(variant, layers=4 if variant == "H" else 6, prefix=2, heads=3 if variant == "H" else 4)
    each, tail = made.switches_per_layer, made.tail_layers
    for k in range(made.max_k + 1):
        found = {"layer on": 0.0, "layer in part": 0.0, "slice": 0.0}
        plans = list(itertools.combinations(range(made.max_k), k))
        for plan in plans:
            layers = [[layer * each + s in plan for s in range(each)] for layer in range(tail)]
            found["layer on"] += sum(map(any, layers)) / len(plans)
            if each > 1:
                found["layer in part"] += sum(any(layer) and not all(layer) for layer in layers) / len(plans)
                found["slice"] += sum(runs(layer) for layer in layers) / len(plans)
        told = named(PREFILL, prefill_work(made, [[7] * made.num_layers], [k], 1))
        assert {name: told[name] for name in found} == pytest.approx(found)
        step = named(DECODE, decode_work(made, [[7] * made.num_layers], [k]))
        assert {name: step[name] for name in found} == pytest.approx(found)


def test_tokens_and_scores_follow_the_lengths_of_each_layer():
    made, lengths = config(), [[10, 8, 4, 4, 4], [3, 3, 3, 3, 3]]
    work = prefill_work(made, lengths, [3, 1], 2)
    told = named(PREFILL, work)
    assert (told["fixed"], told["row"], told["image"]) == (1, 2, 2)
    assert (told["token"], told["score"]) == (24 + 15, 100 + 64 + 9 + 9 + 57)
    assert (told["unit token"], told["unit score"]) == (3 * 4 + 1 * 3, 3 * 16 + 1 * 9)
    assert told["layer on"] == 3  # the first row runs them all
    assert work.extent == {"tokens": 10, "rows": 2, "images": 2}
    step = named(DECODE, decode_work(made, lengths, [3, 1]))
    assert (step["key"], step["unit"], step["unit key"]) == (24 + 15, 4, 15)


def test_what_is_left_when_the_plan_is_decided_is_part_of_the_prefill():
    made, lengths = config("H"), [[10, 8, 4, 4, 4], [3, 3, 3, 3, 3]]
    told = named(TAIL, tail_work(made, lengths, [5, 1]))
    whole = named(PREFILL, prefill_work(made, lengths, [5, 1], 2))
    assert told == {name: whole[name] for name in TAIL}
    assert tail_work(made, lengths, [5, 1]).extent == {"tokens": 10, "rows": 2}
    ks = [[k, 1] for k in range(made.max_k + 1)]
    assert tail_features(made, lengths, ks).tolist() == [list(tail_work(made, lengths, k).features) for k in ks]
    alone = [[k] for k in range(made.max_k + 1)]
    found = tail_features(made, lengths[:1], alone).tolist()
    assert found == [pytest.approx(tail_work(made, lengths[:1], k).features) for k in alone]
    with pytest.raises(PlanError, match=r"k is \[-1, 1\], expected whole numbers from 0 to"):
        tail_features(made, lengths, [[0, 0], [-1, 1]])


def test_rows_that_choose_different_layers_touch_more_of_them():
    made = config()
    assert named(PREFILL, prefill_work(made, [[5] * 5] * 2, [1, 1], 0))["layer on"] == pytest.approx(3 * (1 - 4 / 9))


def test_a_base_model_is_all_prefix():
    told = named(PREFILL, prefill_work(None, [[10, 10, 6]], [0], 1))
    assert told["token"] == 26
    assert not any(told[name] for name in ("layer on", "unit token", "unit score", "slice", "layer in part"))


@pytest.mark.parametrize(
    ("lengths", "k"), [([[5] * 4], [0]), ([[5] * 5], [0, 1]), ([], []), ([[5] * 5], [4]), ([[5] * 5], [-1])]
)
def test_what_does_not_go_together(lengths, k):
    with pytest.raises(PlanError, match="lengths for|expected whole numbers from 0 to 3"):
        prefill_work(config(), lengths, k, 0)
