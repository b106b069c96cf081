"""Training and sampling of ours and of the peers installed, on one GPU in bf16, eager and compiled, in under 8 minutes.

    python benchmarks/gpu.py [--out gpu.json] [--budget 480]

Each case is a process of its own: base stages at 64 px of about 100 and 400 million parameters, a super-resolution
stage 64 -> 256, and sampling. A JSON record a case: images/s, share of the measured bf16 matmul rate, peak memory.
What the budget leaves no time for, and what fails, stands in the file too. `--device cpu --small` tries the script out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# task, program, compiled; the first are those that matter most
CASES = [
    ("base_100M", "ours", True),
    ("base_100M", "diffusers", False),
    ("base_100M", "diffusers", True),
    ("base_100M", "ours", False),
    ("sr_256", "ours", True),
    ("sr_256", "diffusers", False),
    ("sr_256", "diffusers", True),
    ("sample_base_100M", "ours", False),
    ("sample_base_100M", "diffusers", False),
    ("base_400M", "ours", True),
    ("base_400M", "diffusers", True),
    ("base_400M", "diffusers", False),
    ("sr_256_efficient", "ours", True),
    ("base_100M", "imagen-pytorch", False),
]
SHAPES = {
    "base_100M": {"dim": 96, "size": 64, "batch": 64},
    "base_400M": {"dim": 192, "size": 64, "batch": 32},
    "sr_256": {"dim": 64, "size": 256, "batch": 8},
    "sr_256_efficient": {"dim": 128, "size": 256, "batch": 16},
    "sample_base_100M": {"dim": 96, "size": 64, "batch": 32},
}
SMALL = {"dim": 32, "size": 32, "batch": 2}
WARM_UP, STEPS, SAMPLING_STEPS = 5, 15, 10


def run_case(task: str, program: str, compiled: bool, device: str, small: bool) -> dict[str, Any]:
    import torch
    from peers import Shape, count_flops, inputs, matmul_rate

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    shape = Shape(**(SMALL if small else SHAPES[task]))
    if small:
        shape.text_dim = 64
    cuda = device.startswith("cuda")
    peer = make(task, program, compiled, shape, device)
    images, states, mask = inputs(shape, device)
    optimizer = torch.optim.AdamW(peer.module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            loss = peer.loss(images, states, mask)
        loss.backward()
        optimizer.step()

    def sample() -> None:
        peer.module(states)

    run = sample if task.startswith("sample") else step
    start = time.perf_counter()
    warm_up, counted = (1, 2) if small else (WARM_UP, STEPS)
    for _ in range(warm_up):
        run()
    if cuda:
        torch.cuda.synchronize()
    record = {"warm_up_seconds": round(time.perf_counter() - start, 1)}
    times = []
    for _ in range(counted if run is step else 3):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    rate = matmul_rate(torch.bfloat16, device)
    if not compiled:  # a compiled network's operations are hidden from the counter; its eager twin's are the same
        flops = count_flops(run)
        record |= {"gflops_per_image": round(flops / shape.batch / 1e9, 1)}
        record |= {"matmul_share": round(flops / seconds / rate, 3)}
    if cuda:
        record |= {"peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    parameters = sum(parameter.numel() for parameter in peer.module.parameters())
    return {
        **record,
        "parameters_M": round(parameters / 1e6, 1),
        "batch": shape.batch,
        "seconds": round(seconds, 4),
        "images_per_second": round(shape.batch / seconds, 2),
        "matmul_tflops": round(rate / 1e12, 2),
    }


def make(task: str, program: str, compiled: bool, shape: Any, device: str) -> Any:
    """The peer of a task; for sampling, its module draws a batch from text states."""
    import peers

    if task.startswith("sample"):
        return sampling(program, compiled, shape, device)
    settings: dict[str, Any] = {}
    if program != "imagen-pytorch":
        settings = {"compile": compiled, "channels_last": True}
    if task.startswith("sr_256"):
        settings["low_res"] = shape.size // 4
    if task == "sr_256_efficient":
        from imagen_lightning.networks import EfficientUNet

        heads = min(64, shape.dim)
        settings["network"] = EfficientUNet(
            shape.dim, (1, 2, 4, 8), [2, 4, 8, 8], text_dim=shape.text_dim, head_dim=heads
        )
    peer = peers.PEERS[program](shape, **settings)
    peer.module.to(device)
    return peer


def sampling(program: str, compiled: bool, shape: Any, device: str) -> Any:
    """Guided DDPM of a few steps in bf16, by `benchmarks/sample.py`'s programs."""
    import sample
    import torch
    from peers import Peer, diffusers_unet

    unet = diffusers_unet(shape.dim, shape.size, shape.text_dim).eval().to(device)
    settings = {"batch": shape.batch, "size": shape.size, "tokens": shape.tokens, "text_dim": shape.text_dim}
    settings["steps"] = 2 if device == "cpu" else SAMPLING_STEPS
    states = torch.randn(2, shape.batch, shape.tokens, shape.text_dim, device=device)
    draw = {"ours": sample.ours, "diffusers": sample.pipeline}[program](unet, states, settings, "bf16")

    class Draws(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = unet

        def forward(self, _: Any) -> Any:
            return draw()

    return Peer(Draws(), lambda *_: torch.zeros(()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file (default gpu.json)")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all cases (default 480)")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks, to try the script out")
    parser.add_argument("--only", default="", help="cases whose task contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        task, program, compiled = json.loads(arguments.case)
        print(json.dumps(run_case(task, program, compiled, arguments.device, arguments.small)))
        return
    import torch
    from peers import machine

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --small tries the script out")
    result: dict[str, Any] = {"machine": machine(), "device": arguments.device, "small": arguments.small, "cases": []}
    begin = time.monotonic()
    for task, program, compiled in CASES:
        if arguments.only not in task or (arguments.small and compiled):
            continue
        record: dict[str, Any] = {"task": task, "program": program, "compiled": compiled}
        left = arguments.budget - (time.monotonic() - begin)
        if program == "imagen-pytorch" and importlib.util.find_spec("imagen_pytorch") is None:
            record["left_out"] = "imagen-pytorch is not installed"
        elif left < 20:
            record["left_out"] = "no time left in the budget"
        else:
            record |= in_process(arguments, (task, program, compiled), left)
        result["cases"].append(record)
        print(json.dumps(record), flush=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def in_process(arguments: argparse.Namespace, case: tuple[str, str, bool], seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(case), "--device", arguments.device]
    command += ["--small"] if arguments.small else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"left_out": "no time left in the budget"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
