"""`imagen-lightning adapter RUN OUT`: the low-rank adapter that a run trained, apart from the weights it adapts."""

from __future__ import annotations

from imagen_lightning.cli.arguments import Parser, folder


def parser() -> Parser:
    made = Parser(
        "adapter",
        description="Writes the adapter (LoRA) of a fine-tuning run to files of its own: its averaged weights, and "
        "which base they are for. `imagen-lightning cascade CASCADE --adapter FILE OUT` puts it on that base.",
    )
    made.add_argument("run", metavar="RUN", help="a run folder (its last checkpoint), or a .ckpt file")
    made.add_argument("out", type=folder, metavar="OUT", help="the folder to make; new or empty")
    made.add_argument(
        "--format",
        choices=("peft", "diffusers"),
        default="peft",
        help="peft, for any network, or diffusers, which reads those of DeepFloyd IF's U-Nets (%(default)s)",
    )
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from imagen_lightning.finetuning import adapters

    adapter = adapters.of_run(arguments.run, arguments.trust)
    adapters.save(adapter, arguments.out, arguments.format)
    size = sum(each.a.numel() + each.b.numel() for each in adapter.layers.values())
    base = adapter.base or {}
    print(
        f"Wrote {arguments.out}: {size} parameters in {len(adapter.layers)} layers, for a stage {base['stage']!r} with "
        f"weights {base['weights']}"
    )
    return 0
