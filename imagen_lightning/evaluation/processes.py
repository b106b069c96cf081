"""The processes that share an evaluation."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from imagen_lightning.errors import InputError
from imagen_lightning.evaluation.drawing import Part

_TO_MEET = datetime.timedelta(minutes=10)  # from the first process's start to the last one's
_TO_WORK = datetime.timedelta(days=7)  # one may draw far longer than another


def own_device() -> str:
    """The GPU that is this process's among those of its machine, else the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


@contextmanager
def processes() -> Iterator[tuple[Part, Callable[[], None]]]:
    """This process's part, and how it waits for the others.

    Raises:
        InputError: another process did not come, or has ended while this one waits for it.
    """
    part = Part.of_environment()
    if part.world_size == 1:
        yield part, lambda: None
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=_TO_MEET)
    except RuntimeError as error:
        raise InputError(
            f"process {part.rank} of {part.world_size} did not meet the others ({str(error).splitlines()[0]}); start "
            "all of them with the same address"
        ) from error
    group = dist.new_group(timeout=_TO_WORK)

    def meet() -> None:
        try:
            dist.barrier(group=group)
        except RuntimeError as error:
            raise InputError(
                f"another process has ended, and process {part.rank} of {part.world_size} with it; its own message "
                "says why; the same command goes on"
            ) from error

    try:
        yield part, meet
    finally:
        dist.destroy_process_group()
