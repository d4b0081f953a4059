"""``adallava demo``: the same questions about one picture at several budgets, side by side."""

from __future__ import annotations

import io
import platform
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from adallava import __version__
from adallava.budget import Budget, parse_budgets
from adallava.cli.show import check_question, drawing_of, picture_text, plan_legend, plan_text, warn_unknown_words
from adallava.errors import BudgetError, ConfigError
from adallava.hosts.answer import Answer
from adallava.hosts.images import load_image
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.questions import DESCRIBE, Question, rich_scene
from adallava.mini.scenes import to_image
from adallava.mini.scoring import score
from adallava.plots.report import Report, Row, Section, write_report
from adallava.plots.units import flops_text, ms_text, share_text

MAX_NEW_TOKENS = 32
REPETITIONS = 5
_TIME_LIMIT_S = 25.0
_LARGEST_SIDE = 800
_LONGEST_ANSWER = 60
_WIDE = 100


@dataclass(frozen=True)
class DemoOptions:
    """What ``adallava demo`` was asked for."""

    out: Path
    seed: int
    image: Path | None
    questions: tuple[str, ...]
    budgets: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class _Subject:
    """A picture and the questions about it."""

    image: Image.Image
    caption: str
    questions: tuple[Question, ...]
    drawn: bool


@dataclass
class _Run:
    """One model at one budget, over all questions: the answers and the times of every repetition."""

    name: str
    vlm: AdaptiveVLM
    budget: Budget
    series: int
    answers: list[Answer] = field(default_factory=list)
    first_ms: list[list[float]] = field(default_factory=list)
    total_ms: list[list[float]] = field(default_factory=list)


def demo_or_page(options: DemoOptions, web: bool, port: int | None) -> None:
    """Run the demo here, or as a page."""
    if not web:
        demo(options)
        return
    from adallava.cli.web import web as page

    page(options, port)


def demo(options: DemoOptions) -> None:
    """Run the demo: tables on stdout, a report in ``options.out``."""
    console, progress = Console(highlight=False), Console(stderr=True)
    budgets = parse_budgets(options.budgets)
    if options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a folder, expected a file name such as adallava-report.html.")
    subject = _subject(options)
    runs = _runs(options.models, budgets)
    for question in subject.questions:
        warn_unknown_words(runs[0].vlm, question.text, progress)
    repetitions = _measure(runs, subject, progress)
    sections = [_section(question, index, runs) for index, question in enumerate(subject.questions)]
    _print(console, subject, sections)
    write_report(_report(options, subject, sections, runs[0].vlm, repetitions), options.out)
    console.print(Text.assemble("\nReport with the picture: ", (str(options.out), "bold")), soft_wrap=True)


# -- what is asked ----------------------------------------------------------------------------------------------------


def _subject(options: DemoOptions) -> _Subject:
    for text in options.questions:
        check_question(text)
    own = tuple(Question("", text, "") for text in options.questions)
    if options.image is not None:
        standard = ("what numbers are there ?", "how many red things are there ?", DESCRIBE)
        questions = own or tuple(Question("", text, "") for text in standard)
        return _Subject(load_image(options.image), options.image.name, questions, drawn=False)
    scene, questions = rich_scene(options.seed)
    caption = (
        f"Test scene drawn from seed {options.seed}, with real handwritten digits that no training scene showed: "
        f"{scene.describe().replace(' ,', ',')}."
    )
    return _Subject(to_image(scene), caption, own or questions, drawn=True)


# -- asking -----------------------------------------------------------------------------------------------------------


def _runs(models: tuple[str, ...], budgets: list[Budget]) -> list[_Run]:
    """Every model at every budget, a base model at 100 % only and first."""
    loaded = {name: AdaptiveVLM.from_pretrained(name) for name in dict.fromkeys(models)}
    runs, series = [], 0
    for name, vlm in sorted(loaded.items(), key=lambda item: item[1].adaptive_config is not None):
        label = Path(name).name
        if vlm.adaptive_config is None:
            runs.append(_Run(label, vlm, Budget.parse(1), 0))
            continue
        series += 1
        for budget in budgets:
            try:
                budget.resolve(vlm.adaptive_config)
            except BudgetError as error:
                raise BudgetError(f"{label}: {error}") from error
            runs.append(_Run(label, vlm, budget, series))
    return runs


