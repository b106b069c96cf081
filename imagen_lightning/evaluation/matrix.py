"""The matrix: every stage on real and on generated input, and what each stage costs the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imagen_lightning.cascade import StageSettings
from imagen_lightning.cascade.sampling import protocol_fields
from imagen_lightning.evaluation.costs import Judgement, Quality, judge
from imagen_lightning.evaluation.drawing import Chain, Drawing, chains
from imagen_lightning.evaluation.measures import Measured, Measurer
from imagen_lightning.evaluation.schema import Row
from imagen_lightning.metrics.protocol import flat

REAL_IMAGES = "real images"


@dataclass(frozen=True)
class Matrix:
    """What `run_matrix` found.

    Attributes:
        rows: the base at its size, each super-resolution stage on real and on generated input, the whole chain, and
            the real images themselves at each stage's size: the best that the numbers can be.
        judgements: the stages' costs, by every metric of the last stage's images that can judge, the best judge first.
    """

    rows: list[Row]
    judgements: list[Judgement]

    @property
    def verdict(self) -> str:
        return self.judgements[0].sentence()


def input_of(drawing: Drawing, chain: Chain) -> str | None:
    """What the chain's last stage was given: "real", "generated", "chain" for the whole cascade, None for a base."""
    if chain.first == chain.last:
        return None if drawing.takes_text_alone(chain.first) else "real"
    whole = chain.first == 0 and chain.last == len(drawing.cascade.stages) - 1
    return "chain" if whole else "generated"


def run_matrix(drawing: Drawing, settings: Sequence[StageSettings], measurer: Measurer) -> Matrix:
    """Draws what is missing, measures each row, and finds the stages' costs."""
    cascade = drawing.cascade
    rows: list[Row] = []
    ends: dict[int, Measured] = {}  # by the first stage that was not replaced by real images
    for chain in chains(settings):
        measured = measurer.measure(drawing, chain)
        rows.append(row_of(drawing, chain, measured))
        if chain.last == len(cascade.stages) - 1:
            ends[chain.first] = measured
    for stage in cascade.stages:
        truth = measurer.measure_real(drawing, stage.image_size)
        name = f"{REAL_IMAGES}, {stage.image_size} px"
        values = tuple(value.to_json() for value in truth.values)
        rows.append(Row(name, None, {}, values, samples=picture_of_real(stage.image_size)))
    order = [*(ends[number] for number in range(len(cascade.stages))), truth]
    judgements = []
    for judge_ in measurer.judges(order):
        qualities = [
            Quality(item.number(judge_.metric), item.per_image.get(judge_.metric), item.margin(judge_.metric))
            for item in order
        ]
        judgements.append(
            judge(
                judge_.metric,
                cascade.names,
                qualities,
                higher_is_better=judge_.higher_is_better,
                percent=judge_.percent,
            )
        )
    return Matrix(rows, judgements)


def row_of(drawing: Drawing, chain: Chain, measured: Measured) -> Row:
    """The chain's line in evaluation.json; its time is that of all its stages."""
    steps: list[Chain] = []
    step: Chain | None = chain
    while step is not None:
        steps.append(step)
        step = step.before()
    drawn = [drawing.draw(item) for item in steps]
    seconds = [item.seconds_per_image for item in drawn if item.seconds_per_image is not None]
    settings = {"seed": drawing.seed, "weights": drawing.weights(chain), **protocol_fields(chain.described())}
    return Row(
        stage=drawing.cascade.names[chain.last],
        input=input_of(drawing, chain),
        settings=flat(settings),
        values=tuple(value.to_json() for value in measured.values),
        seconds_per_image=sum(seconds) if len(seconds) == len(steps) else None,
        peak_memory_bytes=max((item.peak_memory_bytes or 0 for item in drawn), default=0) or None,
        samples=picture_of(drawing, chain),
    )


def picture_of(drawing: Drawing, chain: Chain) -> str:
    """The picture of a chain's images, relative to the evaluation's folder."""
    return f"samples/{drawing.name(chain)}.png"


def picture_of_real(size: int) -> str:
    """Likewise of the real images at a size."""
    return f"samples/real-{size}.png"
