"""What is measured, of how many images, by which networks, and what can choose a point."""

from dataclasses import replace

import pytest
import torch

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.data import load_evaluation_set, prompt_evaluation_set
from imagen_lightning.evaluation.drawing import Chain, Drawing
from imagen_lightning.evaluation.image_set import ImageSet
from imagen_lightning.evaluation.measures import CAPTION_ACCURACY, Measurer
from imagen_lightning.evaluation.prompts import PromptSet
from imagen_lightning.metrics.caption_accuracy import caption_accuracy
from imagen_lightning.metrics.features import RandomConvFeatures
from imagen_lightning.metrics.frechet import FeatureMoments, frechet_distance
from imagen_lightning.metrics.image_quality import psnr
from imagen_lightning.metrics.precision_recall import precision_recall

NUM = 50


@pytest.fixture
def drawing(cascade, tmp_path):
    data = load_evaluation_set("shapes", NUM, 16)
    return Drawing(cascade, data, tmp_path / "samples", identity="abc", batch_size=25)


def test_blocks_measure_what_all_images_at_once_do(cascade, drawing, tmp_path):
    chain = Chain(1, 1, tuple(cascade.settings()[1:]))
    extractor = RandomConvFeatures()
    found = Measurer(tmp_path / "measured", [extractor], batch_size=7).measure(drawing, chain)
    images, truth = drawing.draw(chain).images[:], drawing.data.images[:]
    features, real = extractor(images), extractor(truth)
    expected = frechet_distance(FeatureMoments.of(features), FeatureMoments.of(real))
    assert found.number("FD-random") == pytest.approx(expected, rel=1e-5)
    near = precision_recall(features, real)
    assert (found.number("precision"), found.number("recall")) == (near.precision, near.recall)
    assert found.number("PSNR") == pytest.approx(psnr(images, truth).mean().item(), rel=1e-9)
    accuracy = caption_accuracy(images, drawing.data.captions)
    assert torch.equal(found.per_image[CAPTION_ACCURACY], accuracy.all.double())
    for name, share in accuracy.mean().items():
        assert found.number(CAPTION_ACCURACY if name == "all" else f"{CAPTION_ACCURACY}, {name}") == share
    metrics = {value.metric for value in found.values}
    assert {"KD-random", "SSIM", "low-res PSNR", "colour shift"} <= metrics
    for value in found.values:
        assert value.low is not None, value.metric
        assert value.protocol.seed == 0, value.metric
    against = {value.metric for value in found.values if value.protocol.reference}
    assert against == {"FD-random", "KD-random", "precision", "recall", "PSNR", "SSIM"}


def test_few_images_have_no_neighbours(cascade, drawing, tmp_path):
    few = replace(drawing.data, captions=drawing.data.captions[:10], images=ImageSet.of(drawing.data.images[:10]))
    small = Drawing(cascade, few, tmp_path / "few", identity="abc", batch_size=25)
    metrics = {v.metric for v in Measurer(tmp_path / "m", [RandomConvFeatures()]).measure_real(small, 16).values}
    assert "FD-random" in metrics
    assert not {"KD-random", "precision", "recall"} & metrics


def test_real_images_are_measured_once(drawing, tmp_path, monkeypatch):
    measurer = Measurer(tmp_path / "m", [RandomConvFeatures()])
    first = measurer.measure_real(drawing, 8)
    again = Measurer(tmp_path / "m", [RandomConvFeatures()])
    monkeypatch.setattr(again, "_measure", None)
    assert again.measure_real(drawing, 8).values == first.values


def test_who_can_choose_a_point(drawing, tmp_path):
    measurer = Measurer(tmp_path, [RandomConvFeatures()])
    assert measurer.judge_of("FD-random", drawing.data).higher_is_better is False
    assert measurer.judge_of(CAPTION_ACCURACY, drawing.data).percent
    with pytest.raises(InputError, match="'CLIP score' cannot choose"):  # there is no CLIP
        measurer.judge_of("CLIP score", drawing.data)
    prompts = prompt_evaluation_set(PromptSet("p", ["a dog"], [""]))
    with pytest.raises(InputError, match="give --clip"):  # neither real images nor known answers
        measurer.judge_of("FD-random", prompts)
    with pytest.raises(InputError, match="use one of 'FD-random'"):
        measurer.judge_of(CAPTION_ACCURACY, replace(drawing.data, has_answers=False))
