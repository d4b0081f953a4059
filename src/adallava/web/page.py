"""The demo page itself: Gradio components, and what happens when they are touched. Nothing is fetched from outside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from PIL import Image

from adallava.budget import Budget
from adallava.errors import AdaLlavaError
from adallava.mini.questions import rich_scene
from adallava.mini.scenes import to_image
from adallava.web.studio import CALIBRATION_SECONDS, Strain, Studio
from adallava.web.views import STYLE, answer_html, error_html, facts_html, note_html, overlay, plan_html, strains_html

SHARE, TIME = "% of the model", "ms to the first token"
_FONTS = ["system-ui", "sans-serif"]
_SECONDS = 10.0
_LOADS = (0.5, 3.0)


def theme() -> gr.themes.Base:
    """Fonts of the reader's system: Gradio's own are fetched."""
    return gr.themes.Default(font=_FONTS, font_mono=["ui-monospace", "monospace"])


def build(studio: Studio, image: Image.Image | None = None, asked: tuple[str, ...] = (), seed: int = 0) -> gr.Blocks:
    """The page about ``image``, or about a scene drawn from ``seed``."""
    names = list(studio.models)
    picture, questions = (image, list(asked)) if image is not None else _scene(seed)
    questions = list(asked) or questions or ["what numbers are there ?"]
    with gr.Blocks(title="AdaLLaVA") as page:
        gr.Markdown("## One model, any budget\nChange the budget, and see what of the model runs for this picture.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                shown = gr.Image(picture, type="pil", label="Picture", height=300, elem_id="picture")
                another = gr.Button("Another scene", size="sm")
                question = gr.Dropdown(
                    questions, value=questions[0], label="Question", allow_custom_value=True, elem_id="question"
                )
                name = gr.Radio(names, value=names[0], label="Model", visible=len(names) > 1)
                unit = gr.Radio([SHARE, TIME], value=SHARE, label="Budget in", elem_id="unit")
                least = _percent(studio.least(names[0]))
                share = gr.Slider(least, 100, value=75, step=1, label=SHARE, elem_id="share")
                time_ms = gr.Slider(1, 100, value=1, step=0.1, label=TIME, visible=False, elem_id="time")
                measure = gr.Button(
                    f"Measure this machine first ({CALIBRATION_SECONDS:.0f} s)", visible=False, elem_id="measure"
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=360):
                said = gr.HTML(elem_id="said", label="Answer")
                plan = gr.HTML(elem_id="plan")
                facts = gr.HTML(elem_id="facts")
                seen = gr.Image(
                    label="Where the latency token looks", interactive=False, height=300, elem_id="attention"
                )
        with gr.Accordion("Under load", open=True):
            gr.Markdown(
                f"Random questions for {_SECONDS:.0f} s at a multiple of what the whole model sustains: once with the "
                "governor, which gives each request what the load allows, and once with all of the model for everybody."
            )
            with gr.Row():
                times = gr.Slider(*_LOADS, value=1.4, step=0.1, label="Load, times the capacity", scale=3)
                push = gr.Button("Put it under load", elem_id="push", scale=1)
            strain = gr.HTML(elem_id="strain")
            state = gr.HTML(elem_id="state")

        budget = [unit, share, time_ms]
        request = [name, shown, question, *budget]
        foresee = _foresee(studio)
        views = [said, plan, facts, seen]
        for touched in (shown, question, share, time_ms):
            touched.change(foresee, request, views, trigger_mode="always_last", show_progress="hidden")
        for chosen in (unit, name):
            chosen.change(_units(studio), request, [share, time_ms, measure]).then(foresee, request, views)
        page.load(foresee, request, views)
        another.click(_another(seed), None, [shown, question])
        measure.click(_measure(studio), request, [share, time_ms, measure]).then(foresee, request, views)
        ask.click(_ask(studio), request, [said, plan, facts])
        push.click(_push(studio), [name, times], [strain, state])
    return page


def _percent(share: float) -> int:
    return -int(-100 * share // 1)  # the next whole percentage


def _scene(seed: int) -> tuple[Image.Image, list[str]]:
    scene, questions = rich_scene(seed)
    return to_image(scene), [question.text for question in questions]


def _another(seed: int) -> Callable[[], tuple[Image.Image, Any]]:
    drawn = [seed]

    def draw() -> tuple[Image.Image, Any]:
        drawn[0] += 1
        picture, questions = _scene(drawn[0])
        return picture, gr.Dropdown(choices=questions, value=questions[0])

    return draw


def _budget(unit: str, share: float, time_ms: float) -> str:
    return f"{share:g}%" if unit == SHARE else f"{time_ms:g} ms"


def _foresee(studio: Studio) -> Callable[..., tuple[str, str, str, Image.Image | None]]:
    def foresee(
        name: str, picture: Image.Image | None, question: str | None, unit: str, share: float, time_ms: float
    ) -> tuple[str, str, str, Image.Image | None]:
        if picture is None or not question:
            return note_html("Give a picture and a question."), "", facts_html(None), None
        if unit == TIME and not studio.calibrated(name):
            return note_html("Times can be asked for once this machine is measured."), "", facts_html(None), None
        try:
            foreseen = studio.foresee(name, picture, question, _budget(unit, share, time_ms))
        except AdaLlavaError as error:
            return error_html(error), "", facts_html(None), None
        return "", plan_html(foreseen.plan), facts_html(foreseen.cost), overlay(picture, foreseen.attention)

    return foresee


def _ask(studio: Studio) -> Callable[..., Iterator[tuple[str, Any, str]]]:
    def ask(
        name: str, picture: Image.Image | None, question: str | None, unit: str, share: float, time_ms: float
    ) -> Iterator[tuple[str, Any, str]]:
        if picture is None or not question:
            yield note_html("Give a picture and a question."), gr.skip(), facts_html(None)
            return
        budget = _budget(unit, share, time_ms)
        try:
            for told in studio.answer(name, picture, question, budget):
                if told.begun is not None:
                    yield answer_html(told), plan_html(told.begun.plan), facts_html(told.begun.cost)
            assert told.begun is not None, "an answer has begun"
            yield (
                answer_html(told),
                gr.skip(),
                facts_html(told.begun.cost, *studio.compare(name, picture, question, told.begun.plan.k[0])),
            )
        except AdaLlavaError as error:
            yield error_html(error), gr.skip(), facts_html(None)

    return ask


def _units(studio: Studio) -> Callable[..., tuple[Any, Any, Any]]:
    """The slider of the chosen unit, with the range of the model; a button where time was never measured."""

    def units(
        name: str, picture: Image.Image | None, question: str | None, unit: str, share: float, time_ms: float
    ) -> tuple[Any, Any, Any]:
        least = _percent(studio.least(name))
        shares = gr.Slider(minimum=least, value=max(least, share), visible=unit == SHARE)
        if unit == SHARE or picture is None or not question:
            return shares, gr.Slider(visible=unit == TIME), gr.Button(visible=False)
        found = studio.times(name, picture, question)
        if found is None:
            return shares, gr.Slider(visible=False), gr.Button(visible=True)
        low, high = found
        inside = time_ms if low < time_ms < high else 1.1 * high
        return (
            shares,
            gr.Slider(minimum=round(0.5 * low, 1), maximum=round(1.5 * high, 1), value=round(inside, 1), visible=True),
            gr.Button(visible=False),
        )

    return units


def _measure(studio: Studio) -> Callable[..., tuple[Any, Any, Any]]:
    units = _units(studio)

    def measure(
        name: str,
        picture: Image.Image | None,
        question: str | None,
        unit: str,
        share: float,
        time_ms: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (Gradio looks for it in the defaults)
    ) -> tuple[Any, Any, Any]:
        studio.calibrate(name, lambda done: progress(done, desc="measuring"))
        return units(name, picture, question, unit, share, time_ms)

    return measure


def _push(studio: Studio) -> Callable[..., Iterator[tuple[Any, str]]]:
    def push(name: str, times: float) -> Iterator[tuple[Any, str]]:
        ended: list[Strain] = []
        yield gr.skip(), note_html("measuring what the whole model sustains here ...")
        try:
            for policy, budget in (("governor", None), ("all of the model", Budget.parse("100%"))):
                current: Strain | None = None
                for current in studio.strain(name, times, _SECONDS, policy, budget):
                    about = (
                        f"{current.rate:.0f} requests a second. Each dot is a first token: the darker, the more of the "
                        "model it got; dashed: the objective; a cross: refused."
                    )
                    yield strains_html([*ended, current]), note_html(about)
                assert current is not None, "a run tells of itself at least once"
                ended.append(current)
        except AdaLlavaError as error:
            yield gr.skip(), error_html(error)

    return push


def show(page: gr.Blocks, port: int | None, say: Callable[[str], None]) -> None:
    """Serve the page on this machine until Ctrl-C. port: a free one from 7860 on when None."""
    page.queue(default_concurrency_limit=4)
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        theme=theme(),
        css=STYLE,
        share=False,
        quiet=True,
        footer_links=[],
        prevent_thread_lock=True,
    )
    say(address)
    page.block_thread()
