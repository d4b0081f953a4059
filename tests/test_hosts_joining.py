"""Rows that come and go: decoded together, joined one after another, they say what generate() says of each alone."""

import pytest
import torch

from adallava.budget import Budget
from adallava.errors import ConfigError, PlanError
from adallava.hosts.joining import join, part
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Request, to_prompt
from adallava.hosts.stepping import check_steps, counts_positions, prepare, start, step
from matrix import options, requests
from tiny import ROWS, placeholders, tiny_base, tiny_vlm

NEW = 5


def alone(vlm, host, request):
    """Token ids that generate() makes of one request, and its plan."""
    answer = vlm.generate_batch([request], **options(host, max_new_tokens=NEW, min_new_tokens=NEW))[0]
    return answer.texts, answer.plan


class Stepped:
    """One request on its way: its row, the logits of its next token, what it has said."""

    def __init__(self, vlm, host, request):
        prepared = prepare(vlm, to_prompt(request), NEW)
        self.started = start(vlm, prepared, Budget.parse(request.budget))
        self.host, self.row, self.logits, self.said = host, self.started.row, self.started.logits, []

    def speak(self, vlm):
        refused = [*placeholders(self.host), vlm.model.generation_config.eos_token_id]
        logits = self.logits.clone()
        logits[[token for token in refused if isinstance(token, int)]] = -float("inf")
        self.said.append(int(logits.argmax()))
        return self.said[-1]


@pytest.mark.parametrize(("host", "variant"), ROWS)
def test_rows_that_come_and_go_answer_as_alone(host, variant):
    vlm = tiny_vlm(host, variant)
    asked = requests(host)
    waiting, active, done = list(asked), [], {}
    while waiting or active:
        if waiting:  # one joins between any two steps
            active.append((len(asked) - len(waiting), Stepped(vlm, host, waiting.pop(0))))
        tokens = [one.speak(vlm) for _, one in active]
        joined = join([one.row for _, one in active], vlm.scheduler, positions=counts_positions(vlm))
        logits, joined = step(vlm, joined, tokens)
        for (_, one), row, each in zip(active, part(joined), logits, strict=True):
            one.row, one.logits = row, each
        done |= {number: one for number, one in active if len(one.said) == NEW}
        active = [(number, one) for number, one in active if len(one.said) < NEW]
    for number, request in enumerate(asked):
        texts, plan = alone(vlm, host, request)
        one = done[number]
        assert one.started.row.plan == plan
        assert vlm.processor.tokenizer.decode(one.said, skip_special_tokens=True).strip() == texts[0]


@pytest.mark.parametrize("variant", ["L", "H"])
def test_a_row_holds_what_its_plan_runs(variant):
    vlm = tiny_vlm(variant=variant)
    rows = [Stepped(vlm, "llava", request).row for request in requests("llava")]
    for row, again in zip(rows, part(join(rows, vlm.scheduler)), strict=True):
        config = vlm.adaptive_config
        heads = int(row.plan.gates[0, :, 0].sum())
        assert row.nbytes == again.nbytes == 2 * heads * (config.hidden_size // config.num_heads) * row.tokens * 4
        assert again.tokens == row.tokens and again.plan == row.plan
        for ours, theirs in zip(row.held, again.held, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_cannot_be_stepped():
    with pytest.raises(PlanError, match="no rows"):
        join([], tiny_vlm().scheduler)
    with pytest.raises(ConfigError, match="base model"):
        check_steps(AdaptiveVLM(tiny_base(), None))
    vlm = tiny_vlm()
    vlm.token_selection = "fastv:layer=2,ratio=0.5"
    with pytest.raises(ConfigError, match="inside the decoder"):
        check_steps(vlm)
    prepared = prepare(vlm, to_prompt(Request("what color ?")), 3)
    with pytest.raises(PlanError, match="cannot be joined"):
        start(vlm, prepared, Budget.parse("67%"))
