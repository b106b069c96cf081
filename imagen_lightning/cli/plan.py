"""`imagen-lightning plan`: what training a stage takes, and which settings make it fit."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from imagen_lightning.cli.arguments import Parser, new_file, shown, whole
from imagen_lightning.errors import InputError

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def parser() -> Parser:
    made = Parser(
        "plan",
        usage="imagen-lightning plan STAGE.yaml [OVERLAY.yaml …] [--key value …] [options]",
        description="Counts what a stage's training takes, in seconds and without taking it; arguments are those of "
        "fit.",
    )
    made.add_argument("--memory", type=_memory, metavar="24GB", help="a GPU's; says which settings make it fit")
    made.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="whose kernels keep which tensors; default: cuda, any GPU, which need not be there",
    )
    made.add_argument(
        "--tokens", type=whole(1, 100_000), help="of the longest caption in a batch; default: the encoder's most"
    )
    made.add_argument("--measure", action="store_true", help="also run two real steps here, and measure the second")
    made.add_argument("--json", type=new_file, metavar="FILE", help="write the plan there, in bytes and FLOPs")
    return made


def _memory(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|MiB|GiB)", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not an amount of memory; write e.g. 24GB (of 10^9 bytes) or 24GiB"
        )
    amount = float(found[1]) * _UNITS[found[2]]
    if amount > 10**18:
        raise argparse.ArgumentTypeError(f"{shown(text)} is more memory than any GPU has")
    return round(amount)


def main(arguments: Sequence[str]) -> int:
    options, rest = parser().parse_known_args(list(arguments))
    while rest and not rest[0].startswith("-"):  # plan STAGE.yaml OVERLAY.yaml
        first = next((i for i, item in enumerate(rest) if item.startswith("-")), len(rest))
        rest = [item for path in rest[:first] for item in (f"--config={path}",)] + rest[first:]
    if not any(item.split("=")[0] in ("--config", "-c") for item in rest):
        raise InputError("which stage? give its YAML: imagen-lightning plan experiments/quickstart/base.yaml")

    from imagen_lightning.cli.plan_config import read_training, weights_of
    from imagen_lightning.planning import make_plan, show_plan
    from imagen_lightning.planning.advice import FIXED
    from imagen_lightning.planning.show import show_bytes

    if options.memory is not None and options.memory <= FIXED:
        raise InputError(
            f"--memory {show_bytes(options.memory)} is no more than the {show_bytes(FIXED)} that a GPU's context and "
            "libraries take; give the whole memory of the GPU"
        )
    training, config = read_training(rest, options.device, options.tokens)
    measured = None
    if options.measure:
        import torch

        from imagen_lightning.planning.measure import measure_peak

        there: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
        training, _ = read_training(rest, there, options.tokens)
        measured = measure_peak(weights_of(rest, training), torch.device(there))
    plan = make_plan(training)
    print(show_plan(plan, measured))
    found: dict[str, Any] = {"plan": plan.as_dict(), "measured_peak": measured}
    if options.memory is not None:
        found |= _advise(training, config, plan, options.memory)
    if options.json:
        from imagen_lightning.files import write_text

        write_text(options.json, json.dumps(found, indent=2) + "\n")
    return 0


def _advise(training: Any, config: Any, plan: Any, memory: int) -> dict[str, Any]:
    from imagen_lightning.cli.plan_config import levers
    from imagen_lightning.planning import cheapest, fits
    from imagen_lightning.planning.advice import room
    from imagen_lightning.planning.show import show_bytes

    print(f"\n{show_bytes(memory)}, of which an estimate may take {show_bytes(room(memory))}")
    if fits(plan.peak, memory):
        print("  fits as it is")
        return {"fits": True, "memory": memory, "overrides": []}
    advice = cheapest(training, memory, levers(training, config), config.batch_overrides)
    if advice is None:
        print("  does not fit, nor with any of these settings; use a smaller network, or several GPUs with sharding")
        return {"fits": False, "memory": memory, "overrides": None}
    print(f"  does not fit as it is; it does, with a peak of {show_bytes(advice.plan.peak)}, with")
    for override in advice.overrides:
        print(f"    {override}")
    if not advice.plan.encoder_memory and plan.encoder_memory and config.needs_stored_text:
        print("  FOLDER: `imagen-lightning shards embed` stores the captions' states there")
    return {
        "fits": False,
        "memory": memory,
        "overrides": list(advice.overrides),
        "plan_with_overrides": advice.plan.as_dict(),
    }
