"""How far an EfficientUNet shifts colours: its samples' mean colour against that of the low-resolution input.

    python benchmarks/colour_shift.py [--steps 1000] [--images 64] [--sampling-steps 25]

For each parametrization and way of upsampling a small 4 -> 16 stage is trained on built-in shapes from the same
images, noise and first weights, and enlarges held-out shapes without text, guidance or augmentation. The area filter
keeps the mean, so a right answer has the input's own: what differs is the network's shift. Printed, in units of 1/255:

- rms: root mean square over images and channels of the difference in mean;
- bias: the largest over channels of its mean over images, a tint common to all;
- pixel: root mean square over pixels of the difference from the true image.
"""

from __future__ import annotations

import argparse
import time

import torch

from imagen_lightning.data.shapes import sample
from imagen_lightning.diffusion import Epsilon, Parametrization, V
from imagen_lightning.images import downsample, to_float
from imagen_lightning.networks import EfficientUNet
from imagen_lightning.stages import Diffusion, Sampling, SuperResolutionStage
from imagen_lightning.types import Batch

SIZE, LOW = 16, 4


def shapes(split: str, count: int) -> torch.Tensor:
    """(count, 3, SIZE, SIZE) uint8."""
    images = torch.stack([sample(0, position, split)[0] for position in range(count)])
    return downsample(images.float(), SIZE).round().to(torch.uint8)


def train(stage: SuperResolutionStage, images: torch.Tensor, num_steps: int, batch_size: int = 16) -> float:
    """Trains for a number of steps and returns the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(stage.parameters(), lr=2e-3, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    losses = []
    for step in range(num_steps):
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        batch = Batch(images[positions % len(images)], [""] * batch_size, [""] * batch_size, positions)
        x0, conditioning = stage.condition(batch, stage.seed, training=True)
        loss = stage.diffusion_loss(x0, conditioning, positions, stage.seed)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return sum(losses[-num_steps // 10 :]) / len(losses[-num_steps // 10 :])


def measure(stage: SuperResolutionStage, images: torch.Tensor) -> tuple[float, float, float]:
    """(rms, bias, pixel) over the images, in units of 1/255."""
    truth = to_float(images)
    low_res = downsample(truth, LOW)
    generators = [torch.Generator().manual_seed(i) for i in range(len(images))]
    made = stage.sample([""] * len(images), generators, low_res=low_res, aug_level=0.0)
    shift = 127.5 * (made.mean(dim=(2, 3)) - low_res.mean(dim=(2, 3)))
    pixel = 127.5 * (made - truth).square().mean().sqrt()
    return shift.square().mean().sqrt().item(), shift.mean(dim=0).abs().max().item(), pixel.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--sampling-steps", type=int, default=25)
    options = parser.parse_args()
    start = time.process_time()
    seen, held_out = shapes("train", 2048), shapes("val", options.images)
    print(f"{'parametrization':16} {'upsampling':14} {'rms':>6} {'bias':>6} {'pixel':>6} {'loss':>8} {'CPU s':>8}")
    parametrizations: tuple[type[Parametrization], ...] = (Epsilon, V)
    for parametrization in parametrizations:
        for upsampling in ("nearest", "pixel_shuffle", "transposed"):
            torch.manual_seed(0)
            network = EfficientUNet(32, [1, 2], [1, 1], ["none", "self"], head_dim=32, groups=8, upsampling=upsampling)
            stage = SuperResolutionStage(
                SIZE,
                LOW,
                network,
                diffusion=Diffusion(parametrization=parametrization()),
                sampling=Sampling(num_steps=options.sampling_steps, guidance=1.0),
            )
            begun = time.process_time()
            loss = train(stage, seen, options.steps)
            rms, bias, pixel = measure(stage, held_out)
            print(
                f"{parametrization.__name__:16} {upsampling:14} {rms:6.2f} {bias:6.2f} {pixel:6.2f} {loss:8.4f} "
                f"{time.process_time() - begun:8.1f}",
                flush=True,
            )
    print(f"{time.process_time() - start:.0f} s of CPU time in all")


if __name__ == "__main__":
    main()
