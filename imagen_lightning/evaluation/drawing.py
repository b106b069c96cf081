"""Drawing a stage's images once: kept as PNG files, gone on with where it stopped, shared by several processes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from imagen_lightning.cascade import Cascade, StageSettings
from imagen_lightning.cascade.origin import weights_kinds
from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.data import EvaluationSet
from imagen_lightning.evaluation.image_set import ImageSet
from imagen_lightning.evaluation.memory import PeakMemory
from imagen_lightning.files import write_json
from imagen_lightning.images import from_pil, save_png, to_pil
from imagen_lightning.io.locks import locked
from imagen_lightning.metrics.digests import digest_texts

Progress = Callable[[int, str], None]
"""Called with (network evaluations done, what is drawn)."""


@dataclass(frozen=True)
class Part:
    """Which images are this process's to draw: batches `rank`, `rank + world_size`, …"""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_environment(cls) -> Part:
        """As torchrun tells its processes."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def batches(self, count: int, batch_size: int) -> list[slice]:
        starts = range(0, count, batch_size)
        return [slice(start, min(start + batch_size, count)) for start in starts[self.rank :: self.world_size]]


@dataclass(frozen=True)
class Chain:
    """Stages `first` to `last`, the first of them given real low-resolution images (or text alone, for a base).

    Attributes:
        first, last: numbers of the cascade's stages.
        settings: of each of those stages, in order.
    """

    first: int
    last: int
    settings: tuple[StageSettings, ...]

    def described(self) -> list[dict[str, Any]]:
        """The settings as plain data."""
        return [setting.described() for setting in self.settings]

    def before(self) -> Chain | None:
        """The chain without its last stage."""
        return None if self.first == self.last else Chain(self.first, self.last - 1, self.settings[:-1])


def chains(settings: Sequence[StageSettings]) -> list[Chain]:
    """Every run of stages, from each stage on: what the matrix draws, in an order that shares as it goes."""
    count = len(settings)
    return [
        Chain(first, last, tuple(settings[first : last + 1])) for first in range(count) for last in range(first, count)
    ]


@dataclass(frozen=True)
class Drawn:
    """What a chain drew.

    Attributes:
        images: N images of its last stage, which are read from their files.
        given: N images, what that stage was given; None for a base.
        folder: where the PNG files lie.
        seconds_per_image: of the last stage alone, or None where nobody knows.
        peak_memory_bytes: of the process (or its GPU) while that stage drew, or None where nobody knows.
    """

    images: ImageSet
    given: ImageSet | None
    folder: Path
    seconds_per_image: float | None
    peak_memory_bytes: int | None


class Drawing:
    """Draws chains of a cascade for the captions of an evaluation set, each stage of each chain once.

    Image i takes its noise from (seed, i, stage) whatever the process, the batch or the moment, so that a drawing that
    was stopped goes on as if it had not been, and chains with the same settings share their images.

    Args:
        cascade: on its device.
        data: the captions and real images.
        folder: images lie in `folder/STAGE-INPUT-HASH/00000.png`.
        identity: hash of the cascade's weights and text encoders (`evaluation.identity.drawing_sha256`).
        seed: of the noise.
        batch_size: images at a time.
        precision: "32" or "bf16".
        part: this process's share.
        meet: waits for the other processes.
        progress: told of network evaluations.
    """

    def __init__(
        self,
        cascade: Cascade,
        data: EvaluationSet,
        folder: Path,
        *,
        identity: str,
        seed: int = 0,
        batch_size: int = 32,
        precision: str = "32",
        part: Part | None = None,
        meet: Callable[[], None] = lambda: None,
        progress: Progress = lambda done, what: None,
    ) -> None:
        self.cascade = cascade
        self.data = data
        self.folder = folder
        self.identity = identity
        self.seed = seed
        self.batch_size = batch_size
        self.precision = precision
        self.part = part or Part()
        self.meet = meet
        self.progress = progress
        self._drawn: dict[str, Drawn] = {}

    def draw(self, chain: Chain) -> Drawn:
        """The chain's images, drawn or read; every process calls it and all get all images."""
        name = self.name(chain)
        if name not in self._drawn:
            before = chain.before()
            if before is not None:
                given: ImageSet | None = self.draw(before).images
            else:
                given = self.real(chain.first)
            # One evaluation at a time draws into the folder, whatever its number of processes; its first one keeps the
            # others of it waiting until they may draw, and another evaluation until all of them have.
            lock = self.folder / f".{name}.lock"
            with locked(lock, f"{self.folder / name}", wait=True) if self.part.rank == 0 else nullcontext():
                self.meet()
                self._draw_missing(chain, name, given)
                self.meet()
            self._drawn[name] = self._read(chain, name, given)
        return self._drawn[name]

    def name(self, chain: Chain) -> str:
        """The folder of a chain: stage, input, and a hash of all that its images depend on."""
        facts = {
            "cascade": self.identity,
            "captions": digest_texts(self.data.captions),
            "images": None if self.takes_text_alone(chain.first) else self.data.sha256,
            "seed": self.seed,
            "precision": self.precision,
            "first": chain.first,
            "settings": chain.described(),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        kind = "chain"
        if chain.first == chain.last:
            kind = "text" if self.takes_text_alone(chain.first) else "real"
        return f"{self.cascade.names[chain.last]}-{kind}-{digest}"

    def weights(self, chain: Chain) -> str | list[str]:
        """What the weights of a chain's stages are, as a protocol says it: "ema", "imported", …"""
        return weights_kinds(self.cascade.stages[chain.first : chain.last + 1])

    def takes_text_alone(self, stage: int) -> bool:
        """Whether a stage is a base."""
        return getattr(self.cascade.stages[stage], "low_res_size", None) is None

    def real(self, stage: int) -> ImageSet | None:
        """The real images at the size that a stage takes; None for a base."""
        return None if self.takes_text_alone(stage) else self.truth(self.cascade.stages[stage].low_res_size)  # type: ignore[attr-defined]

    def truth(self, size: int) -> ImageSet | None:
        """The real images at a size, by the area filter; None where there are none."""
        return None if self.data.images is None else self.data.images.reduced(size)

    def evaluations(self, chain: Chain) -> int:
        """Network evaluations that are left for this process to draw the chain's last stage."""
        missing = sum(bool(self._missing(self.name(chain), rows)) for rows in self._batches())
        return missing * chain.settings[-1].steps

    def _batches(self) -> list[slice]:
        return self.part.batches(len(self.data), self.batch_size)

    def _missing(self, name: str, rows: slice) -> list[int]:
        return [i for i in range(rows.start, rows.stop) if not (self.folder / name / f"{i:05d}.png").exists()]

    def _draw_missing(self, chain: Chain, name: str, given: ImageSet | None) -> None:
        setting, number = chain.settings[-1], chain.last
        every: list[Any] = [None] * len(self.cascade.stages)

        def only(value: Any) -> list[Any]:
            return [value if place == number else None for place in range(len(every))]

        for rows in self._batches():
            if not self._missing(name, rows):
                continue
            memory, start = PeakMemory(self.cascade.device), time.perf_counter()
            samples = self.cascade.sample(
                self.data.captions[rows],
                seed=self.seed,
                guidance=only(setting.guidance),
                steps=only(setting.steps),
                sampler=only(setting.sampler),
                aug_level=only(setting.aug_level),
                images=None if given is None else given[rows],
                start_stage=number,
                last_stage=number,
                batch_size=self.batch_size,
                first_index=rows.start,
                precision=self.precision,
                progress=lambda done, total, stage: self.progress(1, name),
            )
            seconds = time.perf_counter() - start
            cost = {"seconds": seconds, "images": rows.stop - rows.start, "peak_memory_bytes": memory.read()}
            # Before the images: where these are all there, their cost is known, whenever the process was killed.
            write_json(self.folder / name / f"cost-{rows.start:05d}.json", cost)
            for index, image in enumerate(samples.images, rows.start):
                save_png(to_pil(image), self.folder / name / f"{index:05d}.png")

    def _read(self, chain: Chain, name: str, given: ImageSet | None) -> Drawn:
        folder = self.folder / name
        size = self.cascade.stages[chain.last].image_size
        images = ImageSet(len(self.data), size, lambda index: read_png(folder / f"{index:05d}.png"))
        costs = [_cost(path) for path in sorted(folder.glob("cost-*.json"))]
        total = sum(cost["images"] for cost in costs)
        seconds = sum(cost["seconds"] for cost in costs) / total if total else None
        memory = max((cost["peak_memory_bytes"] or 0 for cost in costs), default=0)
        return Drawn(images, given, folder, seconds, memory or None)


def read_png(path: Path) -> Tensor:
    """(3, H, W) uint8.

    Raises:
        InputError: the file is missing or no whole image.
    """
    try:
        with Image.open(path) as image:
            return from_pil(image)
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and run the same command again") from None


def _cost(path: Path) -> dict[str, Any]:
    try:
        cost: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} is damaged; delete its folder and run the same command again") from None
    return cost
