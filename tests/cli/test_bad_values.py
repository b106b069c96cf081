"""Bad values for every option of every command: one line and exit code 2, no traceback, nothing left behind.

Commands and options are found in the parsers, so that a new one is tried too. `make test` tries a few values of each
option, `make test-slow` all of them.
"""

import random
import string
import time

import pytest
from commands import COMMANDS, arguments_of, argv_of, listing, remove

from imagen_lightning.cli.main import main

NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1.5",
    "1e9",
    "1e400",
    "0x10",
    "1_0",
    "１２",
    *map(str, (2**31, 2**63, 2**64)),
]
NUMBERS += ["9" * 5000, "1,", ",", "1,2,3,4,5", "base=nan", "base=1", "sr_16=", "-0.0", "1e-400"]
TEXTS = [
    "",
    " ",
    "\t\n",
    "true",
    "null",
    "日本語",
    "🙂",
    "a\u2028b",
    "\x1b[31m",
    "caf\udce9",
    "nul\0l",
    "a" * 300,
    "a" * 5000,
]
TEXTS += [
    "=",
    "@",
    "@nan",
    "#",
    "cascade#",
    "cascade#x",
    "cascade@1",
    "[",
    "*",
    "{0..3}",
    "a=b",
    "%s",
    "~",
    "~nobody/x",
]
PATHS = [
    "missing",
    "missing/below",
    "empty",
    "binary",
    "folder",
    "empty/below",
    "/dev/null",
    "/dev/full",
    "/dev/zero",
    ".",
    "..",
    "/",
]
PATHS += ["prompts.csv", "prompts.csv/x", "stage.yaml", "cascade", "cascade/cascade.json", "run", "images", "shards"]
DAMAGED = [f"damaged/{name}" for name in (
    "broken.yaml", "bomb.yaml", "deep.yaml", "deeper.yaml", "list.yaml", "self.yaml",
    "deep.json", "list-manifest", "null-manifest",
    "deep-manifest", "no-weights", "cut-weights", "no-config", "nul-metrics", "half-row", "other-version",
    "list-evaluation", "prompts.jsonl", "prompts.tsv", "list-samples", "cut.ckpt", "text.ckpt", "list.ckpt",
    "shard.tar",
)]  # fmt: skip
GRAMMAR = NUMBERS + TEXTS + PATHS + DAMAGED


def attempt(here, capsys, argv):
    """What is wrong with how a command ended, None where nothing is."""
    before = listing(here)
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # noqa: BLE001  (any is a fault)
        return f"{type(error).__name__}: {str(error)[:200]}"
    printed = capsys.readouterr()
    new = listing(here) - before
    remove(new)
    if code == 2:
        lines = printed.err.splitlines()
        if len(lines) != 1 or not lines[0].startswith("imagen-lightning: error: "):
            return f"not one line: {printed.err[-500:]!r}"
        if len(lines[0]) > 1600:
            return f"a line of {len(lines[0])} characters"
        if "too little memory" in lines[0]:
            return f"takes all memory: {lines[0]}"
        if any(path.suffix != ".index" for path in new):  # shards keep theirs next to them
            return f"left {sorted(map(str, new))[:3]} after {lines[0]!r}"
    elif code not in (0, 1, 130):
        return f"exit code {code}"
    elif "Traceback" in printed.err:
        return f"traceback: {printed.err[-500:]!r}"
    return None


CASES = [(command, name) for command in COMMANDS for name in arguments_of(command)]


def few(command, name):
    """Some values of the grammar, others for each argument; fewer where a command that accepts one takes a second."""
    count = 1 if command in ("plan", "evaluate", "finetune-report") else 2
    return random.Random(f"{command} {name}").sample(GRAMMAR, count)


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_values_end_with_one_line(command, here, capsys):
    faults = []
    for name in arguments_of(command):
        for value in few(command, name):
            problem = attempt(here, capsys, argv_of(command, **{name: value}))
            if problem is not None:
                faults.append(f"{name}={value[:60]!r}: {problem}")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), CASES)
def test_every_bad_value_of_every_option(command, name, here, capsys):
    generator = random.Random(f"{command} {name}")
    made = ["".join(generator.choices(string.printable, k=generator.randrange(1, 40))) for _ in range(10)]
    made += [str(generator.randrange(-(2**70), 2**70)) for _ in range(3)]
    faults = []
    for value in GRAMMAR + made:
        problem = attempt(here, capsys, argv_of(command, **{name: value}))
        if problem is not None:
            faults.append(f"{name}={value[:60]!r}: {problem}")
    assert not faults, "\n".join(faults)


YAMLS = [("plan", ""), ("verify-resume", "config"), ("finetune-report", "features")]
YAMLS += [("evaluate", "features"), ("shards doctor", "stage"), ("shards embed", "encoder")]


@pytest.mark.parametrize(("command", "name"), YAMLS)
@pytest.mark.parametrize(("file", "words"), [("bomb", "200,000"), ("deep", "50 levels"), ("self", "holds itself")])
def test_yaml_of_any_size_is_refused_with_the_number(command, name, file, words, here, capsys):
    start = time.process_time()
    capsys.readouterr()
    assert main(argv_of(command, **{name: f"damaged/{file}.yaml"})) == 2
    assert words in capsys.readouterr().err
    assert time.process_time() - start < 5  # of imports, the first time
