"""Addresses that fsspec opens (http, s3, gs, …): what they are, what they list, and attempts to read them."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from imagen_lightning.data.braces import expand_braces
from imagen_lightning.errors import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")

_SILENCE = 30  # seconds without a byte before a connection is given up
_FINAL = (400, 401, 403, 410)  # HTTP answers that another attempt will not change
_FINAL_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # nor these of the disk


def is_remote(name: str) -> bool:
    """Whether a name is an address, such as `s3://bucket/train-00000.tar`, and not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*(://|::)", name) is not None


def expand_addresses(pattern: str) -> list[str]:
    """Braces, and globs where the backend can list, to addresses in order; one that ends in `/` is a folder.

    Raises:
        InputError: the backend is not installed, cannot list, cannot be reached, or lists nothing.
    """
    found: list[str] = []
    for address in expand_braces(pattern):
        text = f"{address}*.tar" if address.endswith("/") else address
        path, magic = (text.split("?")[0], "*[") if text.startswith("http") else (text, "*?[")
        found.extend(_list(text) if any(sign in path for sign in magic) else [text])
    return found


def _list(pattern: str) -> list[str]:
    system, path = filesystem(pattern)
    try:
        names = attempt(lambda: system.glob(path), f"shards {pattern!r}")
    except (FileNotFoundError, NotImplementedError):
        names = []
    if not names:
        raise InputError(f"shards {pattern!r} list nothing; check the address, or name them with {{00000..00009}}")
    return sorted(str(system.unstrip_protocol(name)) for name in names)


def filesystem(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, made in this process, and the path within it."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    options: dict[str, Any] = {}
    if address.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    protocol = re.split("://|::", address)[0]
    try:
        system, path = url_to_fs(address, **options)
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
        raise InputError(f"{address!r} needs a package: pip install {package} ({error})") from None
    except ValueError as error:
        raise InputError(f"{address!r} cannot be opened: {error}") from None
    return system, path


class WrongTransfer(Exception):
    """What arrived is not what was there."""


def attempt(action: Callable[[], T], what: str, attempts: int = 5, pause: float = 0.5) -> T:
    """Calls a function until the network lets it succeed, with pauses that double.

    Raises:
        FileNotFoundError: there is no such address.
        InputError: all attempts failed, or one in a way that another will not mend.
    """
    for number in range(attempts):
        try:
            return action()
        except _network_errors() as error:  # noqa: PERF203
            cause = _cause(error)
            if isinstance(cause, FileNotFoundError):
                raise
            reason = str(cause) or type(cause).__name__
            final = isinstance(cause, PermissionError) or getattr(cause, "status", None) in _FINAL
            final = final or getattr(cause, "errno", None) in _FINAL_ERRNO
            if final or number == attempts - 1:
                tries = "" if final else f" in {attempts} attempts"
                message = f"{what} cannot be read{tries}: {reason}; check address, access and network"
                raise InputError(message) from error
            log.info("%s: %s; attempt %d follows", what, reason, number + 2)
            time.sleep(pause * 2**number)
    raise AssertionError("no attempt was made")


def _cause(error: BaseException) -> BaseException:
    """What happened: fsspec calls a server that cannot be reached a missing file."""
    cause = error.__cause__
    unreached = isinstance(cause, _network_errors()) and getattr(cause, "status", None) != 404
    return cause if isinstance(error, FileNotFoundError) and cause is not None and unreached else error


def _network_errors() -> tuple[type[Exception], ...]:
    """What the backends that are loaded raise for a failing network."""
    names = (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("gcsfs.retry", "HttpError"),
    )
    found = [getattr(sys.modules[module], name) for module, name in names if module in sys.modules]
    return (OSError, EOFError, asyncio.TimeoutError, WrongTransfer, *found)
