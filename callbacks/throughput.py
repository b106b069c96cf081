"""How fast training runs, and how fast the machine could."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

import lightning.pytorch as pl  # isort: skip

from imagen_lightning.callbacks.observer import Observer
from imagen_lightning.callbacks.run_folder import log_metrics
from imagen_lightning.networks.flops import count_flops
from imagen_lightning.types import Conditioning, InputError


class Throughput(Observer):
    """Logs images and FLOPs a second over all processes, seconds a step, and the share of the machine's matmul rate.

    `throughput/{images_per_second, seconds_per_step, flops_per_second, matmul_share}` are means over the steps since
    they were last logged, with the time spent waiting for data, without the first batch, validation, samples and
    checkpoints. FLOPs are the network's, forward and backward, counted once on tensors without memory; text encoders
    are left out. The matmul rate is that of one square product in the precision of training, measured before it.

    Args:
        every_n_steps: optimizer steps between two loggings.
        measure_matmul: whether to measure the matmul rate, which takes a tenth of a second.
        strict: end training where this fails, rather than log it and continue.
    """

    def __init__(self, every_n_steps: int = 50, measure_matmul: bool = True, strict: bool = False) -> None:
        if every_n_steps < 1:
            raise InputError(f"Throughput every_n_steps {every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.measure_matmul = measure_matmul
        self.strict = strict
        self.matmul_rate: float | None = None  # FLOP/s of this process's device
        self.flops_per_image: float | None = None
        self._since: float | None = None
        self._paused = 0.0
        self._validation_start = 0.0
        self._num_images = self._num_steps = self._seen_step = 0

    def metric_names(self, stage: str) -> set[str]:
        """Return what may be logged of any stage."""
        names = ("images_per_second", "seconds_per_step", "flops_per_second", "matmul_share")
        return {f"throughput/{name}" for name in names}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.measure_matmul and self.matmul_rate is None:
            with self.tolerating(trainer):
                self.matmul_rate = matmul_rate(pl_module.device, _compute_dtype(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = None
        self._seen_step = trainer.global_step
        if self.flops_per_image is None and hasattr(pl_module, "predict"):
            self._watch_first_prediction(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with self.tolerating(trainer):
            self._count(trainer, pl_module, len(batch))

    def _count(self, trainer: pl.Trainer, pl_module: pl.LightningModule, num_images: int) -> None:
        stepped = trainer.global_step > self._seen_step
        self._seen_step = trainer.global_step
        if self._since is None:
            self._restart(pl_module)
            return
        self._num_images += num_images * trainer.world_size
        self._num_steps += stepped
        if not stepped or trainer.global_step % self.every_n_steps:
            return
        _synchronize(pl_module.device)
        seconds = time.perf_counter() - self._since - self._paused
        metrics = {
            "throughput/images_per_second": self._num_images / seconds,
            "throughput/seconds_per_step": seconds / self._num_steps,
        }
        if self.flops_per_image is not None:
            rate = self.flops_per_image * self._num_images / seconds
            metrics["throughput/flops_per_second"] = rate
            if self.matmul_rate is not None:
                metrics["throughput/matmul_share"] = rate / trainer.world_size / self.matmul_rate
        log_metrics(trainer, metrics)
        self._restart(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused += time.perf_counter() - self._validation_start

    def _restart(self, pl_module: pl.LightningModule) -> None:
        _synchronize(pl_module.device)
        self._since, self._paused, self._num_images, self._num_steps = time.perf_counter(), 0.0, 0, 0

    def _watch_first_prediction(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Shadows the method for one call. A forward hook on the network would make torch.compile compile it twice.
        def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            del pl_module.predict
            with self.tolerating(trainer):
                self.flops_per_image = count_flops(pl_module.network, x_t, t, conditioning)
            return pl_module.predict(x_t, t, conditioning)

        pl_module.predict = predict


@contextmanager
def uncounted(trainer: pl.Trainer) -> Iterator[None]:
    """The time spent inside does not count in the trainer's throughput."""
    start = time.perf_counter()
    try:
        yield
    finally:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback._paused += time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """The best FLOP/s of a square matrix product on the device, tried for `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = a @ b
    _synchronize(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _compute_dtype(trainer: pl.Trainer) -> torch.dtype:
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    return torch.float64 if precision.startswith("64") else torch.float32


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
