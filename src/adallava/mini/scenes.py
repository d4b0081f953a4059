"""Scenes the project renders itself: coloured shapes and real handwritten digits on a 3 x 3 raster.

The digits are scikit-learn's bundled set (1,797 scans of 8 x 8 pixels). They are split by sample, so that a test scene
never shows a digit that any training scene showed. A scene is a pure function of (split, seed, index): the same three
values give the same picture on every machine, and the seeds of two splits cannot meet because the split is part of the
random state.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Split = Literal["train", "test"]

IMAGE_SIZE = 72
RASTER = 3
# A cell is two by two patches of the mini tower with one patch between cells. Things that lay anywhere, over two to
# nine patches, took a tower of this size far too long to tell apart (tried, see docs/LOG.md).
CELL = 18
PITCH = 27
SIZES = range(13, CELL + 1)
MAX_ANGLE = 12

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 45, 45),
    "green": (50, 185, 70),
    "blue": (60, 105, 240),
    "yellow": (235, 210, 50),
    "purple": (175, 75, 215),
    "white": (235, 235, 235),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = (
    ("top-left", "top", "top-right"),
    ("left", "middle", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene: what it is (``kind``), its colour, its raster cell, and how it is drawn.

    ``x``, ``y`` and ``size`` are pixels; a digit is drawn from scan ``digit_sample`` turned by ``angle`` degrees.
    """

    kind: str
    color: str
    row: int
    column: int
    x: int
    y: int
    size: int
    digit_sample: int | None
    angle: int = 0

    @property
    def is_digit(self) -> bool:
        """Whether this is a handwritten digit rather than a drawn shape."""
        return self.digit_sample is not None

    @property
    def place(self) -> str:
        """The name of its raster cell, such as ``top-left``."""
        return PLACES[self.row][self.column]

    @property
    def name(self) -> str:
        """Colour and kind, such as ``red seven``."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, and the seed of the background noise."""

    objects: tuple[SceneObject, ...]
    noise_seed: int

    def at(self, row: int, column: int) -> SceneObject | None:
        """The object in a raster cell, or None (also outside the raster)."""
        return next((o for o in self.objects if o.row == row and o.column == column), None)

    def describe(self) -> str:
        """Every object in reading order: ``top-left red seven , middle blue circle``."""
        return " , ".join(f"{o.place} {o.name}" for o in self.objects)


