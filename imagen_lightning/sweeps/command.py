"""A trial's command as W&B's agent makes it (wandb.sdk.launch.sweeps.utils), and where its run goes.

`${env}`, `${interpreter}` and `${program}` stand for `/usr/bin/env`, `python` and the file's program; `${args}` for
`--NAME=VALUE` of each parameter, `${args_no_hyphens}` for `NAME=VALUE`, `${args_no_boolean_flags}` for `--NAME` of what
is true and nothing of what is false, `${args_no_equals}`, `${args_json}` and Hydra's forms likewise; `${envvar:NAME}`
for a variable of the environment. No shell reads the command: nothing is quoted. A macro is a word of its own; inside
of a longer word only `${envvar:…}` is replaced.

W&B writes a value as Python prints it, in which `fit` reads another one where a list or mapping holds null (the text
None) or certain texts. Here `fit` is given a text as it is and any other value as JSON, which it reads as what it is.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.io.yaml import read_yaml
from imagen_lightning.sweeps.file import SweepFile

RUN_VARIABLE = "IMAGEN_LIGHTNING_RUN"  # the trial's folder, for programs that are not this package's
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


def arguments_of(sweep: SweepFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as W&B hands them on: nested ones as one dictionary under their first key.

    Args:
        sweep: the file.
        values: by parameter name.
    """
    found: dict[str, Any] = {}
    for parameter in sweep.parameters:
        place = found
        for key in parameter.path[:-1]:
            place = place.setdefault(key, {})
        place[parameter.path[-1]] = values[parameter.name]
    return found


def expand(sweep: SweepFile, arguments: Mapping[str, Any]) -> list[str]:
    """Return the command's words.

    Args:
        sweep: the file.
        arguments: from `arguments_of`.

    Raises:
        InputError: a macro that W&B does not know or `fit` does not understand; null for another program than `fit`.
    """
    given = [_written(sweep, name, value) for name, value in arguments.items()]
    macros = {
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [str(sweep.program)],
        "args": [f"--{name}={text}" for name, text in given],
        "args_no_equals": [word for name, text in given for word in (f"--{name}", text)],
        "args_no_hyphens": [f"{name}={text}" for name, text in given],
        "args_no_boolean_flags": [
            f"--{name}" if arguments.get(name) is True else f"--{name}={text}"
            for name, text in given
            if arguments.get(name) is not False
        ],
        "args_json": [json.dumps(dict(arguments))],
        "args_append_hydra": [f"+{name}={text}" for name, text in given],
        "args_override_hydra": [f"++{name}={text}" for name, text in given],
    }
    if is_fit(sweep) and "${args_no_boolean_flags}" in sweep.command:
        raise InputError(f"{sweep.path}: fit takes --NAME=true, not flags; use ${{args}} in the command")
    words: list[str] = []
    for word in sweep.command:
        word = _ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[1]), word)
        if not (word.startswith("${") and word.endswith("}")):
            words.append(word)
            continue
        if word[2:-1] not in macros:
            raise InputError(f"{sweep.path}: command holds {word}, which is not supported; use {_macros(macros)}")
        words += macros[word[2:-1]]
    return words


def _written(sweep: SweepFile, name: str, value: Any) -> tuple[str, str]:
    """Return an argument's name and its value as the program reads it."""
    if is_fit(sweep):
        parent, _, key = name.rpartition(".")
        if isinstance(value, str) and parent and _is_more_than_text(value):
            return parent, _flow({key: value})  # where `fit` does not read the text as YAML once more
        return name, value if isinstance(value, str) else _flow(value)
    if value is None:
        raise InputError(
            f"{sweep.path}: parameters.{name}: this program would be given null as the text None; leave the parameter "
            "out for its default"
        )
    return name, str(value)


def _is_more_than_text(value: str) -> bool:
    """Return whether YAML reads a text as null, a list or a mapping."""
    try:
        return value.strip() != "" and not isinstance(read_yaml(value, "value"), str | int | float)
    except InputError:
        return False


def _flow(value: Any) -> str:
    """Return JSON that YAML reads as the same value: what YAML does not take or breaks lines at is escaped."""
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def _macros(names: Mapping[str, Any]) -> str:
    return ", ".join(f"${{{name}}}" for name in names) + " and ${envvar:NAME}"


def is_fit(sweep: SweepFile) -> bool:
    """Return whether the sweep's trials are trainings by this package's `fit`."""
    found = own_command([str(sweep.program) if word == "${program}" else word for word in sweep.command])
    return found is not None and found[0] == "fit"


def own_command(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the command of this package that is run and the words after it; None for any other program."""
    for place, word in enumerate(words[:-1]):
        module = word == "imagen_lightning" and words[place - 1 : place] == ["-m"]
        if module or Path(word).name == "imagen-lightning":
            return words[place + 1], list(words[place + 2 :])
    return None


def in_folder(words: Sequence[str], folder: Path, samples: Path) -> list[str]:
    """Return the command with its trial's folder: `fit` begins or resumes there, `evaluate` shares images."""
    found = own_command(words)
    if found is None:
        return list(words)
    name, rest = found
    if name == "fit":
        return [*words, "--run", str(folder), "--resume"]
    if name == "evaluate":
        shared = () if any(word.split("=")[0] == "--samples" for word in rest) else ("--samples", str(samples))
        return [*words, "--out", str(folder), *shared]
    raise InputError(f"a sweep runs imagen-lightning fit or evaluate, not {name[:80]!r}")


def environment(folder: Path, name: str, threads: int | None, device: str | None) -> dict[str, str]:
    """A trial's variables: this Python's programs first, its folder, its share of the machine.

    Args:
        folder: the trial's.
        name: the sweep's, W&B's group.
        threads: of the CPU; None leaves them as they are.
        device: what CUDA_VISIBLE_DEVICES becomes; None leaves it.
    """
    made = {key: value for key, value in os.environ.items() if key not in ("WANDB_SWEEP_ID", "WANDB_RUN_ID")}
    made["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), made.get("PATH", os.defpath)])
    made[RUN_VARIABLE] = str(folder)
    made.setdefault("WANDB_RUN_GROUP", name)
    if threads is not None:
        made.setdefault("OMP_NUM_THREADS", str(threads))
    if device is not None:
        made["CUDA_VISIBLE_DEVICES"] = device
    return made
