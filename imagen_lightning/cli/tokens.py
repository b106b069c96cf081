"""`imagen-lightning tokens RUN OUT.tokens.safetensors`: the words that a run learned, in a file to share."""

from __future__ import annotations

from imagen_lightning.cli.arguments import Parser, file
from imagen_lightning.errors import InputError, counted


def parser() -> Parser:
    made = Parser("tokens", description="Writes the pseudo-words that textual inversion learned to a file.")
    made.add_argument(
        "source", metavar="RUN", help="a run folder (its last checkpoint), a .ckpt file, or CASCADE#stage"
    )
    made.add_argument("out", type=file, metavar="OUT.tokens.safetensors", help="the file to make")
    made.add_argument(
        "--word",
        metavar="WORD",
        action="append",
        default=[],
        help="write this word alone, e.g. '<zib>'; may be given several times (default: all that the stage knows)",
    )
    made.add_argument(
        "--licence", metavar="NAME", help="of the vectors, kept in the file (default: those of the stage's origin)"
    )
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from imagen_lightning.cascade.origin import licences
    from imagen_lightning.cascade.sources import stages_of
    from imagen_lightning.text.token_files import save_tokens

    stages = [stage for stage in stages_of(arguments.source, tuple(arguments.trust)) if stage.text.tokens is not None]
    if not stages:
        raise InputError(f"{arguments.source!r} knows no pseudo-word; give a run of textual inversion")
    if len(stages) > 1:
        raise InputError(f"{len(stages)} stages of {arguments.source!r} know pseudo-words; name one: CASCADE#stage")
    tokens, encoder = stages[0].text.tokens, stages[0].text.encoder
    assert tokens is not None
    assert encoder is not None
    licence = ", ".join(licences(stages[0].origin)) if arguments.licence is None else arguments.licence
    save_tokens(arguments.out, tokens, encoder, arguments.word, licence)
    for word in arguments.word or tokens.words:
        count = tokens.words[tokens.known(word)[0]]
        print(f"{word}: {counted(count, 'vector')} of {encoder.dim} features, for text encoder {encoder.name}")
    print(f"Wrote {arguments.out}; give it to a cascade with: imagen-lightning cascade … --tokens {arguments.out}")
    return 0
