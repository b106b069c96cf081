"""Does a picture of shapes show what its caption says? Answered without a network, attribute by attribute.

Pixels far from the background's colour form connected components; each component's soft mask is compared with drawings
of every shape at every size; the objects found are paired with the caption's in the way that agrees best. Where a
caption names a new shape (`NEW_SHAPES`), its picture is compared with drawings of that shape too; all others are judged
as if there were none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from imagen_lightning.data.shapes import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    NEW_SHAPES,
    SHAPES,
    SIZES,
    Scene,
    parse_caption,
    shape_mask,
)
from imagen_lightning.types import InputError

_WORDS = [*COLORS, *BACKGROUNDS]
_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)
_CHUNK = 128  # images in memory at once

_FOREGROUND = 45.0  # least RGB distance from the background; the palette's least is 112
_MIXTURE = 32.0  # RGB distance from a line between object and background; the other objects' colours keep 64 from it
_MIN_AREA = 40.0  # px; a small star, the least object, has 140
_MAX_EXTENT = 37  # px; anything longer is two touching objects of one colour
_MIN_MATCH = 0.6  # least overlap (Tanimoto) of a mask with its best template, below which it has no shape
_SIZE_TOLERANCE = 4  # px from a size's side

_WINDOW = 40
_SIDES = range(16, 36)
_SHIFTS = range(-2, 3)


@dataclass(frozen=True)
class CaptionAccuracy:
    """Which attributes of each caption its picture shows: (B,) bool tensors.

    Attributes:
        background: the background has the caption's colour.
        number: as many objects as the caption names.
        color: every object of the caption has its colour; a missing object has none.
        shape: every object of the caption has its shape.
        size: every object of the caption has its size.
        relation: the first object is left of or above the second; False where the caption names one object.
        has_relation: the caption names two objects; the others do not count for `relation`.
    """

    background: Tensor
    number: Tensor
    color: Tensor
    shape: Tensor
    size: Tensor
    relation: Tensor
    has_relation: Tensor

    def __len__(self) -> int:
        return len(self.background)

    @property
    def all(self) -> Tensor:
        """(B,) bool: every attribute that applies is right."""
        return (
            self.background & self.number & self.color & self.shape & self.size & (self.relation | ~self.has_relation)
        )

    def mean(self, where: Tensor | None = None) -> dict[str, float]:
        """The share of pictures that are right, by attribute and for "all".

        Args:
            where: (B,) bool, the pictures to count; default all.

        Returns:
            Shares in [0, 1]. An attribute that applies to none of the pictures is left out.
        """
        counted = torch.ones_like(self.background) if where is None else where
        rates = {}
        for name in ("background", "number", "color", "shape", "size", "relation", "all"):
            applies = counted & self.has_relation if name == "relation" else counted
            if applies.any():
                rates[name] = getattr(self, name)[applies].double().mean().item()
        return rates


@dataclass(frozen=True)
class _Found:
    """An object seen in a picture; None where no word fits."""

    size: str | None
    color: str
    shape: str | None
    center: tuple[float, float]  # y, x


def caption_accuracy(images: Tensor, captions: Sequence[str]) -> CaptionAccuracy:
    """Checks pictures of shapes against their captions.

    Args:
        images: (B, 3, H, W) uint8; sizes other than 64x64 are resized bilinearly.
        captions: B captions in the grammar of `imagen_lightning.data.shapes`.

    Raises:
        InputError: images of another dtype or shape, another number of captions, a caption outside the grammar.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"caption_accuracy needs uint8 images (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if len(images) != len(captions):
        raise InputError(f"{len(images)} images but {len(captions)} captions; give one caption an image")
    scenes = [parse_caption(caption) for caption in captions]
    rows = []
    for start in range(0, len(images), _CHUNK):
        new = [{thing.shape for thing in scene.things} & {*NEW_SHAPES} for scene in scenes[start : start + _CHUNK]]
        seen = _look(_pixels(images[start : start + _CHUNK]), new)
        rows += [_compare(scene, *found) for scene, found in zip(scenes[start : start + _CHUNK], seen)]
    names = [field.name for field in fields(CaptionAccuracy)]
    return CaptionAccuracy(**{name: torch.tensor([row[name] for row in rows], dtype=torch.bool) for name in names})


