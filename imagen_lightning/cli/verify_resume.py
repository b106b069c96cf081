"""`imagen-lightning verify-resume`: proves on this machine and data that a killed run resumes exactly."""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from imagen_lightning.cli.arguments import SEED, WORKERS, Parser, folder, several, whole
from imagen_lightning.errors import InputError, counted
from imagen_lightning.io.locks import LOCK, is_lock, locked

if TYPE_CHECKING:
    from imagen_lightning.callbacks.history import StepSamples

HISTORY = "history.jsonl"
SEEN, LOSSES = "samples seen, in order", "loss of each sample"
LOSS_TOLERANCE = 1e-6  # of the losses where the number of processes changes, and with it the order of sums
_PARTS = {
    "current_model_state": "weights",
    "state_dict": "weights that every verb loads (the average)",
    "optimizer_states": "optimizer",
    "lr_schedulers": "learning rate schedule",
    "MixedPrecision": "precision scaler",
    "callbacks": "random states and callbacks",
}


class Difference(NamedTuple):
    """The largest difference in one thing of two runs: 0 where equal to the bit, infinite where none can be taken."""

    what: str
    largest: float


# ---- comparing two runs


def largest_difference(first: Any, second: Any) -> float:
    """The largest absolute difference of two nested collections of tensors and plain data; see `Difference`."""
    import torch

    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        return max((largest_difference(first[key], second[key]) for key in first), default=0.0)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return max(map(largest_difference, first, second), default=0.0)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape or torch.equal(first, second):
            return 0.0 if first.shape == second.shape else float("inf")
        worst = float((first.double() - second.double()).abs().max())
        return worst if worst > 0 else float("inf")  # not a number somewhere
    if isinstance(first, float) and isinstance(second, float) and first != second:
        return abs(first - second)
    return 0.0 if first == second else float("inf")


def compare_runs(first: Path, second: Path) -> list[Difference]:
    """Compares the last checkpoints of two run folders, their metrics.csv and their histories of samples."""
    from imagen_lightning.callbacks.history import read_history
    from imagen_lightning.cascade import read_checkpoint

    one, two = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (first, second))
    parts = {key: name for key, name in _PARTS.items() if key in one or key in two}
    found = [Difference(name, largest_difference(one.get(key), two.get(key))) for key, name in parts.items()]
    data = {key for key in one if isinstance(one[key], dict) and "position" in one[key]}
    positions = [[side.get(key, {}).get("position") for key in sorted(data)] for side in (one, two)]
    found.append(Difference("position in the data", largest_difference(*positions)))
    found.append(Difference("metrics.csv", largest_difference(read_metrics(first), read_metrics(second))))
    return found + compare_histories(read_history(first / HISTORY), read_history(second / HISTORY))


def read_metrics(run: Path) -> list[dict[str, str | float]]:
    """The rows of a run's metrics.csv, without what measures time, and what a process counts from its own start."""
    if not (run / "metrics.csv").exists():
        return []
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        left_out = re.compile(r"throughput/|(.*/)?skipped")
        rows = [{k: v for k, v in row.items() if not left_out.match(k)} for row in csv.DictReader(file)]
    numbers: list[dict[str, str | float]] = [{k: float(v) if v else "" for k, v in row.items()} for row in rows]
    return [row for row in numbers if any(value != "" for key, value in row.items() if key != "step")]


def compare_histories(first: Sequence[StepSamples], second: Sequence[StepSamples]) -> list[Difference]:
    """Compares which samples two runs saw in which order, and their losses; each must come once and in its turn."""
    seen = [[(step.positions, step.keys) for step in history] for history in (first, second)]
    positions = [[p for step in history for p in step.positions] for history in (first, second)]
    in_turn = all(numbers == list(range(len(numbers))) for numbers in positions)
    losses = [[step.losses for step in history] for history in (first, second)]
    return [
        Difference(SEEN, 0.0 if in_turn and seen[0] == seen[1] else float("inf")),
        Difference(LOSSES, largest_difference(*losses)),
    ]