def _measure(runs: list[_Run], subject: _Subject, console: Console) -> int:
    """Ask every question in every run, once to warm up and then in turns; return how often each was measured.

    In turns and in an order that changes: a machine that slows down meanwhile must not favour one budget.
    """
    order, rng, started = list(range(len(runs))), random.Random(0), time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("asking", total=len(runs) * (1 + REPETITIONS))
        for run in runs:
            run.answers = [_ask(run, subject.image, question.text) for question in subject.questions]
            run.first_ms, run.total_ms = [[] for _ in run.answers], [[] for _ in run.answers]
            progress.advance(task)
        for done in range(1, REPETITIONS + 1):
            rng.shuffle(order)
            for run in (runs[i] for i in order):
                for index, question in enumerate(subject.questions):
                    timing = _ask(run, subject.image, question.text).timing
                    run.first_ms[index].append(timing.first_token_ms)
                    run.total_ms[index].append(timing.total_ms)
                progress.advance(task)
            elapsed = time.perf_counter() - started
            if elapsed * (done + 2) / (done + 1) > _TIME_LIMIT_S:  # one more round would take too long
                return done
    return REPETITIONS


def _ask(run: _Run, image: Image.Image, question: str) -> Answer:
    return run.vlm.generate(image, question, budget=run.budget, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)


# -- showing ----------------------------------------------------------------------------------------------------------


def _section(question: Question, index: int, runs: list[_Run]) -> Section:
    known = bool(question.family)
    rows = []
    for run in runs:
        answer = run.answers[index]
        rows.append(
            Row(
                model=run.name,
                budget=str(run.budget),
                answer=answer.text,
                right=score(question, answer.text) == 1 if known else None,
                plan=drawing_of(run.vlm, answer),
                flops=answer.cost.prefill_flops,
                share=answer.cost.frac,
                first_token_ms=median(run.first_ms[index]),
                total_ms=median(run.total_ms[index]),
                series=run.series,
            )
        )
    truth, family = (question.answer, question.family) if known else (None, None)
    return Section(question.text, tuple(rows), truth, family)


def _print(console: Console, subject: _Subject, sections: list[Section]) -> None:
    legend = Text.assemble("plan: ", plan_legend([row.plan for section in sections for row in section.rows]))
    about = Group(
        Text("One model, any budget", style="bold"),
        Text(subject.caption, style="dim"),
        "",
        legend,
        Text("FLOPs: prefill, paper convention, and share of the base model", style="dim"),
        Text("ms: measured, to the first token and to the last one (median)", style="dim"),
    )
    picture = picture_text(subject.image, console)
    if picture is None:
        console.print(about)
    else:
        grid = Table.grid(padding=(0, 3, 0, 0))
        grid.add_row(picture, about)
        console.print(grid)
    for section in sections:
        console.print()
        console.print(_table(section, wide=console.width >= _WIDE))


def _table(section: Section, wide: bool) -> Table:
    title = Text(section.question, style="bold")
    if section.truth is not None:
        title.append(f"   right answer: {section.truth}", style="not bold dim")
    table = Table(
        title=title,
        title_justify="left",
        box=None,
        header_style="dim",
        pad_edge=False,
        padding=(0, 1) if wide else (0, 1, 0, 0),
    )
    for name in (
        "model",
        "budget",
        "answer",
        "plan",
        *(["on"] if wide else []),
        "FLOPs",
        "share",
        "first ms",
        "total ms",
    ):
        left = name in ("model", "answer", "plan")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "answer")
    for before, row in zip((None, *section.rows), section.rows, strict=False):
        table.add_row(
            row.model if before is None or before.model != row.model else "",
            row.budget,
            _marked(row),
            plan_text(row.plan),
            *([row.plan.count] if wide else []),
            flops_text(row.flops).removesuffix("FLOPs").strip(),
            share_text(row.share),
            ms_text(row.first_token_ms).removesuffix(" ms"),
            ms_text(row.total_ms).removesuffix(" ms"),
        )
    return table


def _marked(row: Row) -> Text:
    answer = Text(row.answer) if row.answer else Text("(empty)", style="dim")
    answer.truncate(_LONGEST_ANSWER, overflow="ellipsis")  # the report has it whole
    if row.right is None:
        return answer
    return Text.assemble(("✓ ", "green") if row.right else ("✗ ", "red"), answer)


def _report(
    options: DemoOptions, subject: _Subject, sections: list[Section], vlm: AdaptiveVLM, repetitions: int
) -> Report:
    image = subject.image.copy()
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    data = io.BytesIO()
    image.save(data, format="PNG")
    method = (
        f"Times are medians of {repetitions} repetitions after a warm-up, all models and budgets in turns and in "
        "changing order, from prepared inputs on. FLOPs follow the paper's convention: prefill of the language model. "
        "An adaptive model reads one token more, the latency token, and its share is taken at that length."
    )
    facts = (
        ("adallava", __version__),
        ("torch", torch.__version__),
        ("Python", platform.python_version()),
        ("device", str(vlm.device)),
        ("threads", str(torch.get_num_threads())),
        *((("seed", str(options.seed)),) if subject.drawn else ()),
    )
    return Report(data.getvalue(), subject.caption, tuple(sections), method, facts, smooth=not subject.drawn)
