"""The models that come with the package: present, small, and much better than guessing."""

import pytest

from adallava import AdaptiveVLM
from adallava.hosts.load import SHIPPED, shipped_folder
from adallava.hosts.model import Request
from adallava.mini.questions import benchmark
from adallava.mini.scenes import to_image
from adallava.mini.scoring import score

VARIANTS = {"mini-base": None, "mini-L": "L", "mini-H": "H"}


def test_together_they_stay_under_20_megabytes():
    assert set(SHIPPED) == set(VARIANTS)
    files = [f for name in SHIPPED for f in shipped_folder(name).rglob("*") if f.is_file()]
    assert len(files) >= 3 * 7
    assert sum(f.stat().st_size for f in files) < 20e6


@pytest.mark.parametrize(("name", "variant"), VARIANTS.items())
def test_they_answer_far_better_than_guessing(name, variant):
    vlm = AdaptiveVLM.from_pretrained(name)
    assert vlm.status()["variant"] == variant
    budget = "100%" if variant is None else "60%"
    items = [item for family in ("open", "reading", "description") for item in benchmark(family, 99, 40)]
    requests = [Request(i.question.text, to_image(i.scene), budget=budget) for i in items]
    answers = vlm.generate_batch(requests, max_new_tokens=32)
    right = sum(score(i.question, a.text) for i, a in zip(items, answers, strict=True))
    assert right / len(items) > 0.8, "measured 0.83 to 0.87; guessing gives about a tenth"
    if variant is not None:
        assert {k for a in answers for k in a.plan.k} == {vlm.generate(None, "which", budget=budget).budget.k}


def test_the_call_of_the_readme():
    item = next(benchmark("open", 0, 1))
    answer = AdaptiveVLM.from_pretrained("mini-L").generate(
        to_image(item.scene), "How many sevens are there?", budget="60%"
    )
    assert answer.text and answer.plan.fraction[0] <= 0.6 and answer.cost.frac < 0.65
