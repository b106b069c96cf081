"""A few captioned scenes of one subject, for fine-tuning: a shape that training never showed, or a word for a thing.

A subject is what each scene has in one of its objects: any of a size, a color and a shape, in this order ("hourglass",
"large purple star"). A made-up word can stand for it in the captions: "a <zib> above a small red ring on a white
background".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from imagen_lightning.data.dataset import Sample
from imagen_lightning.data.order import SampleOrder
from imagen_lightning.data.shapes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT_PAIRS,
    NEW_HELD_OUT_PAIRS,
    NEW_SHAPES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    draw,
)
from imagen_lightning.images import downsample
from imagen_lightning.types import InputError

_WORDS = {*SIZES, *COLORS, *SHAPES, *NEW_SHAPES, *BACKGROUNDS, *("a", "left", "of", "above", "on", "background")}
_UNSEEN = HELD_OUT_PAIRS | NEW_HELD_OUT_PAIRS
_OTHERS = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT_PAIRS]


@dataclass(frozen=True)
class Subject:
    """What one object of each scene is; None where any will do.

    Attributes:
        size: a word of `SIZES`.
        color: a word of `COLORS`.
        shape: a word of `SHAPES` or `NEW_SHAPES`.
        word: stands for the subject's words in captions; None writes them.
    """

    size: str | None
    color: str | None
    shape: str | None
    word: str | None = None

    @classmethod
    def of(cls, text: str, word: str | None = None) -> Subject:
        """The subject that a text such as "hourglass" or "large purple star" names.

        Args:
            text: a size, a color and a shape in this order, of which any but not all may be missing.
            word: one word that stands for it in captions and is none of theirs.

        Raises:
            InputError: words that are none of these, or in another order; a word that cannot stand for them.
        """
        left = text.split()

        def take(choices: Iterable[str]) -> str | None:
            return left.pop(0) if left and left[0] in choices else None

        found = take(SIZES), take(COLORS), take((*SHAPES, *NEW_SHAPES))
        if left or not any(found):
            at = f"at {left[0]!r}" if left else "where it is empty"
            raise InputError(
                f"subject {text!r} cannot be read {at}: give any of a size ({', '.join(SIZES)}), a color "
                f"({', '.join(COLORS)}) and a shape ({', '.join((*SHAPES, *NEW_SHAPES))}), in this order"
            )
        if word is not None:
            if len(word.split()) != 1 or word in _WORDS:
                raise InputError(f"word {word!r} cannot stand for {text!r}: give one word that captions do not use")
            if found[0] and found[2] and not found[1]:
                raise InputError(
                    f"word {word!r} cannot stand for {text!r}: in captions the color lies between; name it"
                )
        return cls(*found, word)

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)

    def caption(self, scene: Scene) -> str:
        """The scene's caption, with the word in the place of the subject's own where there is one."""
        return scene.caption if self.word is None else scene.caption.replace(str(self), self.word)

    def spell_out(self, caption: str) -> str:
        """The caption with the subject's own words in the place of the word: what pictures are checked against."""
        words = caption.split()
        return " ".join(str(self) if word == self.word else word for word in words)


class SubjectDataset(Dataset[Sample]):
    """Drawings of one subject at a size of at most 64 px.

    Args:
        subject: what is in each.
        seed: another seed draws other scenes.
        split: "train", "val" or "held_out".
        image_size: side in pixels; drawn at 64 and area-resized.
        num_samples: how many there are.
        order: the order in which a run sees them, again and again; without one item p is drawing p.
    """

    def __init__(
        self,
        subject: Subject,
        seed: int,
        split: str,
        image_size: int,
        num_samples: int,
        order: SampleOrder | None = None,
    ) -> None:
        self.subject = subject
        self.seed = seed
        self.split = split
        self.image_size = image_size
        self.num_samples = num_samples
        self.order = order

    def __len__(self) -> int:
        if self.order is not None:
            raise TypeError("an endless order has no length")
        return self.num_samples

    def __getitem__(self, position: int) -> Sample:
        number = position if self.order is None else self.order.at(position)[1]
        image, caption = sample(self.seed, number, self.split, self.subject)
        if self.image_size != image.shape[-1]:
            image = downsample(image[None].float(), self.image_size)[0].round().to(torch.uint8)
        name = str(self.subject).replace(" ", "-")
        return Sample(image, caption, f"{name}-{self.split}-{number:06d}", position)

    def captions(self) -> list[str]:
        """Those of its drawings."""
        return subject_captions(self.subject, self.num_samples, self.split, self.seed)


def sample(seed: int, index: int, split: str, subject: Subject) -> tuple[Tensor, str]:
    """Sample `index` of a split of the subject's scenes: a pure function of its arguments.

    Args:
        seed: names the data set, at least 0.
        index: the sample's number, at least 0.
        split: "train" and "val" hold no pair of `HELD_OUT_PAIRS` or `NEW_HELD_OUT_PAIRS` and come from different random
            streams; in "held_out" the subject is of such a pair, where one fits it.
        subject: what is in each scene.

    Returns:
        The image, (3, 64, 64) uint8, and its caption.

    Raises:
        InputError: an unknown split, a negative number, or a subject whose every pair is held out.
    """
    scene, rng = _scene(seed, index, split, subject)
    return torch.from_numpy(draw(scene, rng).transpose(2, 0, 1).copy()), subject.caption(scene)


def subject_captions(subject: Subject, num: int, split: str = "val", seed: int = 0) -> list[str]:
    """The captions of the first `num` samples of a split."""
    return [subject.caption(_scene(seed, index, split, subject)[0]) for index in range(num)]


def _scene(seed: int, index: int, split: str, subject: Subject) -> tuple[Scene, np.random.Generator]:
    """A random scene of one object in a third of the cases, of two otherwise; and the generator to draw it with."""
    if split not in SPLITS:
        raise InputError(f"split {split!r} of the shapes is unknown; choose one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise InputError(f"seed {seed} and index {index} of the shapes must not be negative")
    # SeedSequence pads with zeros: the fourth word keeps these streams apart from those of the five shapes.
    name = int.from_bytes(hashlib.sha256(str(subject).encode()).digest()[:4], "little") | 1
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, SPLITS.index(split), index, name])))
    pairs = _pairs(subject, split)
    color, shape = pairs[rng.integers(len(pairs))]
    things = [Thing(subject.size or _pick(rng, tuple(SIZES)), color, shape)]
    if rng.integers(3) > 0:
        other_color, other_shape = _OTHERS[rng.integers(len(_OTHERS))]
        things.insert(int(rng.integers(2)), Thing(_pick(rng, tuple(SIZES)), other_color, other_shape))
    relation = _pick(rng, RELATIONS) if len(things) == 2 else None
    return Scene(tuple(things), relation, _pick(rng, tuple(BACKGROUNDS))), rng


def _pairs(subject: Subject, split: str) -> list[tuple[str, str]]:
    """The (color, shape) pairs that the subject has in a split."""
    colors = COLORS if subject.color is None else (subject.color,)
    shapes = SHAPES if subject.shape is None else (subject.shape,)
    pairs = [(color, shape) for color in colors for shape in shapes]
    unseen = [pair for pair in pairs if pair in _UNSEEN]
    if split == "held_out":
        return unseen or pairs
    seen = [pair for pair in pairs if pair not in _UNSEEN]
    if not seen:
        raise InputError(f"subject {str(subject)!r} is held out of training; choose another color or shape")
    return seen


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[rng.integers(len(words))]
