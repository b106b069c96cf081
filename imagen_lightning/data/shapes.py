"""Captioned scenes of simple shapes, drawn from a seed: training data with known answers, and no download.

A scene holds one or two objects on a plain background. Its caption follows one grammar:

    a {size} {color} {shape} [left of|above a {size} {color} {shape}] on a {background} background

Four of the forty (color, shape) pairs never occur in training (`HELD_OUT_PAIRS`): captions that name one of them test
whether a model composes what it has learned. A sixth shape (`NEW_SHAPES`) occurs in no data but that of
`imagen_lightning.data.subjects`, for a trained model to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from imagen_lightning.types import InputError

CANVAS = 64

# Pairwise at least 112/255 apart in RGB, backgrounds included.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 0, 0),
    "green": (0, 160, 0),
    "blue": (0, 50, 255),
    "yellow": (255, 240, 0),
    "orange": (255, 128, 0),
    "purple": (140, 0, 190),
    "cyan": (0, 220, 240),
    "pink": (255, 110, 200),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (140, 140, 140),
    "brown": (110, 70, 30),
}
# Of the familiar shapes, the five that differ most from each other once a 20 px drawing is reduced to 5 px.
SHAPES: tuple[str, ...] = ("circle", "ring", "star", "plus", "cross")
# For fine-tuning alone. Of twelve tried, the one farthest from all five: by 2.66 in the Euclidean distance of their 5x5
# masks where the nearest two of the five are 1.77 apart (a triangle is 1.84 from a star).
NEW_SHAPES: tuple[str, ...] = ("hourglass",)
# Side of the square that bounds an object, in pixels.
SIZES: dict[str, int] = {"small": 22, "large": 29}
RELATIONS: tuple[str, ...] = ("left of", "above")
HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {("green", "star"), ("yellow", "circle"), ("purple", "plus"), ("orange", "ring")}
)
# Pairs of a new shape that no data to fine-tune on shows.
NEW_HELD_OUT_PAIRS: frozenset[tuple[str, str]] = frozenset({("blue", "hourglass"), ("pink", "hourglass")})
SPLITS: tuple[str, ...] = ("train", "val", "held_out")

_PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
_SEEN_PAIRS = [pair for pair in _PAIRS if pair not in HELD_OUT_PAIRS]
_UNSEEN_PAIRS = [pair for pair in _PAIRS if pair in HELD_OUT_PAIRS]
_GAP = 3  # least distance in pixels between two objects along the relation's axis
# Places lie on a grid of 4 px: a drawing reduced to 16x16 then looks the same wherever it lies, which a small model can
# learn in minutes.
_GRID = 4
_ORIGIN = 1  # px; where the grid begins, so that no object touches the canvas's edge
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object: words from `SIZES`, `COLORS`, and `SHAPES` or `NEW_SHAPES`."""

    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background.

    Attributes:
        things: the objects in the order of the caption; `things[0]` is the one left of or above the other.
        relation: a word of `RELATIONS` for two objects, None for one.
        background: a word of `BACKGROUNDS`.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        second = f" {self.relation} a {self.things[1]}" if len(self.things) == 2 else ""
        return f"a {self.things[0]}{second} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether an object is of a (color, shape) pair that never occurs in training."""
        unseen = HELD_OUT_PAIRS | NEW_HELD_OUT_PAIRS
        return any((thing.color, thing.shape) in unseen for thing in self.things)


def parse_caption(text: str) -> Scene:
    """The scene that a caption names: the inverse of `Scene.caption`. It may name a new shape.

    Raises:
        InputError: the caption does not follow the grammar; the message names the word that does not fit.
    """
    words = text.split()

    def fail(expected: str) -> InputError:
        found = f"the word {words[place]!r} (number {place + 1})" if place < len(words) else "the end"
        return InputError(f"caption {text!r}: expected {expected} instead of {found}")

    place = 0

    def take(*choices: str) -> str:
        nonlocal place
        for choice in choices:
            length = len(choice.split())
            if words[place : place + length] == choice.split():
                place += length
                return choice
        raise fail(" or ".join(map(repr, choices)))

    def take_thing() -> Thing:
        take("a")
        return Thing(take(*SIZES), take(*COLORS), take(*SHAPES, *NEW_SHAPES))

    things = [take_thing()]
    relation = take(*RELATIONS, "on a")
    if relation in RELATIONS:
        things.append(take_thing())
        take("on a")
    background = take(*BACKGROUNDS)
    take("background")
    if place < len(words):
        raise fail("the end")
    return Scene(tuple(things), relation if relation in RELATIONS else None, background)


