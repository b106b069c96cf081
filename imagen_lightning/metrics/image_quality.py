"""How near a super-resolved picture is to the true one: PSNR, SSIM and LPIPS, one number a picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.images import to_float
from imagen_lightning.metrics.features.base import exact_float32
from imagen_lightning.metrics.features.weights import Published, read_weights, without_random_numbers
from imagen_lightning.torchvision_mend import mend

_PIXELS = 1 << 22  # in memory at once
_SMALLEST_SSIM = 6  # px: the window of 11 is reflected at the edges
_SMALLEST_LPIPS = 32  # px: smaller ones vanish in the network

_HUB = "https://download.pytorch.org/models/"
_BACKBONES = {
    "alex": Published(_HUB + "alexnet-owt-7be5be79.pth", "7be5be79"),
    "vgg": Published(_HUB + "vgg16-397923af.pth", "397923af"),
    "squeeze": Published(_HUB + "squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
}


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture's 8-bit values: (B,) float64 in dB, infinite where they are equal.

    Args:
        images: (B, 3, H, W) uint8.
        truth: likewise.

    Raises:
        InputError: other dtypes, or shapes that differ.
    """
    mend()  # torchmetrics imports torchvision
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def each(x: Tensor, y: Tensor) -> Tensor:
        return peak_signal_noise_ratio(x, y, data_range=255.0, reduction="none", dim=(1, 2, 3))

    return _by_chunks(each, images, truth, "PSNR", 1)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Gaussian window of sigma 1.5) of each picture: (B,) float64 in [-1, 1].

    Args:
        images: (B, 3, H, W) uint8, H and W at least 6.
        truth: likewise.

    Raises:
        InputError: other dtypes, shapes that differ or are too small.
    """
    mend()
    from torchmetrics.functional.image import structural_similarity_index_measure

    def each(x: Tensor, y: Tensor) -> Tensor:
        return structural_similarity_index_measure(x, y, data_range=255.0, reduction="none")  # type: ignore[return-value]

    return _by_chunks(each, images, truth, "SSIM", _SMALLEST_SSIM)


class LPIPS:
    """Learned perceptual distance (Zhang et al. 2018, version 0.1), by torchmetrics' linear layers.

    Its backbone's ImageNet weights are torchvision's. Nothing is loaded before the first use.

    Args:
        network: "alex", as the paper reports, "vgg" or "squeeze".
        weights: torchvision's weights file of that backbone; default torch.hub's folder, downloaded where absent.

    Raises:
        InputError: an unknown network; at first use, weights that cannot be had or are others.
    """

    def __init__(self, network: str = "alex", weights: str | Path | None = None) -> None:
        if network not in _BACKBONES:
            raise InputError(f"LPIPS network {network!r} is unknown; use one of {', '.join(_BACKBONES)}")
        self.network = network
        self.weights = weights

    @property
    def name(self) -> str:
        return f"lpips-{self.network}"

    @property
    def sha256(self) -> str:
        """Of the backbone's weights file."""
        return self._loaded[1]

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """(B,) float64 distances, 0 where pictures are equal.

        Args:
            images: (B, 3, H, W) uint8, H and W at least 32.
            truth: likewise.

        Raises:
            InputError: other dtypes, shapes that differ or are too small; see the class.
        """
        net = self._loaded[0].to(images.device)

        def each(x: Tensor, y: Tensor) -> Tensor:
            with exact_float32(x.device):
                return net(to_float(x), to_float(y)).flatten()

        return _by_chunks(each, images, truth, "LPIPS", _SMALLEST_LPIPS)

    @cached_property
    def _loaded(self) -> tuple[Any, str]:
        mend()
        from torchmetrics.functional.image.lpips import _NoTrainLpips  # its public class only downloads

        state, sha256 = read_weights(self.weights, _BACKBONES[self.network], f"the backbone of LPIPS ({self.network})")
        with without_random_numbers():
            net: Any = _NoTrainLpips(net=self.network, pnet_rand=True)  # type: ignore[arg-type]
        # "slice2.3.weight" and "slices.1.3.weight" are torchvision's "features.3.weight".
        names = {
            key: "features." + key.split(".", 2 if key.startswith("slices.") else 1)[-1] for key in net.net.state_dict()
        }
        missing = sorted(name for name in names.values() if name not in state)
        if missing:
            raise InputError(
                f"the weights for LPIPS ({self.network}) lack {missing[0]}: give torchvision's file of that network"
            )
        net.net.load_state_dict({key: state[name] for key, name in names.items()})
        return net, sha256


@torch.no_grad()
def _by_chunks(
    measure: Callable[[Tensor, Tensor], Tensor], images: Tensor, truth: Tensor, name: str, smallest: int
) -> Tensor:
    """Applies `measure` to pairs of float64 pictures in [0, 255] in chunks; gives (B,) float64."""
    for given in (images, truth):
        if given.dtype != torch.uint8 or given.ndim != 4 or given.shape[1] != 3:
            raise InputError(f"{name} needs uint8 images (B, 3, H, W), not {given.dtype} {tuple(given.shape)}")
    if images.shape != truth.shape:
        raise InputError(f"{name} needs images of one shape, not {tuple(images.shape)} and {tuple(truth.shape)}")
    if min(images.shape[-2:]) < smallest:
        raise InputError(f"{name} needs images of at least {smallest} px, not {tuple(images.shape[-2:])}")
    truth = truth.to(images.device)
    chunk = max(1, _PIXELS // images[0].numel()) if len(images) else 1
    pairs = zip(images.split(chunk), truth.split(chunk))
    none = torch.zeros(0, dtype=torch.float64, device=images.device)
    return torch.cat([none, *(measure(x.double(), y.double()).double() for x, y in pairs if len(x))])
