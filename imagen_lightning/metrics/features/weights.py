"""Weights files: found or downloaded, checked by SHA-256, read without unpickling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.digests import digest_file


@dataclass(frozen=True)
class Published:
    """A file that a project publishes.

    Attributes:
        url: where.
        sha256: its hash, or the beginning of it where no more is known.
    """

    url: str
    sha256: str

    @property
    def cached(self) -> Path:
        """Where torch.hub keeps it; torch-fidelity and torchvision look there too."""
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(self.url).path).name


def read_weights(
    path: str | Path | None, published: Published, what: str, sha256: str | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors of a weights file, and its SHA-256.

    Args:
        path: the file, PyTorch's or safetensors; None for torch.hub's copy of the published one, downloaded where
            absent.
        published: what is expected.
        what: the weights' name in messages.
        sha256: expected instead of the published file's.

    Raises:
        InputError: no such file, no network, another file than expected, or one that holds more than tensors.
    """
    found = _download(published, what) if path is None else Path(path).expanduser()
    if not found.is_file():
        raise InputError(f"{what}: there is no file {str(found)!r}; give {published.cached.name} from {published.url}")
    digest = digest_file(found)
    expected = sha256 or published.sha256
    if not digest.startswith(expected.lower()):
        mend = f"remove it or fetch {published.url} again" if path is None else "give the right file, or its sha256"
        raise InputError(f"{what}: {str(found)!r} has SHA-256 {digest}, not {expected}; {mend}")
    return read_tensors(found, what), digest


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of PyTorch's, which is not unpickled.

    Raises:
        InputError: the file is damaged or holds more than named tensors.
    """
    from pickle import UnpicklingError  # noqa: TID251  (what torch.load raises where it refuses to unpickle)

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError, SafetensorError) as error:
        raise InputError(f"{what}: {str(path)!r} cannot be read as tensors alone; it is damaged or unsafe") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{what}: {str(path)!r} is no state_dict of tensors")
    return state


@contextmanager
def without_random_numbers() -> Iterator[None]:
    """Leaves the CPU's random numbers as they were: networks draw first weights before they are given theirs."""
    with torch.random.fork_rng(devices=[]):
        yield


def _download(published: Published, what: str) -> Path:
    path = published.cached
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Whole or not at all, and refused where the hash is another.
            torch.hub.download_url_to_file(published.url, str(path), hash_prefix=published.sha256, progress=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            raise InputError(
                f"{what} cannot be downloaded from {published.url} ({error}): give the path of a local copy, or put it "
                f"at {path}"
            ) from error
    return path
