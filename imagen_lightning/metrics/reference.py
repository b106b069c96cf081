"""What generated pictures are measured against: statistics of real ones, kept in files between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.io.atomic import whole_file
from imagen_lightning.metrics.digests import digest_tensors
from imagen_lightning.metrics.distributed import FeatureStore, all_sum, num_processes
from imagen_lightning.metrics.features.base import FeatureExtractor
from imagen_lightning.metrics.frechet import FeatureMoments

_FORMAT = "imagen-lightning reference 1"


@dataclass(frozen=True)
class ReferenceKey:
    """What statistics of real pictures depend on.

    Attributes:
        data: SHA-256 of the pictures, or of what determines them (their shards and which of them).
        image_size: side in pixels at which the extractor is given them.
        resize_filter: the extractor's.
        extractor_sha256: of its weights.
    """

    data: str
    image_size: int
    resize_filter: str
    extractor_sha256: str

    @classmethod
    def of(cls, extractor: FeatureExtractor, data: str, image_size: int) -> ReferenceKey:
        return cls(data, image_size, extractor.resize_filter, extractor.sha256)

    @property
    def digest(self) -> str:
        """Hex digits that name the file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Reference:
    """Statistics of real pictures.

    Attributes:
        key: what they depend on.
        moments: for the Fréchet distance.
        features: (N, D) float32 of each picture, for KID, precision and recall; None where only sums were kept.
        name: what people call the pictures.
    """

    key: ReferenceKey
    moments: FeatureMoments
    features: Tensor | None = None
    name: str | None = None


def measure_reference(
    extractor: FeatureExtractor,
    batches: Iterable[tuple[Tensor, Tensor]],
    data: str,
    image_size: int,
    *,
    name: str | None = None,
    cache: Path | None = None,
) -> Reference:
    """Features and moments of real pictures; every process must call, with its own share of them or with none.

    Args:
        extractor: of the features.
        batches: uint8 images (B, 3, image_size, image_size) and their numbers (B,); a number that several processes or
            batches have counts once. Not touched where the cache has the statistics.
        data: SHA-256 of all processes' pictures, see `ReferenceKey`.
        image_size: their side in pixels.
        name: what people call them.
        cache: folder that keeps statistics; None keeps none.

    Raises:
        InputError: fewer than two pictures, pictures of another size, a damaged file in the cache.
    """
    key = ReferenceKey.of(extractor, data, image_size)

    def measure() -> Reference:
        store = FeatureStore(extractor.num_features)
        for images, positions in batches:
            if images.shape[-2:] != (image_size, image_size):
                raise InputError(f"a reference of {image_size} px was given images of {tuple(images.shape[-2:])} px")
            store.update(extractor(images), positions)
        features = store.gather()
        if len(features) < 2:
            raise InputError(f"a reference needs at least 2 images, not {len(features)}; take more")
        return Reference(key, FeatureMoments.of(features), features, name)

    return measure() if cache is None else cached(cache, key, measure)


def cached(folder: Path, key: ReferenceKey, measure: Callable[[], Reference]) -> Reference:
    """The statistics in `folder`, or those that `measure` gives, which are then kept there by the first process.

    Every process must call: all of them measure, or none.
    """
    path = folder / f"{key.digest}.safetensors"
    found = read_reference(path, key)
    if int(all_sum(torch.tensor([int(found is not None)]))) == num_processes() and found is not None:
        return found
    reference = measure()
    if num_processes() == 1 or torch.distributed.get_rank() == 0:
        write_reference(path, reference)
    return reference


def write_reference(path: Path, reference: Reference) -> None:
    """Writes a file whole or not at all; one that is there already stays.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    if path.exists():
        return
    tensors = _tensors(reference)
    facts = json.dumps({**asdict(reference.key), "name": reference.name, "count": reference.moments.count})
    metadata = {"format": _FORMAT, "facts": facts, "sha256": _digest(facts, tensors)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_reference(path: Path, key: ReferenceKey) -> Reference | None:
    """Reads what `write_reference` wrote; None where there is no file.

    Raises:
        InputError: a file that is damaged, or that holds the statistics of something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        facts = json.loads(metadata["facts"])
        whole = metadata["format"] == _FORMAT and metadata["sha256"] == _digest(metadata["facts"], tensors)
        name, count = facts.pop("name"), int(facts.pop("count"))
        moments = FeatureMoments(len(tensors["mean"]))
        moments.count, moments.mean, moments.scatter = count, tensors["mean"], tensors["scatter"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"reference statistics {str(path)!r} are damaged; delete the file") from error
    if not whole:
        raise InputError(f"reference statistics {str(path)!r} are damaged; delete the file")
    for field, value in asdict(key).items():
        if facts.get(field) != value:
            raise InputError(
                f"reference statistics {str(path)!r} have {field} {facts.get(field)!r}, not {value!r}; delete the file"
            )
    return Reference(key, moments, tensors.get("features"), name)


def _tensors(reference: Reference) -> dict[str, Tensor]:
    """In order of their names."""
    found = {"mean": reference.moments.mean, "scatter": reference.moments.scatter}
    if reference.features is not None:
        found["features"] = reference.features
    return {name: found[name].detach().cpu().contiguous() for name in sorted(found)}


def _digest(facts: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256((facts + digest_tensors(tensors.values())).encode()).hexdigest()
