"""Benchmarks run, compare in the same round, and keep their files. What they measure is not tested: it is measured."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adallava.bench import BenchSettings, load, paper, quantized, scaling, speed
from adallava.bench.models import random_llava
from adallava.bench.selection import SELECTIONS, measure
from adallava.bench.timing import Times, interleaved
from adallava.cli.main import app
from adallava.cost import LayerLoad, ModelSpec
from adallava.errors import ConfigError
from adallava.results import read_rows
from test_hosts_graphs import Recorder


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
    assert told.stdout.count("\n") == 1
    one = json.loads(told.stdout)
    assert len(one["rows"]) == len(SELECTIONS) and one["rows"][0]["token_selection"] == "none"
    assert one["provenance"]["torch"] == torch.__version__


def test_speed_tells_ratios_beside_shares():
    rows = {row.config["measure"]: row.metrics for row in speed.measure(BenchSettings("tiny", rounds=1, threads=1))}
    half, most = rows["L 50%, prefill"], rows["L 75%, prefill"]
    assert half["share"] == pytest.approx(0.5, abs=0.05) and most["share"] == pytest.approx(0.75, abs=0.05)
    assert rows["H 75%, prefill"]["share"] == pytest.approx(0.75, abs=0.05)
    assert 0.5 < rows["L 50%, decode"]["share"] < 0.6  # the output layer is read at any budget
    assert rows["L, 8 requests at 50 to 100%, prefill"]["share"] == pytest.approx(0.75, abs=0.05)
    assert rows["L, 8 requests at 50 to 100%, decode"]["share"] > 0.75  # what one row runs is read for all
    for name in ("L 50%, KV bytes", "H 75%, KV bytes"):
        assert rows[name]["ratio"] == 1.0 and rows[name]["held"] is True
    promised = {name for name, row in rows.items() if row["allowance"] is not None}
    assert set(rows) - promised == {name for name in rows if name.startswith("static model")}
    for row in rows.values():
        assert row["ratio"] > 0 and (
            row["held"] is None or row["held"] == (row["ratio"] <= row["share"] + row["allowance"])
        )


def test_bytes_of_a_step():
    spec = ModelSpec(8, 16, 2, 4, 2, 2, 10)  # width, neurons, layers, heads, kv heads, head size, words
    whole, none = LayerLoad(4, Fraction(1)), LayerLoad(0, Fraction(0))
    layer, cache = 2 * 8 * (8 + 4) + 3 * 8 * 16, 2 * 4 * 7
    assert speed.step_bytes(spec, [(whole, whole)], 7) == 80 + 2 * (layer + cache)
    assert speed.step_bytes(spec, [(whole, none)], 7) == 80 + layer + cache
    assert speed.step_bytes(spec, [(whole, none), (whole, whole)], 7) == 80 + 2 * layer + 3 * cache
    half = LayerLoad(2, Fraction(1, 2))
    assert speed.step_bytes(spec, [(whole, half)], 7) == 80 + 1.5 * (layer + cache)
    assert speed.step_bytes(spec, [(whole, none)], 7, packed=0.25) == 80 + 0.25 * layer + cache


def test_the_papers_budgets_are_measured_beside_its_times():
    rows = {row.config["measure"]: row.metrics for row in paper.measure(BenchSettings("tiny", rounds=1, threads=1))}
    assert list(rows) == [f"{variant} {budget}, prefill" for variant in "LH" for budget in ("100%", "85%", "60%")]
    assert rows["L 60%, prefill"]["share"] == pytest.approx(49 / 81)
    assert rows["L 60%, prefill"]["flops_share"] == pytest.approx(0.5, abs=0.05)  # two layers of four
    assert all(row["ratio"] > 0 and row["held"] is None for row in rows.values())


def test_quantized_weights_need_their_library(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'adallava\[quantized\]'"):
        quantized.measure(BenchSettings("tiny", rounds=1, threads=1))


def test_models_share_their_weights():
    base = random_llava("tiny", torch.device("cpu"))
    twin, shallow = speed._twin(base), speed._twin(base, 2)
    assert twin is not base and len(shallow.model.language_model.layers) == 2
    assert base.config.text_config.num_hidden_layers == 4 == len(base.model.language_model.layers)
    for name, weight in twin.named_parameters():
        assert weight is base.get_parameter(name)


def test_scaling_tells_exponents(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "AXES", {"prompt tokens": (8, 16, 32), "requests": (1, 2)})
    monkeypatch.setattr(speed, "NEW_TOKENS", 3)
    out = tmp_path / "rows.json"
    run = ["bench", "scaling", "--model", "tiny", "--rounds", "1", "--threads", "1"]
    made = CliRunner().invoke(app, [*run, "--out", str(out), "--figures", str(tmp_path)])
    assert made.exit_code == 0, made.output
    rows = read_rows(out)
    points = [row for row in rows if "part" not in row.config]
    assert len(points) == (3 + 2 + 1) * len(scaling.WAYS)
    (slope,) = [r for r in rows if r.config == {"axis": "prompt tokens", "way": "plain", "part": "exponents"}]
    assert slope.metrics["kv_bytes_exponent"] == pytest.approx(1, abs=0.05)  # but for the latency token
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"scaling-{axis}.png" for axis in ("prompt-tokens", "requests", "parameters")
    }


def test_exponents():
    assert scaling.exponent([(1, 100), (2, 100), (4, 40), (8, 160)]) == pytest.approx(2)
    assert scaling.exponent([(1, 1)]) is None


@pytest.mark.parametrize(
    ("name", "file", "figure"),
    [
        ("speed", "speed-mid-cpu-third", "speed"),
        ("load", "load-mini-L-2threads", "load-mini-L"),
        ("load", "load-small-2threads", "load-small"),
    ],
)
def test_figures_of_published_rows(name, file, figure, tmp_path):
    rows = Path(__file__).parents[1] / "benchmarks" / "results" / f"{file}.json"
    shown = CliRunner().invoke(app, ["bench", name, "--rows", str(rows), "--figures", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{figure}.png", f"{figure}.svg"]
    wrong = CliRunner().invoke(app, ["bench", "scaling", "--rows", str(rows)])
    assert wrong.exit_code == 2 and "has no rows of scaling" in wrong.output


def test_load_asks_under_every_policy(monkeypatch):
    monkeypatch.setattr(load, "LOADS", (0.5, 3.0))
    monkeypatch.setattr(load, "CALIBRATION_SECONDS", 8.0)
    rows = load.measure(BenchSettings("mini-L", rounds=1, threads=1))
    told = {(row.config["load"], row.config["policy"]): row.metrics for row in rows}
    assert set(told) == {(at, policy) for at in (0.5, 3.0) for policy in load.POLICIES}
    for (_, policy), metrics in told.items():
        assert 0 < metrics["answered"] <= 20 and metrics["capacity_per_s"] > 0
        assert metrics["right_frac"] <= metrics["accuracy"] <= 1
        assert policy == "governor" or metrics["refused_frac"] == 0
    assert told[3.0, "fixed 100%"]["mean_budget_frac"] == 1


def test_mistakes():
    with pytest.raises(ConfigError, match="rounds is 0"):
        BenchSettings(rounds=0)
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        measure(BenchSettings("tinny"))
    wrong = CliRunner().invoke(app, ["bench", "selektion"])
    assert wrong.exit_code == 2 and "Did you mean 'selection'" in wrong.output


def test_load_of_random_weights_has_no_right_answers(monkeypatch):
    monkeypatch.setattr(load, "LOADS_OF_SHAPES", (1.0,))
    monkeypatch.setattr(load, "CALIBRATION_SECONDS", 8.0)
    rows = load.measure(BenchSettings("tiny", rounds=1, threads=1))
    assert {row.config["policy"] for row in rows} == set(load.POLICIES)
    for row in rows:
        assert row.metrics["accuracy"] is None and row.metrics["right_frac"] is None
        assert row.metrics["answered"] + round(20 * row.metrics["refused_frac"]) == 20


def test_decoding_with_graphs_is_measured_where_there_are_any():
    recorder = Recorder()
    suite = speed.Suite(random_llava("tiny", torch.device("cpu")), BenchSettings("tiny", rounds=1, threads=1))
    told = {one.name: one for one in suite.graphed(recorder)}
    assert set(told) == {"L 100% with graphs, decode", "L 50% with graphs, decode"}
    assert told["L 50% with graphs, decode"].share < told["L 100% with graphs, decode"].share
    assert recorder.recorded == 4 and recorder.replayed > 0
