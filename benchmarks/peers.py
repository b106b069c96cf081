"""The networks that the benchmarks compare, at matched widths, and the machine that they run on.

Every peer is Imagen's base U-Net as its project builds it: channels dim x (1, 2, 3, 4), three residual blocks a level,
attention with text at every level but the first.

diffusers comes with `pip install -e ".[dev]"`. imagen-pytorch is optional: `pip install --no-deps imagen-pytorch kornia
kornia_rs ema-pytorch beartype pytorch-warmup datasets einops pandas pyarrow multiprocess dill xxhash`, into
this project's environment. `--no-deps` keeps its versions of torch and others; the last five are what
datasets imports.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import imagen_lightning.torchvision_mend  # noqa: F401  (before the peers)

# isort: split
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MULTIPLIERS = (1, 2, 3, 4)


@dataclass
class Shape:
    """What a training step works on: images of size x size, captions of `tokens` states of `text_dim` features."""

    dim: int = 64
    size: int = 64
    batch: int = 4
    tokens: int = 32
    text_dim: int = 512


@dataclass
class Peer:
    """A module to train, and its loss of images (B, 3, H, W) in [-1, 1], text states (B, L, D) and mask (B, L)."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]


def unet_arguments(dim: int, text_dim: int) -> dict[str, Any]:
    """Our U-Net as DeepFloyd IF has it, which is what diffusers' builds."""
    return {
        "dim": dim,
        "multipliers": list(MULTIPLIERS),
        "num_blocks": 3,
        "attention": [False, True, True, True],
        "text_dim": text_dim,
        "text_projection": dim * MULTIPLIERS[-1],
        "text_norm": "group",
        "text_pooling": "attention",
        "pooling_heads": 8,
        "head_dim": dim,
        "out_channels": 6,
        "activation": "gelu",
    }


def ours(shape: Shape, low_res: int | None = None, network: nn.Module | None = None, **execution: Any) -> Peer:
    """imagen-lightning: a stage with its own training step, epsilon on the cosine schedule.

    Args:
        shape: of the step.
        low_res: side of the low-resolution images of a super-resolution stage; None makes a base stage.
        network: in place of the U-Net that the peers have too.
        execution: channels_last, compile.
    """
    from imagen_lightning.diffusion import Epsilon
    from imagen_lightning.networks import UNet
    from imagen_lightning.stages import BaseStage, SuperResolutionStage
    from imagen_lightning.stages.settings import Diffusion, Execution, TextSettings
    from imagen_lightning.text import TinyTextEncoder
    from imagen_lightning.types import Batch, Text

    if network is None:
        arguments = {**unet_arguments(shape.dim, shape.text_dim), "out_channels": 3, "low_res": low_res is not None}
        network = UNet(**arguments)
    settings = {
        "network": network,
        "text": TextSettings(TinyTextEncoder(dim=shape.text_dim)),
        "diffusion": Diffusion(parametrization=Epsilon()),
        "execution": Execution(**execution),
    }
    if low_res is None:
        stage = BaseStage(shape.size, **settings)
    else:
        stage = SuperResolutionStage(shape.size, low_res, **settings)
    stage.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    stage.position = 0  # type: ignore[assignment]

    def loss(images: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        count = len(images)
        positions = torch.arange(count, device=images.device) + stage.position
        stage.position += count  # type: ignore[operator,assignment]
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        return stage.training_step(Batch(pixels, [""] * count, [""] * count, positions, Text(states, mask, pooled)), 0)

    return Peer(stage, loss)


def diffusers_unet(dim: int, size: int, text_dim: int, low_res: bool = False) -> nn.Module:
    from diffusers import UNet2DConditionModel

    widths = tuple(dim * multiplier for multiplier in MULTIPLIERS)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=6 if low_res else 3,
        class_embed_type="timestep" if low_res else None,
        out_channels=6,
        block_out_channels=widths,
        layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        cross_attention_dim=widths[-1],
        encoder_hid_dim=text_dim,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
        attention_head_dim=dim,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        only_cross_attention=False,
        cross_attention_norm="group_norm",
        norm_num_groups=32,
    )


def diffusers(shape: Shape, low_res: int | None = None, compile: bool = False, channels_last: bool = False) -> Peer:
    """diffusers: the U-Net of DeepFloyd IF's pipelines with the loss of its text-to-image training script, epsilon."""
    from diffusers import DDPMScheduler

    unet = diffusers_unet(shape.dim, shape.size, shape.text_dim, low_res is not None)
    if channels_last:
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        unet.compile()
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")

    def loss(images: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        steps = torch.randint(0, 1000, (len(images),), device=images.device)
        noised, levels = scheduler.add_noise(images, noise, steps), None
        if low_res is not None:
            levels = torch.randint(0, 1000, (len(images),), device=images.device)
            small = nn.functional.interpolate(images, size=(low_res, low_res), mode="area")
            large = nn.functional.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=True)
            noised = torch.cat([noised, scheduler.add_noise(large, torch.randn_like(large), levels)], dim=1)
        output = unet(noised, steps, states, class_labels=levels, encoder_attention_mask=mask.long()).sample[:, :3]
        return nn.functional.mse_loss(output.float(), noise)

    return Peer(unet, loss)


def imagen_pytorch(shape: Shape) -> Peer:
    """imagen-pytorch: its Unet in its Imagen."""
    import transformers

    # It asks the hub for t5-small's width while it is being imported.
    transformers.T5Config.from_pretrained = classmethod(lambda cls, name, **_: cls(d_model=512))  # type: ignore[assignment]
    from imagen_pytorch import Imagen, Unet  # type: ignore[import-not-found]

    unet = Unet(
        dim=shape.dim,
        dim_mults=MULTIPLIERS,
        num_resnet_blocks=3,
        text_embed_dim=shape.text_dim,
        layer_attns=(False, True, True, True),
        layer_cross_attns=(False, True, True, True),
        attn_heads=8,
        ff_mult=2.0,
        memory_efficient=False,
    )
    imagen = Imagen(
        unets=(unet,), image_sizes=(shape.size,), timesteps=1000, cond_drop_prob=0.1, text_embed_dim=shape.text_dim
    )

    def loss(images: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        return imagen((images + 1) / 2, text_embeds=states, text_masks=mask, unet_number=1)

    return Peer(imagen, loss)


PEERS: dict[str, Callable[..., Peer]] = {"ours": ours, "diffusers": diffusers, "imagen-pytorch": imagen_pytorch}


def inputs(shape: Shape, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random images, text states, and a mask of all tokens."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape.batch, 3, shape.size, shape.size, generator=generator) * 2 - 1
    states = torch.randn(shape.batch, shape.tokens, shape.text_dim, generator=generator)
    return images.to(device), states.to(device), torch.ones(shape.batch, shape.tokens, dtype=torch.bool, device=device)


def count_flops(step: Callable[[], Any]) -> int:
    """FLOPs of one call, attention on the CPU too, which torch's counter leaves out."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        step()
    return counter.get_total_flops()


def matmul_rate(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.5) -> float:
    """The best FLOP/s of a square matrix product in `seconds`."""
    size = 8192 if device.startswith("cuda") else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out, best, end = a @ b, float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "revision": revision.stdout.strip() or None,
    }
