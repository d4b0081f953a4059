"""A table as Markdown, CSV and LaTeX; and the numbers that the paper prints, to stand beside ours."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Cells as they are printed."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """A pipe table; the first column to the left, the others to the right."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = (self.columns, rule, *self.rows)
        return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)

    def to_csv(self) -> str:
        """Comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def to_latex(self) -> str:
        """A ``tabular`` with booktabs rules."""
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.columns, *self.rows)]
        head = rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}"
        return "\n".join((head, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}", ""))


def _latex(text: str) -> str:
    for sign in "&%#_$":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("±", r"$\pm$")


TABLE_A_COLUMNS = ("GQA", "SEED-Bench", "MM-Vet", "LLaVA-Wild", "VizWiz")
TABLE_A = {
    ("base", "100%"): (62.0, 58.6, 31.1, 65.4, 50.0),
    ("L", "100%"): (61.5, 60.5, 30.7, 64.2, 54.3),
    ("L", "85%"): (61.3, 60.2, 30.0, 62.1, 51.5),
    ("L", "60%"): (58.7, 59.8, 23.9, 46.3, 44.8),
}
"""Table A of the paper: LLaVA-1.5-7B and AdaLLaVA-L."""

TABLE_B_COLUMNS = ("VQAv2", "SQA-I", "TextVQA", "POPE", "MME", "MMBench")
_TABLE_B = {
    "none": """78.5 66.8 58.2 85.9 1510.7 64.3
        78.4 67.8 57.0 85.9 1521.0 63.7 / 77.1 67.4 54.5 86.4 1487.2 63.7 / 75.0 66.9 47.7 86.1 1463.8 63.8
        77.9 68.5 57.1 86.9 1471.1 64.1 / 76.8 68.2 55.2 86.7 1494.9 64.3 / 74.2 68.1 48.7 85.0 1489.6 64.8""",
    "prumerge": """72.0 68.5 56.0 76.3 1350.3 60.9
        71.0 69.1 54.1 74.2 1312.6 58.4 / 69.7 68.6 52.5 75.6 1313.3 59.1 / 67.8 68.7 44.7 75.8 1332.5 57.0
        70.4 67.9 54.4 77.2 1311.4 60.1 / 69.2 67.2 52.3 75.5 1309.7 60.7 / 66.8 68.1 45.9 76.4 1289.3 58.7""",
    "prumerge+": """76.8 68.3 57.1 84.0 1462.4 64.9
        76.3 68.3 55.8 85.1 1455.5 61.9 / 75.3 68.5 52.9 85.7 1429.5 62.5 / 73.0 67.7 47.4 85.6 1450.9 61.3
        76.0 67.9 56.0 86.6 1503.2 63.2 / 75.0 68.1 54.2 86.4 1511.8 63.6 / 72.2 67.6 47.2 86.4 1458.0 63.6""",
}
"""Base; L at 100, 85, 60 %; H at 100, 85, 60 %. FastV's lines are garbled in the text of the paper that we have."""


def table_b(selection: str) -> dict[tuple[str, str], tuple[float, ...]]:
    """Table B of the paper for LLaVA-1.5-7B under one token selection: (model, budget) -> accuracies; {} if unknown."""
    if selection not in _TABLE_B:
        return {}
    lines = [line for block in _TABLE_B[selection].splitlines() for line in block.split("/")]
    keys = [("base", "100%"), *((variant, budget) for variant in "LH" for budget in ("100%", "85%", "60%"))]
    return {key: tuple(map(float, line.split())) for key, line in zip(keys, lines, strict=True)}


def relative(values: Sequence[float], base: Sequence[float]) -> float | None:
    """Mean over benchmarks of the accuracy relative to the base model's; 1 is as good, None beside a base of 0."""
    if not all(base):
        return None
    return sum(value / reference for value, reference in zip(values, base, strict=True)) / len(base)
