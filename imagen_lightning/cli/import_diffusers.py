"""`imagen-lightning import-diffusers STAGE_I [STAGE_II …] OUT`: DeepFloyd IF's pipelines become a cascade folder."""

from __future__ import annotations

from imagen_lightning.cli.arguments import Parser, folder, whole


def parser() -> Parser:
    made = Parser("import-diffusers", description="Makes a cascade folder of DeepFloyd IF's pipelines.")
    made.add_argument(
        "pipelines",
        nargs="+",
        metavar="PIPELINE",
        help="stage I and stages II in order, or either alone: folders that diffusers saved, or names on the hub",
    )
    made.add_argument("out", type=folder, metavar="OUT", help="the folder to make; new or empty")
    made.add_argument(
        "--dtype", metavar="TYPE", help="cast weights to float32, bfloat16 or float16 (default: as stored)"
    )
    made.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="folder or hub name of the T5 and its tokenizer, or a pipeline's folder (default: the pipelines' own)",
    )
    made.add_argument(
        "--text-dtype",
        metavar="TYPE",
        default="float32",
        help="float32, bfloat16 or float16, of the T5 (default float32)",
    )
    made.add_argument("--variant", metavar="NAME", help="of the weights' files, e.g. fp16")
    made.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of names on the hub")
    made.add_argument(
        "--low-res-size",
        metavar="PX",
        type=whole(1, 2**14),
        help="side of the images that stage II takes where it comes first (default: a quarter of its own)",
    )
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from imagen_lightning.cascade.origin import licences
    from imagen_lightning.export.import_pipelines import import_pipelines

    cascade = import_pipelines(
        arguments.pipelines,
        arguments.text_encoder,
        arguments.dtype,
        arguments.text_dtype,
        arguments.variant,
        arguments.revision,
        arguments.low_res_size,
    )
    cascade.save(arguments.out)
    print(cascade.describe())
    for stage in cascade.stages:
        found = ", ".join(licences(stage.origin)) or "licence not found: ask whoever published the weights"
        print(f"{stage.origin['source'] if stage.origin else 'weights'}: {found}")
    print(f"Wrote {arguments.out}; sample it with: imagen-lightning sample {arguments.out} --prompt … --out …")
    return 0
