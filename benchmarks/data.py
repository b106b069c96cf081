"""Samples a second from shards to batches: ours against plain webdataset, in one run; and what the index costs.

    python benchmarks/data.py [--only reading|index|resume|text] [--rounds 5] [--seconds 2] [--out FILE.json]

Reading: JPEG photos of 256, 512 and 1024 px (shorter side) to square images, 0, 1 and 2 worker processes, batches of
32. webdataset is its own pipeline, `decode("pil")` and the same area resize and crop. Each program and case is a
process of its own; they take turns. Printed are medians, and the peak memory of the process and its workers above the
libraries'.
Index: samples a second of the walk through a shard's headers, without and with SHA-256, against hashlib's own rate.
Resume: the time from a synthetic index of 100 million samples to the first pairs at position 1,000,000.
Text: training steps a second with stored text states and with T5 in the loop, a T5 of random weights.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import answer, memory, serve, take_turns, write

CASES = ((256, 256), (512, 64), (1024, 64))
WORKERS = (0, 1, 2)
BATCH = 32
NUM_SHARDS = 4
PHOTOS = Path(os.environ.get("IMAGEN_LIGHTNING_TEST_DATA", "shared/data"), "coco-mini-permissive").resolve()


def worker(name: str, case: str, settings: dict[str, int]) -> None:
    """Answers each request with the samples a second of some seconds of reading."""
    import torch
    import webdataset as _webdataset  # noqa: F401  (both import both, so that their memory compares)

    import imagen_lightning.data.datamodule as _ours  # noqa: F401

    torch.set_num_threads(1)
    source, target, workers = (int(part) for part in case.split("-"))
    shards = Path(os.environ["IMAGEN_LIGHTNING_BENCHMARK"]) / str(source)
    make = ours if name == "ours" else webdataset
    before = memory("VmHWM")
    batches = iter(make(shards, target, workers))
    next(batches)
    answer({})
    for _ in sys.stdin:  # one line a request
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < settings["seconds"]:
            batch = next(batches)
            assert batch.shape == (BATCH, 3, target, target), batch.shape
            count += BATCH
        answer({"rate": count / (time.perf_counter() - start), "peak": memory("VmHWM") - before + children(before)})


def ours(shards: Path, target: int, workers: int) -> Any:
    from imagen_lightning.data import LaionDataModule

    data = LaionDataModule(train=str(shards), image_size=target, batch_size=BATCH, num_workers=workers)
    return (batch.images for batch in data.train_dataloader())


def webdataset(shards: Path, target: int, workers: int) -> Any:
    """The usual pipeline: shards shuffled, a shuffle buffer, Pillow, the same resize and crop."""
    import numpy as np
    import torch
    import webdataset as wds
    from PIL import Image

    def fit(image: Image.Image) -> torch.Tensor:
        short = min(image.size)
        left, top = ((side - short) // 2 for side in image.size)
        box = (left, top, left + short, top + short)
        resized = image.resize((target, target), Image.Resampling.BOX, box=box)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = (
        wds.WebDataset(paths, shardshuffle=NUM_SHARDS, empty_check=False)
        .shuffle(200)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(fit)
        .batched(BATCH, partial=False)
        .repeat()
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return (images if torch.is_tensor(images) else torch.as_tensor(images) for images, _ in loader)


def children(before: int) -> int:
    """The peak memory of this process's workers in bytes, each above what the libraries take."""
    peak = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        except OSError:  # it ended meanwhile
            continue
        if int(fields["PPid"]) == os.getpid() and "VmHWM" in fields:
            peak += max(int(fields["VmHWM"].split()[0]) * 1024 - before, 0)
    return peak


def make_shards(folder: Path, per_shard: int) -> None:
    """JPEG photos with captions at each of the sizes; synthetic pictures where the photos are not at hand."""
    from imagen_lightning.data.shards import ShardWriter

    pictures = photos()
    for source, _ in CASES:
        place = folder / str(source)
        place.mkdir()
        resized = [encoded(picture, source) for picture in pictures]
        with ShardWriter(place, "train", per_shard) as writer:
            for number in range(NUM_SHARDS * per_shard):
                members = {"jpg": resized[number % len(resized)], "txt": b"a photo", "json": b"{}"}
                writer.write(f"{number:09d}", members)


