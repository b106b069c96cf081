"""How much memory a piece of work took at its peak."""

from __future__ import annotations

from pathlib import Path

import torch

_RESET = "5"  # of the peak resident set (proc(5), clear_refs)


class PeakMemory:
    """The peak from the moment that this is made: of a GPU what torch took, else of the whole process.

    A process's peak holds all that lies in it, the cascade's weights and the libraries too (some 0.5 GB). It is known
    on Linux alone.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device, proc: Path = Path("/proc/self")) -> None:
        self._device = device
        self._proc = proc
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._known = self._reset()

    def read(self) -> int | None:
        """Bytes, None where nobody knows."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if not self._known:
            return None
        lines = (self._proc / "status").read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)

    def _reset(self) -> bool:
        try:
            (self._proc / "clear_refs").write_text(_RESET, encoding="utf-8")
        except OSError:  # another system, or one that does not let us
            return False
        return True
