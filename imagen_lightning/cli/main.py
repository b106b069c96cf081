"""Finds the verb, runs it, and turns what the user can mend into one line and exit code 2."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from imagen_lightning import __version__
from imagen_lightning.errors import InputError

VERBS = {
    "quickstart": ("quickstart", "train a small cascade on built-in captioned shapes, offline, and sample it"),
    "fit": ("fit", "train one stage from a YAML"),
    "validate": ("fit", "validation loss of a checkpoint"),
    "test": ("fit", "run a stage's test loop, if it has one"),
    "predict": ("fit", "run a stage's prediction loop, if it has one"),
    "plan": ("plan", "what training a stage takes: memory, FLOPs, disk; and which settings make it fit a GPU"),
    "adapter": ("adapter", "write the low-rank adapter that a run trained to files of its own"),
    "cascade": ("cascade", "chain trained stages into a cascade folder"),
    "class-images": ("class_images", "draw what a cascade knows of a class, to keep it while fine-tuning (DreamBooth)"),
    "tokens": ("tokens", "write the words that textual inversion learned to a file"),
    "import-diffusers": ("import_diffusers", "make a cascade of DeepFloyd IF's pipelines"),
    "export": ("export", "write a cascade as pipelines that diffusers loads"),
    "evaluate": ("evaluate", "measure a cascade and name the stage that costs most, or sweep its settings"),
    "compare": ("compare", "let a person vote between two cascades, blind"),
    "sweep": ("sweep", "run a W&B sweep file's trials here, without W&B; they resume, and share machines"),
    "sample": ("sample", "captions to pictures with a cascade folder"),
    "report": ("report", "one page of runs and evaluations: table, curves, samples side by side"),
    "finetune-report": ("finetune_report", "a cascade before and after fine-tuning: learned, forgotten, copied, cost"),
    "verify-resume": ("verify_resume", "prove that a killed run resumes exactly, on this machine and data"),
    "shards": ("shards", "make webdataset shards of captioned images"),
}


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items())
    return (
        "usage: imagen-lightning VERB [options]\n\n"
        "Experiments with cascaded pixel diffusion from text.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`imagen-lightning VERB --help` says what a verb takes; `imagen-lightning --version` prints the version."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs `argv` (default: the process's arguments) and returns the exit code."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except InputError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (a pager, head) has gone; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    if verb == "--version":
        print(f"imagen-lightning {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(VERBS)}"
        raise InputError(f"unknown verb {verb!r}; {hint}")
    name = VERBS[verb][0]
    module = importlib.import_module(f"imagen_lightning.cli.{name}")
    return module.main(argv if name == "fit" else rest)


def _refuse(message: str) -> int:
    message = message.rpartition(f"{InputError.__module__}.InputError: ")[2]  # a loader's process adds its traceback
    print(f"imagen-lightning: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