def _compare(scene: Scene, background: str, found: list[_Found]) -> dict[str, bool]:
    """Pairs the caption's objects with those found so that most words agree; between equals the relation decides."""
    best, best_score = {}, -1.0
    num = len(scene.things)
    # Stand-ins for what is missing let every object of the caption have a partner.
    partners = [*found, *[None] * (num - len(found))]
    for chosen in permutations(partners, num):
        pairs = list(zip(scene.things, chosen))
        right = {
            word: [seen is not None and getattr(seen, word) == getattr(thing, word) for thing, seen in pairs]
            for word in ("color", "shape", "size")
        }
        relation = num == 2 and _related(scene.relation, *chosen)
        score = sum(map(sum, right.values())) + 0.5 * relation
        if score > best_score:
            best, best_score = {word: all(flags) for word, flags in right.items()} | {"relation": relation}, score
    return best | {
        "background": background == scene.background,
        "number": len(found) == num,
        "has_relation": num == 2,
    }


def _related(relation: str | None, first: _Found | None, second: _Found | None) -> bool:
    if first is None or second is None:
        return False
    down, right = second.center[0] - first.center[0], second.center[1] - first.center[1]
    return right > abs(down) if relation == "left of" else down > abs(right)


def _pixels(images: Tensor) -> np.ndarray:
    """uint8 (B, 3, H, W) to float32 (B, 64, 64, 3) in [0, 255]."""
    pixels = images.cpu().float()
    if pixels.shape[-2:] != (CANVAS, CANVAS):
        pixels = F.interpolate(pixels, size=(CANVAS, CANVAS), mode="bilinear", align_corners=False, antialias=True)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def _look(pixels: np.ndarray, new: list[set[str]]) -> list[tuple[str, list[_Found]]]:
    """The background's word and the objects of each picture of (B, 64, 64, 3), which may also show its new shapes."""
    num = len(pixels)
    # The nearest colour of the palette, by |p - c|^2 less the common |p|^2.
    labels = ((_PALETTE**2).sum(1) - 2 * pixels @ _PALETTE.T).argmin(-1).astype(np.uint8)
    counts = np.stack([(labels == word).sum((1, 2)) for word in range(len(_WORDS))], axis=1)
    backgrounds = counts.argmax(1)
    paper = np.stack([np.median(pixels[i][labels[i] == backgrounds[i]], axis=0) for i in range(num)])
    distance = np.linalg.norm(pixels - paper[:, None, None], axis=-1)
    # Where the 3x3 neighbourhood has one colour: edges, whose mixtures resemble other colours, are not among it.
    core = ndimage.minimum_filter(labels, size=(1, 3, 3)) == ndimage.maximum_filter(labels, size=(1, 3, 3))
    within_a_picture = np.zeros((3, 3, 3), bool)
    within_a_picture[1] = True
    components, _ = ndimage.label(distance > _FOREGROUND, structure=within_a_picture)

    owners, colors, masks = [], [], []
    for number, box in enumerate(ndimage.find_objects(components), start=1):
        picture = box[0].start
        component = components[picture] == number
        if component.sum() < _MIN_AREA:
            continue
        for part, color in _split(component, pixels[picture], labels[picture], core[picture], paper[picture]):
            mask = _soft_mask(
                pixels[picture], part, part & core[picture] & (labels[picture] == color), color, paper[picture]
            )
            if mask.sum() >= _MIN_AREA:
                owners.append(picture)
                colors.append(color)
                masks.append(mask)
    found: list[list[_Found]] = [[] for _ in range(num)]
    if masks:
        centers = [_center(mask) for mask in masks]
        words = _recognise(masks, centers, [new[owner] for owner in owners])
        for owner, color, center, (shape, size) in zip(owners, colors, centers, words):
            found[owner].append(_Found(size, _WORDS[color], shape, center))
    return [(_WORDS[background], things) for background, things in zip(backgrounds, found)]


