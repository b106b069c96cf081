"""What operations cost: the memory that their tensors hold, the most that they held at once, and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BLOCK = 512  # bytes: a GPU's allocator rounds up to a multiple of it
_aten = torch.ops.aten
_SAME_FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside it make, until nothing holds them any more.

    A storage counts once however many tensors share it; tensors without memory count as if they had it. FLOPs are those
    of products and convolutions, by torch.utils.flop_counter's formulas.

    Args:
        block: sizes are rounded up to a multiple of it.

    Attributes:
        now: bytes that are held.
        peak: the most since the start, or since `restart`.
        flops: so far.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.block = block
        self.now = self.peak = self.flops = 0
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> int:
        """Counts tensors that were made before, and returns by how many bytes."""
        before = self.now
        for tensor in tensors:
            self._add(tensor)
        return self.now - before

    def restart(self) -> None:
        """From here on the peak is that of what follows."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value)
        packet = func._overloadpacket
        formula = flop_registry.get(_SAME_FLOPS.get(packet, packet))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _add(self, tensor: Tensor) -> None:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = -(-storage.nbytes() // self.block) * self.block
            self._known[key] = size, weakref.ref(storage, partial(self._free, key))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, key: int, _: Any) -> None:
        self.now -= self._known.pop(key)[0]


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor, or those that a tensor subclass (a quantized state, say) is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """The memory of tensors, of which several may share one storage."""
    sizes = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())
