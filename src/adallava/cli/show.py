"""What the commands print: plans as coloured squares, pictures as coloured half blocks, remarks on questions."""

from __future__ import annotations

from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

from adallava.errors import PromptError
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM
from adallava.plots.drawing import BAR, OFF, ON, PlanDrawing

PREFIX_STYLE, ON_STYLE, OFF_STYLE = "bright_black", "cyan", "bright_black"


def drawing_of(vlm: AdaptiveVLM, answer: Answer) -> PlanDrawing:
    """Return the drawing of an answer's plan; a base model runs whole."""
    return PlanDrawing.whole(vlm.spec.num_layers) if answer.plan is None else PlanDrawing.of(answer.plan)


def plan_text(drawing: PlanDrawing) -> Text:
    """Return a plan as squares: grey prefix, then what is on in colour; a digit is a layer that runs in part."""
    text = Text(ON * drawing.prefix, style=PREFIX_STYLE)
    if drawing.tail:
        text.append(BAR, style=PREFIX_STYLE)
        for mark in drawing.marks():
            text.append(mark, style=OFF_STYLE if mark == OFF else ON_STYLE)
    return text


def plan_legend(drawings: list[PlanDrawing]) -> Text:
    """Explain the squares."""
    text = Text.assemble((ON, PREFIX_STYLE), " always on   ", (ON, ON_STYLE), " on   ", (OFF, OFF_STYLE), " off")
    if each := max((d.per_layer for d in drawings), default=1) - 1:
        text.append("   ")
        text.append(f"1-{each}" if each > 1 else "1", style=ON_STYLE)
        text.append(f" head groups on of a layer's {each + 1}")
    return text


def kept_text(answer: Answer) -> str:
    """Say how many tokens of an answer's prompt its layers processed, the latency token not counted."""
    total, latency = answer.prompt_tokens, answer.plan is not None
    kept = [tokens - latency for tokens in answer.layer_tokens]
    if kept[-1] == total:
        return f"all {total} prompt tokens kept"
    first = next(layer for layer, tokens in enumerate(kept) if tokens < total)
    return f"{kept[-1]} of {total} prompt tokens kept" + (f", from layer {first} on" if first else "")


def picture_text(image: Image.Image, console: Console, columns: int = 36) -> Text | None:
    """Return a small picture of half blocks, or None where the terminal has too few colours or is none."""
    if console.color_system not in ("truecolor", "256") or not console.is_terminal:
        return None
    rows = max(1, round(columns * image.height / image.width / 2))
    small = image.convert("RGB").resize((columns, 2 * rows), Image.Resampling.BOX)
    text = Text()
    for row in range(rows):
        for column in range(columns):
            upper, lower = (small.getpixel((column, 2 * row + half)) for half in (0, 1))
            text.append("▀", style=f"{_rgb(upper)} on {_rgb(lower)}")
        text.append("\n" if row < rows - 1 else "")
    return text


def check_question(question: str) -> None:
    """Raise ``PromptError`` for an empty question, before a model is loaded for it."""
    if not question.strip():
        raise PromptError(f"the question {question!r} is empty. Ask something, such as 'what numbers are there ?'.")


def unknown_words(vlm: AdaptiveVLM, question: str) -> list[str]:
    """Return the words of a question that the tokenizer cannot tell from any other unknown word."""
    tokenizer = vlm.processor.tokenizer
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    encoded = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [question[start:end] for token, (start, end) in spans if token == tokenizer.unk_token_id]


def warn_unknown_words(vlm: AdaptiveVLM, question: str, console: Console) -> None:
    """Say on stderr which words the model does not know: its answer to them is a guess."""
    if words := list(dict.fromkeys(unknown_words(vlm, question))):
        console.print(
            f"note: this model does not know {', '.join(map(repr, words))}. The mini models know questions such as "
            "'what color is the seven ?', 'how many stars are there ?', 'what is left of the cross ?'.",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _rgb(pixel: Any) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixel)
