"""`imagen-lightning tokens`: a run's words in a file, a cascade that reads it, pictures of a caption with the word."""

from pathlib import Path

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import pytest
import torch
from safetensors.torch import load_file
from tiny_stages import base_stage, sr_stage

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.finetuning import from_cascade
from imagen_lightning.text import PseudoTokens
from imagen_lightning.text.token_files import read_tokens


@pytest.fixture
def cascade(tmp_path) -> Path:
    Cascade([base_stage(), sr_stage(image_size=16, low_res_size=8)]).save(tmp_path / "cascade")
    return tmp_path / "cascade"


@pytest.fixture
def taught(cascade, tmp_path) -> Path:
    """A cascade whose base stage has learned two words."""
    stage = from_cascade(str(cascade), tokens=PseudoTokens({"<zib>": 2, "<zub>": 1}, "star"))
    stage.tokens.begin(stage.text.encoder)
    stage.origin = {"licence": "CC-BY-4.0"}
    Cascade([stage, sr_stage(image_size=16, low_res_size=8)]).save(tmp_path / "taught")
    return tmp_path / "taught"


def test_words_go_from_a_stage_to_a_file(taught, tmp_path, capsys):
    out = tmp_path / "words.tokens.safetensors"
    assert main(["tokens", str(taught), str(out)]) == 0
    told = capsys.readouterr().out
    assert "<zib>: 2 vectors of 12 features, for text encoder tiny-bytes-d12-s0" in told
    assert "<zub>: 1 vector of" in told
    file = read_tokens(out)
    assert list(file.vectors) == ["<zib>", "<zub>"]
    assert file.licence == "CC-BY-4.0"
    one = tmp_path / "one.tokens.safetensors"
    assert main(["tokens", f"{taught}#base", str(one), "--word", "<ZUB>", "--licence", "CC0-1.0"]) == 0
    assert list(load_file(one)) == ["<zub>"]
    assert read_tokens(one).licence == "CC0-1.0"
    assert torch.equal(load_file(one)["<zub>"], file.vectors["<zub>"])


def test_what_has_no_words_is_refused(cascade, taught, tmp_path, capsys):
    out = str(tmp_path / "words.tokens.safetensors")
    assert main(["tokens", str(cascade), out]) == 2
    assert "knows no pseudo-word; give a run of textual inversion" in capsys.readouterr().err
    assert main(["tokens", str(taught), out, "--word", "<foo>"]) == 2
    assert "knows no pseudo-word '<foo>'; it knows <zib>, <zub>" in capsys.readouterr().err
    assert main(["tokens", str(taught), str(tmp_path / "words.safetensors")]) == 2
    assert "must be named NAME.tokens.safetensors" in capsys.readouterr().err


def test_a_cascade_reads_the_file_and_draws_the_word(cascade, taught, tmp_path, capsys):
    file, made = tmp_path / "words.tokens.safetensors", tmp_path / "made"
    assert main(["tokens", str(taught), str(file)]) == 0
    sample = ["--prompt", "a <zib> above a red <Zub>", "--steps", "2", "--guidance", "2", "--device", "cpu"]
    assert main(["sample", str(taught), *sample, "--out", str(tmp_path / "refused")]) == 2
    assert "stage 'sr_16' does not know the pseudo-word '<zib>'" in capsys.readouterr().err
    assert main(["cascade", str(cascade), str(made), "--tokens", str(file)]) == 0
    assert [stage.tokens.words for stage in Cascade.load(made).stages] == [{"<zib>": 2, "<zub>": 1}] * 2
    assert main(["sample", str(made), *sample, "--negative-prompt", "a <zub>", "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "00000.png").exists()
    assert main(["tokens", str(made), str(tmp_path / "again.tokens.safetensors")]) == 2
    assert "2 stages of" in capsys.readouterr().err
