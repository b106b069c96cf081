"""One training step (forward, loss, backward, AdamW) of ours and of peers at matched widths, in one run.

    python benchmarks/train_step.py [--dim 64] [--size 64] [--batch 4] [--rounds 5] [--out FILE.json]

Each peer and precision is a process of its own that lives through the whole run; the processes take turns, an untimed
and a timed step each and the machine's matrix product right after, so that what slows the machine slows all of them.
Printed are medians: images/s, share of the matmul rate of the same precision (convolutions may exceed it), and the peak
memory above that of the imported libraries. bf16 is autocast over float32 weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from turns import answer, memory, serve, take_turns, write


def worker(name: str, precision: str, shape_arguments: dict[str, int]) -> None:
    """Answers each request with one timed step."""
    import torch
    from peers import PEERS, Shape, count_flops, inputs, matmul_rate

    torch.manual_seed(0)
    shape, dtype = Shape(**shape_arguments), torch.bfloat16 if precision == "bf16" else torch.float32
    images, states, mask = inputs(shape)
    matmul_rate(dtype, seconds=0.1)
    before = memory("VmHWM")
    peer = PEERS[name](shape)
    # Before the first step, in which imagen-pytorch takes its networks out of its modules.
    parameters = sum(parameter.numel() for parameter in peer.module.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(peer.module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = peer.loss(images, states, mask)
        loss.backward()
        optimizer.step()

    step()
    peak = memory("VmHWM") - before
    answer({"parameters": parameters, "flops": count_flops(step), "peak_bytes": peak})
    for _ in sys.stdin:  # one line a request
        time.sleep(0.3)  # until the threads of the one before have stopped waiting for more
        step()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        answer({"seconds": seconds, "matmul": matmul_rate(dtype, seconds=0.3), "peak_bytes": memory("VmHWM") - before})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=64, help="channels of the first level (default 64)")
    parser.add_argument("--size", type=int, default=64, help="pixels along a side (default 64)")
    parser.add_argument("--batch", type=int, default=4, help="images a step (default 4)")
    parser.add_argument("--tokens", type=int, default=32, help="text states a caption (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--peers", default="ours,diffusers,imagen-pytorch", help="comma-separated")
    parser.add_argument("--precisions", default="fp32,bf16", help="comma-separated")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    names = arguments.peers.split(",")
    if "imagen-pytorch" in names and importlib.util.find_spec("imagen_pytorch") is None:
        print("imagen-pytorch is not installed and is left out")
        names.remove("imagen-pytorch")
    shape = {name: getattr(arguments, name) for name in ("dim", "size", "batch", "tokens")}
    kinds = [(name, precision) for precision in arguments.precisions.split(",") for name in names]
    facts, figures = take_turns(__file__, kinds, shape, arguments.rounds)
    report(arguments, shape, facts, figures)


def report(arguments: argparse.Namespace, shape: dict[str, int], facts: Any, figures: Any) -> None:
    from peers import machine

    rows = []
    for (name, precision), measured in figures.items():
        fact = facts[name, precision]
        seconds = statistics.median(item["seconds"] for item in measured)
        shares = [fact["flops"] / item["seconds"] / item["matmul"] for item in measured]
        rows.append(
            {
                "peer": name,
                "precision": precision,
                "parameters_M": round(fact["parameters"] / 1e6, 1),
                "gflops_per_image": round(fact["flops"] / shape["batch"] / 1e9, 1),
                "seconds_per_step": round(seconds, 3),
                "images_per_second": round(shape["batch"] / seconds, 2),
                "matmul_share": round(statistics.median(shares), 3),
                "peak_MiB": round(max(item["peak_bytes"] for item in measured) / 2**20),
            }
        )
    write({"machine": machine(), "shape": shape, "rounds": arguments.rounds, "rows": rows}, arguments.out)


if __name__ == "__main__":
    if not serve(worker):
        main()
