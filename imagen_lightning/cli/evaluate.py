"""`imagen-lightning evaluate CASCADE --data …`: which stage costs how much, or a sweep over sampling settings."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imagen_lightning.cli.arguments import (
    FRACTION,
    GUIDANCE,
    MAX_IMAGES,
    STEPS,
    Parser,
    folder,
    several,
    whole,
)
from imagen_lightning.errors import InputError, counted

AXES: dict[str, tuple[Callable[[str], Any], str]] = {
    "guidance": (GUIDANCE, "1,1.5,2"),
    "steps": (STEPS, "10,25"),
    "sampler": (str, "ddim,dpmpp"),
    "aug_level": (FRACTION, "0,0.1"),
}


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
        "--num",
        type=whole(2, MAX_IMAGES),
        metavar="N",
        help="samples, evenly spaced (default 200 of --data, all of --prompts)",
    )
    made.add_argument("--out", required=True, type=folder, metavar="DIR", help="new, or that of the same evaluation")
    made.add_argument(
        "--samples",
        type=folder,
        metavar="DIR",
        help="where images are kept, and found where an evaluation with the same settings drew them (default "
        "OUT/samples)",
    )
    for name, (kind, example) in AXES.items():
        made.add_argument(
            f"--{name.replace('_', '-')}",
            type=_values_of(kind),
            action="append",
            default=[],
            metavar=f"[STAGE=]{example}",
            help=f"{name.replace('_', ' ')} to try, for all stages that take it or for one "
            "by name; may be given once a stage",
        )
    made.add_sampling(batch_size=50)
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


def _values_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, list[Any]]]:
    """Return the type of an axis: the stage ("" for all) and its values."""

    def parse(text: str) -> tuple[str, list[Any]]:
        stage, _, values = text.rpartition("=")
        return stage, several(kind)(values)

    return parse


def axes_of(arguments: argparse.Namespace) -> dict[str, dict[str, Sequence[Any]]]:
    """Setting to stage ("" for all) to values."""
    found: dict[str, dict[str, Sequence[Any]]] = {}
    for name in AXES:
        for stage, values in getattr(arguments, name):
            by_stage = found.setdefault(name, {})
            if stage in by_stage:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is given twice for {stage or 'all stages'}; join the values")
            by_stage[stage] = values
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
