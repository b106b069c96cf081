"""The captions and images that evidence is gathered on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from imagen_lightning.data.dataset import ShardDataset
from imagen_lightning.data.subjects import Subject, SubjectDataset
from imagen_lightning.errors import InputError, counted
from imagen_lightning.evaluation.data import SHAPES, EvaluationSet, load_evaluation_set, prompt_evaluation_set
from imagen_lightning.evaluation.image_set import ImageSet
from imagen_lightning.evaluation.prompts import PromptSet, encodable, read_prompts
from imagen_lightning.finetuning.evidence_copying import MIN_HELD_OUT
from imagen_lightning.metrics.digests import digest_texts

log = logging.getLogger(__name__)

MOST_TRAINING = 20_000
NUM_DRAWINGS = 50  # of a subject
NEW, OLD, TRAINED, OWN = "new", "old", "trained", "own"


@dataclass(frozen=True)
class TrainingSet:
    """What AFTER was trained on.

    Attributes:
        name: of the shards.
        captions, keys: of N samples.
        images: N, at the size of the cascade's last stage.
        sha256: of images and captions, in order.
        of: samples that the shards have, of which the N are evenly spaced.
    """

    name: str
    captions: list[str]
    keys: list[str]
    images: ImageSet
    sha256: str
    of: int

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Sets:
    """Sets of captions.

    Attributes:
        new: the new domain's held-out data.
        old: of what the cascade could do before, or None.
        trained: captions that AFTER was trained on, which it alone draws, to look for copies; None where they are the
            held-out ones or nobody asked.
        own: captions to look at, or None.
        training: the training images, or None.
    """

    new: EvaluationSet
    old: EvaluationSet | None = None
    trained: EvaluationSet | None = None
    own: EvaluationSet | None = None
    training: TrainingSet | None = None

    def measured(self) -> dict[str, EvaluationSet]:
        """Those that both cascades are measured on."""
        return {NEW: self.new, **({} if self.old is None else {OLD: self.old})}

    def drawn(self, is_after: bool) -> dict[str, EvaluationSet]:
        """Those that a cascade draws."""
        own = {} if self.own is None else {OWN: self.own}
        trained = {TRAINED: self.trained} if self.trained is not None and is_after else {}
        return {**self.measured(), **own, **trained}


@dataclass(frozen=True)
class EvidenceRequest:
    """What to compare; see `imagen-lightning finetune-report --help`."""

    before: str
    after: str
    data: str
    train: str | None = None
    before_data: str | None = None
    before_prompts: str | None = None
    prompts: str | None = None
    num: int = 200
    num_before: int | None = None
    num_train: int | None = None
    guidance: Any = None
    steps: Any = None
    seed: int = 0
    batch_size: int = 50
    device: str | None = None
    precision: str = "32"
    caption_field: str | None = None
    before_caption_field: str | None = None
    inception: str | None = None
    clip: str | None = None
    features: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    samples: Path | None = None
    command: str = ""


def load_sets(request: EvidenceRequest, stages: list[Mapping[str, Any]]) -> Sets:
    """Reads all that the request names.

    Args:
        request: what was asked for.
        stages: the cascades' entries in the manifest.

    Raises:
        InputError: data that cannot be used; captions alone for a cascade that takes images.
    """
    size, takes_images = stages[-1]["image_size"], stages[0]["low_res_size"] is not None
    for option, given in (("--before-prompts", request.before_prompts), ("--prompts", request.prompts)):
        if given is not None and takes_images:
            raise InputError(f"{option}: the cascades begin with {stages[0]['name']!r}, which needs images")
    new = _answered(load_evaluation_set(request.data, request.num, size, request.seed, request.caption_field))
    old = None
    num = request.num_before or request.num
    if request.before_data is not None:
        field = request.before_caption_field
        old = _answered(load_evaluation_set(request.before_data, num, size, request.seed, field))
    elif request.before_prompts is not None:
        old = prompt_evaluation_set(read_prompts(request.before_prompts).first(num))
    own = None if request.prompts is None else prompt_evaluation_set(read_prompts(request.prompts))
    training = trained = None
    if request.train is not None:
        if request.num < MIN_HELD_OUT:
            raise InputError(f"--train: copying is told by at least {MIN_HELD_OUT} held-out images; raise --num")
        training = training_set(request.train, size, request.num_train, request.seed, request.caption_field)
        trained = None if takes_images else _captions_trained_on(training, new, request.num)
    return Sets(new, old, trained, own, training)


def training_set(
    name: str, size: int, most: int | None = None, seed: int = 0, caption_field: str | None = None
) -> TrainingSet:
    """The training images, evenly spaced where there are too many; those that cannot be used are left out.

    Args:
        name: shards: a path, folder, glob or brace pattern; or "shapes:SUBJECT", drawings of one subject.
        size: side in pixels; images are resized by the area filter and cropped at the centre.
        most: images; None takes 20,000 of shards, and 50 drawings.
        seed: of the drawings.
        caption_field: as the evaluation's data have it.

    Raises:
        InputError: shapes of all kinds, which are drawn without end; shards that match nothing, or with fewer than two
            images.
    """
    dataset = _training_data(name, size, most, seed, caption_field)
    count, most = len(dataset), most or MOST_TRAINING
    places = range(count) if count <= most else [k * count // most for k in range(most)]
    digest = hashlib.sha256()
    found: list[int] = []
    captions, keys = [], []
    for place in places:
        sample = dataset[place]
        if sample.image is None:
            continue
        digest.update(sample.image.numpy().tobytes())
        found.append(place)
        captions.append(encodable(sample.caption))
        keys.append(sample.key)
    if len(found) < 2:
        raise InputError(f"--train {name!r} has {counted(len(found), 'usable image')} at {size} px; give more")
    if len(found) < len(places):
        log.warning("%s of --train %r cannot be used", counted(len(places) - len(found), "image"), name)
    digest.update(digest_texts(captions).encode())
    images = ImageSet(len(found), size, lambda number: _image(dataset, found[number]), keep=True)
    return TrainingSet(name, captions, keys, images, digest.hexdigest(), count)


def _training_data(
    name: str, size: int, most: int | None, seed: int, caption_field: str | None
) -> ShardDataset | SubjectDataset:
    kind, _, subject = name.partition(":")
    if name == SHAPES:
        raise InputError("--train shapes: shapes are drawn without end; give shards, or shapes:SUBJECT")
    if kind == SHAPES:
        return SubjectDataset(Subject.of(subject), seed, "train", size, most or NUM_DRAWINGS)
    from imagen_lightning.data.datamodule import LaionDataModule

    return LaionDataModule(train=name, val=name, image_size=size, caption_field=caption_field).validation_set()


def _answered(data: EvaluationSet) -> EvaluationSet:
    """The set; where all captions of shards are in the shapes' grammar, pictures are checked against them."""
    if data.has_answers:
        return data
    captions = prompt_evaluation_set(PromptSet(data.name, data.captions, [""] * len(data)))
    return replace(data, has_answers=captions.has_answers)


def _captions_trained_on(training: TrainingSet, new: EvaluationSet, num: int) -> EvaluationSet | None:
    """Distinct captions of the training images, evenly spaced; None where the held-out images have them too."""
    distinct = list(dict.fromkeys(training.captions))
    if set(distinct) <= set(new.captions):
        return None
    if len(distinct) > num:
        distinct = [distinct[k * len(distinct) // num] for k in range(num)]
    return EvaluationSet(f"captions of {training.name}", distinct, None, digest_texts(distinct), False)


def _image(dataset: ShardDataset | SubjectDataset, place: int) -> Tensor:
    image = dataset[place].image
    if image is None:
        raise InputError(f"sample {place} of the training data can no longer be read; are its shards as they were?")
    return image
