"""Super-resolution stages: text and a small image to a larger one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imagen_lightning.stages.mixin import DiffusionMixin  # first: it lets lightning be imported

# isort: split
import lightning

from imagen_lightning.diffusion import LowResAugmentation
from imagen_lightning.diffusion.random import Stream, normal, uniform
from imagen_lightning.images import downsample, upsample
from imagen_lightning.networks import LoRA
from imagen_lightning.samplers.common import noise_like
from imagen_lightning.stages.optimization import Optimization
from imagen_lightning.stages.settings import Diffusion, Execution, Sampling, TextSettings
from imagen_lightning.types import Batch, Conditioning, InputError


class SuperResolutionStage(DiffusionMixin, lightning.LightningModule):
    """Text and a low_res_size image to one of image_size (Saharia et al. 2022, section 2.4).

    In training the low-resolution image is made from the image itself, by the one area filter; it is enlarged
    bilinearly and noised at a level drawn per sample, which the network is told.

    Args:
        image_size: pixels along a side of what it makes.
        low_res_size: pixels along a side of what it is given.
        network: `network(x_t, time, conditioning)` with low_res, e.g. an EfficientUNet.
        text: encoder, trainable text network, caption drop.
        diffusion: schedule, parametrization, weighting.
        augmentation: noise on the low-resolution image in training.
        aug_level: in [0, 1], the noise put on the low-resolution image in sampling.
        crop_size: train on random crops of this many pixels at full scale, None for whole images.
            Validation and sampling are whole.
        sampling: how the stage is sampled by default.
        optimization: optimizer and learning-rate schedule.
        execution: channels-last, torch.compile.
        seed: of training's noise, times, drops, levels and crops.
        upsampling: how low-resolution images are enlarged: "bilinear", or "bilinear_aligned" for corners that keep
            their place, which is DeepFloyd IF's.
        adapter: low-rank adapters of the network, which alone are then trained.
    """

    own_guidance = 1.0

    def __init__(
        self,
        image_size: int,
        low_res_size: int,
        network: nn.Module,
        text: TextSettings | None = None,
        diffusion: Diffusion | None = None,
        augmentation: LowResAugmentation | None = None,
        aug_level: float = 0.1,
        crop_size: int | None = None,
        sampling: Sampling | None = None,
        optimization: Optimization | None = None,
        execution: Execution | None = None,
        seed: int = 0,
        upsampling: str = "bilinear",
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__()
        if not 0 < low_res_size < image_size:
            raise InputError(f"low_res_size {low_res_size} must be positive and below image_size {image_size}")
        if crop_size is not None and not 0 < crop_size <= image_size:
            raise InputError(f"crop_size {crop_size} must be positive and at most image_size {image_size}")
        self.image_size, self.low_res_size, self.network, self.seed = image_size, low_res_size, network, seed
        self.text, self.diffusion = text or TextSettings(), diffusion or Diffusion()
        self.augmentation, self.aug_level = augmentation or LowResAugmentation(), aug_level
        if upsampling not in ("bilinear", "bilinear_aligned"):
            raise InputError(f"upsampling {upsampling!r} is unknown; use 'bilinear' or 'bilinear_aligned'")
        self.crop_size, self.upsampling = crop_size, upsampling
        self.sampling, self.optimization = sampling or Sampling(), optimization or Optimization()
        self.execution = execution or Execution()
        self.adapter = adapter
        self.process = self.diffusion.process()
        if not 0 <= aug_level <= self.augmentation.max_level:
            raise InputError(
                f"aug_level {aug_level} must be in [0, {self.augmentation.max_level}], the levels seen in training"
            )
        self.prepare()

    def condition(self, batch: Batch, seed: int, training: bool) -> tuple[Tensor, Conditioning]:
        """The images in [-1, 1], their text, and the noised low-resolution image at a level drawn per sample."""
        x0, positions = self.images_of(batch), batch.positions
        low_res = self.enlarge(downsample(x0, self.low_size(x0)))
        if training and self.crop_size is not None:
            x0, low_res = self.crop(x0, low_res, positions, seed)
        level = self.augmentation.levels(uniform(seed, Stream.AUG_LEVEL, positions))
        noise = normal(seed, Stream.AUG_NOISE, positions, tuple(low_res.shape[1:]))
        text = self.text_of(batch, seed, training)
        return x0, Conditioning(text, self.augmentation(low_res, level, noise), level)

    def low_size(self, x0: Tensor) -> tuple[int, int]:
        """Height and width of the low-resolution image of x0 (B, 3, H, W).

        Raises:
            InputError: they are not whole.
        """
        height, width = x0.shape[-2:]
        if height * self.low_res_size % self.image_size or width * self.low_res_size % self.image_size:
            step = self.image_size // math.gcd(self.image_size, self.low_res_size)
            raise InputError(
                f"images of {height, width} px have no whole low-resolution size at {self.low_res_size} of "
                f"{self.image_size} px; set data.init_args.bucket_step to a multiple of {step}"
            )
        return height * self.low_res_size // self.image_size, width * self.low_res_size // self.image_size

    def enlarge(self, low_res: Tensor) -> Tensor:
        """The low-resolution image (B, 3, h, w) at the size that the network sees."""
        height, width = (side * self.image_size // self.low_res_size for side in low_res.shape[-2:])
        return upsample(low_res, (height, width), align_corners=self.upsampling == "bilinear_aligned")

    def crop(self, x0: Tensor, low_res: Tensor, positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The same random square of both images, per sample; as narrow as they are where that is less."""
        assert self.crop_size is not None
        sides = x0.shape[-2:]
        height, width = (min(self.crop_size, side) for side in sides)
        room = torch.tensor([sides[0] - height + 1, sides[1] - width + 1], device=x0.device)
        offsets = (uniform(seed, Stream.CROP, positions, (2,)) * room).long().tolist()
        pairs = torch.cat([x0, low_res], dim=1)
        cut = torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(pairs, offsets)])
        return cut[:, :3], cut[:, 3:]

    def prepare_low_res(
        self,
        low_res: Tensor | None,
        aug_level: float | None,
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Enlarges and noises (B, 3, low_res_size, low_res_size) in [-1, 1] at the sampling level."""
        if low_res is None:
            raise InputError("super-resolution needs low_res images")
        if low_res.shape[-1] != self.low_res_size or low_res.shape[-2] != self.low_res_size:
            raise InputError(
                f"low_res images of {tuple(low_res.shape[-2:])} px given to a stage for {self.low_res_size} px"
            )
        value = self.aug_level if aug_level is None else aug_level
        if not 0 <= value <= self.augmentation.max_level:
            raise InputError(
                f"aug_level {value} must be in [0, {self.augmentation.max_level}], the levels seen in training"
            )
        level = torch.full((len(low_res),), value, device=device)
        enlarged = self.enlarge(low_res.to(device))
        return self.augmentation(enlarged, level, noise_like(enlarged, generators)), level
