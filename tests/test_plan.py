"""ExecutionPlan: checks, reading, algebra and text."""

import json

import pytest
import torch

from adallava.config import AdaptiveConfig
from adallava.errors import PlanError
from adallava.plan import ExecutionPlan

L = AdaptiveConfig(variant="L", num_layers=12, num_heads=4, num_kv_heads=4, hidden_size=8, prefix_layers=6)
H = AdaptiveConfig(
    variant="H", num_layers=4, num_heads=8, num_kv_heads=4, hidden_size=8, prefix_layers=2, heads_per_switch=4
)


def l_plan(*rows):
    return ExecutionPlan.from_switches(torch.tensor([[c == "#" for c in row] for row in rows]), L)


def h_plan(*layers):
    """One row from "1100/0011" texts, one per tail layer."""
    return ExecutionPlan.from_dict({"config": H.to_dict(), "rows": [list(layers)]})


def test_reading_l():
    plan = l_plan(".#....", "######", "......")
    assert len(plan) == 3
    assert plan.k == [1, 6, 0]
    assert plan.fraction == [7 / 12, 1.0, 0.5]
    assert plan.layer_on.tolist()[0] == [True] * 6 + [False, True] + [False] * 4
    assert torch.equal(plan.layer_on, plan.layer_full)
    assert plan.describe().splitlines() == [
        "L 7/12 layers: ######|.#....",
        "L 12/12 layers: ######|######",
        "L 6/12 layers: ######|......",
    ]


def test_reading_h():
    plan = h_plan("1100/0011", "1111/1111")
    assert plan.k == [3]
    assert plan.switches_on.tolist() == [[1, 2]]
    assert plan.layer_on.tolist() == [[True, True, True, True]]
    assert plan.layer_full.tolist() == [[True, True, False, True]]
    assert plan.describe() == "H 7/8 switches: ##|12"
    assert h_plan("0000/0000", "1111/1111").layer_on.tolist() == [[True, True, False, True]]


def test_what_is_left():
    plan = l_plan(".#...#", ".....#")
    assert [plan.left_from(layer) for layer in range(6, 12)] == [[2, 1], [2, 1], *[[1, 1]] * 4]
    assert plan.left_from(0) == plan.k
    assert h_plan("1100/0011", "1111/1111").left_from(3) == [2]


def test_full():
    for config in (L, H):
        plan = ExecutionPlan.full(config, 2)
        assert plan.k == [config.max_k] * 2
        assert plan.fraction == [1.0, 1.0]


def test_the_gates_are_a_copy():
    gates = torch.ones(1, 12, 2, 4, dtype=torch.bool)
    plan = ExecutionPlan(gates, L)
    gates[:] = False
    assert plan.k == [6]


@pytest.mark.parametrize("variant", [L, H])
def test_prefix_must_be_on(variant):
    gates = torch.ones(2, variant.num_layers, 2, 4, dtype=torch.bool)
    gates[1, 1, 0, 2] = False
    with pytest.raises(PlanError, match="row 1 switches off part of layer 1, but the first"):
        ExecutionPlan(gates, variant)


def test_l_layers_are_whole():
    gates = torch.ones(2, 12, 2, 4, dtype=torch.bool)
    gates[1, 8, 1, 3] = False
    with pytest.raises(PlanError, match="row 1 has layer 8 on in part, but variant L"):
        ExecutionPlan(gates, L)


@pytest.mark.parametrize(
    ("layer", "counts"),
    [("1100/1111", "2 attention and 4 MLP"), ("1000/0001", "1 attention and 1 MLP"), ("0000/0011", "0 attention")],
)
def test_h_counts(layer, counts):
    with pytest.raises(PlanError, match=f"row 0, layer 3 has {counts}.*multiples of 2"):
        h_plan("1111/1111", layer)


@pytest.mark.parametrize(
    "gates",
    [
        torch.ones(1, 12, 2, 4),
        torch.ones(1, 11, 2, 4, dtype=torch.bool),
        torch.ones(12, 2, 4, dtype=torch.bool),
        torch.ones(1, 12, 2, 3, dtype=torch.bool),
        [[True]],
    ],
)
def test_shape_and_dtype(gates):
    with pytest.raises(PlanError, match=r"gates are .*expected bool \[B, 12, 2, 4\]"):
        ExecutionPlan(gates, L)


def test_from_switches_checks():
    with pytest.raises(PlanError, match=r"switches are bool \[1, 5\], expected bool \[B, 6\]"):
        l_plan("#####")
    with pytest.raises(PlanError, match="variant L, got H"):
        ExecutionPlan.from_switches(torch.ones(1, 2, dtype=torch.bool), H)


def test_rows():
    plan = l_plan(".#....", "######", "......")
    assert plan.row(1) == l_plan("######")
    assert plan.row(-1) == l_plan("......")
    assert [row.k for row in plan] == [[1], [6], [0]]
    assert ExecutionPlan.cat([plan.row(0), plan.select([1, 2])]) == plan
    assert plan.select(torch.tensor([2, 0, 0])).k == [0, 1, 1]
    assert plan.repeat_interleave(2).k == [1, 1, 6, 6, 0, 0]
    with pytest.raises(PlanError, match="row 3 of a plan with 3 rows"):
        plan.row(3)
    with pytest.raises(PlanError, match="plans of two models"):
        ExecutionPlan.cat([plan, ExecutionPlan.full(H)])
    with pytest.raises(PlanError, match="no plans"):
        ExecutionPlan.cat([])


def test_algebra():
    a, b = l_plan("##.#.."), l_plan(".##...")
    assert a & b == l_plan(".#....")
    assert a | b == l_plan("####..")
    assert a - b == l_plan("#..#..")
    assert a.overlap(b) == [0.25]
    assert l_plan("......").overlap(l_plan("......")) == [1.0]
    assert a != b
    assert a != "plan"
    with pytest.raises(PlanError, match="1 and 2 rows"):
        a & l_plan("......", "......")


def test_algebra_of_h_may_leave_no_plan():
    a = h_plan("1100/1100", "0000/0000")
    assert a | h_plan("0011/0011", "0000/0000") == h_plan("1111/1111", "0000/0000")
    assert a.overlap(h_plan("1001/1100", "0000/0000")) == [pytest.approx(3 / 5)]
    with pytest.raises(PlanError, match="expected equal numbers that are multiples of 2"):
        a & h_plan("0110/0110", "0000/0000")


def test_dict_round_trip():
    for plan in (l_plan(".#....", "######"), h_plan("1100/0011", "1111/1111"), ExecutionPlan.full(H, 3)):
        assert ExecutionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["1100/0011"]], "every row needs 2 tail layers"),
        ([["1100/0011", "11000011"]], "tail layer '11000011'"),
        ([["1100/0011", "1/1000011"]], "every row needs 2 tail layers|tail layer"),
        ([["1100/0011", "2100/0011"]], "tail layer '2100/0011'"),
    ],
)
def test_bad_dicts(rows, message):
    with pytest.raises(PlanError, match=message):
        ExecutionPlan.from_dict({"config": H.to_dict(), "rows": rows})
    with pytest.raises(PlanError, match="'config' and 'rows'"):
        ExecutionPlan.from_dict({"rows": rows})
