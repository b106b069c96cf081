"""What the probes find in the first steps of healthy trainings, and of trainings with an ailment planted.

    python benchmarks/first_hour.py [CASE ...] [--photos FOLDER] [--steps N] [--every N]

Each case trains a stage of the quickstart from its YAML, in float32, with one thing changed, and prints what `Probes`
measures of the average as it goes: the numbers from which the thresholds of `callbacks/probes.py` were chosen. Cases on
photos need shards with train-*.tar and heldout-*.tar.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
import lightning.pytorch as pl
import torch

from imagen_lightning.callbacks import EMA, Probes
from imagen_lightning.callbacks.probes import Findings
from imagen_lightning.cli import fit
from imagen_lightning.metrics.probes import z_score

STEPS = {"base": 800, "sr": 600}
LR = "--model.init_args.optimization.optimizer.init_args.lr"
PARAMETRIZATION = "--model.init_args.diffusion.parametrization"


@dataclass(frozen=True)
class Case:
    """A stage of the quickstart and what is changed in it."""

    stage: str
    options: tuple[str, ...] = ()
    photos: bool = False
    shuffled: bool = False


CASES = {
    "base": Case("base"),
    "base-text-dropped": Case("base", ("--model.init_args.text.drop=1.0",)),
    "base-captions-shuffled": Case("base", shuffled=True),
    "base-lr-1e-6": Case("base", (f"{LR}=1e-6",)),
    "base-photos": Case("base", photos=True),
    "sr": Case("sr"),
    "sr-v": Case("sr", (f"{PARAMETRIZATION}=imagen_lightning.diffusion.V",)),
    "sr-epsilon": Case("sr", (f"{PARAMETRIZATION}=imagen_lightning.diffusion.Epsilon",)),
    "sr-photos": Case("sr", photos=True),
}


class Shuffle(pl.Callback):
    """Gives each training image another one's caption."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch.captions = batch.captions[1:] + batch.captions[:1]


class Shown(Probes):
    """Prints what it finds."""

    def __init__(self, case: str, every: int) -> None:
        super().__init__(every_n_steps=every)
        self.case = case

    def _findings(self, trainer: pl.Trainer, *rest: Any) -> tuple[Findings, bool]:
        found, averaged = super()._findings(trainer, *rest)
        gains, shifts = found.text_gains, found.colour_shifts
        gain = "–" if gains is None else f"{gains.mean():.2%}"
        z = "–" if gains is None else f"{z_score(gains):.1f}"
        shift = "–" if shifts is None else f"{shifts.mean():.1f}"
        words = ", ".join(sentence.split(":")[0] for sentence in found.verdict()) or "nothing ails"
        ratio = f"{found.denoising_ratios.mean():.2f}"
        print(f"| {self.case} | {trainer.global_step} | {ratio} | {gain} | {z} | {shift} | {words} |", flush=True)
        return found, averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--photos", metavar="FOLDER", help="shards of captioned photos")
    parser.add_argument("--steps", type=int, help="in the place of 800 (base) and 600 (sr)")
    parser.add_argument("--every", type=int, default=100)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}; use {', '.join(CASES)}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.argv[1:] = []  # LightningCLI would read them
    print("| case | step | denoising ratio | text gain | z | colour shift | verdict |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    start = time.process_time()
    for name in options.cases or [name for name, case in CASES.items() if options.photos or not case.photos]:
        train(name, CASES[name], options)
    print(f"\n{time.process_time() - start:.0f} s of CPU time, {torch.get_num_threads()} threads")


def train(name: str, case: Case, options: argparse.Namespace) -> None:
    size = {"base": 16, "sr": 64}[case.stage]
    arguments = ["--config", str(fit.find_config(f"quickstart/{case.stage}.yaml")), "--trainer.logger=false"]
    if case.photos:
        arguments += ["--data", "imagen_lightning.data.LaionDataModule", f"--data.image_size={size}"]
        arguments += [f"--data.{split}={options.photos}/{part}-*.tar" for split, part in SPLITS.items()]
        arguments += ["--data.batch_size=16"]
    cli = fit.StageCLI(
        run=False,
        parser_class=fit.Parser,
        save_config_callback=None,
        auto_configure_optimizers=False,
        trainer_defaults=dict(fit.TRAINER_DEFAULTS),
        args=[*arguments, *case.options],
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=options.steps or STEPS[case.stage],
            max_epochs=-1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=[EMA(0.998), Shown(name, options.every), *([Shuffle()] if case.shuffled else [])],
        )
        trainer.fit(cli.model, datamodule=cli.datamodule)


SPLITS = {"train": "train", "val": "heldout"}

if __name__ == "__main__":
    main()
