"""What happens beside a training step: averaging, checkpoints, samples, measurements, and the run folder's loggers."""

from imagen_lightning.callbacks.caption_metrics import CaptionAccuracy, CLIPScore
from imagen_lightning.callbacks.checkpoint import Checkpoint, NonFiniteWeightsError, find_last, interrupted
from imagen_lightning.callbacks.distances import FID, KID
from imagen_lightning.callbacks.ema import EMA, averaged_weights
from imagen_lightning.callbacks.encode_once import EncodeOnce
from imagen_lightning.callbacks.finite_loss import FiniteLoss, NonFiniteLossError
from imagen_lightning.callbacks.loggers import RunCSVLogger, wandb_agent_run, wandb_logger
from imagen_lightning.callbacks.noise_level_loss import NoiseLevelLoss
from imagen_lightning.callbacks.probes import Probes
from imagen_lightning.callbacks.progress import StepProgress
from imagen_lightning.callbacks.run_folder import read_run_info, run_dir, update_run_info
from imagen_lightning.callbacks.sample_grid import SampleGrid
from imagen_lightning.callbacks.skipped_samples import SkippedSamples
from imagen_lightning.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "FID",
    "KID",
    "CLIPScore",
    "CaptionAccuracy",
    "Checkpoint",
    "EncodeOnce",
    "FiniteLoss",
    "NoiseLevelLoss",
    "NonFiniteLossError",
    "NonFiniteWeightsError",
    "Probes",
    "RunCSVLogger",
    "SampleGrid",
    "SkippedSamples",
    "StepProgress",
    "Throughput",
    "averaged_weights",
    "find_last",
    "interrupted",
    "read_run_info",
    "run_dir",
    "update_run_info",
    "wandb_agent_run",
    "wandb_logger",
]
