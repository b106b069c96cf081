"""What cascades draw of the quickstart's old captions, and of a shape that they were fine-tuned on.

    python benchmarks/new_shape.py CASCADE … [--subject hourglass] [--num 200] [--seed 0] [--grid FILE.png]

Of each cascade folder two lines are printed, of the same captions and noise for all of them: the share of pictures that
are right in every attribute (caption accuracy) with its 95% interval, in all, with pairs of a color and a shape that
training showed, and with pairs that it never showed.

- "old": the captions that `imagen-lightning quickstart` asks for; the cascade was not trained on their scenes.
- "new": scenes of the subject other than those fine-tuned on; of 200 captions of an hourglass 14, of one object alone,
  are among the captions fine-tuned on.

With `--grid` the first captions of both kinds are drawn, a row a cascade.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from imagen_lightning.cascade import Cascade
from imagen_lightning.data import shapes
from imagen_lightning.data.subjects import Subject, subject_captions
from imagen_lightning.images import grid, save_png
from imagen_lightning.metrics import caption_accuracy
from imagen_lightning.metrics.confidence import wilson

SHOWN = 4  # of each quarter of the captions, in the grid


def captions_of(subject: Subject, num: int, seed: int) -> dict[str, list[str]]:
    """Old and new captions, of each the second half with a pair that training never showed."""
    half = num // 2
    return {
        "old": [shapes.sample(seed, index, "val")[1] for index in range(half)] + shapes.held_out_captions(half, seed),
        "new": subject_captions(subject, half, "val", seed) + subject_captions(subject, half, "held_out", seed),
    }


def tell(name: str, right: Tensor) -> None:
    half, parts = len(right) // 2, []
    for part, chosen in (("all", right), ("seen pairs", right[:half]), ("unseen pairs", right[half:])):
        low, high = wilson(int(chosen.sum()), len(chosen))
        parts.append(f"{part} {chosen.double().mean():6.1%} ({low:.1%} to {high:.1%})")
    print(f"{name:<40} " + "   ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cascades", nargs="+")
    parser.add_argument("--subject", default="hourglass")
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path)
    arguments = parser.parse_args()
    asked = captions_of(Subject.of(arguments.subject), arguments.num, arguments.seed)
    starts = (0, arguments.num // 2)
    shown = [start + number for start in starts for number in range(min(SHOWN, arguments.num // 2))]
    rows: list[list[Tensor]] = []
    for folder in arguments.cascades:
        cascade, row = Cascade.load(folder), []
        for kind in ("new", "old"):
            images = cascade.sample(asked[kind], seed=arguments.seed).images
            tell(f"{folder}, {kind}", caption_accuracy(images, asked[kind]).all)
            row += [images[number] for number in shown]
        rows.append(row)
    if arguments.grid is not None:
        captions = [asked[kind][number] for kind in ("new", "old") for number in shown]
        above = [""] * len(captions) * (len(rows) - 1)
        save_png(grid(rows, above + captions, cell=96), arguments.grid)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