@functools.cache
def _digit_images() -> tuple[NDArray[np.float32], dict[Split, tuple[tuple[int, ...], ...]]]:
    """All digit scans in [0, 1], and for each split and digit the samples it may use (every fifth is for tests)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)
    by_digit = [np.flatnonzero(bunch.target == digit) for digit in range(10)]
    return images, {
        "train": tuple(tuple(int(i) for n, i in enumerate(ids) if n % 5) for ids in by_digit),
        "test": tuple(tuple(int(i) for n, i in enumerate(ids) if n % 5 == 0) for ids in by_digit),
    }


def digit_samples(split: Split) -> frozenset[int]:
    """The scikit-learn sample numbers a split may draw."""
    return frozenset(i for ids in _digit_images()[1][split] for i in ids)


def sample_scene(split: Split, seed: int, index: int, max_objects: int = 6, twins: int = 1) -> Scene:
    """Draw scene ``index`` of a split: 2 to ``max_objects`` things (1 if that is the maximum) in distinct cells.

    twins: this many successive scenes share places and colours and differ in their kinds, the first thing's kind in
    all of them if there are as many kinds. To tell twins apart one has to recognise the things.
    """
    layout = random.Random(f"adallava-mini/{split}/{seed}/{index // twins}")
    rng = random.Random(f"adallava-mini/{split}/{seed}/{index}/{twins}")
    count = layout.randint(min(2, max_objects), max_objects)
    cells = sorted(layout.sample([(r, c) for r in range(RASTER) for c in range(RASTER)], count))
    colors = [layout.choice(tuple(COLORS)) for _ in cells]
    kinds = _draw_kinds(rng, count)
    if twins > 1:
        kinds[layout.randrange(count)] = (DIGITS + SHAPES)[index % twins % len(DIGITS + SHAPES)]
    objects = []
    for (row, column), color, kind in zip(cells, colors, kinds, strict=True):
        size = rng.choice(SIZES)
        slack = CELL - size
        digit = rng.choice(_digit_images()[1][split][DIGITS.index(kind)]) if kind in DIGITS else None
        objects.append(
            SceneObject(
                kind,
                color,
                row,
                column,
                x=column * PITCH + rng.randint(0, slack),
                y=row * PITCH + rng.randint(0, slack),
                size=size,
                digit_sample=digit,
                # There are 144 scans of a digit to learn from; turning them keeps the tower from knowing them by heart.
                angle=0 if digit is None else rng.randint(-MAX_ANGLE, MAX_ANGLE),
            )
        )
    return Scene(tuple(objects), rng.getrandbits(32))


def _draw_kinds(rng: random.Random, count: int) -> list[str]:
    """Kinds of ``count`` things; half the scenes favour one kind, so that counting and naming are not trivial."""
    favourite = _draw_kind(rng) if rng.random() < 0.5 else None
    return [favourite if favourite and rng.random() < 0.5 else _draw_kind(rng) for _ in range(count)]


def _draw_kind(rng: random.Random) -> str:
    return rng.choice(DIGITS if rng.random() < 0.5 else SHAPES)


@functools.lru_cache(maxsize=20_000)
def _mask(kind: str, size: int, digit_sample: int | None, angle: int) -> NDArray[np.float32]:
    """Coverage in [0, 1] of a kind drawn at ``size`` x ``size`` pixels, last axis 1."""
    if digit_sample is not None:
        scan = Image.fromarray((_digit_images()[0][digit_sample] * 255).astype(np.uint8))
        picture = scan.resize((size, size), Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BILINEAR)
    else:
        big = 8 * size
        picture = Image.new("L", (big, big))
        _draw_shape(ImageDraw.Draw(picture), kind, big)
        picture = picture.resize((size, size), Image.Resampling.BOX)
    return (np.asarray(picture, np.float32) / 255.0)[:, :, None]


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, n: int) -> None:
    if kind == "circle":
        draw.ellipse((n // 16, n // 16, n - n // 16, n - n // 16), fill=255)
    elif kind == "square":
        draw.rectangle((n // 10, n // 10, n - n // 10, n - n // 10), fill=255)
    elif kind == "triangle":
        draw.polygon([(n // 2, n // 16), (n - 1, n - n // 10), (0, n - n // 10)], fill=255)
    elif kind == "cross":
        third = n // 3
        draw.rectangle((third, 0, n - third, n), fill=255)
        draw.rectangle((0, third, n, n - third), fill=255)
    elif kind == "star":
        angles = np.pi * np.arange(10) / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2, 0.21, 0.5) * n
        draw.polygon([(n / 2 + r * np.cos(a), n / 2 + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)], 255)
    else:
        raise AssertionError(f"no drawing for shape {kind!r}")


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene as an RGB array [72, 72, 3]: uneven dark ground, jittered colours, anti-aliased edges."""
    rng = np.random.default_rng(scene.noise_seed)
    ground = rng.uniform(5, 60) + rng.uniform(-12, 12) * np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    picture = np.repeat(ground.astype(np.float32)[:, None, None], IMAGE_SIZE, 1) + rng.normal(
        0, 6, (IMAGE_SIZE, IMAGE_SIZE, 3)
    ).astype(np.float32)
    for o in scene.objects:
        mask = _mask(o.kind, o.size, o.digit_sample, o.angle)
        ink = np.asarray(COLORS[o.color], np.float32) + rng.uniform(-18, 18, 3).astype(np.float32)
        region = picture[o.y : o.y + o.size, o.x : o.x + o.size]
        region += mask * (ink - region)
    return np.clip(picture, 0, 255).astype(np.uint8)


def to_image(scene: Scene) -> Image.Image:
    """``render`` as a PIL image."""
    return Image.fromarray(render(scene))
