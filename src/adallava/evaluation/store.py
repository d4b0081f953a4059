"""The rows of a sweep in a JSONL file, where a stopped sweep finds what it has done already."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from adallava.errors import ResultExistsError
from adallava.evaluation.tasks import COSTS
from adallava.results import ResultRow, append_jsonl, read_rows


class Key(NamedTuple):
    """What a row is about."""

    model: str
    budget: str
    mode: str
    token_selection: str
    task: str


class RowStore:
    """Rows kept in a file, or nowhere if ``path`` is None."""

    def __init__(self, path: Path | None) -> None:
        """Read the rows that are there; ``ResultExistsError`` for a file that holds something else."""
        self.path = path
        self._rows: dict[Key, ResultRow] = {}
        if path is None or not path.exists():
            return
        _drop_cut_line(path)
        try:
            self._rows = {_key(row): row for row in map(_completed, read_rows(path))}
        except (ValueError, KeyError) as error:
            raise ResultExistsError(
                f"{path} exists and is not the output of a sweep ({error}). It is left as it is: choose another file."
            ) from error

    def find(self, key: Key, made_with: dict[str, Any]) -> ResultRow | None:
        """Return the row of ``key``; ``ResultExistsError`` if it was made with other settings than ``made_with``."""
        row = self._rows.get(key)
        if row is None:
            return None
        for name, wanted in made_with.items():
            found = row.config.get(name)
            if found != wanted:
                raise ResultExistsError(
                    f"{self.path} holds {key.model} at {key.budget} with {name} {found}, and this sweep has {name} "
                    f"{wanted}. Rows of both would not be comparable: choose another file, or the same {name}."
                )
        return row

    def add(self, row: ResultRow) -> None:
        """Keep a row."""
        self._rows[_key(row)] = row
        if self.path is not None:
            append_jsonl(self.path, row)


def _key(row: ResultRow) -> Key:
    config = row.config
    return Key(config["model"], config["budget"], config["mode"], config["token_selection"], row.name)


def _completed(row: ResultRow) -> ResultRow:
    """A row as it would be written now: older ones did not count tokens, which all were kept, or tell all costs."""
    config = {"token_selection": "none", **row.config}
    return replace(row, config=config, metrics={**dict.fromkeys(COSTS), **row.metrics})


def _drop_cut_line(path: Path) -> None:
    """Cut off a last line that a killed process did not finish; the rows before it are whole."""
    data = path.read_bytes()
    # A file that is not ours is never touched: reading it says that it is no result file.
    if data.endswith(b"\n") or not data.startswith(b'{"name": "'):
        return
    whole, newline, last = data.rpartition(b"\n")
    try:
        json.loads(last)
    except ValueError:
        path.write_bytes(whole + newline)
    else:
        path.write_bytes(data + b"\n")
