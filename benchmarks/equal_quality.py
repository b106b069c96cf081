"""The fewest network evaluations, by sampler, whose caption accuracy is that of DDPM at 250 steps.

    python benchmarks/equal_quality.py runs/quickstart/cascade [--captions 200] [--precision bf16] [--out F.json]

Captioned shapes that training never saw, drawn by the quickstart's cascade; one stage's sampler and steps change, the
others stay as the manifest has them. "As good" is a caption accuracy (all attributes together) within the 95%
confidence interval (Wilson 1927) of the reference, or above it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from peers import machine
from turns import write

from imagen_lightning import Cascade
from imagen_lightning.data import shapes
from imagen_lightning.metrics import caption_accuracy
from imagen_lightning.samplers import DDIM, DDPM, DPMSolverPP, DPMSolverPPSDE, Heun
from imagen_lightning.types import Sampler

REFERENCE = ("DDPM", DDPM(), 250)
# Heun evaluates the network twice a step: half the steps.
CANDIDATES: list[tuple[str, Sampler, tuple[int, ...]]] = [
    ("DDPM", DDPM(), (50, 25)),
    ("DDIM", DDIM(), (20, 10, 5)),
    ("DPMSolverPP", DPMSolverPP(), (20, 10, 5)),
    ("DPMSolverPPSDE", DPMSolverPPSDE(), (20, 10, 5)),
    ("Heun", Heun(), (10, 5, 3)),
]


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% confidence interval of a share of `count` trials (Wilson 1927)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cascade", type=Path)
    parser.add_argument("--captions", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--stage", default="base", help="whose sampler changes (default base)")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="of the networks (default 32)")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    cascade = Cascade.load(arguments.cascade)
    place = cascade.names.index(arguments.stage)
    half = arguments.captions // 2
    captions = [shapes.sample(0, index, "val")[1] for index in range(arguments.captions - half)]
    captions += shapes.held_out_captions(half)

    def measure(name: str, sampler: Sampler, steps: int) -> dict[str, Any]:
        samplers: list[Sampler | None] = [None] * len(cascade.names)
        numbers: list[int | None] = [None] * len(cascade.names)
        samplers[place], numbers[place] = sampler, steps
        start = time.perf_counter()
        settings = {"batch_size": 50, "precision": arguments.precision}
        images = cascade.sample(captions, sampler=samplers, steps=numbers, **settings).images
        seconds = time.perf_counter() - start
        share = caption_accuracy(images, captions).mean()["all"]
        low, high = interval(share, len(captions))
        evaluations = steps * getattr(sampler, "evaluations_per_step", 1)
        return {
            "sampler": name,
            "steps": steps,
            "evaluations": evaluations,
            "accuracy": round(100 * share, 1),
            "interval": f"{100 * low:.1f} to {100 * high:.1f}",
            "seconds_per_image": round(seconds / len(captions), 4),
        }

    reference = measure(*REFERENCE)
    least = interval(reference["accuracy"] / 100, len(captions))[0] * 100
    rows = [{**reference, "as_good": "reference"}]
    for name, sampler, numbers in CANDIDATES:
        for steps in numbers:
            row = measure(name, sampler, steps)
            rows.append({**row, "as_good": "yes" if row["accuracy"] >= least else "no"})
    good = [row for row in rows if row["as_good"] == "yes"]
    fewest = min(good, key=lambda row: row["evaluations"]) if good else None
    settings = {"captions": len(captions), "stage": arguments.stage, "precision": arguments.precision, "fewest": fewest}
    write({"machine": machine(), **settings, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
