"""What every stage does: one training step, one validation step, sampling, optimizers.

The mixin is stateless: a stage sets `network`, `process`, `text`, `sampling` and the rest in its `__init__`, and says
how a batch becomes images and conditioning (`condition`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
from lightning.pytorch.core import saving

from imagen_lightning.components import OWN_PACKAGE, build_as, describe_args
from imagen_lightning.diffusion import DiffusionProcess, guide, threshold
from imagen_lightning.diffusion.guidance import within
from imagen_lightning.diffusion.process import wrong_channels
from imagen_lightning.diffusion.random import Stream, normal, spread_uniform, uniform
from imagen_lightning.images import are_finite, to_float
from imagen_lightning.networks import LoRA, lora
from imagen_lightning.networks.conditioned import ConditionedNetwork
from imagen_lightning.samplers.common import noise_like
from imagen_lightning.stages.means import Means
from imagen_lightning.stages.optimization import Optimization
from imagen_lightning.stages.settings import Execution, Sampling, TextSettings
from imagen_lightning.text import PseudoTokens
from imagen_lightning.text.batching import join_texts, replace_texts
from imagen_lightning.types import Batch, Conditioning, Denoised, Denoiser, InputError, NonFiniteSamples, Sampler, Text

AREA_TOLERANCE = 0.1  # by which the area of images of another aspect may differ from the square's, as a share
VALIDATION_SEED = 0  # validation noise is the same in every run, whatever its seed, so that two runs compare


@dataclass
class StepRecord:
    """What the last step saw, for callbacks: keys, and (B,) times, losses and augmentation levels (or None)."""

    keys: list[str]
    times: Tensor
    losses: Tensor
    aug_level: Tensor | None


class DiffusionMixin:
    """Training, validation and sampling of one stage of a cascade."""

    undescribed = ("optimization",)  # arguments that only training uses, which no manifest and no checkpoint holds
    image_size: int
    network: nn.Module
    text: TextSettings
    text_network: nn.Module | None
    tokens: PseudoTokens | None
    seed: int
    process: DiffusionProcess
    own_guidance = 3.0  # of a stage whose `sampling` gives none
    optimization: Optimization
    execution: Execution
    adapter: LoRA | None = None
    base_digest: str | None = None  # of the weights that the adapter was put on
    null_embedding: nn.Parameter
    record: StepRecord | None
    mean_loss: Means  # of training, since it was last logged
    mean_val_loss: Means
    weights_record: dict[str, Any] | None = None  # what the weights are, {"kind": "ema", …}; None: unknown
    origin: dict[str, Any] | None = None  # where imported or inherited weights come from, licences included: plain data

    @property
    def sampling(self) -> Sampling:
        """How the stage is sampled by default, its guidance a number."""
        return self._sampling

    @sampling.setter
    def sampling(self, value: Sampling) -> None:
        self._sampling = replace(value, guidance=self.own_guidance) if value.guidance is None else value

    @property
    def stage_name(self) -> str:
        """The stage's name in a cascade: "base", and "sr_256" for super-resolution to 256 px."""
        return "base" if getattr(self, "low_res_size", None) is None else f"sr_{self.image_size}"

    def prepare(self) -> None:
        """Checks that the parts fit and readies the network; a stage calls it at the end of its `__init__`."""
        own = type(self.network).__module__.startswith(f"{OWN_PACKAGE}.")
        if own and not isinstance(self.network, ConditionedNetwork):
            raise InputError(
                f"network {type(self.network).__name__} cannot make images; use UNet, EfficientUNet, PatchTransformer "
                "or your own"
            )
        wanted = getattr(self.network, "text_dim", None)
        if wanted != self.text.dim:
            raise InputError(f"the network's text_dim is {wanted}; the text it is given has {self.text.dim} features")
        channels = 3 if self.process.variance is None else 6
        given = getattr(self.network, "out_channels", None)
        if given is not None and given != channels:
            raise InputError(wrong_channels(given, channels))
        self.text_network, self.tokens = self.text.network, self.text.tokens
        if self.text.null_text == "learned" and self.text.encoder is not None:
            self.null_embedding = nn.Parameter(0.02 * torch.randn(self.text.encoder.dim))
        if self.adapter is not None:
            self.adapter.inject(self.network)
        if self.execution.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.execution.compile:
            self.network.compile()
        self.optimization.freeze_parameters(self)  # type: ignore[arg-type]
        self.record = None
        self.mean_loss, self.mean_val_loss = Means(), Means()

    def attach_adapter(self, adapter: LoRA) -> None:
        """Gives a stage that has its weights an adapter, which alone is trained from here on."""
        if self.adapter is not None:
            raise InputError("the stage has an adapter already; merge it first")
        self.base_digest = lora.weights_digest(self)  # type: ignore[arg-type]
        adapter.inject(self.network)
        self.adapter = adapter
        self.optimization.freeze_parameters(self)  # type: ignore[arg-type]

    def attach_tokens(self, tokens: PseudoTokens) -> None:
        """Gives a stage that has its weights new words, beside those that it knows."""
        known = self.text.tokens
        self.text = replace(self.text, tokens=tokens if known is None else known.joined(tokens))
        self.tokens = self.text.tokens
        self.tokens.to(next(self.network.parameters()).device)  # type: ignore[union-attr]

    def merge_adapter(self) -> None:
        """Folds the stage's adapter, if it has one, into the weights; all of them can be trained again."""
        if self.adapter is not None:
            lora.merge(self.network)
            self.adapter = None
            self.requires_grad_(True)  # type: ignore[attr-defined]

    # ---- training

    def images_of(self, batch: Batch) -> Tensor:
        """The batch's images in [-1, 1]: squares of the stage's size, or of another aspect and about its area.

        Raises:
            InputError: they are neither.
        """
        height, width = batch.images.shape[-2:]
        square = height == width == self.image_size
        if not square and (height == width or abs(height * width / self.image_size**2 - 1) > AREA_TOLERANCE):
            raise InputError(
                f"the data gives images of {height, width} px to a stage of {self.image_size} px; set "
                f"data.init_args.image_size to {self.image_size}"
            )
        return to_float(batch.images)

    def condition(self, batch: Batch, seed: int, training: bool) -> tuple[Tensor, Conditioning]:
        """The images x0 in [-1, 1] and what the network is told; the one thing that differs between stages."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        self.weights_record = {"kind": "raw"}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x0, conditioning = self.condition(batch, self.seed, training=True)
        losses, times = self.diffusion_loss(x0, conditioning, batch.positions, self.seed)
        self.record = StepRecord(batch.keys, times, losses.detach(), conditioning.aug_level)
        loss = (losses if batch.weights is None else batch.weights * losses).mean()
        self._log_loss(loss.detach(), len(batch))
        return loss

    def _log_loss(self, loss: Tensor, count: int) -> None:
        """Log the mean loss since it was last written; over all processes at the batches at which it is."""
        trainer = getattr(self, "_trainer", None)
        if trainer is None:
            return
        self.mean_loss.add(loss[None], weight=count)
        connector = trainer._logger_connector
        is_written = connector.should_update_logs or trainer.fast_dev_run
        if is_written and not trainer.fit_loop._should_accumulate():
            total, number = self.mean_loss.take(trainer.strategy, loss.device)
        else:
            total, number = self.mean_loss.totals  # type: ignore[misc]  # of this process, for the progress bar
        self.log("train/loss", (total / number)[0].float(), prog_bar=True, batch_size=count)  # type: ignore[attr-defined]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x0, conditioning = self.condition(batch, VALIDATION_SEED, training=False)
        losses, times = self.diffusion_loss(x0, conditioning, batch.positions, VALIDATION_SEED, training=False)
        self.record = StepRecord(batch.keys, times, losses, conditioning.aug_level)
        self.mean_val_loss.add(losses)

    def on_validation_epoch_end(self) -> None:
        # Lightning's own mean over processes truncates odd numbers of samples.
        total, number = self.mean_val_loss.take(self.trainer.strategy, self.device)  # type: ignore[attr-defined]
        self.log("val/loss", (total / number)[0].float(), prog_bar=True, batch_size=1, sync_dist=True)  # type: ignore[attr-defined]

    def diffusion_loss(
        self, x0: Tensor, conditioning: Conditioning, positions: Tensor, seed: int, training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(B,) losses and the (B,) times they were taken at; noise and times derive from (seed, position).

        In training the times have the distribution of `diffusion.times`; else they are even, so that two runs compare.
        """
        u = spread_uniform(seed, Stream.TIME, positions)
        t = self.process.training_times(u) if training else self.process.schedule.training_time(u)
        epsilon = normal(seed, Stream.NOISE, positions, tuple(x0.shape[1:]))
        x_t = self.process.add_noise(x0, epsilon, t)
        output = self.predict(x_t, t, conditioning)
        return self.process.losses(output, x0, epsilon, t), t

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output at times t (B,) in [0, 1]; of x_t's type where the weights have another."""
        time, dtype = self.process.schedule.network_time(t), self.weights_dtype
        if dtype == x_t.dtype:
            return self.network(x_t, time, conditioning)
        return self.network(x_t.to(dtype), time, conditioning).to(x_t.dtype)

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the network's weights: float32, or less where a cascade was loaded so."""
        return next((parameter.dtype for parameter in self.network.parameters()), torch.float32)

    def read_text(self, text: Text) -> Text:
        """The text as the network takes it: through the stage's text network, in the type of the weights."""
        text = self.text_network(text) if self.text_network is not None else text
        return text if self.weights_dtype == torch.float32 else text.to(self.weights_dtype)

    # ---- text

    def text_of(self, batch: Batch, seed: int, training: bool) -> Text | None:
        """The batch's text as the network takes it; in training a share `text.drop` of it is made null."""
        if self.text.encoder is None:
            return None
        text = self.text.encode_batch(batch)
        if training and self.text.drop > 0:
            dropped = uniform(seed, Stream.TEXT_DROP, batch.positions) < self.text.drop
            stored = batch.empty if self.text.null_text == "empty_caption" else None
            text = replace_texts(text, self.null(text.states.device) if stored is None else stored, dropped)
        return self.read_text(text)

    def null(self, device: torch.device) -> Text:
        """The text of no caption, for one image: zero, learned, or the empty caption's."""
        assert self.text.encoder is not None
        if self.text.null_text == "empty_caption":
            return self.text.encode([""], device)
        if self.text.null_text == "learned":
            vector = self.null_embedding[None]
        else:
            vector = torch.zeros(1, self.text.encoder.dim, device=device)
        return Text(vector[:, None], torch.ones(1, 1, dtype=torch.bool, device=device), vector)

    # ---- sampling

    def denoiser(
        self,
        captions: Sequence[str],
        *,
        guidance: float,
        low_res: Tensor | None = None,
        aug_level: Tensor | None = None,
        negative: Sequence[str] | None = None,
        variance: bool = False,
    ) -> Denoiser:
        """`denoise(x_t, t)` bound to B captions (and low-res images): guided and thresholded, text encoded once.

        Args:
            captions: B strings.
            guidance: classifier-free guidance weight; 1 takes one pass of B images a step, any other one pass of 2B.
            low_res: (B, 3, H, W) the conditioning image, upsampled and noised, for super-resolution.
            aug_level: (B,) the level at which it was noised.
            negative: B captions that take the place of the null text.
            variance: give `Denoised` with the learned variance rather than x0 alone.
        """
        if variance and not self.process.learns_variance:
            raise InputError(
                "the sampler needs a learned variance and the stage has none (diffusion.variance is no LearnedRange); "
                "use another sampler, or DDPM with variance 'small' or 'large'"
            )
        if negative and len(negative) != len(captions):
            raise InputError(f"{len(negative)} negative captions for {len(captions)} captions; give one a caption")
        if negative and guidance == 1.0:
            raise InputError("negative captions need guidance: a weight other than 1")
        device = next(self.network.parameters()).device
        text = None
        guided = guidance != 1.0 and self.text.encoder is not None
        if self.text.encoder is not None:
            text = self.text.encode(captions, device)
            if guided:
                null = self.null(device)
                count = len(captions)
                everyone = torch.ones(count, dtype=torch.bool, device=device)
                without = self.text.encode(negative, device) if negative else replace_texts(text, null, everyone)
                text = join_texts(text, without)
            text = self.read_text(text)
            if text is not None and text.mask is not None and bool(text.mask.all()):
                text = replace(text, mask=None)  # attention without a mask is faster
        estimate = self.process.denoised if variance else self.process.x0

        def bound(text: Text | None, low_res: Tensor | None, aug_level: Tensor | None) -> Denoiser:
            conditioning = Conditioning(text, low_res, aug_level)
            precompute = getattr(self.network, "precompute", None)
            if precompute is not None:
                conditioning = precompute(conditioning)
            return lambda x_t, t: estimate(self.predict(x_t, t, conditioning), x_t, t)  # type: ignore[return-value]

        if not guided:
            return threshold(bound(text, low_res, aug_level), self.sampling.thresholding)
        twice = [torch.cat([value, value]) if value is not None else None for value in (low_res, aug_level)]
        denoise = guide(bound(text, *twice), guidance, self.sampling.guidance_rescale)
        if self.sampling.guidance_interval is not None and text is not None:
            mask = text.mask[: len(captions)] if text.mask is not None else None
            plain = bound(Text(text.states[: len(captions)], mask, text.pooled[: len(captions)]), low_res, aug_level)
            denoise = within(denoise, plain, self.sampling.guidance_interval, self.process.schedule)
        return threshold(denoise, self.sampling.thresholding)

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        guidance: float | None = None,
        num_steps: int | None = None,
        sampler: Sampler | None = None,
        low_res: Tensor | None = None,
        aug_level: float | None = None,
        negative: Sequence[str] | None = None,
        on_step: Any = None,
    ) -> Tensor:
        """Draws one image a caption: (B, 3, image_size, image_size) in [-1, 1].

        Args:
            captions: B strings.
            generators: one an image; all of an image's noise comes from its own.
            guidance, num_steps, sampler: default to the stage's `sampling`.
            low_res: (B, 3, h, w) in [-1, 1] at the stage's low_res_size; super-resolution only.
            aug_level: in [0, 1], noise put on low_res; super-resolution only.
            negative: B captions to steer away from.
            on_step: called with no argument once a step, after its (first) network evaluation.

        Raises:
            NonFiniteSamples: images hold NaN or infinite values; the message names the stage and the first such step.
        """
        network = self.network
        was_training = network.training
        self.eval()  # type: ignore[attr-defined]
        try:
            device = next(network.parameters()).device
            shape = (len(captions), 3, self.image_size, self.image_size)
            x = noise_like(torch.empty(shape, device=device), generators)
            low_res, level = self.prepare_low_res(low_res, aug_level, generators, device)
            run = sampler or self.sampling.sampler
            denoise = self.denoiser(
                captions,
                guidance=self.sampling.guidance if guidance is None else guidance,
                low_res=low_res,
                aug_level=level,
                negative=negative,
                variance=getattr(run, "needs_variance", False),
            )
            steps = self.sampling.num_steps if num_steps is None else num_steps
            times = self.sampling.spacing(steps, self.process.schedule)

            a_step = getattr(run, "evaluations_per_step", 1)
            finite: list[Tensor] = []  # (B,) of each evaluation's x0, on the device, which nothing waits for

            def counted(x_t: Tensor, t: Tensor) -> Tensor:
                result = denoise(x_t, t)
                if on_step is not None and len(finite) % a_step == 0:
                    on_step()
                finite.append(are_finite(result.x0 if isinstance(result, Denoised) else result))
                return result

            images = run(counted, x, times, schedule=self.process.schedule, generator=generators)
            if bool((bad := ~are_finite(images)).any()):
                step = next((i // a_step + 1 for i, each in enumerate(finite) if not bool(each.all())), steps)
                raise NonFiniteSamples(
                    f"stage {self.stage_name!r} gave NaN or infinite values at step {step} of {steps}, in "
                    f"{int(bad.sum())} of {len(bad)} images; sample with less guidance or in float32, or take an "
                    "earlier checkpoint",
                    images,
                    bad.cpu(),
                )
            return images
        finally:
            self.train(was_training)  # type: ignore[attr-defined]

    def prepare_low_res(
        self,
        low_res: Tensor | None,
        aug_level: float | None,
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The conditioning image and its level as the network takes them; (None, None) for a base stage."""
        if low_res is not None or aug_level is not None:
            raise InputError(f"{type(self).__name__} takes no low_res image and no aug_level; drop them")
        return None, None

    # ---- Lightning

    def setup(self, stage: str) -> None:
        self.mean_loss, self.mean_val_loss = Means(), Means()  # a new run; a checkpoint's is loaded after this

    def configure_optimizers(self) -> Any:
        optimizer = self.optimization.make(self)  # type: ignore[arg-type]
        # Not trainer.estimated_stepping_batches: reading it drops the loader's state (Lightning #20550).
        total = self.trainer.max_steps  # type: ignore[attr-defined]
        self.optimization.check_length(total)
        shares = partial(self.optimization.share_at, total=total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain data from which `load_from_checkpoint` and Cascade.from_checkpoints rebuild the stage.
        checkpoint["hyper_parameters"] = {**self.hyperparameters(), "_instantiator": f"{__name__}.instantiate"}
        checkpoint["origin"] = self.origin
        checkpoint.setdefault("weights_record", self.weights_record)  # unless the EMA's callback has put its average in
        checkpoint["stage_class"] = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint["base_digest"] = self.base_digest
        if (trainer := getattr(self, "_trainer", None)) is not None:
            checkpoint["mean_loss"] = self.mean_loss.parts(trainer.strategy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (trainer := getattr(self, "_trainer", None)) is not None and "mean_loss" in checkpoint:
            self.mean_loss.restore(checkpoint["mean_loss"], trainer.global_rank, trainer.world_size)
        self.origin, self.weights_record = checkpoint.get("origin"), checkpoint.get("weights_record")

    def hyperparameters(self) -> dict[str, Any]:
        """The stage's arguments as plain data, without those that only training uses."""
        return describe_args(self, skip=self.undescribed)


def instantiate(cls: type, arguments: dict[str, Any]) -> Any:
    """What `load_from_checkpoint` makes a stage with."""
    return build_as(cls, arguments)


saving._ALLOWED_INSTANTIATORS.add(f"{__name__}.{instantiate.__name__}")  # Lightning runs no other that a file names
