"""Drawings, units and the HTML report: well-formed, everything escaped, nothing fetched."""

import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from adallava.config import AdaptiveConfig
from adallava.plan import ExecutionPlan
from adallava.plots.drawing import PlanDrawing
from adallava.plots.report import Report, Row, Section, to_html, write_report
from adallava.plots.units import flops_text, ms_text, share_text

VOID = {"meta", "img", "br", "rect"}
EVIL = '<script>alert("x")</script> & more'


class Checker(HTMLParser):
    """Notes tags, text and attributes; fails on a tag that is closed in the wrong order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def config(variant, heads_per_switch=2):
    return AdaptiveConfig(variant, 4, 8, 8, 64, 2, heads_per_switch)


def rows(answer="four"):
    base = Row("mini-base", "100%", answer, True, PlanDrawing.whole(4), 4e8, 1.0, 14.0, 20.0)
    small = Row("mini-H", "60%", answer, False, PlanDrawing(2, (4, 1), 4), 2.4e8, 0.6, 9.0, 12.0, 1)
    return (base, small, Row("mini-H", "50%", "", None, PlanDrawing(2, (0, 0), 4), 2e8, 0.5, 8.0, 8.0, 1))


def report(**changes):
    data = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(data, "PNG")
    section = Section(changes.pop("question", "what ?"), changes.pop("rows", rows()), "four", "reading")
    return Report(data.getvalue(), changes.pop("caption", "a scene"), (section,), "Medians.", (("seed", "1"),))


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_drawing_of_plans():
    layers = ExecutionPlan.from_switches(torch.tensor([[True, False]]), config("L"))
    drawing = PlanDrawing.of(layers)
    assert (drawing.text(), drawing.count) == ("■■│■□", "3/4")
    gates = torch.ones(1, 4, 2, 8, dtype=torch.bool)
    gates[:, 2, :, 2:] = False
    drawing = PlanDrawing.of(ExecutionPlan(gates, config("H")))
    assert (drawing.text(), drawing.count) == ("■■│1■", "13/16")
    assert PlanDrawing.whole(3).text() == "■■■"
    assert PlanDrawing.whole(3).count == "3/3"


def test_drawing_as_svg_fills_from_below():
    svg = PlanDrawing(2, (4, 1, 0), 4).svg()
    parse(svg)
    assert [svg.count(f'class="{kind}"') for kind in ("prefix", "on", "off")] == [2, 2, 3]
    heights = [float(h) for h in re.findall(r'class="on"[^>]* height="([\d.]+)"', svg)]
    assert heights == [19, 4]


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (8.5512e12, "8.55 TFLOPs"),
        (3.7e8, "370 MFLOPs"),
        (9.999e11, "1 TFLOPs"),
        (2e15, "2000 TFLOPs"),
        (1500, "1.5 kFLOPs"),
        (12, "12 FLOPs"),
    ],
)
def test_flops_text(flops, text):
    assert flops_text(flops) == text


def test_other_units():
    assert [ms_text(v) for v in (7.421, 81.26, 1204.4)] == ["7.42 ms", "81.3 ms", "1,204 ms"]
    assert share_text(0.58333) == "58.3%"


def test_page_is_whole_and_fetches_nothing():
    page = to_html(report())
    checker = parse(page)
    assert "http" not in page.replace("http-equiv", "")
    assert "script" not in checker.seen
    assert len(checker.links) == 1
    assert checker.links[0].startswith("data:image/png;base64,")
    assert "url(" not in page and "@import" not in page
    text = " ".join(checker.text)
    for expected in ("four", "12.0 ms", "240 MFLOPs", "60.0%", "✓", "✗", "(empty)", "what ?", "a scene", "seed"):
        assert expected in text


def test_everything_from_outside_is_escaped():
    page = to_html(report(rows=rows(EVIL), question=EVIL, caption=EVIL))
    checker = parse(page)
    assert "script" not in checker.seen
    assert "<script" not in page
    assert sum(EVIL in text for text in checker.text) == 4  # two answers, the question, the caption


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(report(), path)
    before = path.read_text(encoding="utf-8")
    with pytest.raises(AttributeError):
        write_report(report(caption=None), path)
    assert path.read_text(encoding="utf-8") == before
    assert list(path.parent.iterdir()) == [path]
