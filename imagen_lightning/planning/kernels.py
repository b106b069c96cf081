"""What a device's kernels would do, on tensors of the meta device, which have shapes and no memory.

Meta tensors know neither torch.autocast nor the fused attention of a real device, and have no values. `Kernels`
supplies all three, so that a training step runs on them with the dtypes, and keeps the tensors, that it would there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from imagen_lightning.networks.layers import recomputed_within

Device = Literal["cuda", "cpu"]

# torch.autocast's lists (torch/include/ATen/autocast_mode.h), by the names of torch's functions and operators.
LOWER = frozenset(
    [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "mv",
        "bmm",
        "addmm",
        "addmv",
        "addr",
        "addbmm",
        "baddbmm",
        "einsum",
        "prelu",
        "chain_matmul",
        "multi_dot",
        "vecdot",
        "scaled_dot_product_attention",
    ]
)
FLOAT: dict[str, frozenset[str]] = {
    "cuda": frozenset(
        [
            "acos",
            "asin",
            "cosh",
            "erfinv",
            "exp",
            "expm1",
            "log",
            "log10",
            "log2",
            "log1p",
            "reciprocal",
            "rsqrt",
            "sinh",
            "tan",
            "pow",
            "__pow__",
            "__rpow__",
            "softplus",
            "layer_norm",
            "native_layer_norm",
            "rms_norm",
            "group_norm",
            "cosine_similarity",
            "l1_loss",
            "smooth_l1_loss",
            "huber_loss",
            "mse_loss",
            "kl_div",
            "cdist",
            "logsumexp",
            "interpolate",
            "prod",
            "softmax",
            "log_softmax",
            "cumprod",
            "cumsum",
            "vector_norm",
            "sum",
        ]
    ),
    "cpu": frozenset(["mse_loss", "l1_loss", "smooth_l1_loss", "kl_div", "cdist", "prod"]),
}
_VALUES = {"item": 1, "__bool__": True, "__float__": 1.0, "__int__": 1, "__index__": 1}


class Kernels(TorchFunctionMode):
    """Inside, functions of meta tensors act as those of `device` under the torch.autocast("cpu") that is in force.

    That context does nothing to meta tensors by itself, but is carried into recomputed activations. What asks a tensor
    for its values gets ones, lists zeros.

    Args:
        device: "cuda" for a GPU, or "cpu".
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self._kept: list[Tensor] = []
        self._copies: dict[int, weakref.ref[Tensor]] = {}
        self._keeps = False

    def copied_bytes(self) -> int:
        """What the weights' copies in lower precision hold, as far as something still needs them."""
        alive = (copy() for copy in self._copies.values())
        return sum(tensor.untyped_storage().nbytes() for tensor in alive if tensor is not None)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Low-precision copies of weights are kept to its end, as torch.autocast caches them."""
        self._keeps = True
        try:
            with recomputed_within(self):
                yield
        finally:
            self._keeps = False
            self._kept.clear()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _VALUES and args[0].is_meta:
            return _VALUES[name]
        if name == "tolist" and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
        if torch.is_autocast_enabled("cpu"):
            if name in LOWER:
                args, kwargs = tree_map(self._lower, (args, kwargs))
            elif name in FLOAT[self.device] and kwargs.get("mode") != "area":
                args, kwargs = tree_map(_float, (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point():
            return value
        if value.dtype in (dtype, torch.float64):
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(dtype)
        ready = self._copies.get(id(value), lambda: None)()
        if ready is None:
            ready = value.to(dtype)
            self._copies[id(value)] = weakref.ref(ready)
            if self._keeps and value.requires_grad and value.dtype == torch.float32:
                self._kept.append(ready)
        return ready


def _float(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.is_meta and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The fused kernel, which keeps queries, keys, values, output and a number a query, not the N^2 weights."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
