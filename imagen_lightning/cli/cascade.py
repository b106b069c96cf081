"""`imagen-lightning cascade STAGE … OUT`: trained stages, adapters and pseudo-words become a cascade folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imagen_lightning.cli.arguments import Parser, folder, real
from imagen_lightning.errors import InputError

if TYPE_CHECKING:
    from imagen_lightning.cascade import Cascade
    from imagen_lightning.stages import DiffusionMixin

GB = 10**9


def parser() -> Parser:
    made = Parser("cascade", description="Joins trained stages into a cascade folder.")
    made.add_argument(
        "stages",
        nargs="+",
        metavar="STAGE",
        help="in order, base first: .ckpt files, run folders (their last checkpoint), stages of other cascades "
        "(CASCADE#base), or whole cascade folders; adapters that a run trained are merged",
    )
    made.add_argument("out", type=folder, metavar="OUT", help="the folder to make; new or empty")
    made.add_argument(
        "--adapter",
        metavar="[STAGE=]FILE[@WEIGHT]",
        action="append",
        default=[],
        help="add an adapter (a file, or its folder) times a weight, default 1, to the stage of that name or number, "
        "else to the one that it is for; may be given several times",
    )
    made.add_argument(
        "--tokens",
        metavar="FILE",
        action="append",
        default=[],
        help="give the pseudo-words of NAME.tokens.safetensors to the stages; may be given several times",
    )
    made.add_argument(
        "--max-shard-size",
        type=real(1 / GB, 10**6),
        default=5.0,
        metavar="GB",
        help="of a file of weights (default %(default)g)",
    )
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from imagen_lightning.cascade import Cascade

    cascade = Cascade.from_checkpoints(arguments.stages, trust=arguments.trust)
    _add_adapters(cascade, arguments.adapter)
    _add_tokens(cascade, arguments.tokens)
    cascade.save(arguments.out, max_shard_size=int(arguments.max_shard_size * GB))
    print(cascade.describe())
    print(f"Wrote {arguments.out}; sample it with: imagen-lightning sample {arguments.out} --prompt … --out …")
    return 0


# ---- adapters


def _add_adapters(cascade: Cascade, given: Sequence[str]) -> None:
    """Adds adapters to the weights of the stages that they are for."""
    if not given:
        return
    from imagen_lightning.cascade.origin import enlarged, file_facts
    from imagen_lightning.finetuning import adapters

    parts: dict[int, list[tuple[str, float]]] = {}
    for text in given:
        name, file, weight = _parts(text, cascade.names)
        number = _stage_for(cascade, file) if name is None else _number(cascade.names, name)
        parts.setdefault(number, []).append((file, weight))
    for number, files in parts.items():
        stage = cascade.stages[number]
        bases = [adapters.load(file, stage).base or {} for file, _ in files]
        adapters.apply(stage, files)  # all of a stage's at once: each is for the weights without the others
        for (file, weight), base in zip(files, bases):
            facts = {"adapter": file_facts(file), "weight": weight, "origin": base.get("origin")}
            stage.origin = enlarged(stage.origin, facts)


def _parts(text: str, names: Sequence[str]) -> tuple[str | None, str, float]:
    """Return (stage or None, file, weight) of `[STAGE=]FILE[@WEIGHT]`; a file may have either sign in its name."""
    before, at, after = text.rpartition("@")
    for part, weight in ((text, "1"), (before, after))[: 2 if at else 1]:  # a file of the very name comes first
        stage, equals, rest = part.partition("=")
        for name, file in ((None, part), (stage, rest))[: 2 if equals else 1]:
            if Path(file).expanduser().exists():
                if name is not None:
                    _number(names, name)
                return name, file, _weight(text, weight)
    if equals:
        _number(names, stage)
    raise InputError(f"--adapter {text!r}: {rest if equals else part!r} does not exist; give a file or a folder")


def _weight(text: str, weight: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--adapter {text!r}: weight {weight!r} is not a finite number; write FILE@0.5")
    return value


def _number(names: Sequence[str], stage: str) -> int:
    from imagen_lightning.cascade.sampling import find_stage

    return find_stage(names, stage)


def _stage_for(cascade: Cascade, file: str) -> int:
    """The number of the one stage that an adapter fits."""
    refused = [_refusal(file, stage) for stage in cascade.stages]
    fitting = [number for number, refusal in enumerate(refused) if refusal is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        fit = [cascade.names[number] for number in fitting]
        raise InputError(f"--adapter {file}: it fits stages {', '.join(fit)}; name one: {fit[0]}={file}")
    reasons = dict.fromkeys(str(error) for error in refused)
    raise InputError(f"--adapter {file} fits no stage: {'; '.join(reasons)}")


def _refusal(file: str, stage: DiffusionMixin) -> InputError | None:
    """Why a stage is not the base of an adapter, None where it is."""
    from imagen_lightning.finetuning import adapters

    try:
        adapters.load(file, stage)
    except InputError as error:
        return error
    return None


# ---- pseudo-words


def _add_tokens(cascade: Cascade, files: Sequence[str]) -> None:
    """Gives pseudo-words from files to every stage of their text encoder."""
    if not files:
        return
    from imagen_lightning.cascade.origin import enlarged, file_facts
    from imagen_lightning.text.token_files import add_tokens, read_tokens

    for file in files:
        before = [stage.tokens for stage in cascade.stages]
        words = add_tokens(cascade.stages, file)
        facts = {"tokens": file_facts(file), "words": words, "licence": read_tokens(file).licence or None}
        for stage, known in zip(cascade.stages, before):
            if stage.tokens is not known:
                stage.origin = enlarged(stage.origin, facts)
