"""The part of the page on evaluations: prompts by category share a column and say how many they are."""

from imagen_lightning.evaluation.schema import Evaluation, Row
from imagen_lightning.metrics.protocol import Protocol, Value
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
