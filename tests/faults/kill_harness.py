"""Runs of `fit` that are killed at chosen moments and resumed, and what they are compared with.

Each attempt is a process forked from one that has imported everything and done nothing else, so that hundreds are
affordable. It writes the phase that it is in to a file that both sides map; the killer waits for a phase of its
schedule, and a random while more, and sends SIGKILL to the whole group.
"""

import copy
import io
import mmap
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import yaml  # isort: skip
from lightning.pytorch import Callback  # isort: skip
from PIL import Image  # isort: skip

from imagen_lightning.cli.main import main  # isort: skip
from imagen_lightning.cli.verify_resume import HISTORY  # isort: skip

HERE = Path(__file__).parent
PRELOAD = [
    "kill_harness",
    "imagen_lightning.cli.fit",
    "imagen_lightning.networks",
    "imagen_lightning.callbacks.history",
]
STEPS = 40
MENDED = Path("mended")  # lies in the folder of a run whose fault is mended
LIMIT = 300  # seconds after which an attempt hangs
PHASES = ("start", "step", "save", "validation", "end")
LAYOUT = "q" * (1 + len(PHASES))  # the phase, and how often each was entered
NOWHERE = bytes(struct.calcsize(LAYOUT))
STAGE = {
    "seed_everything": 1,
    "model": {
        "class_path": "imagen_lightning.stages.BaseStage",
        "init_args": {
            "image_size": 8,
            "network": {
                "class_path": "imagen_lightning.networks.UNet",
                "init_args": {
                    **{"dim": 8, "multipliers": [1], "num_blocks": 1, "attention": [True], "text_dim": 8},
                    **{"groups": 4, "head_dim": 8, "dropout": 0.2},
                },
            },
            "text": {"encoder": {"class_path": "imagen_lightning.text.TinyTextEncoder", "init_args": {"dim": 8}}},
            "sampling": {"num_steps": 2},
            "optimization": {
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "warmup_steps": 4,
                "lr_schedule": "cosine",
            },
        },
    },
    "trainer": {"accelerator": "cpu", "max_steps": STEPS, "log_every_n_steps": 1, "enable_progress_bar": False},
    "ema": {"decay": 0.9},
    "checkpoint": {"every_n_steps": 2},
    "noise_level_loss": {"num_bins": 4, "every_n_steps": 5},
    "throughput": {"measure_matmul": False},
}


def write_shards(folder: Path) -> None:
    """Shards of unequal sizes, with several captions a sample, images that are no squares, and some broken ones."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate((9, 14, 5, 11)):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                picture = io.BytesIO()
                image = Image.linear_gradient("L").resize((10 + number % 3, 12)).rotate(number).convert("RGB")
                image.save(picture, "PNG")
                members = {"png": b"broken" if number % 13 == 5 else picture.getvalue()}
                members["txt"] = f"number {number}\nanother\na third".encode()
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1


def config(data: str, shards: Path, accumulate: int = 1) -> dict:
    """The configuration of a run on "shapes", or on "shards" in the folder."""
    settings = {"image_size": 8, "batch_size": 4, "num_val": 6}
    if data == "shards":
        settings |= {"train": str(shards), "val": str(shards), "crop": "random", "random_flip": True, "window": 2}
        settings |= {"max_skip_share": 0.5}
    name = "LaionDataModule" if data == "shards" else "ShapesDataModule"
    trainer = {**STAGE["trainer"], "accumulate_grad_batches": accumulate, "val_check_interval": 3 * accumulate}
    return {
        **copy.deepcopy(STAGE),
        "trainer": trainer,
        "data": {"class_path": f"imagen_lightning.data.{name}", "init_args": settings},
    }


# ---- in the process that trains


class Phases(Callback):
    """Writes the phase that training is in, and how often it was entered, where the killer looks."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), len(NOWHERE))
        self._counts = [0] * len(PHASES)

    def __deepcopy__(self, memo):
        return self

    def _enter(self, phase: str) -> None:
        number = PHASES.index(phase)
        self._counts[number] += 1
        self._map[:] = struct.pack(LAYOUT, number, *self._counts)

    def on_train_batch_start(self, *_):
        self._enter("step")

    def on_save_checkpoint(self, *_):
        self._enter("save")

    def on_validation_start(self, *_):
        self._enter("validation")

    def on_train_end(self, *_):
        self._enter("end")


class Signals(Callback):
    """Sends itself a signal in each of the named optimizer steps, or while the checkpoint after it is made."""

    def __init__(self, steps: list[int], number: int, in_save: bool = False) -> None:
        self.steps, self.number, self.in_save = steps, number, in_save
        self._sent_in = -1

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step + 1 in self.steps and not self.in_save and self._sent_in != trainer.global_step:
            self._sent_in = trainer.global_step  # once, though batches be accumulated
            os.kill(os.getpid(), self.number)

    def on_save_checkpoint(self, trainer, *_):
        if trainer.global_step in self.steps and self.in_save:
            os.kill(os.getpid(), self.number)