def photos() -> list[Any]:
    from PIL import Image

    from imagen_lightning.data.shards import Shards, expand_shards, index_shard

    if not PHOTOS.is_dir():
        import numpy as np

        generator = np.random.default_rng(0)
        noise = [generator.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(16)]
        return [Image.fromarray(item).resize((1365, 1024), Image.Resampling.BICUBIC) for item in noise]
    shards = Shards([index_shard(path) for path in expand_shards(PHOTOS)])
    found = []
    for number, index in enumerate(shards.indexes):
        for row in range(len(index.keys)):
            data = shards.read(number, row, 0)
            found.append(Image.open(io.BytesIO(data or b"")).convert("RGB"))
    return found


def encoded(picture: Any, short: int) -> bytes:
    from PIL import Image

    scale = short / min(picture.size)
    resized = picture.resize(tuple(round(side * scale) for side in picture.size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def reading(folder: Path, rounds: int, seconds: int, per_shard: int) -> list[dict[str, Any]]:
    make_shards(folder, per_shard)
    os.environ["IMAGEN_LIGHTNING_BENCHMARK"] = str(folder)
    rows = []
    for source, target in CASES:
        for workers in WORKERS:
            case = f"{source}-{target}-{workers}"
            kinds = [("ours", case), ("webdataset", case)]
            _, records = take_turns(__file__, kinds, {"seconds": seconds}, rounds)
            rates = {name: statistics.median(item["rate"] for item in records[name, case]) for name, _ in kinds}
            peaks = {name: max(item["peak"] for item in records[name, case]) for name, _ in kinds}
            rows.append(
                {
                    "JPEG px": source,
                    "to px": target,
                    "workers": workers,
                    "ours samples/s": round(rates["ours"]),
                    "webdataset samples/s": round(rates["webdataset"]),
                    "ratio": round(rates["ours"] / rates["webdataset"], 2),
                    "ours peak MiB": round(peaks["ours"] / 2**20),
                    "webdataset peak MiB": round(peaks["webdataset"] / 2**20),
                }
            )
    return rows


def index(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Without hashes on many small samples; with them on samples of a photo's size."""
    from imagen_lightning.data.shards import ShardWriter, index_shard

    rows = []
    for name, count, size in (("3 members, 1 KiB images", 20_000, 1024), ("3 members, 60 KiB images", 3_000, 60_000)):
        place = folder / f"index-{size}"
        place.mkdir()
        image = os.urandom(size)
        with ShardWriter(place, "train", count) as writer:
            for number in range(count):
                writer.write(
                    f"{number:09d}", {"jpg": image, "txt": b"a caption of some words", "json": b'{"width": 1}'}
                )
        (path,) = place.glob("*.tar")
        for hashes in (False, True):
            seconds = min(timed(index_shard, path, hashes=hashes) for _ in range(rounds))
            block = os.urandom(2**24)
            sha = len(block) / min(timed(hashlib.sha256, block) for _ in range(rounds))
            rows.append(
                {
                    "shard": name,
                    "hashes": "SHA-256" if hashes else "none",
                    "samples/s": round(count / seconds),
                    "MB/s of members": round(count * (size + 35) / seconds / 1e6),
                    "share of hashlib's rate": round(count * (size + 35) / seconds / sha, 2) if hashes else "",
                }
            )
    return rows


def resume(rounds: int) -> list[dict[str, Any]]:
    from imagen_lightning.data.order import SampleOrder

    def start() -> None:
        order = SampleOrder([10_000] * 10_000, seed=0, global_batch_size=2048, window=8)
        order.batch(1_000_000)

    seconds = min(timed(start) for _ in range(rounds))
    return [{"what": "first batch at position 1,000,000 of 10,000 shards", "seconds": round(seconds, 4)}]


def timed(function: Any, *arguments: Any, **options: Any) -> float:
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["reading", "index", "resume"], help="one part alone")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case (default 5)")
    parser.add_argument("--seconds", type=int, default=2, help="of reading in each turn (default 2)")
    parser.add_argument("--per-shard", type=int, default=200, help="samples of a shard (default 200)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "reading": lambda: reading(folder, arguments.rounds, arguments.seconds, arguments.per_shard),
            "index": lambda: index(folder, arguments.rounds),
            "resume": lambda: resume(arguments.rounds),
        }
        for part in [arguments.only] if arguments.only else list(parts):
            out = arguments.out.with_stem(f"{arguments.out.stem}-{part}") if arguments.out else None
            write({"benchmark": f"data: {part}", "cores": os.cpu_count(), "rows": parts[part]()}, out)


if __name__ == "__main__" and not serve(worker):
    main()
