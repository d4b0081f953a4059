"""Benchmarks run, compare in the same round, and keep their files. What they measure is not tested: it is measured."""

import json

import pytest
import torch
from typer.testing import CliRunner

from adallava.bench import BenchSettings
from adallava.bench.selection import SELECTIONS, measure
from adallava.bench.timing import Times, interleaved
from adallava.cli.main import app
from adallava.errors import ConfigError
from adallava.results import read_rows


def test_everything_runs_once_per_round_in_changing_order():
    ran = []
    times = interleaved({name: lambda n=name: ran.append(n) for name in "abc"}, 8, torch.device("cpu"))
    rounds = ["".join(ran[i : i + 3]) for i in range(0, 27, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
    assert all(len(t.ms) == 8 for t in times.values()), "the first round warms up"


def test_a_ratio_is_taken_within_rounds():
    slow, fast = Times((10.0, 40.0, 20.0)), Times((5.0, 20.0, 40.0))
    assert slow.ratio(fast) == 2.0 and slow.median == 20.0


def test_selection_counts_tokens_and_flops():
    rows = {row.config["token_selection"]: row for row in measure(BenchSettings("tiny", rounds=2, threads=1))}
    assert tuple(rows) == SELECTIONS
    whole = rows["none"].metrics
    assert whole["tokens_first_layer"] == whole["tokens_last_layer"] == 48 + 36
    assert (whole["time_ratio"], whole["llm_flops_ratio"]) == (1.0, 1.0)
    half = rows["fastv:ratio=0.5"].metrics
    assert (half["tokens_first_layer"], half["tokens_last_layer"]) == (84, 66)
    assert rows["uniform:ratio=0.25"].metrics["tokens_first_layer"] == 48 + 9
    assert rows["uniform:ratio=0.25"].metrics["llm_flops_ratio"] < half["llm_flops_ratio"] < 1


def test_the_command_keeps_its_file(tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["bench", "selection", "--model", "tiny", "--rounds", "1", "--threads", "1", "--out", str(out)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "fastv:ratio=0.5" in shown.output and "time ratio" in shown.output
    assert [row.config["token_selection"] for row in read_rows(out)] == list(SELECTIONS)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "Result files are kept" in again.output
    told = CliRunner().invoke(app, [*arguments[:-2], "--json"])
    assert len(json.loads(told.stdout)) == len(SELECTIONS)


def test_mistakes():
    with pytest.raises(ConfigError, match="rounds is 0"):
        BenchSettings(rounds=0)
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        measure(BenchSettings("tinny"))
    wrong = CliRunner().invoke(app, ["bench", "selektion"])
    assert wrong.exit_code == 2 and "Did you mean 'selection'" in wrong.output
