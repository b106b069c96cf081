"""An evaluation in words: shares in percent, the best point, and the quicker ones that are worth their time."""

from dataclasses import replace

import pytest

from imagen_lightning.evaluation.measures import CAPTION_ACCURACY, Judge, Measured
from imagen_lightning.evaluation.schema import Evaluation, Row
from imagen_lightning.evaluation.words import cell, sweep_verdict, table
from imagen_lightning.metrics.protocol import Protocol, Value

JUDGE = Judge(CAPTION_ACCURACY)


def value(number, margin=0.02, metric=CAPTION_ACCURACY):
    return Value(metric, number, number - margin, number + margin, Protocol(metric), "95% Wilson")


@pytest.fixture
def sweep(cascade):
    """Points of 1, 2, 3 and 4 steps: accuracy and seconds."""

    def make(numbers, seconds):
        settings = [tuple(cascade.settings(steps=[steps, None])) for steps in range(1, len(numbers) + 1)]
        measured = [Measured((value(number),)) for number in numbers]
        rows = [
            Row(
                "sr_16",
                "chain",
                {"steps": [point[0].steps, 2], "guidance": [2.0, 1.0]},
                (item.values[0].to_json(),),
                each,
            )
            for point, item, each in zip(settings, measured, seconds)
        ]
        return rows, settings, measured

    return make


def test_the_best_and_the_quicker_ones(sweep):
    text = sweep_verdict(*sweep([0.5, 0.4, 0.8, 0.79], [1.0, 2.0, 3.0, 4.0]), [JUDGE])
    assert text == (
        "best caption accuracy: 80% (78% to 82%) at steps 3,2; 1 other point of 3 cannot be told from it: more "
        "samples would tell; quicker, and the best at their time: steps 1,2 (50% (48% to 52%), 1 s/image)"
    )


def test_a_point_without_a_time_is_not_quick(sweep):
    text = sweep_verdict(*sweep([0.5, 0.8], [None, 3.0]), [JUDGE])
    assert (
        text == "best caption accuracy: 80% (78% to 82%) at steps 2,2; every other point is worse by more than chance"
    )
    assert "s/image" not in sweep_verdict(*sweep([0.5, 0.8], [1.0, None]), [JUDGE])


def test_a_best_point_without_intervals_is_not_told_from_the_others(sweep):
    rows, settings, measured = sweep([0.5, 0.8], [1.0, 1.0])
    alone = [Measured((replace(item.values[0], low=None, high=None, confidence=None),)) for item in measured]
    for some in ([alone[0], measured[1]], [measured[0], alone[1]], alone):
        assert sweep_verdict(rows, settings, some, [JUDGE]).endswith(
            "without intervals it cannot be told from the others"
        )
    wide = [Measured((value(0.5, 0.4),)), measured[1]]  # the other one's interval holds the best
    assert "1 other point of 1 cannot be told from it" in sweep_verdict(rows, settings, wide, [JUDGE])


def test_one_point_and_none(sweep):
    assert sweep_verdict(*sweep([0.5], [1.0]), [JUDGE]).startswith(
        "caption accuracy: 50% (48% to 52%) at guidance 2.0,1.0"
    )
    assert "give --clip" in sweep_verdict(*sweep([0.5], [1.0]), [])


def test_numbers():
    assert cell(None) == "-"
    assert cell(value(12.3456, 0.5, "PSNR").to_json()) == "12.3 (11.8 to 12.8)"
    alone = replace(value(0.5, metric="PSNR"), low=None, high=None, confidence=None)
    assert cell(alone.to_json()) == "0.5"
    assert cell(Value("PSNR", float("inf"), 40.0, float("inf"), Protocol("PSNR"), "x").to_json()) == "inf (40 to inf)"


def test_a_line_leaves_out_what_is_for_the_page():
    rows = [Row("base", None, {}, tuple(value(1, metric=name).to_json() for name in ("FID", "recall", "FID, x")))]
    head = table(Evaluation("matrix", "c", "now", {}, tuple(rows))).splitlines()[0]
    assert head.split() == ["stage", "input", "FID", "s/image"]
