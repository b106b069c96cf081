"""Find the command and run it; whatever the user can fix ends with one line and exit code 2."""

from __future__ import annotations

import codecs
import contextlib
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

# What the commands print, for terminals that lack it.
_ASCII = {"…": "...", "–": "-", "—": "-", "×": "x", "±": "+-", "≥": ">=", "≤": "<=", "“": '"', "”": '"', "’": "'"}


_LONGEST = 1500  # characters of a message: whatever a value's length, its end says what to do


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
    """Run `argv` (default: the process's arguments) and return the exit code."""
    _prepare_streams()
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            _flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (a pager, head) has gone
        _discard_output()
        return 1
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        return _refuse(line)


def _run(argv: list[str]) -> int:
    for argument in argv:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as lone surrogates
            raise InputError(f"argument {argument!a} is not UTF-8; write it, or rename the file, in UTF-8") from None
        if "\0" in argument:
            raise InputError(f"argument {argument!a} holds a null character; drop it")
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


# ---- errors


def explain(error: BaseException) -> str | None:
    """Return the line on an error that comes from the input or the machine; None for one that is a bug."""
    if isinstance(error, InputError):
        # A loader's process puts its traceback in front.
        return str(error).rpartition(f"{InputError.__module__}.InputError: ")[2]
    if isinstance(error, OSError):
        from imagen_lightning.files import explain_os_error

        return explain_os_error(error)
    if isinstance(error, UnicodeError):
        return f"a text is not UTF-8: {error}; save it as UTF-8"
    if type(error).__name__ == "SafetensorError":  # by name, as torch's below: libraries that may not be imported yet
        return f"a file of weights cannot be read or written: {_first_line(error)}"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply; give one with fewer levels of lists and mappings"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with ~ and the name of no user; write ./~… for a file of that name"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return f"too little memory ({_first_line(error) or 'of this process'}); make less at a time or choose less"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _refuse(message: str) -> int:
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(message.split()))
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    with contextlib.suppress(OSError):  # a closed or full stderr: the exit code says it
        print(f"imagen-lightning: error: {line}", file=sys.stderr)
    return 2


# ---- streams


def _prepare_streams() -> None:
    """Let no text fail for the terminal's encoding, and give closed streams (`>&-`) a place to write to."""
    codecs.register_error("imagen_lightning", _replace)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (as long as the process)
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="imagen_lightning")


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write a character that an encoding lacks in ASCII, or as its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(sign, ascii(sign)[1:-1]) for sign in text), error.end


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        raise OSError(error.errno, error.strerror, "standard output") from error


def _discard_output() -> None:
    """Send what is still to be printed nowhere; Python would complain once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