def _split(
    component: np.ndarray, pixels: np.ndarray, labels: np.ndarray, core: np.ndarray, paper: np.ndarray
) -> list[tuple[np.ndarray, int]]:
    """Cuts a component where two objects touch: by colour, or by its waist where it is too long for one object."""
    solid = component & core
    counts = np.bincount(labels[solid if solid.any() else component], minlength=len(_WORDS))
    first, second = np.argsort(-counts)[:2]
    of_first, of_second = (pixels[component & (labels == word)] for word in (first, second))
    if counts[second] >= max(8, counts[first] // 5) and not _is_edge(of_first, of_second, paper):
        to_first, to_second = (ndimage.distance_transform_edt(~(solid & (labels == word))) for word in (first, second))
        return [(component & (to_first <= to_second), first), (component & (to_first > to_second), second)]
    rows, columns = np.flatnonzero(component.any(1)), np.flatnonzero(component.any(0))
    extents = np.ptp(rows) + 1, np.ptp(columns) + 1
    if max(extents) <= _MAX_EXTENT:
        return [(component, first)]
    axis = int(np.argmax(extents))
    start, extent = (rows[0], columns[0])[axis], extents[axis]
    middle = np.arange(start + 3 * extent // 10, start + 7 * extent // 10 + 1)
    # The narrowest place; of several, the one nearest to the middle.
    width = component.sum(1 - axis)[middle] + 0.01 * abs(middle - middle.mean())
    cut = middle[width.argmin()]
    before = np.arange(CANVAS) < cut
    before = before[:, None] if axis == 0 else before[None]
    return [(component & before, first), (component & ~before, first)]


def _is_edge(ink: np.ndarray, other: np.ndarray, paper: np.ndarray) -> bool:
    """Whether the other pixels (N, 3) mix ink (M, 3) and paper, as a blurred edge does, and are not an object's own."""
    direction = np.median(ink, axis=0) - paper
    offset = np.median(other, axis=0) - paper
    share = np.clip(offset @ direction / max(float(direction @ direction), 1.0), 0, 1)
    return bool(np.linalg.norm(offset - share * direction) < _MIXTURE)


def _soft_mask(pixels: np.ndarray, part: np.ndarray, solid: np.ndarray, color: int, paper: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers, (64, 64) in [0, 1]: its place between background and object colour."""
    ink = np.median(pixels[solid], axis=0) if solid.any() else _PALETTE[color]
    direction = ink - paper
    share = (pixels - paper) @ direction / max(float(direction @ direction), 1.0)
    return np.where(part, np.clip(share, 0, 1), 0).astype(np.float32)


def _center(mask: np.ndarray) -> tuple[float, float]:
    """The middle of the bounding box, (y, x)."""
    solid = mask >= 0.5
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if not len(rows):
        return (CANVAS - 1) / 2, (CANVAS - 1) / 2
    return (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2


def _recognise(
    masks: list[np.ndarray], centers: list[tuple[float, float]], new: list[set[str]]
) -> list[tuple[str | None, str | None]]:
    """The words for shape and size of each mask, None where nothing fits; its new shapes are among those tried."""
    margin = _WINDOW // 2
    windows = []
    for mask, (y, x) in zip(masks, centers):
        top, left = round(y + 0.5), round(x + 0.5)
        windows.append(np.pad(mask, margin)[top : top + _WINDOW, left : left + _WINDOW].ravel())
    window = np.stack(windows)
    overlap = _overlap(window, SHAPES)
    shapes = SHAPES
    if any(new):
        of_new = _overlap(window, NEW_SHAPES)
        of_new[[[shape not in names for shape in NEW_SHAPES] for names in new]] = 0
        overlap, shapes = np.concatenate([overlap, of_new], axis=1), SHAPES + NEW_SHAPES
    words: list[tuple[str | None, str | None]] = []
    for row in overlap:
        shape, side = np.unravel_index(row.argmax(), row.shape)
        size = min(SIZES, key=lambda word: abs(SIZES[word] - _SIDES[side]))
        fits = row.max() >= _MIN_MATCH
        near = abs(SIZES[size] - _SIDES[side]) <= _SIZE_TOLERANCE
        words.append((shapes[shape] if fits else None, size if fits and near else None))
    return words


def _overlap(window: np.ndarray, shapes: tuple[str, ...]) -> np.ndarray:
    """The Tanimoto overlap of N masks with each shape at each side, at its best place: (N, shapes, sides)."""
    templates = _templates(shapes)
    product = window @ templates.T
    overlap = product / ((window**2).sum(1)[:, None] + (templates**2).sum(1) - product)
    return overlap.reshape(len(window), len(shapes), len(_SIDES), -1).max(-1)


@cache
def _templates(shapes: tuple[str, ...]) -> np.ndarray:
    """Each shape at each side and shift: (shapes * sides * shifts, window * window) float32."""
    templates = np.zeros((len(shapes), len(_SIDES), len(_SHIFTS), len(_SHIFTS), _WINDOW, _WINDOW), np.float32)
    for i, shape in enumerate(shapes):
        for j, side in enumerate(_SIDES):
            for k, down in enumerate(_SHIFTS):
                for m, right in enumerate(_SHIFTS):
                    top, left = _WINDOW // 2 - side // 2 + down, _WINDOW // 2 - side // 2 + right
                    templates[i, j, k, m, top : top + side, left : left + side] = shape_mask(shape, side)
    return templates.reshape(-1, _WINDOW * _WINDOW)
