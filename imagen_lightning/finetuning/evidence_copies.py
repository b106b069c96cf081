"""Drawn images beside their nearest training images, in pixel and in feature space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.evaluation.image_set import ImageSet, reduce
from imagen_lightning.finetuning.evidence_copying import (
    AUTHENTICITY,
    Neighbours,
    authentic,
    copying_values,
    data_copying_z,
    near_everywhere,
    neighbours,
)
from imagen_lightning.finetuning.evidence_data import TrainingSet
from imagen_lightning.finetuning.evidence_words import EVERYWHERE, HELD_OUT, copying_sentence
from imagen_lightning.images import save_png, to_pil
from imagen_lightning.metrics.features import FeatureExtractor
from imagen_lightning.metrics.protocol import Protocol
from imagen_lightning.metrics.values import share_value

PIXELS = "pixels"
PIXEL_SIDE = 32  # px at which pixels are compared: a copy that is shifted a little stays near
_BLOCK = 64
_SUSPECTS, _TYPICAL = 6, 6  # samples shown: of the smallest ratios in each space, and evenly spaced
FOLDER = "neighbours"


@dataclass(frozen=True)
class Group:
    """Drawn images.

    Attributes:
        what: in words, "held-out captions".
        images: N.
        captions: N.
        protocol: how they were made.
    """

    what: str
    images: ImageSet
    captions: Sequence[str]
    protocol: Protocol


@dataclass(frozen=True)
class _Space:
    """Vectors of images, and the protocol's fields that tell them."""

    name: str
    extractor: FeatureExtractor | None
    device: torch.device

    def vectors(self, images: ImageSet, mirror: bool) -> Tensor:
        """(N, D) float32. Distances of pixels are root mean squares in units of 1/255."""
        return torch.cat(
            [self._of(images[rows].flip(-1) if mirror else images[rows]) for rows in images.blocks(_BLOCK)]
        )

    def protocol(self, protocol: Protocol) -> Protocol:
        if self.extractor is None:
            return replace(protocol, extractor=PIXELS, resize_filter=f"area to {PIXEL_SIDE} px at most")
        extractor = self.extractor
        return replace(
            protocol,
            extractor=extractor.name,
            extractor_sha256=extractor.sha256,
            resize_filter=extractor.resize_filter,
        )

    def _of(self, block: Tensor) -> Tensor:
        if self.extractor is not None:
            return self.extractor(block.to(self.device)).cpu()
        pixels = reduce(block, min(PIXEL_SIDE, block.shape[-1])).flatten(1).float()
        return pixels / pixels.shape[1] ** 0.5


def find_copies(
    groups: Sequence[Group],
    held_out: ImageSet,
    training: TrainingSet,
    extractor: FeatureExtractor,
    device: torch.device,
    out: Path,
) -> dict[str, Any]:
    """How near drawn images lie to training images, beside held-out images; with the most suspect ones as pictures.

    Mirrored images count as copies too. Everything is plain data: {"training", "num_training", "of", "held_out",
    "leaks", "rows": [{"what", "space", "values", "z"}, …], "sentence", "shown": [{"sample", "caption", "what",
    "nearest": {space: {"image", "caption", "key", "distance", "ratio", "nearer_than"}}}, …]}.

    Args:
        groups: of drawn images.
        held_out: at least 20 real images that were not trained on.
        training: the training images.
        extractor: of the feature space.
        device: where it runs.
        out: pictures go to its folder "neighbours".

    Raises:
        InputError: fewer held-out or training images.
    """
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Neighbours]] = [{} for _ in groups]
    real: dict[str, Neighbours] = {}
    for space in (_Space(PIXELS, None, device), _Space(extractor.name, extractor, device)):
        vectors = space.vectors(training.images, mirror=False)
        real[space.name] = _neighbours(space, held_out, vectors)
        for place, group in enumerate(groups):
            found[place][space.name] = own = _neighbours(space, group.images, vectors)
            protocol = replace(space.protocol(group.protocol), reference=training.sha256, reference_name=training.name)
            values = copying_values(own, real[space.name], vectors, protocol)
            z = data_copying_z(own.distances, real[space.name].distances)
            row = {"what": group.what, "space": space.name, "values": [value.to_json() for value in values], "z": z}
            rows.append(row)
        protocol = space.protocol(Protocol("none", image_size=held_out.size, reference=training.sha256,
                                           reference_name=training.name))  # fmt: skip
        value = share_value(AUTHENTICITY, authentic(real[space.name], vectors), protocol)
        rows.append({"what": HELD_OUT, "space": space.name, "values": [value.to_json()], "z": None})
    everywhere = [
        {
            "what": group.what,
            "space": EVERYWHERE,
            "values": [near_everywhere(list(own.values()), list(real.values()), group.protocol).to_json()],
            "z": None,
        }
        for group, own in zip(groups, found)
    ]
    rows = [*everywhere, *rows]
    return {
        "training": training.name,
        "num_training": len(training),
        "of": training.of,
        "held_out": len(held_out),
        "leaks": int((real[PIXELS].distances == 0).sum()),
        "rows": rows,
        "sentence": copying_sentence(rows),
        "shown": list(_shown(groups, found, real, training, out)),
    }


def _neighbours(space: _Space, images: ImageSet, training: Tensor) -> Neighbours:
    return neighbours(space.vectors(images, False), training, mirrored=space.vectors(images, True))


def _shown(
    groups: Sequence[Group],
    found: Sequence[Mapping[str, Neighbours]],
    real: Mapping[str, Neighbours],
    training: TrainingSet,
    out: Path,
) -> Iterable[dict[str, Any]]:
    """The samples of the smallest ratios first, then some evenly spaced."""
    for place, number in _chosen(found):
        group = groups[place]
        sample = f"{FOLDER}/sample-{place}-{number:05d}.png"
        save_png(to_pil(group.images[number : number + 1][0]), out / sample)
        nearest = {}
        for space, own in found[place].items():
            near = int(own.numbers[number])
            picture = f"{FOLDER}/training-{near:05d}.png"
            save_png(to_pil(training.images[near : near + 1][0]), out / picture)
            ratio = float(own.ratios[number])
            nearest[space] = {
                "image": picture,
                "caption": training.captions[near],
                "key": training.keys[near],
                "distance": float(own.distances[number]),
                "ratio": ratio,
                "nearer_than": float((real[space].ratios > ratio).double().mean()),
            }
        yield {"sample": sample, "caption": group.captions[number], "what": group.what, "nearest": nearest}


def _chosen(found: Sequence[Mapping[str, Neighbours]]) -> list[tuple[int, int]]:
    """(group, image): the smallest ratios of each space over all groups, then evenly spaced ones of the first group."""
    chosen: dict[tuple[int, int], None] = {}
    for space in found[0]:
        ratios = [
            (float(ratio), place, number)
            for place, own in enumerate(found)
            for number, ratio in enumerate(own[space].ratios)
        ]
        chosen.update(dict.fromkeys((place, number) for _, place, number in sorted(ratios)[:_SUSPECTS]))
    count = len(found[0][PIXELS].ratios)
    chosen.update(dict.fromkeys((0, k * count // _TYPICAL) for k in range(min(_TYPICAL, count))))
    return list(chosen)
