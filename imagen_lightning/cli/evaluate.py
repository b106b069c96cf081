"""`imagen-lightning evaluate CASCADE --data …`: which stage costs how much, or a sweep over sampling settings."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagen_lightning.cli.arguments import Parser
from imagen_lightning.errors import InputError, counted

AXES = {"guidance": float, "steps": int, "sampler": str, "aug_level": float}


def parser() -> Parser:
    made = Parser(
        "evaluate",
        description="Measures every stage of a cascade on real and on generated input and names the one that costs the "
        "most; with several values of a setting, measures the whole cascade at each combination instead.",
    )
    made.add_argument("cascade", metavar="CASCADE", help="a cascade folder")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", metavar="SHARDS|shapes", help="shards (path, folder, glob, braces), shapes, or shapes:SUBJECT"
    )
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts without images, measured by category: PartiPrompts' .tsv, DrawBench's .csv, GenEval's .jsonl, or "
        "one a line",
    )
    made.add_argument(
        "--num", type=int, metavar="N", help="samples, evenly spaced (default 200 of --data, all of --prompts)"
    )
    made.add_argument("--out", required=True, type=Path, metavar="DIR", help="new, or that of the same evaluation")
    made.add_argument(
        "--samples",
        type=Path,
        metavar="DIR",
        help="where images are kept, and found where an evaluation with the same settings drew them (default "
        "OUT/samples)",
    )
    for name, example in (
        ("guidance", "1,1.5,2"),
        ("steps", "10,25"),
        ("sampler", "ddim,dpmpp"),
        ("aug-level", "0,0.1"),
    ):
        made.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar=f"[STAGE=]{example}",
            help=f"{name} to try, for all stages that take it or for one by name; may be given once a stage",
        )
    made.add_argument("--seed", type=int, default=0, help="of the sampling noise and the shapes (default 0)")
    made.add_argument("--batch-size", type=int, default=50, metavar="N", help="images at a time (default %(default)s)")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: cuda where there is one)")
    made.add_argument("--precision", choices=["32", "bf16"], default="32", help="of the networks (default 32)")
    made.add_argument("--caption-field", metavar="NAME", help="the json field of the shards' captions")
    made.add_argument(
        "--inception",
        metavar="FILE|download",
        help="weights of torch-fidelity's Inception for FID and KID: a local file, or fetched by name "
        "(default: distances from fixed random features, named FD-random and never FID)",
    )
    made.add_argument("--clip", metavar="NAME_OR_PATH", help="a CLIP model for the CLIP score, of the hub or a folder")
    made.add_argument(
        "--lpips",
        metavar="FILE|download",
        help="torchvision's AlexNet weights for LPIPS of super-resolution stages on real input: a file, or fetched",
    )
    made.add_argument(
        "--features", action="append", default=[], metavar="YAML", help="class_path and init_args of another extractor"
    )
    made.add_argument(
        "--save-best",
        metavar="METRIC",
        help="write the best operating point by this metric, with its evidence, into the cascade's manifest",
    )
    made.add_trust()
    return made


def axes_of(arguments: argparse.Namespace) -> dict[str, dict[str, Sequence[Any]]]:
    """Setting to stage ("" for all) to values."""
    found: dict[str, dict[str, Sequence[Any]]] = {}
    for name, kind in AXES.items():
        for text in getattr(arguments, name):
            stage, _, values = text.rpartition("=")
            option = f"--{name.replace('_', '-')}"
            by_stage = found.setdefault(name, {})
            if stage in by_stage:
                raise InputError(f"{option} is given twice for {stage or 'all stages'}; join the values")
            try:
                by_stage[stage] = [kind(part.strip()) for part in values.split(",")]
            except ValueError:
                raise InputError(
                    f"{option} {text!r}: give {kind.__name__} values with commas between them, after "
                    "STAGE= for one stage"
                ) from None
    return found


def agent_folder(out: Path) -> Path:
    """OUT, or OUT/SWEEP/RUN where W&B's agent started this process: each trial then has its own."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return out / sweep / run if sweep and run else out


def log_to_agent(out: Path) -> None:
    """Sends the whole cascade's numbers to the run that W&B's agent started."""
    import wandb

    from imagen_lightning.sweeps.metric import evaluation_values

    with wandb.init() as run:
        run.log(evaluation_values(out))


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    axes = axes_of(arguments)
    if arguments.num is not None and arguments.num < 2:
        raise InputError(f"--num {arguments.num} must be at least 2")
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size} must be at least 1")

    from imagen_lightning.evaluation.run import Request, evaluate

    out = agent_folder(arguments.out)
    request = Request(
        cascade=arguments.cascade,
        data=arguments.data,
        prompts=arguments.prompts,
        num=arguments.num,
        axes=axes,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
        caption_field=arguments.caption_field,
        inception=arguments.inception,
        clip=arguments.clip,
        lpips=arguments.lpips,
        features=tuple(arguments.features),
        save_best=arguments.save_best,
        trust=tuple(arguments.trust),
        samples=arguments.samples,
        command=f"imagen-lightning evaluate {shlex.join(argv)}",
    )
    try:
        evaluation = evaluate(request, out)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on", file=sys.stderr)
        raise
    if evaluation is not None:  # the first process tells
        print(evaluation.table)
        print(evaluation.result.verdict)
        if evaluation.best is not None:
            print(evaluation.best)
        if out != arguments.out:
            log_to_agent(out)
        print(
            f"Wrote {counted(len(evaluation.result.rows), 'row')} to {out / 'evaluation.json'}",
            file=sys.stderr,
        )
    return 0
