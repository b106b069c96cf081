"""Which samples a page holds, and how they stand side by side."""

import json
import re

import pytest
from PIL import Image

from imagen_lightning.report.page import Page
from imagen_lightning.report.runs import Problems, read_run
from imagen_lightning.report.samples import Drawer, add_grid, drawer_kinds, evenly, plan, prompts_of


def drawers_of(make, tmp_path, *samples):
    found = []
    for number, item in enumerate(samples):
        run = read_run(make.run(tmp_path / f"run{number}", samples=item), Problems())
        found.append(Drawer(f"r{number}", f"run{number}", run.samples))
    return found


def embedded(section, page):
    (box,) = re.findall(r'data-samples="([^"]+)"', "".join(section.parts))
    (text,) = re.findall(rf'id="{box}">(.*?)</script>', page.render(), re.DOTALL)
    return json.loads(text)


def grid(drawers, most_images=1000, most_bytes=10**7):
    page, problems = Page("t"), Problems()
    section = page.section("Samples")
    add_grid(section, "Base stages", drawers, problems, most_images, most_bytes)
    return embedded(section, page), section.render(), problems.lines


def test_rows_are_captions_of_the_same_noise(make, tmp_path):
    common = ("a red star", "a blue circle")
    drawers = drawers_of(
        make,
        tmp_path,
        {"captions": ("only the first's", *common), "steps": (500, 1000)},
        {"captions": ("", *common, "x"), "steps": (1000, 2000)},
        {"captions": ("", *common), "seed": 7},
    )
    content, _, problems = grid(drawers)
    assert problems == []
    captions = [(prompt["caption"], prompt["seed"]) for prompt in content["prompts"]]
    assert captions[:2] == [("a red star", "seed 0, image 1"), ("a blue circle", "seed 0, image 2")]
    assert ("a red star", "seed 7, image 1") in captions  # other noise, another row
    assert content["steps"] == [500, 1000, 2000]
    first, second, third = content["runs"]
    assert first["steps"] == [500, 1000]
    assert all(len(first["images"][row]) == 2 and len(second["images"][row]) == 2 for row in (0, 1))
    assert third["images"][0] is None


def test_equal_pictures_are_embedded_once(make, tmp_path):
    drawers = drawers_of(make, tmp_path, {}, {})
    content, _, _ = grid(drawers)
    assert content["runs"][0]["images"] == content["runs"][1]["images"]
    assert len(content["images"]) == 6
    assert len(set(content["images"])) == 6


def test_a_broken_picture_leaves_a_gap(make, tmp_path):
    drawers = drawers_of(make, tmp_path, {}, {})
    drawers[0].sets[1].samples[0].path.write_bytes(b"\x89PNG broken")
    content, _, problems = grid(drawers)
    assert content["runs"][0]["images"][0][1] is None
    assert content["runs"][1]["images"][0][1] is not None
    assert len(problems) == 1
    assert "00000.png" in problems[0]


def test_pictures_are_reduced_to_the_budget_and_it_is_said(make, tmp_path):
    drawers = drawers_of(make, tmp_path, {"size": 512, "steps": (500,)})
    for number, sample in enumerate(drawers[0].sets[0].samples):  # noise, which compresses badly
        Image.effect_noise((512, 512), 80 + number).convert("RGB").save(sample.path)
    content, html, _ = grid(drawers)
    assert "pictures reduced to 256 px" in html
    large = sum(map(len, content["images"]))
    content, html, _ = grid(drawers, most_bytes=large // 5)
    assert sum(map(len, content["images"])) <= large // 5
    assert re.search(r"pictures reduced to (96|128) px", html)


@pytest.mark.parametrize(
    ("num_runs", "num_sets", "num_prompts", "steps", "prompts", "left_out"),
    [
        (2, 3, 8, 3, 8, ""),
        (1, 40, 30, 16, 24, "16 of up to 40 steps and 24 of 30 captions"),
        (50, 16, 8, 4, 8, "4 of up to 16 steps"),
        (200, 16, 12, 2, 6, "2 of up to 16 steps and 6 of 12 captions"),
        (2000, 16, 12, 2, 4, "2 of up to 16 steps and 4 of 12 captions"),
    ],
)
def test_budget(num_runs, num_sets, num_prompts, steps, prompts, left_out):
    found = plan([Drawer("", "", [None] * num_sets)] * num_runs, num_prompts, 3000)
    assert (found.steps, found.prompts, found.left_out) == (steps, prompts, left_out)


def test_even_choices():
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(10, 1) == [9]
    assert evenly(0, 3) == []


def test_stages_of_a_kind_stand_together(make, tmp_path):
    drawers = drawers_of(make, tmp_path, {}, {"stage": 1}, {"size": 64})
    kinds = [(title, [drawer.name for drawer in found]) for title, found in drawer_kinds(drawers)]
    assert kinds == [("Base stages", ["run0", "run2"]), ("Super-resolution stages", ["run1"])]
    assert len(prompts_of(drawers)) == 2
