"""What a word that textual inversion taught a cascade draws, and what old captions draw.

    python benchmarks/textual_inversion.py runs/quickstart/cascade runs/zib/cascade [--word "<zib>"]
        [--subject "large purple star"] [--num 100]

Before and after are cascade folders. Printed, of `--num` scenes of the subject that training did not see and as many
of the quickstart's held-out ones, at each cascade's own settings and the same noise:

- the share of pictures that are right in every attribute (caption accuracy, the word read as the subject) with the
  word, and with the subject spelt out, after;
- the share on old captions before and after, and how many of these pictures differ in any bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

from imagen_lightning.cascade import Cascade
from imagen_lightning.data.shapes import held_out_captions
from imagen_lightning.data.subjects import Subject, subject_captions
from imagen_lightning.metrics import caption_accuracy
from imagen_lightning.metrics.confidence import wilson


def tell(name: str, images: Tensor, meant: Sequence[str]) -> None:
    """Prints the share that is right in every attribute, its 95% interval, and the share of each attribute."""
    accuracy = caption_accuracy(images, meant)
    right = int(accuracy.all.sum())
    low, high = wilson(right, len(meant))
    parts = ", ".join(f"{part} {rate:.0%}" for part, rate in accuracy.mean().items() if part != "all")
    print(f"{name:<24} {right / len(meant):6.1%}  ({low:.1%} to {high:.1%})  {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--word", default="<zib>")
    parser.add_argument("--subject", default="large purple star")
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    subject = Subject.of(arguments.subject, arguments.word)
    before, after = Cascade.load(arguments.before), Cascade.load(arguments.after)

    def draw(cascade: Cascade, captions: list[str]) -> Tensor:
        return cascade.sample(captions, seed=arguments.seed).images

    captions = subject_captions(subject, arguments.num)
    meant = [subject.spell_out(caption) for caption in captions]
    tell(f"{arguments.word}, after", draw(after, captions), meant)
    tell("spelt out, after", draw(after, meant), meant)
    old = held_out_captions(arguments.num)
    earlier, later = draw(before, old), draw(after, old)
    tell("old captions, before", earlier, old)
    tell("old captions, after", later, old)
    print(f"old captions' pictures that differ: {int((earlier != later).flatten(1).any(dim=1).sum())} of {len(old)}")


if __name__ == "__main__":
    main()
