"""Seconds an image of ours and of diffusers' IFPipeline, with the same weights and steps, in one run.

    python benchmarks/sample.py [--dim 64] [--size 64] [--batch 2] [--steps 10] [--rounds 5] [--out FILE.json]

The network is DeepFloyd IF's base stage at a small width, random weights; DDPM with learned variance, dynamic
thresholding, guidance 7. Each program and precision is a process of its own that lives through the whole run; they take
turns, a sampling run each and the machine's matrix product right after. IFPipeline runs with its SDPA attention. bf16
is what each program offers: ours autocast (with channels-last weights), diffusers' weights in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from turns import answer, serve, take_turns, write

GUIDANCE = 7.0


def worker(name: str, precision: str, shape: dict[str, int]) -> None:
    """Answers each request with one timed sampling run."""
    import torch
    from peers import diffusers_unet, matmul_rate

    torch.manual_seed(0)
    unet = diffusers_unet(shape["dim"], shape["size"], shape["text_dim"]).eval()
    for parameter in unet.parameters():  # random biases and no zero layers, so that no work is spared
        torch.nn.init.normal_(parameter, std=0.02)
    states = torch.randn(2, shape["batch"], shape["tokens"], shape["text_dim"])
    run = {"ours": ours, "diffusers": pipeline}[name](unet, states, shape, precision)
    images = run()
    if images.shape[-1] != shape["size"] or not bool(images.isfinite().all()):
        raise SystemExit(f"{name} made no images")
    answer({"images": len(images)})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for _ in sys.stdin:  # one line a request
        time.sleep(0.3)  # until the threads of the one before have stopped waiting for more
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "matmul": matmul_rate(dtype, seconds=0.3)})


def ours(unet: Any, states: Any, shape: dict[str, int], precision: str) -> Any:
    import torch

    from imagen_lightning.diffusion import DiscreteSchedule, DynamicThresholding, Epsilon, LearnedRange
    from imagen_lightning.export.diffusers_unet import from_diffusers, unet_arguments
    from imagen_lightning.networks import UNet
    from imagen_lightning.samplers import DDPM, LeadingTimes
    from imagen_lightning.stages import BaseStage
    from imagen_lightning.stages.settings import Diffusion, Execution, Sampling, TextSettings
    from imagen_lightning.types import Text, TextEncoder

    class Stored(TextEncoder):
        """States made beforehand, as the pipeline is given them: the first for captions, the second for none."""

        max_tokens, name, dim = shape["tokens"], "stored", shape["text_dim"]

        def __call__(self, captions: Any, device: Any = "cpu") -> Text:
            chosen = states[1 if captions[0] == "" else 0][: len(captions)]
            return Text(chosen, None, chosen.mean(1))

    arguments = unet_arguments(unet.config)
    network = UNet(**arguments)
    network.load_state_dict(from_diffusers(unet.state_dict(), arguments))
    stage = BaseStage(
        shape["size"],
        network,
        TextSettings(Stored(), null_text="empty_caption"),
        Diffusion(DiscreteSchedule("squaredcos_cap_v2"), Epsilon(), variance=LearnedRange()),
        Sampling(DDPM("learned"), shape["steps"], GUIDANCE, DynamicThresholding(0.95, 1.5), LeadingTimes()),
        execution=Execution(channels_last=precision == "bf16"),
    ).to(states.device)

    def run() -> Any:
        generators = [torch.Generator().manual_seed(number) for number in range(shape["batch"])]
        with torch.autocast(states.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return stage.sample(["a"] * shape["batch"], generators)

    return run


def pipeline(unet: Any, states: Any, shape: dict[str, int], precision: str) -> Any:
    import torch
    from diffusers import DDPMScheduler, IFPipeline
    from diffusers.models.attention_processor import AttnAddedKVProcessor2_0

    unet.set_attn_processor(AttnAddedKVProcessor2_0())
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
        variance_type="learned_range",
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    made = IFPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=unet.to(dtype),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)

    def run() -> Any:
        return made(
            prompt_embeds=states[0].to(dtype),
            negative_prompt_embeds=states[1].to(dtype),
            num_inference_steps=shape["steps"],
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(number) for number in range(shape["batch"])],
            output_type="pt",
            height=shape["size"],
            width=shape["size"],
        ).images

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=64, help="channels of the first level (default 64)")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side (default 64)")
    parser.add_argument("--batch", type=int, default=2, help="images a run (default 2)")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps (default 10)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    shape = {name: getattr(arguments, name) for name in ("dim", "size", "batch", "steps")}
    shape |= {"tokens": 77, "text_dim": 512}
    kinds = [(name, precision) for precision in ("fp32", "bf16") for name in ("ours", "diffusers")]
    _, records = take_turns(__file__, kinds, shape, arguments.rounds)
    from peers import machine

    rows = []
    for (name, precision), measured in records.items():
        seconds = statistics.median(item["seconds"] for item in measured)
        rows.append(
            {
                "program": name,
                "precision": precision,
                "seconds_per_image": round(seconds / shape["batch"], 3),
                "seconds_per_step": round(seconds / shape["steps"], 3),
                "matmul_gflops": round(statistics.median(item["matmul"] for item in measured) / 1e9),
            }
        )
    write({"machine": machine(), "shape": shape, "rounds": arguments.rounds, "rows": rows}, arguments.out)


if __name__ == "__main__":
    if not serve(worker):
        main()
