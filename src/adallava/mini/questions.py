"""Families of questions about a scene, each the miniature of one of the paper's benchmarks.

A family is a function (scene, rng) -> Question or None, where None says that this scene has nothing to ask of that
kind. Answers are unique by construction: a reference such as "the red star" is only used where exactly one object
matches it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adallava.mini.scenes import COLORS, DIGITS, PLACES, SHAPES, Scene, SceneObject, Split, sample_scene

KINDS = DIGITS + SHAPES
PLURALS = {k: {"six": "sixes", "cross": "crosses", "zero": "zeros"}.get(k, k + "s") for k in KINDS}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
LETTERS = ("a", "b", "c")
DESCRIBE = "describe the picture"
_FUNCTION_WORDS = "what color is the how many things are there at number numbers a an which thing describe picture"


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one right answer."""

    family: str
    text: str
    answer: str


def _one(rng: random.Random, objects: list[SceneObject]) -> SceneObject | None:
    return rng.choice(objects) if objects else None


def _unique_kinds(scene: Scene) -> list[SceneObject]:
    kinds = [o.kind for o in scene.objects]
    return [o for o in scene.objects if kinds.count(o.kind) == 1]


def _absent_mixtures(scene: Scene) -> list[str]:
    """Colour-kind pairs that are not shown although both halves are: the adversarial negatives."""
    shown = {o.name for o in scene.objects}
    mixtures = {f"{a.color} {b.kind}" for a in scene.objects for b in scene.objects}
    return sorted(mixtures - shown)


def _absent(scene: Scene, rng: random.Random, count: int) -> list[str]:
    """``count`` names that are not in the scene, adversarial ones first."""
    shown = {o.name for o in scene.objects}
    names = _absent_mixtures(scene)
    rng.shuffle(names)
    while len(names) < count:
        name = f"{rng.choice(tuple(COLORS))} {rng.choice(KINDS)}"
        if name not in shown and name not in names:
            names.append(name)
    return names[:count]


def open_question(scene: Scene, rng: random.Random) -> Question | None:
    """VQAv2: colours, counts and places."""
    form = rng.randrange(4)
    if form == 0:
        thing = _one(rng, _unique_kinds(scene))
        return None if thing is None else Question("open", f"what color is the {thing.kind} ?", thing.color)
    if form == 1:
        color = rng.choice(scene.objects).color if rng.random() < 0.8 else rng.choice(tuple(COLORS))
        count = sum(o.color == color for o in scene.objects)
        return Question("open", f"how many {color} things are there ?", DIGITS[count])
    if form == 2:
        kind = rng.choice(scene.objects).kind if rng.random() < 0.8 else rng.choice(KINDS)
        count = sum(o.kind == kind for o in scene.objects)
        return Question("open", f"how many {PLURALS[kind]} are there ?", DIGITS[count])
    thing = rng.choice(scene.objects)
    return Question("open", f"what is at the {thing.place} ?", thing.name)


def reading(scene: Scene, rng: random.Random) -> Question | None:
    """TextVQA: read one handwritten digit, or all of them in reading order."""
    digits = [o for o in scene.objects if o.is_digit]
    form = rng.randrange(3)
    if not digits:
        return None
    if form == 0:
        colors = [o.color for o in digits]
        thing = _one(rng, [o for o in digits if colors.count(o.color) == 1])
        return None if thing is None else Question("reading", f"what number is {thing.color} ?", thing.kind)
    if form == 1:
        thing = rng.choice(digits)
        return Question("reading", f"what number is at the {thing.place} ?", thing.kind)
    if len(digits) < 2:
        return None
    return Question("reading", "what numbers are there ?", " ".join(o.kind for o in digits))


def presence(scene: Scene, rng: random.Random) -> Question | None:
    """POPE: yes or no, half and half; the negatives mix halves of things that are there."""
    if rng.random() < 0.5:
        return Question("presence", f"is there a {rng.choice(scene.objects).name} ?", "yes")
    return Question("presence", f"is there a {_absent(scene, rng, 1)[0]} ?", "no")


