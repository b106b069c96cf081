"""Memory in which a large stage is loaded and saved, beside what its weights need.

    python benchmarks/cascade_memory.py [--dim 320] [--folder DIR] [--out FILE.json]

A base stage with Imagen's U-Net is written to a cascade folder and loaded again, each in a process of its own. Measured
is the process's largest resident memory (VmHWM, which counts mapped file pages too) above what was resident when the
imports were done and, for saving, the stage was there. Beyond the weights: that less the weights' size in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import memory

MIB = 2**20
OPERATIONS = ("save", "load", "load in bfloat16")


def operate(operation: str, dim: int, folder: str) -> dict[str, Any]:
    """One operation in this process, and what it took."""
    import torch

    from imagen_lightning.cascade import Cascade
    from imagen_lightning.cascade.description import build_stage
    from imagen_lightning.cascade.weights import put_tensors
    from imagen_lightning.components import class_path
    from imagen_lightning.networks import UNet
    from imagen_lightning.stages import BaseStage

    description = {"class_path": class_path(UNet), "init_args": {"dim": dim}}
    cascade: Any = None
    if operation == "save":
        arguments = {"image_size": 64, "network": description}
        stage: Any = build_stage({"class_path": class_path(BaseStage), "init_args": arguments}, (), "it")
        generator = torch.Generator().manual_seed(0)
        put_tensors(
            stage,
            {key: torch.rand(value.shape, generator=generator) - 0.5 for key, value in stage.state_dict().items()},
        )
        cascade = Cascade([stage])
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident memory is counted from here on
    before, start = memory("VmRSS"), time.perf_counter()
    if operation == "save":
        cascade.save(folder)
    else:
        cascade = Cascade.load(folder, dtype="bfloat16" if "bfloat16" in operation else None)
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
    weights = list(cascade.stages[0].state_dict().values())
    size = sum(value.numel() * value.dtype.itemsize for value in weights)
    return {
        "operation": operation,
        "parameters": sum(value.numel() for value in weights),
        "weights_bytes": size,
        "largest_tensor_bytes": max(value.numel() * 4 for value in weights),
        "peak_bytes": peak,
        "beyond_bytes": peak - (0 if operation == "save" else size),
        "seconds": seconds,
        "sum": float(sum(value.double().sum() for value in weights[:50])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=320, help="of the U-Net's first level, by 64 (default 320)")
    parser.add_argument("--folder", help="where the cascade is written (default: a temporary folder)")
    parser.add_argument("--out", help="write the figures to this file too")
    parser.add_argument("--operation", choices=OPERATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.operation:
        print(json.dumps(operate(arguments.operation, arguments.dim, arguments.folder)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for operation in OPERATIONS:
            command = [sys.executable, __file__, "--dim", str(arguments.dim), "--folder", f"{folder}/cascade"]
            done = subprocess.run([*command, "--operation", operation], stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{rows[0]['parameters'] / 1e6:.0f}M parameters\n")
    print(
        "| | weights in memory, MiB | largest tensor in float32, MiB | peak, MiB | beyond the weights, MiB | seconds |"
    )
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        sizes = [row[name] / MIB for name in ("weights_bytes", "largest_tensor_bytes", "peak_bytes", "beyond_bytes")]
        print(f"| {row['operation']} | {' | '.join(f'{size:.0f}' for size in sizes)} |")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
