"""Show that a refactoring keeps training bit-exact: train the quickstart's first steps and print the weights' SHA-256.

    python benchmarks/same_weights.py            # compares with the hashes below
    python benchmarks/same_weights.py --steps 110

One thread, float32. The hashes hold for one kind of CPU and one torch; on another machine run the script on the commit
before the change and on the one after.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

STAGES = ("base", "sr")
STEPS = 200
# Both averaged and raw weights. 2026-11-29, AMD EPYC (Zen 5), torch 2.13.0+cpu, one thread.
KNOWN = {
    "base": "da148c093f8f78a9035df4468067a5d78f58c7803bd8ac8954964ce5eee34703",
    "sr": "c85e4913e149e1cbd712bf0668d4130927382bdb3552ab76617638b96189a1a3",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    changed = False
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES:
            found = digest(train(stage, steps, Path(folder, stage)))
            known = KNOWN.get(stage) if steps == STEPS else None
            verdict = "" if known is None else "  unchanged" if found == known else f"  CHANGED from {known}"
            changed |= known is not None and found != known
            print(f"{stage}: {found}{verdict}", flush=True)
    return int(changed)


def train(stage: str, steps: int, run: Path) -> Path:
    """Train a stage of the quickstart for some steps; return its last checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "imagen_lightning", "fit", "--config", f"experiments/quickstart/{stage}.yaml"]
    command += ["--run", str(run), f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    command += ["--trainer.precision=32-true", "--trainer.callbacks=null", "--trainer.enable_progress_bar=false"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return run / "checkpoints" / f"step-{steps}.ckpt"


def digest(checkpoint: Path) -> str:
    """Return the SHA-256 of the averaged and of the raw weights, by name."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    total = hashlib.sha256()
    for part in ("state_dict", "current_model_state"):
        for name, value in sorted(content[part].items()):
            total.update(f"{part} {name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
