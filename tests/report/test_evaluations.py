"""The part of the page on evaluations: prompts by category share a column and say how many they are."""

from dataclasses import replace

from imagen_lightning.evaluation.schema import Evaluation, Row
from imagen_lightning.metrics.protocol import Protocol, Value, flat
from imagen_lightning.report import evaluations
from imagen_lightning.report.page import Page
from imagen_lightning.report.runs import Problems
from imagen_lightning.report.sources import FoundEvaluation


def row(category, num, value):
    protocol = Protocol("CLIP score", extractor="clip", num_samples=num, prompts=(category or "all") * 8)
    settings = {"guidance": 2.0} | ({"category": category} if category else {})
    return Row("base", None, settings, (Value("CLIP score", value, None, None, protocol).to_json(),))


def test_categories_share_a_column(tmp_path):
    rows = (row(None, 3, 25.0), row("Colors", 2, 24.0), row("Counting", 1, 27.0))
    found = FoundEvaluation(tmp_path, "parti", Evaluation("sweep", "c", "2026-01-01T00:00:00+00:00", {}, rows))
    page = Page("x")
    evaluations.add(page, [found], Problems())
    text = page.render()
    assert "parti, by category" in text
    by_category = text[text.index("parti, by category") :]
    assert by_category.count('<th scope="col" class="number"') >= 2
    head = by_category[: by_category.index("</thead>")]
    assert head.count("CLIP score") == 1  # one column for both
    for word in ("Colors", "Counting", "24", "27"):
        assert word in by_category
    whole = text[: text.index("parti, by category")]
    assert "Colors" not in whole
    assert "3 samples" in whole


def matrix(folder, name, *, spacing="UniformTimes", schedule="CosineSchedule", weights="ema"):
    """An evaluation of two stages and the real images, with all that a row says of its sampling."""
    groups = {
        "sampling": {"spacing": spacing, "thresholding": "StaticThresholding"},
        "process": {"diffusion.schedule": schedule, "text.null_text": "zero"},
    }
    made = {"guidance": 2, "steps": 9, "sampler": "DDIM(eta=0)", "seed": 0, "weights": weights, **groups}
    larger = {**groups, "process": {**groups["process"], "augmentation": "LowResAugmentation(max_level=1)"}}
    rows = [("base", None, made), ("sr_64", "real", {**made, **larger}), ("real images, 64 px", None, {})]
    values = [Value("FID", 3.0, None, None, Protocol("FID", image_size=64, **fields)) for *_, fields in rows]
    found = tuple(Row(*place, flat(made), (item.to_json(),)) for (*place, made), item in zip(rows, values))
    return FoundEvaluation(folder / name, name, Evaluation("matrix", "c", "2026-01-01T00:00:00+00:00", {}, found))


def page_of(*found):
    page = Page("x")
    evaluations.add(page, found, Problems())
    text = page.render()
    table = text[text.index("<table") :]
    return text, table[: table.index("</thead>")]


def test_what_is_alike_is_not_shown_and_what_differs_is(tmp_path):
    text, head = page_of(matrix(tmp_path, "one"), matrix(tmp_path, "two"))
    assert head.count("FID") == 1
    for word in ("Spacing", "Thresholding", "schedule", "Augmentation", "Weights", "Null text"):
        assert word not in head, word
    assert "Sampler" in head  # the real images have none
    assert "spacing UniformTimes" in text  # in the protocol under the table
    assert "CosineSchedule" not in text
    for change, title in (
        ({"spacing": "LogSNRTimes(low=-9, high=9)"}, "Spacing"),
        ({"schedule": "SigmoidSchedule(start=-3, end=3, tau=1)"}, "Diffusion schedule"),
        ({"weights": "raw"}, "Weights"),
    ):
        text, head = page_of(matrix(tmp_path, "one"), matrix(tmp_path, "two", **change))
        assert head.count("FID") == 1  # next to which it says what differs
        assert title in head
        assert next(iter(change.values())) in text


def test_an_evaluation_that_does_not_say_all_is_told_apart(tmp_path):
    old = matrix(tmp_path, "old")
    plain = [{k: v for k, v in row.settings.items() if "." not in k} for row in old.evaluation.rows]
    rows = tuple(replace(row, settings=settings) for row, settings in zip(old.evaluation.rows, plain))
    old = replace(old, evaluation=replace(old.evaluation, rows=rows))
    _, head = page_of(matrix(tmp_path, "new"), old)
    assert "Spacing" in head
    assert "Diffusion schedule" in head
