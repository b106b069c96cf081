"""Whether a sweep's commands mean what they say, before the first trial: misspelt parameters and values are refused.

The configuration that `fit` would print (`--print_config`) is made for the file's values in turn, in a process of its
own, so that the sweep holds neither torch nor Lightning in memory while its trials run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from imagen_lightning.errors import InputError
from imagen_lightning.sweeps.command import arguments_of, expand, own_verb
from imagen_lightning.sweeps.file import SweepFile

_MOST = 24  # values of one parameter that are tried
_PROGRAM = "import sys; from imagen_lightning.cli.sweep_check import answer; answer(sys.stdin, sys.stdout)"


def check(sweep: SweepFile) -> None:
    """Raises InputError where a parameter of `fit` or `evaluate`, or one of its values, would be refused by them."""
    commands = [own_verb(expand(sweep, arguments_of(sweep, values))) for values in examples(sweep)]
    found = [command for command in commands if command is not None]
    fits = [words for verb, words in found if verb == "fit"]
    for verb, words in found:
        if verb == "evaluate":
            from imagen_lightning.cli.evaluate import axes_of, parser

            axes_of(parser().parse_args([*words, "--out", "out"]))
        elif verb != "fit":
            raise InputError(f"{sweep.path}: a sweep runs imagen-lightning fit or evaluate, not {verb!r}")
    if not fits:
        return
    done = subprocess.run([sys.executable, "-c", _PROGRAM], input=json.dumps(fits), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the configuration could not be checked:\n{done.stderr}")
    problem = json.loads(done.stdout.splitlines()[-1])
    if problem is not None:
        raise InputError(f"{sweep.path}: {problem}")


def examples(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """Values by parameter: the first of each, then every other one of each in turn."""
    first = {parameter.name: parameter.distribution.examples()[0] for parameter in sweep.parameters}
    yield first
    for parameter in sweep.parameters:
        for value in list(parameter.distribution.examples())[1:_MOST]:
            yield first | {parameter.name: value}


def answer(source: Any, target: Any) -> None:
    """Reads commands of `fit` as JSON, and writes the first one's problem, or null."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    problem = None
    try:
        for words in json.load(source):
            configuration(words)
    except InputError as error:
        problem = str(error)
    finally:
        sys.stdout = stdout
    print(json.dumps(problem), file=target)


def configuration(words: Sequence[str]) -> dict[str, Any]:
    """What `imagen-lightning fit WORDS --print_config` prints, without making anything.

    Raises:
        InputError: what `fit` would refuse.
    """
    import yaml

    from imagen_lightning.cli import fit
    from imagen_lightning.cli.fit_arguments import prepare

    class Parsed(fit.StageCLI):
        def instantiate_classes(self) -> None:
            pass

    prepared = prepare("fit", [*words, "--print_config"], ExitStack())  # which locks nothing
    given = [word for word in prepared if word != "--print_config"]
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        made = Parsed(
            run=False,
            parser_class=fit.Parser,
            save_config_callback=None,
            trainer_defaults=fit.TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=given,
        )
    finally:
        sys.argv = arguments
    return yaml.safe_load(made.dump())
