"""`imagen-lightning cascade BASE.ckpt SR.ckpt … OUT`: trained stages become a cascade folder."""

from __future__ import annotations

from imagen_lightning.cli.arguments import Parser


def parser() -> Parser:
    made = Parser("cascade", description="Joins the checkpoints of trained stages into a cascade folder.")
    made.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="the stages in order, base first: .ckpt files, or run folders (their last checkpoint)",
    )
    made.add_argument("out", metavar="OUT", help="the folder to make; new or empty")
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from imagen_lightning.cascade import Cascade

    cascade = Cascade.from_checkpoints(arguments.checkpoints, trust=arguments.trust)
    cascade.save(arguments.out)
    print(cascade.describe())
    print(f"Wrote {arguments.out}; sample it with: imagen-lightning sample {arguments.out} --prompt … --out …")
    return 0
