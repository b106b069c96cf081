"""The command itself: help and version at once, unknown verbs, each verb's help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imagen_lightning import __version__
from imagen_lightning.cli.main import VERBS, main

COMMAND = str(Path(sys.executable).with_name("imagen-lightning"))
LIGHT = [verb for verb, (module, _) in VERBS.items() if module != "fit"]


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [[COMMAND], [sys.executable, "-m", "imagen_lightning"]])
def test_version(command):
    done = run(*command, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"imagen-lightning {__version__}\n", "")


def test_help_names_every_verb_and_imports_nothing_heavy():
    code = f"""
import sys
from imagen_lightning.cli.main import main

def helped(*arguments):
    try:
        return main([*arguments, "--help"])
    except SystemExit as end:
        return end.code or 0

codes = [helped(), main(["--version"]), *(helped(verb) for verb in {LIGHT!r})]
heavy = {{"torch", "numpy", "PIL", "lightning", "wandb", "jsonargparse"}} & sys.modules.keys()
sys.exit(f"{{codes}} {{heavy}}" if any(codes) or heavy else 0)
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert f"\n  {verb} " in done.stdout
    for verb in LIGHT:
        assert f"usage: imagen-lightning {verb}" in done.stdout


def test_an_unknown_verb_is_one_line():
    done = run(COMMAND, "dream")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"imagen-lightning: error: unknown verb 'dream'; use one of {', '.join(VERBS)}\n"


def test_a_misspelt_verb_is_recognised(capsys):
    assert main(["smaple"]) == 2
    assert "did you mean sample?" in capsys.readouterr().err


def test_no_verb_shows_the_usage(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: imagen-lightning VERB")


def test_a_reader_that_leaves_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([COMMAND, "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("verb", [verb for verb, (module, _) in VERBS.items() if module == "fit"])
def test_help_of_the_trainer_s_verbs(verb, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "--config" in shown
    assert "--trainer.max_steps" in shown
    assert "--run RUN" in shown
    assert "--weights_only" not in shown