def choice(scene: Scene, rng: random.Random) -> Question | None:
    """ScienceQA and MMBench: three options, one of them shown."""
    options = _absent(scene, rng, 2)
    right = rng.randrange(3)
    options.insert(right, rng.choice(scene.objects).name)
    listed = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return Question("choice", f"which is there ? {listed}", LETTERS[right])


def relation(scene: Scene, rng: random.Random) -> Question | None:
    """GQA: from a named thing over one neighbour, or over two, to an attribute."""
    start = _one(rng, _unique_kinds(scene))
    if start is None:
        return None
    thing, path = start, f"the {start.kind}"
    for _ in range(2 if rng.random() < 0.4 else 1):
        near = [(name, scene.at(thing.row + dr, thing.column + dc)) for name, (dr, dc) in RELATIONS.items()]
        steps = [(name, o) for name, o in near if o is not None and o is not start]
        if not steps:
            return None
        name, thing = rng.choice(steps)
        path = f"the thing {name} {path}"
    if rng.random() < 0.5:
        return Question("relation", f"what color is {path} ?", thing.color)
    return Question("relation", f"what is {path} ?", thing.kind)


def description(scene: Scene, rng: random.Random) -> Question | None:
    """LLaVA-Wild: name everything with its place."""
    return Question("description", DESCRIBE, scene.describe())


FAMILIES: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "open": open_question,
    "reading": reading,
    "presence": presence,
    "choice": choice,
    "relation": relation,
    "description": description,
}

# How often a training conversation asks each. Two hops are the hardest; a description is twenty tokens long, and drawn
# as often as the others it would be half of the loss.
SHARES = {"open": 2.0, "reading": 2.0, "presence": 2.0, "choice": 2.0, "relation": 3.0, "description": 0.25}


def ask(scene: Scene, rng: random.Random, count: int, families: tuple[str, ...]) -> list[Question]:
    """``count`` different questions about one scene, families drawn by ``SHARES`` (fewer if the scene has no more)."""
    asked: dict[str, Question] = {}
    for family in rng.choices(families, [SHARES[f] for f in families], k=4 * count):
        question = FAMILIES[family](scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == count:
            break
    return list(asked.values())


@dataclass(frozen=True)
class Item:
    """One benchmark item: a scene and one question about it."""

    scene: Scene
    question: Question


def benchmark(family: str, seed: int, limit: int, split: Split = "test") -> Iterator[Item]:
    """``limit`` items of one family, each about a scene of its own, drawn from a seed the caller chooses."""
    index = found = 0
    while found < limit:
        scene = sample_scene(split, seed, index)
        question = FAMILIES[family](scene, random.Random(f"adallava-mini/{family}/{split}/{seed}/{index}"))
        index += 1
        if question is not None:
            found += 1
            yield Item(scene, question)


SHOWN = ("reading", "open", "relation", "presence")
"""Families of which a picture is shown with a question."""
_RICH_OBJECTS, _RICH_DIGITS = 5, 2


def rich_scene(seed: int) -> tuple[Scene, tuple[Question, ...]]:
    """The first test scene of a seed that has a lot to see, and a question about it of each family in ``SHOWN``."""
    for index in itertools.count():
        scene = sample_scene("test", seed, index)
        rng = random.Random(f"adallava-demo/{seed}/{index}")
        questions = [FAMILIES[family](scene, rng) for family in SHOWN]
        digits = sum(thing.is_digit for thing in scene.objects)
        if len(scene.objects) >= _RICH_OBJECTS and digits >= _RICH_DIGITS and all(questions):
            return scene, tuple(question for question in questions if question is not None)
    raise AssertionError("itertools.count() does not end")


def vocabulary() -> list[str]:
    """Every word the families can say, in a fixed order: the mini tokenizer is made from it."""
    words = [*COLORS, *KINDS, *PLURALS.values(), *LETTERS, *(f"({letter})" for letter in LETTERS)]
    words += [place for row in PLACES for place in row]
    words += ["yes", "no", ",", "?", ".", "above", "below", "of"]
    words += _FUNCTION_WORDS.split()
    return list(dict.fromkeys(words))
