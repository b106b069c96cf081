"""`imagen-lightning export CASCADE OUT --format diffusers`: a cascade for other libraries."""

from __future__ import annotations

from imagen_lightning.cli.arguments import Parser, folder


def parser() -> Parser:
    made = Parser(
        "export",
        description="Writes a cascade as pipelines that diffusers loads, one folder a stage, with model cards.",
    )
    made.add_argument("cascade", metavar="CASCADE", help="the cascade's folder")
    made.add_argument("out", type=folder, metavar="OUT", help="the folder to make; new or empty")
    made.add_argument("--format", required=True, choices=["diffusers"], help="IFPipeline and IFSuperResolutionPipeline")
    made.add_argument(
        "--text-encoder",
        choices=["copy", "reference"],
        help="write the text encoder into stage_1, or leave it out and name it in the model card (default: copy it "
        "from a local folder, name one of the hub)",
    )
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from imagen_lightning.export.export_cascade import export_cascade

    folders = export_cascade(arguments.cascade, arguments.out, arguments.text_encoder)
    print(f"Wrote {', '.join(map(str, folders))}; {arguments.out}/README.md says how to draw with them")
    return 0
