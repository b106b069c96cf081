"""Extractors from a file: a network that someone exported to TorchScript or ONNX, and how pictures are prepared."""

from __future__ import annotations

import hashlib
import io
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.features.base import FeatureExtractor

RANGES = {"0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0), "0..255": (0.0, 255.0)}
FILTERS: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest"},
    "area": {"mode": "area"},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "antialiased bilinear": {"mode": "bilinear", "align_corners": False, "antialias": True},
    "antialiased bicubic": {"mode": "bicubic", "align_corners": False, "antialias": True},
}


class FileFeatures(FeatureExtractor):
    """A network in a file that maps (B, 3, size, size) float32 to (B, D).

    Pictures are resized to size x size, clamped to 0…255, brought to `value_range`, then normalised: (x - mean) / std.
    These settings are part of every value's protocol.

    Args:
        path: the file.
        size: side in pixels that the network takes.
        resize_filter: "antialiased bilinear" (default), "antialiased bicubic", "bilinear", "area" or "nearest".
        value_range: "0..1" (default), "-1..1" or "0..255", before mean and std.
        mean: three numbers, subtracted by channel.
        std: three numbers, divided by.
        name: in protocols; default the file's name.
        sha256: expected of the file; a file that differs is not opened.

    Raises:
        InputError: an unknown filter or range, sizes, mean or std that make no sense; at first use, a file that is
            absent, is another than expected, or holds no network that gives (B, D).
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        resize_filter: str = "antialiased bilinear",
        value_range: str = "0..1",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        name: str | None = None,
        sha256: str | None = None,
    ) -> None:
        for word, known, what in ((resize_filter, FILTERS, "resize_filter"), (value_range, RANGES, "value_range")):
            if word not in known:
                raise InputError(f"{what} {word!r} of {str(path)!r} is unknown; use one of {', '.join(known)}")
        if size < 1 or len(mean) != 3 or len(std) != 3 or not all(std):
            raise InputError(f"{str(path)!r} needs a size above 0, three means and three std other than 0")
        self.path = Path(path).expanduser()
        self.size = size
        self.filter = resize_filter
        self.value_range = value_range
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.given_name = name
        self.expected_sha256 = sha256

    @property
    def name(self) -> str:
        return self.given_name or self.path.name

    @property
    def sha256(self) -> str:
        """Of the file."""
        return self._file[1]

    @property
    def resize_filter(self) -> str:
        mean, std = (" ".join(f"{x:g}" for x in row) for row in (self.mean, self.std))
        return f"{self.filter} to {self.size} px, range {self.value_range}, mean {mean}, std {std}"

    @cached_property
    def num_features(self) -> int:
        return self(torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8)).shape[1]

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to what the network takes: (B, 3, size, size) float32."""
        x = images.float()
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), **FILTERS[self.filter]).clamp(0, 255)
        low, high = RANGES[self.value_range]
        x = x * ((high - low) / 255) + low
        mean, std = (torch.tensor(row, device=x.device).view(1, 3, 1, 1) for row in (self.mean, self.std))
        return (x - mean) / std

    def _features(self, images: Tensor) -> Tensor:
        output = self._run(self.prepare(images))
        if (
            not isinstance(output, Tensor)
            or output.shape[:1] != images.shape[:1]
            or output[0].numel() != output.shape[1]
        ):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"the network in {str(self.path)!r} gives {got} for {len(images)} images; export one of (B, D)"
            )
        return output.flatten(1).float().to(images.device)

    @abstractmethod
    def _run(self, pixels: Tensor) -> Any:
        """(B, 3, size, size) float32 to (B, D), or (B, D, 1, 1)."""

    @cached_property
    def _file(self) -> tuple[bytes, str]:
        """The bytes that are hashed are the bytes that are loaded."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"extractor file {str(self.path)!r} cannot be read: {error.strerror}") from error
        digest = hashlib.sha256(data).hexdigest()
        if self.expected_sha256 is not None and digest != self.expected_sha256.lower():
            raise InputError(
                f"extractor file {str(self.path)!r} has SHA-256 {digest}, not {self.expected_sha256}; it is not opened"
            )
        return data, digest


class TorchScriptFeatures(FileFeatures):
    """A TorchScript file, made by `torch.jit.save`; see `FileFeatures` for the arguments.

    Such a file is a program. PyTorch reads it without Python's pickle and runs it in an interpreter of its own, whose
    operators can nevertheless read and write files: open only files whose origin you trust, and give their `sha256`.
    """

    def _run(self, pixels: Tensor) -> Any:
        return self._network.to(pixels.device)(pixels)

    @cached_property
    def _network(self) -> Any:
        try:
            return torch.jit.load(io.BytesIO(self._file[0]), map_location="cpu").eval()
        except RuntimeError as error:
            raise InputError(
                f"extractor file {str(self.path)!r} is no TorchScript; make it by torch.jit.save"
            ) from error


class OnnxFeatures(FileFeatures):
    """An ONNX file, run by onnxruntime on the CPU; see `FileFeatures` for the arguments.

    onnxruntime comes with `pip install "imagen-lightning[onnx]"`. ONNX holds a graph of known operators and no program.
    The file must hold its weights itself: it is loaded from the bytes that were hashed, so that tensors in a second
    file are refused. The first input and output are taken.
    """

    def _run(self, pixels: Tensor) -> Any:
        session = self._session
        feed = {session.get_inputs()[0].name: pixels.cpu().numpy()}
        return torch.from_numpy(session.run([session.get_outputs()[0].name], feed)[0])

    @cached_property
    def _session(self) -> Any:
        try:
            import onnxruntime
        except ImportError:
            raise InputError(
                f"extractor file {str(self.path)!r} needs `pip install onnxruntime`; it is no part of the installation"
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(self._file[0], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class but this one
            raise InputError(
                f"extractor file {str(self.path)!r} is no ONNX that onnxruntime can run ({str(error)[:200]}); "
                f"export it with its weights inside"
            ) from error
