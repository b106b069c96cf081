"""`imagen-lightning finetune-report BEFORE AFTER --data HELDOUT --out PAGE.html`: what a fine-tuning changed."""

from __future__ import annotations

import shlex
import sys

from imagen_lightning.cli.arguments import MAX_IMAGES, Parser, file, folder, whole
from imagen_lightning.errors import InputError


def parser() -> Parser:
    made = Parser(
        "finetune-report",
        description="Draws the same captions from the same noise with a cascade before and after fine-tuning, and "
        "writes one page: what it learned, what it forgot, whether it copies its training images, and what it took.",
    )
    made.add_argument("before", metavar="BEFORE", help="the cascade folder before fine-tuning")
    made.add_argument("after", metavar="AFTER", help="the one after it, of the same stages and sizes")
    made.add_argument(
        "--data", required=True, metavar="HELDOUT", help="held-out data of the new domain, as `evaluate` takes it"
    )
    made.add_argument(
        "--train", metavar="DATA", help="the training images, to look for copies: shards, or shapes:SUBJECT"
    )
    old = made.add_mutually_exclusive_group()
    old.add_argument("--before-data", metavar="OLD", help="data of what BEFORE could do, e.g. shapes")
    old.add_argument("--before-prompts", metavar="FILE", help="the same as captions alone, as `evaluate` takes them")
    made.add_argument("--prompts", metavar="FILE", help="further captions, to look at")
    made.add_argument(
        "--out", required=True, type=file, metavar="PAGE.html",
        help="the page; beside it PAGE.json, and the folder PAGE with all images and numbers",
    )  # fmt: skip
    made.add_argument(
        "--samples", type=folder, metavar="DIR", help="where drawn images are kept (default PAGE/samples)"
    )
    two_or_more = whole(2, MAX_IMAGES)
    made.add_argument(
        "--num", type=two_or_more, default=200, metavar="N", help="samples of --data (default %(default)s)"
    )
    made.add_argument(
        "--num-before", type=two_or_more, metavar="N", help="of --before-data or --before-prompts (default --num)"
    )
    made.add_argument(
        "--num-train",
        type=whole(2, 100 * MAX_IMAGES),
        metavar="N",
        help="training images to look among (default: 20,000 of shards, evenly spaced; 50 of shapes:SUBJECT)",
    )
    made.add_sampling("guidance", "steps", batch_size=50, each=" of both (default: each one's own)")
    made.add_argument("--caption-field", metavar="NAME", help="the json field of captions in --data and --train")
    made.add_argument("--before-caption-field", metavar="NAME", help="the same in --before-data")
    made.add_argument(
        "--inception", metavar="FILE|download", help="Inception's weights for FID and KID (default: random features)"
    )
    made.add_argument("--clip", metavar="NAME_OR_PATH", help="a CLIP model for the CLIP score, of the hub or a folder")
    made.add_argument(
        "--features", action="append", default=[], metavar="YAML", help="class_path and init_args of another extractor"
    )
    made.add_argument(
        "--run", action="append", default=[], metavar="RUN", help="a run folder of the fine-tuning, for what it took"
    )
    made.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE",
        help="a file that was trained, for its size",
    )
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {str(arguments.out)!r} is the page and must end in .html")
    from imagen_lightning.cascade.cascade import check_device
    from imagen_lightning.finetuning.evidence import EvidenceRequest, gather, with_runs
    from imagen_lightning.finetuning.evidence_schema import save
    from imagen_lightning.report.finetuning import build
    from imagen_lightning.report.finetuning_runs import adapter_files, run_cost
    from imagen_lightning.report.page import refuse_other
    from imagen_lightning.report.runs import Problems

    refuse_other(arguments.out)
    if arguments.device is not None:
        check_device(arguments.device)
    problems = Problems()
    runs = [run_cost(folder, problems) for folder in arguments.run] + adapter_files(arguments.adapter)
    own = ("out", "run", "adapter", "features", "trust")
    given = {name: value for name, value in vars(arguments).items() if name not in own}
    request = EvidenceRequest(
        **given,
        features=tuple(arguments.features),
        trust=tuple(arguments.trust),
        command=f"imagen-lightning finetune-report {shlex.join(argv)}",
    )
    folder = arguments.out.with_suffix("")
    try:
        evidence = gather(request, folder)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on", file=sys.stderr)
        raise
    if evidence is None:  # the first process tells
        return 0
    evidence = with_runs(evidence, runs)
    save(evidence, arguments.out.with_suffix(".json"))
    size = build(evidence, folder, problems).write(arguments.out)
    for line in problems.lines:
        print(f"imagen-lightning: warning: {line}", file=sys.stderr)
    print(evidence.verdict)
    for part in (evidence.new, evidence.old):
        if part is not None:
            print(f"{part.name}: {part.sentence}")
    if evidence.copying is not None:
        print(f"copying: {evidence.copying['sentence']}.")
    print(f"Wrote {arguments.out} ({size / 2**20:.1f} MiB); open it in a browser")
    return 0