def random_scene(rng: np.random.Generator, *, held_out: bool) -> Scene:
    """A random scene: one object in a third of the cases, two otherwise.

    Args:
        rng: source of randomness.
        held_out: True puts at least one pair of `HELD_OUT_PAIRS` into the scene, False none.
    """
    num_things = 1 if rng.integers(3) == 0 else 2
    unseen = int(rng.integers(num_things)) if held_out else -1

    def thing(number: int) -> Thing:
        pairs = _UNSEEN_PAIRS if number == unseen else (_PAIRS if held_out else _SEEN_PAIRS)
        color, shape = pairs[rng.integers(len(pairs))]
        return Thing(_pick(rng, tuple(SIZES)), color, shape)

    things = tuple(thing(number) for number in range(num_things))
    relation = _pick(rng, RELATIONS) if num_things == 2 else None
    return Scene(things, relation, _pick(rng, tuple(BACKGROUNDS)))


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws a scene at places that vary by a cell of a 4 px grid.

    Objects lie fully inside, never overlap, and two of them are separated along the relation's axis; across that axis
    their centres differ by less than along it.

    Returns:
        (64, 64, 3) uint8, antialiased.
    """
    image = np.empty((CANVAS, CANVAS, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for thing, (left, top) in zip(scene.things, _place(scene, rng)):
        side = SIZES[thing.size]
        image[top : top + side, left : left + side] = _patch(thing.shape, side, thing.color, scene.background)
    return image


def sample(seed: int, index: int, split: str) -> tuple[Tensor, str]:
    """Sample `index` of a split: a pure function of its arguments.

    Args:
        seed: names the data set, at least 0.
        index: the sample's number, at least 0.
        split: "train" and "val" hold no pair of `HELD_OUT_PAIRS` and come from different random streams; each scene of
            "held_out" has such a pair.

    Returns:
        The image, (3, 64, 64) uint8, and its caption.
    """
    rng = _stream(seed, index, split)
    scene = random_scene(rng, held_out=split == "held_out")
    return torch.from_numpy(draw(scene, rng).transpose(2, 0, 1).copy()), scene.caption


def held_out_captions(num: int, seed: int = 0) -> list[str]:
    """The first `num` captions of the split "held_out": each names at least one pair never seen in training."""
    return [random_scene(_stream(seed, index, "held_out"), held_out=True).caption for index in range(num)]


@cache
def shape_mask(shape: str, side: int) -> np.ndarray:
    """The share of each pixel that a shape covers: (side, side) float32 in [0, 1]; it touches all four borders."""
    fine = (np.arange(side * _SUPERSAMPLING) + 0.5) / (side * _SUPERSAMPLING) * 2 - 1
    x, y = np.meshgrid(fine, fine)
    covered = _inside(shape, x, y).reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING)
    return covered.mean((1, 3), dtype=np.float32)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points of [-1, 1]^2 (y pointing down) lie inside the shape."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "ring":
        return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3)
    if shape == "plus":
        return np.minimum(abs(x), abs(y)) <= 0.3
    if shape == "cross":
        return np.minimum(abs(x - y), abs(x + y)) <= 0.4
    if shape == "hourglass":
        return abs(x) <= np.maximum(abs(y), 0.2)
    # A pentagram's outline, stretched to fill the square: even-odd rule over its ten edges.
    angle = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.382)
    corners = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    low, high = corners.min(0), corners.max(0)
    corners = (corners - low) / (high - low) * 2 - 1
    inside = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0)):
        inside ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


@cache
def _patch(shape: str, side: int, color: str, background: str) -> np.ndarray:
    mask = shape_mask(shape, side)[..., None]
    mixed = mask * np.array(COLORS[color], np.float32) + (1 - mask) * np.array(BACKGROUNDS[background], np.float32)
    return np.rint(mixed).astype(np.uint8)


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The (left, top) corner of each object's bounding square, on the grid."""
    sides = [SIZES[thing.size] for thing in scene.things]
    if len(sides) == 1:
        return [(_near_middle(sides[0], rng), _near_middle(sides[0], rng))]
    half = CANVAS // 2
    # Each has its half of the canvas, and lies in the middle of that along the relation's axis.
    along = [_ORIGIN + begin + (half - _GAP - side) // 2 // _GRID * _GRID for begin, side in zip((0, half), sides)]
    across = [_near_middle(side, rng) for side in sides]
    if scene.relation == "above":
        return list(zip(across, along))
    return list(zip(along, across))


def _near_middle(side: int, rng: np.random.Generator) -> int:
    """Where a square of `side` begins: at most one cell of the grid from the middle."""
    return _ORIGIN + ((CANVAS - side) // (2 * _GRID) + int(rng.integers(-1, 2))) * _GRID


def _stream(seed: int, index: int, split: str) -> np.random.Generator:
    if split not in SPLITS:
        raise InputError(f"split {split!r} of the shapes is unknown; choose one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise InputError(f"seed {seed} and index {index} of the shapes must not be negative")
    entropy = np.random.SeedSequence([seed, SPLITS.index(split), index])
    return np.random.Generator(np.random.PCG64(entropy))


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]
