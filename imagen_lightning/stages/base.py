"""The base stage: text to a small image."""

from __future__ import annotations

from torch import Tensor, nn

from imagen_lightning.stages.mixin import DiffusionMixin  # first: it lets lightning be imported

# isort: split
import lightning

from imagen_lightning.networks import LoRA
from imagen_lightning.stages.optimization import Optimization
from imagen_lightning.stages.settings import Diffusion, Execution, Sampling, TextSettings
from imagen_lightning.types import Batch, Conditioning


class BaseStage(DiffusionMixin, lightning.LightningModule):
    """Text to an image of image_size x image_size (Saharia et al. 2022, section 2.1).

    Args:
        image_size: pixels along a side.
        network: `network(x_t, time, conditioning)`, e.g. a UNet.
        text: encoder, trainable text network, caption drop.
        diffusion: schedule, parametrization, weighting.
        sampling: how the stage is sampled by default.
        optimization: optimizer and learning-rate schedule.
        execution: channels-last, torch.compile.
        seed: of training's noise, times and drops.
        adapter: low-rank adapters of the network, which alone are then trained.
    """

    def __init__(
        self,
        image_size: int,
        network: nn.Module,
        text: TextSettings | None = None,
        diffusion: Diffusion | None = None,
        sampling: Sampling | None = None,
        optimization: Optimization | None = None,
        execution: Execution | None = None,
        seed: int = 0,
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.network, self.seed = image_size, network, seed
        self.text, self.diffusion = text or TextSettings(), diffusion or Diffusion()
        self.sampling, self.optimization = sampling or Sampling(), optimization or Optimization()
        self.execution = execution or Execution()
        self.adapter = adapter
        self.process = self.diffusion.process()
        self.prepare()

    def condition(self, batch: Batch, seed: int, training: bool) -> tuple[Tensor, Conditioning]:
        """The images in [-1, 1] and the captions' text."""
        return self.images_of(batch), Conditioning(text=self.text_of(batch, seed, training))
