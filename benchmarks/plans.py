"""What training each shipped stage takes, and DeepFloyd IF's shapes, as `imagen-lightning plan` counts it: a table.

    python benchmarks/plans.py

Nothing is downloaded and no weights are made. One row a stage: parameters, what a GPU holds (estimated), FLOPs a step.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from imagen_lightning.cascade.description import without_weights
from imagen_lightning.cli.plan_config import read_training
from imagen_lightning.diffusion import DiscreteSchedule, Epsilon, LearnedRange
from imagen_lightning.networks import LoRA, UNet
from imagen_lightning.planning import Plan, Training, find_precision, make_plan
from imagen_lightning.planning.show import show_bytes, show_count
from imagen_lightning.stages import BaseStage, Diffusion, Optimization, SuperResolutionStage, TextSettings
from imagen_lightning.text import T5TextEncoder

SHIPPED = {  # arguments of the command
    "quickstart, base": ["quickstart/base.yaml"],
    "quickstart, super-resolution": ["quickstart/sr.yaml"],
    "emoji, base": ["domain/emoji/base_64.yaml"],
    "emoji, super-resolution": ["domain/emoji/sr_256.yaml"],
    "paper, base": ["paper/base_64.yaml", "--data.init_args.batch_size=8"],
    "paper, 64 to 256": ["paper/sr_256.yaml", "--data.init_args.batch_size=8"],
    "paper, 256 to 1024": ["paper/sr_1024.yaml", "--data.init_args.batch_size=8"],
}
_IF: dict[str, Any] = {
    "text_dim": 4096,
    "head_dim": 64,
    "out_channels": 6,
    "activation": "gelu",
    "text_norm": "group",
    "text_pooling": "attention",
    "pooling_heads": 64,
    "recompute": True,
}
IF_I_XL = {
    **_IF,
    "dim": 704,
    "multipliers": [1, 2, 3, 4],
    "num_blocks": 3,
    "attention": [False, True, True, True],
    "text_projection": 2816,
}
IF_II_L = {
    **_IF,
    "dim": 160,
    "multipliers": [1, 2, 4, 6, 8],
    "num_blocks": [2, 2, 3, 5, 5],
    "attention": [False, False, False, True, True],
    "low_res": True,
    "time_dim": 1280,
    "embedding_activations": ["gelu"],
    "text_projection": 1280,
    "mid_scale": 1.4142271,
    "out_scale": 1.4142271,
}


def if_training(arguments: dict[str, Any], adapted: bool, batch_size: int) -> Training:
    """IF's stage as an import makes it, its captions encoded once; with LoRA beside weights in bfloat16, or whole."""
    text = TextSettings(
        T5TextEncoder("DeepFloyd/IF-I-XL-v1.0", max_tokens=77, dtype="bfloat16", padding="attended"),
        null_text="empty_caption",
    )
    diffusion = Diffusion(DiscreteSchedule("squaredcos_cap_v2"), Epsilon(), variance=LearnedRange())
    optimization = Optimization(functools.partial(torch.optim.AdamW, lr=1e-4))
    with without_weights():
        network = UNet(**arguments)
        if adapted:
            network.to(torch.bfloat16)
        given = {"text": text, "diffusion": diffusion, "optimization": optimization}
        if adapted:
            given["adapter"] = LoRA(rank=16)
        stage = SuperResolutionStage(256, 64, network, **given) if arguments.get("low_res") else None
        stage = stage or BaseStage(64, network, **given)
    return Training(stage, find_precision("bf16-mixed"), batch_size, num_tokens=77, encoder_on_device=False)


def trainings() -> Iterator[tuple[str, Training]]:
    for name, arguments in SHIPPED.items():
        yield name, read_training([f"--config={arguments[0]}", *arguments[1:]], "cuda", None)[0]
    for name, network, batch_size in (("IF-I-XL", IF_I_XL, 4), ("IF-II-L", IF_II_L, 4)):
        for adapted in (True, False):
            yield f"{name}, {'LoRA' if adapted else 'all weights'}", if_training(network, adapted, batch_size)


def row(name: str, plan: Plan, seconds: float) -> str:
    cells = [
        name,
        show_count(plan.total),
        show_count(plan.trained),
        str(plan.settings["batch_size"]),
        *(show_bytes(value) for value in (plan.weights, plan.average, plan.step.gradients, plan.optimizer.state)),
        *(show_bytes(value) for value in (plan.step.copies, plan.step.activations, plan.encoder_memory, plan.peak)),
        f"{show_count(plan.flops)}FLOP",
        f"{seconds:.1f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    heads = ["stage", "parameters", "trained", "images", "weights", "average", "gradients", "optimizer", "copies"]
    heads += ["activations", "text encoder", "peak", "a step", "planned in"]
    print("| " + " | ".join(heads) + " |")
    print("|" + " --- |" * len(heads))
    wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        here = Path.cwd()
        os.chdir(folder)
        for name, training in trainings():
            if wanted and not any(word in name for word in wanted):
                continue
            start = time.perf_counter()
            plan = make_plan(training)
            print(row(name, plan, time.perf_counter() - start), flush=True)
        os.chdir(here)


if __name__ == "__main__":
    main()