class SmallFiles(Callback):
    """Lets the process write no file beyond a size from a step on."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step + 1 == self.step and not MENDED.exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Deny(Callback):
    """Takes away the right to write in the folder of checkpoints, and the superuser's by being another user."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step + 1 == self.step and not MENDED.exists():
            run = Path(trainer.default_root_dir)
            for path in (run, *(path for path in run.iterdir() if path.is_file())):
                path.chmod(0o777)
            (run / "checkpoints").chmod(0o555)
            if os.geteuid() == 0:
                os.seteuid(65534)


def attempt(folder: str, arguments: list[str], output: str) -> None:
    """What a forked process does: one `fit`, in a process group of its own."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of its loader's workers, as in any other run
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["imagen-lightning"]
    sys.exit(main(arguments))


# ---- in the process that kills


@contextmanager
def fork_server() -> Iterator[multiprocessing.context.BaseContext]:
    """A context whose processes are forked from one that has imported everything."""
    with_path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    changes = {"PYTHONPATH": with_path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Run:
    """One run of `fit` in a folder of its own, in as many attempts as it takes.

    Args:
        context: of the fork server.
        folder: an empty folder; the run folder is `folder / "run"`.
        settings: its configuration.
        workers: loader workers of the attempts; may be changed between them.
        callbacks: further ones, by name in this file with their arguments.
    """

    def __init__(
        self, context, folder: Path, settings: dict, workers: int = 0, callbacks: Mapping[str, dict] | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.context, self.folder, self.run, self.workers = context, folder, folder / "run", workers
        self.output = folder / "output.txt"
        self.kills: list[tuple[str, str]] = []  # the phase aimed at, the phase hit
        self.num_partials = 0  # kills that left a file half written
        self._phase = folder / "phase"
        self._phase.write_bytes(NOWHERE)
        with self._phase.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), len(NOWHERE))
        all_callbacks = [
            {"class_path": "kill_harness.Phases", "init_args": {"path": str(self._phase)}},
            {"class_path": "imagen_lightning.callbacks.history.SampleHistory", "init_args": {"path": f"run/{HISTORY}"}},
            *({"class_path": f"kill_harness.{name}", "init_args": args} for name, args in (callbacks or {}).items()),
        ]
        settings = {**settings, "trainer": {**settings["trainer"], "callbacks": all_callbacks}}
        (folder / "stage.yaml").write_text(yaml.safe_dump(settings))
        self.arguments = ["fit", "--config", "stage.yaml", "--run", "run", "--resume"]

    def start(self):
        self._map[:] = NOWHERE
        arguments = [*self.arguments, "--data.init_args.num_workers", str(self.workers)]
        process = self.context.Process(target=attempt, args=(str(self.folder), arguments, str(self.output)))
        process.start()
        return process

    def finish(self, exit_code: int = 0) -> str:
        """Lets an attempt end by itself, and gives what it wrote."""
        before = self.output.stat().st_size if self.output.exists() else 0
        process = self.start()
        process.join(LIMIT)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
        said = self.output.read_bytes()[before:].decode(errors="replace")
        assert process.exitcode == exit_code, said[-3000:]
        return said

    def phase(self) -> tuple[str, dict[str, int]]:
        """The phase that training is in, and how often this attempt entered each."""
        number, *counts = struct.unpack(LAYOUT, self._map[:])
        return PHASES[number], dict(zip(PHASES, counts))

    def kill(self, wanted: str, count: int, delay: float, number: int = signal.SIGKILL) -> bool:
        """Starts an attempt and signals it `delay` seconds after it enters a phase for the count-th time.

        Returns:
            Whether the signal ended it; False where it ended before.
        """
        process = self.start()
        limit = time.monotonic() + LIMIT
        while process.exitcode is None and time.monotonic() < limit:
            if self.phase()[1][wanted] >= count:
                break
            time.sleep(0.0005)
        if time.monotonic() >= limit:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"hangs in {self.phase()}: {self.output.read_text()[-3000:]}")
        time.sleep(delay)
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # it has not made its group yet, or ended
            if process.exitcode is None:
                process.kill()
        process.join(LIMIT)
        if process.exitcode not in (-signal.SIGKILL, 128 + number):
            assert process.exitcode == 0, self.output.read_text()[-3000:]
            return False
        self.kills.append((wanted, self.phase()[0]))
        self.num_partials += any(self.run.rglob("*.partial"))
        return True

    def kill_often(self, num_kills: int, generator: random.Random) -> None:
        """Kills attempts by a random schedule, the last two times at the run's end, and lets the run end."""
        for _ in range(num_kills - 2):
            wanted = generator.choices(PHASES[:4], (1, 2, 3, 2))[0]
            longest = {"start": 1.2, "step": 0.02, "save": 0.012, "validation": 0.03}[wanted]
            count = 0 if wanted == "start" else generator.randint(1, 2)
            self.kill(wanted, count, generator.random() * longest)
        for _ in range(2):
            self.kill("end", 1, generator.random() * 0.02)
        self.finish()
