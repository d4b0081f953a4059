"""Result files: complete or absent, never overwritten, with their provenance."""

import json
import os
import subprocess

import pytest
import torch

from adallava import __version__, results
from adallava.errors import ResultExistsError
from adallava.results import ResultRow, append_jsonl, provenance, read_rows, write_json

ROWS = [
    ResultRow("pope", {"accuracy_frac": 0.5}, {"budget": "60%"}, provenance(seed=3, dtype=torch.float32)),
    ResultRow("gqa", {"accuracy_frac": None}),
]


def test_provenance():
    row = provenance(device=torch.device("cpu"), dtype=torch.bfloat16, seed=7)
    assert row["adallava"] == __version__
    assert row["torch"] == torch.__version__
    assert row["transformers"]
    assert row["threads"] == torch.get_num_threads()
    assert (row["device"], row["dtype"], row["seed"]) == ("cpu", "bfloat16", 7)
    assert row["device_name"]
    json.dumps(row)


def test_commit_is_that_of_this_checkout_only(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()

    monkeypatch.setattr(results, "__file__", str(tmp_path / "src" / "adallava" / "results.py"))
    assert provenance()["commit"] == commit
    (tmp_path / "file").write_text("changed")
    assert provenance()["commit"] == commit + "+"
    # An environment inside somebody's repository: its commit says nothing about this package.
    (tmp_path / "env").mkdir()
    monkeypatch.setattr(results, "__file__", str(tmp_path / "env" / "site-packages" / "adallava" / "results.py"))
    assert provenance()["commit"] is None


def test_write_and_read(tmp_path):
    path = tmp_path / "new" / "rows.json"
    write_json(path, ROWS)
    assert read_rows(path) == ROWS
    assert os.listdir(path.parent) == ["rows.json"]


def test_append_and_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in ROWS:
        append_jsonl(path, row)
    assert read_rows(path) == ROWS
    assert len(path.read_text().splitlines()) == 2


def test_files_are_kept(tmp_path):
    path = tmp_path / "rows.json"
    write_json(path, ROWS)
    with pytest.raises(ResultExistsError, match=r"rows.json exists.*overwrite=True"):
        write_json(path, [])
    assert read_rows(path) == ROWS
    write_json(path, ROWS[:1], overwrite=True)
    assert read_rows(path) == ROWS[:1]
    assert issubclass(ResultExistsError, FileExistsError)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    with pytest.raises(ValueError, match="NaN or infinity"):
        write_json(path, [ResultRow("a", {"x": float("nan")})])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, ROWS)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"name": "a"}', '{"name": "a", "metrics": {}, "other": 1}'])
def test_other_files(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rows.json is not a result file"):
        read_rows(path)