# ---- running and killing


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning verify-resume` with the arguments after that and returns the exit code."""
    arguments, rest = parser().parse_known_args(argv)
    if own := [item for item in rest if item.split("=")[0] in ("--run", "--resume")]:
        raise InputError(f"verify-resume makes runs of its own; drop {own[0]}")
    if arguments.out:
        _refuse_filled(arguments.out)
    warmup = _shorter_warmup(arguments.config, arguments.steps)
    out = arguments.out or Path(tempfile.mkdtemp(prefix="verify-resume-"))
    with locked(out / LOCK, f"folder {str(out)!r}", advice="choose another --out"):
        _refuse_filled(out)
        return _verify(Verification(arguments, [*warmup, *rest], out))


def _refuse_filled(out: Path) -> None:
    if out.exists() and not all(map(is_lock, out.iterdir())):
        raise InputError(f"{out} is not empty; choose another --out")


def _verify(verification: Verification) -> int:
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # `fit` must not outlive this
    try:
        equal = verification.run()
    finally:
        verification.stop()
        signal.signal(signal.SIGTERM, before)
    if not equal or verification.arguments.out:
        print(f"\nthe runs are in {verification.out}")
    else:
        shutil.rmtree(verification.out)
    return 0 if equal else 1


class Verification:
    """An uninterrupted run and one that is killed and resumed, as subprocesses of `fit`, and their comparison."""

    def __init__(self, arguments: argparse.Namespace, fit_options: list[str], out: Path) -> None:
        self.arguments = arguments
        self.out = out
        self.process: subprocess.Popen[bytes] | None = None
        steps = arguments.steps
        self.options = [
            *(item for config in arguments.config for item in ("--config", config)),
            *("--trainer.max_steps", str(steps), "--checkpoint.every_n_steps", str(max(1, steps // 10))),
            *("--trainer.val_check_interval", str(max(1, steps // 4)), "--trainer.limit_val_batches", "2"),
            *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
            *(("--trainer.deterministic", "true") if arguments.deterministic else ()),
            *fit_options,
        ]

    def run(self) -> bool:
        """Prints what it does and the table; returns whether the runs are equal."""
        processes = self.arguments.processes
        whole, killed = self.out / "uninterrupted", self.out / "killed"
        start = time.monotonic()
        self._finish(self._start(whole))
        seconds = time.monotonic() - start
        print(f"uninterrupted: {counted(self.arguments.steps, 'step')} in {seconds:.1f} s", flush=True)
        self._run_killed(killed, seconds)
        found = compare_runs(whole, killed)
        print("\n" + table(found))
        equal = all(item.largest == 0.0 for item in found)
        if len(set(processes)) > 1:  # sums over other parts of a batch: the weights part in their last digits
            equal = dict(found)[SEEN] == 0.0 and dict(found)[LOSSES] <= LOSS_TOLERANCE
        if not equal and self._on_gpu(whole):
            self._finish(self._start(self.out / "again"))
            noise = max(item.largest for item in compare_runs(whole, self.out / "again"))
            if noise > 0:
                print(f"\ntwo uninterrupted runs differ too, by up to {noise:.3g}: kernels on this GPU are not")
                print("deterministic; add --deterministic")
        print(f"\n{'resume is exact' if equal else 'NOT EQUAL'}: {counted(self.arguments.kills, 'kill')}")
        return equal

    def _run_killed(self, run: Path, seconds: float) -> None:
        """Kills the run after random steps, the first time at a random moment of its start, and lets it end."""
        arguments, generator = self.arguments, random.Random(self.arguments.seed)
        targets = sorted(generator.choices(range(arguments.steps), k=arguments.kills))
        for number, target in enumerate([*targets, None]):
            process = self._start(run, number)
            if target is None:
                self._finish(process)
                return
            while process.poll() is None and num_steps(run) < target:
                time.sleep(0.02)
            # Somewhere in the step, the save or the validation that follows; before the first step, in the start.
            time.sleep(generator.random() * seconds / (2 if target == 0 else arguments.steps))
            if process.poll() is not None:
                self._finish(process)  # it ended before; the next one finds nothing left to do
                continue
            self.stop()
            print(f"kill {number + 1} of {arguments.kills}: after step {num_steps(run)}", flush=True)

    def _start(self, run: Path, number: int = 0) -> subprocess.Popen[bytes]:
        """Starts `fit` as a user would: with all options, or with --resume where the run has its configuration."""
        if (run / "config.yaml").exists():
            options = ["--run", str(run), "--resume"]
        else:
            history = ["--trainer.callbacks+=imagen_lightning.callbacks.history.SampleHistory"]
            history += ["--trainer.callbacks.path", str(run / HISTORY)]
            options = ["--run", str(run), "--resume", *self.options, *history]
        workers, processes = self.arguments.workers, self.arguments.processes
        if workers:
            options += ["--data.init_args.num_workers", str(workers[number % len(workers)])]
        if max(processes) > 1:
            devices = processes[number % len(processes)]
            options += ["--trainer.devices", str(devices), "--trainer.strategy", "ddp" if devices > 1 else "auto"]
        command = [sys.executable, "-m", "imagen_lightning", "fit", *options]
        environment = {**os.environ, "WANDB_MODE": "disabled"}
        with (self.out / "stderr.txt").open("wb") as stderr:
            self.process = subprocess.Popen(  # in a session of its own: its workers and processes are killed with it
                command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment, start_new_session=True
            )
        return self.process

    def stop(self) -> None:
        """Kills the running `fit` and all its processes, as SIGKILL does."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait() != 0:
            text = (self.out / "stderr.txt").read_text(errors="replace").strip()
            raise InputError(f"fit ended with exit code {process.returncode}: {text.splitlines()[-1] if text else ''}")

    def _on_gpu(self, run: Path) -> bool:
        from imagen_lightning.cascade import read_checkpoint

        return "cuda" in read_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"]["Checkpoint"]["rng"][0]


def num_steps(run: Path) -> int:
    """The last optimizer step that the run's history tells of."""
    from imagen_lightning.callbacks.history import read_history

    return len(read_history(run / HISTORY)) if (run / HISTORY).exists() else 0


def table(found: Sequence[Difference]) -> str:
    """What was compared, whether it is equal to the bit, and the largest difference."""
    width = max(len(item.what) for item in found)
    lines = [f"{x.what:<{width}}  {'yes' if x.largest == 0.0 else 'NO':<5}  {x.largest:.3g}" for x in found]
    return "\n".join([f"{'what':<{width}}  equal  largest difference", *lines])


def _shorter_warmup(configs: Sequence[str], steps: int) -> list[str]:
    """The option that makes a configured warm-up fit into the shortened run."""
    from imagen_lightning.cli.configs import find_config, read_config

    sections = [read_config(find_config(config)) for config in configs]
    for name in ("model", "init_args", "optimization"):
        sections = [section[name] for section in sections if isinstance(section.get(name), dict)]
    warmup = [section["warmup_steps"] for section in sections if "warmup_steps" in section]
    if not warmup or warmup[-1] <= steps // 2:
        return []
    return ["--model.init_args.optimization.warmup_steps", str(steps // 2)]


def parser() -> Parser:
    made = Parser(
        "verify-resume",
        description="Trains a shortened run twice on this machine, once uninterrupted and once killed at random "
        "moments and resumed, and compares weights, average, optimizer, metrics and samples seen to the bit.",
        epilog="All other options are those of `fit`, e.g. --data.init_args.batch_size 8.",
    )
    made.add_argument("-c", "--config", action="append", required=True, metavar="YAML", help="as for fit; may repeat")
    made.add_argument("--kills", type=whole(1, 1000), default=5, metavar="N", help="kills with SIGKILL (%(default)s)")
    made.add_argument(
        "--steps", type=whole(4, 1_000_000), default=40, metavar="N", help="optimizer steps (%(default)s)"
    )
    made.add_argument(
        "--workers",
        type=several(WORKERS),
        default=[],
        metavar="N,…",
        help="loader workers; of several numbers each restart takes the next one (by default as configured)",
    )
    made.add_argument(
        "--processes",
        type=several(whole(1, 1024)),
        default=[1],
        metavar="N,…",
        help="training processes, likewise; where their number changes losses are compared to 1e-6 (1)",
    )
    made.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the random moments (%(default)s)")
    made.add_argument("--deterministic", action="store_true", help="let PyTorch use deterministic kernels only")
    made.add_argument(
        "--out", type=folder, metavar="DIR", help="keep the runs in this folder (by default they go when all is equal)"
    )
    return made
