"""Models of Hugging Face's libraries from a local folder, its cache or its hub; none of their code is ever run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagen_lightning.types import InputError

_SENTENCE_END = re.compile(r"\.\s|(?<!:)\n(?=[A-Z])")


class LoadError(Exception):
    """A model's part that cannot be had; the message is the reason, one sentence on one line."""


def import_transformers() -> Any:
    """The library, imported when it is first needed."""
    from imagen_lightning.torchvision_mend import mend

    mend()  # transformers imports torchvision
    import transformers

    return transformers


def local_folder(name_or_path: str, what: str, needs: str) -> Path | None:
    """The local folder of that name, or None for a name on the hub.

    Args:
        name_or_path: "google/t5-v1_1-small", or a folder.
        what: the model's kind, for the message: "text encoder".
        needs: what such a folder holds, and a hub name for an example.

    Raises:
        InputError: a path that can be no hub name and does not exist.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1:
        raise InputError(f"{what} folder {name_or_path!r} does not exist; give the folder that holds {needs}")
    return None


def load_part(
    load: Callable[..., Any],
    name_or_path: str,
    folder: Path | None,
    revision: str | None,
    subfolder: str = "",
    **options: Any,
) -> Any:
    """Calls a `from_pretrained`: in the folder, or in the cache and then on the hub.

    Args:
        load: the function.
        name_or_path: the model's name on the hub.
        folder: the local folder that holds it, or None (see `local_folder`).
        revision: branch, tag or commit on the hub.
        subfolder: where in either the part lies; "" for the top.
        options: more for the function.

    Raises:
        LoadError: it fails.
    """
    from pickle import UnpicklingError  # noqa: TID251  (what torch.load raises where it refuses to unpickle)

    from safetensors import SafetensorError

    source = str(folder or name_or_path)
    options |= {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    options |= {"subfolder": subfolder} if subfolder else {}
    try:
        try:
            return load(source, local_files_only=True, **options)
        except OSError:
            if folder is not None:
                raise
            reach_hub(source, subfolder, revision)
            return load(source, **options)
    except UnpicklingError as error:
        raise LoadError("its weights hold Python objects, which are never unpickled, or are damaged") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise LoadError(first_sentence(error)) from error


def cached_folder(source: str, subfolder: str, revision: str | None) -> Path | None:
    """Where Hugging Face's cache holds a hub model's files, or those of its subfolder; None where it has none."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, _config(subfolder), revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def reach_hub(source: str, subfolder: str, revision: str | None) -> None:
    """Raises OSError where the hub does not answer, at once: a load would try six times, with lines of its own."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(source, _config(subfolder), revision=revision))
    except Exception as error:  # the class is that of whichever HTTP client the hub's library uses
        # What the hub itself refuses is left to the load, which meets it again and words it better.
        if not isinstance(error, OSError | ValueError):
            raise OSError(str(error) or type(error).__name__) from error


def _config(subfolder: str) -> str:
    return f"{subfolder}/config.json" if subfolder else "config.json"


def first_sentence(error: Exception) -> str:
    """What an error says first, on one line."""
    return " ".join(_SENTENCE_END.split(str(error).strip(), maxsplit=1)[0].split()).removesuffix(".")
