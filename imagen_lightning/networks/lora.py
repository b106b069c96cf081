"""Low-rank adapters of a network's layers (LoRA, Hu et al. 2021), made by peft.

An adapted layer computes W x + scale B A x with A of `rank` rows; W is frozen, A and B are trained. peft is imported
where an adapter is first asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from imagen_lightning.networks.attention import TextReader
from imagen_lightning.types import InputError

NAME = "default"  # of the one adapter, in peft's modules
_SAMPLES = 4096  # of a tensor, for its digest


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one layer's weight: scale B A.

    Attributes:
        a: (rank, in) of a linear layer, (rank, in, height, width) of a convolution.
        b: (out, rank), or (out, rank, 1, 1).
        scale: their factor, alpha / rank.
    """

    a: Tensor
    b: Tensor
    scale: float

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale B A, of the weight's shape."""
        a, b = self.a.to(dtype), self.b.to(dtype)
        return self.scale * (b.flatten(1) @ a.flatten(1)).unflatten(1, a.shape[1:])


class LoRA:
    """Low-rank adapters of chosen layers; the stage that takes it freezes all else.

    Args:
        rank: of each adapter.
        alpha: its sum is multiplied by alpha / rank; None for 1.
        targets: which layers: "attention" (the fused projections to queries, keys and values, those of the text, and
            the output's), "convolutions" (all of them, also those of 1 x 1; not those that resample a map on the way),
            or patterns of the names of the network's linear layers and convolutions, as `blocks.*.feed_*`.
        dropout: of the adapters' inputs in training.

    Raises:
        InputError: rank, alpha or dropout out of range, no targets.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        targets: Sequence[str] = ("attention",),
        dropout: float = 0.0,
    ) -> None:
        if rank < 1 or (alpha is not None and not 0 < alpha < math.inf):
            raise InputError(f"LoRA rank {rank} must be at least 1 and alpha {alpha} positive")
        if not 0 <= dropout < 1:
            raise InputError(f"LoRA dropout {dropout} must be in [0, 1)")
        if isinstance(targets, str) or not targets:
            raise InputError(f"LoRA targets {targets!r} must be a list, e.g. [attention]")
        self.rank, self.alpha, self.targets, self.dropout = rank, alpha, targets, dropout

    def layers(self, network: nn.Module) -> list[str]:
        """The names of the network's layers that are adapted.

        Raises:
            InputError: one of the targets matches none.
        """
        found: set[str] = set()
        for target in self.targets:
            matching = _matching(network, target)
            if not matching:
                raise InputError(_no_match(network, target))
            found |= matching
        return sorted(found)

    def inject(self, network: nn.Module) -> None:
        """Replaces the chosen layers by adapted ones, which at first compute the same; all else is frozen.

        Raises:
            InputError: one of the targets matches no layer, peft is not installed.
        """
        names = self.layers(network)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise InputError(f"LoRA needs peft ({error}); install it: pip install 'peft>=0.19,<0.22'") from error
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            target_modules="|".join(map(re.escape, names)),
            lora_dropout=self.dropout,
        )
        inject_adapter_in_model(config, network, NAME)
        for parameter in adapter_parameters(network):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        network.train(network.training)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter, and not to the network that it adapts."""
    return ".lora_" in name


def adapter_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in network.named_parameters() if is_adapter(name))


def adapted_layers(network: nn.Module) -> dict[str, Any]:
    """peft's layers in a network, by the name of the layer that each adapts."""
    return {name: module for name, module in network.named_modules() if hasattr(module, "base_layer")}


def factors(network: nn.Module) -> dict[str, Factors]:
    """What the network's adapter adds to each layer, by its name; the tensors are the adapter's own."""
    return {
        name: Factors(layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach(), layer.scaling[NAME])
        for name, layer in adapted_layers(network).items()
    }


@torch.no_grad()
def add_factors(network: nn.Module, given: Mapping[str, Factors], weight: float = 1.0) -> None:
    """Adds weight times what an adapter adds to the network's own weights, in float32 or finer.

    Raises:
        InputError: a layer is not there, or has another shape; a weight or a sum that is not finite. Nothing is added.
    """
    check_weight(weight)
    check_factors(network, given)

    def added(name: str, each: Factors) -> tuple[Tensor, Tensor]:
        own = network.get_submodule(name).weight
        assert isinstance(own, Tensor)
        finer = torch.promote_types(own.dtype, torch.float32)
        return own, (own.to(finer) + weight * each.delta(finer).to(own.device)).to(own.dtype)

    for name, each in given.items():
        own, total = added(name, each)
        if bool(own.isfinite().all()) and not bool(total.isfinite().all()):
            raise InputError(f"the adapter's layer {name!r} times weight {weight} is too large for {own.dtype} weights")
    for name, each in given.items():
        own, total = added(name, each)
        own.copy_(total)


def check_weight(weight: float) -> None:
    """Raise InputError where the weight of an adapter is not a finite number."""
    if not math.isfinite(weight):
        raise InputError(f"the weight {weight} of an adapter is not a finite number; 1 adds it as it was trained")


def check_factors(network: nn.Module, given: Mapping[str, Factors]) -> None:
    """Raise InputError where a layer is not there, has another shape, or is not finite."""
    for name, each in given.items():
        try:
            layer = network.get_submodule(name)
        except AttributeError:
            layer = None
        if layer is None or not can_adapt(layer):
            raise InputError(f"the adapter has a layer {name!r}, and the network ({type(network).__name__}) none")
        shape, wanted = (each.b.shape[0], *each.a.shape[1:]), tuple(layer.weight.shape)  # type: ignore[union-attr,arg-type]
        if not (math.isfinite(each.scale) and bool(each.a.isfinite().all()) and bool(each.b.isfinite().all())):
            raise InputError(f"the adapter's layer {name!r} holds NaN or infinite values; take an earlier checkpoint")
        if shape != wanted or each.a.shape[0] != each.b.shape[1]:
            raise InputError(
                f"the adapter's layer {name!r} is for a weight of {shape}, with A {tuple(each.a.shape)} and B "
                f"{tuple(each.b.shape)}; the network's is {wanted}"
            )


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Folds the network's adapter into its weights; the layers are plain ones again."""
    given = factors(network)
    for name, layer in adapted_layers(network).items():
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, layer.get_base_layer())
    add_factors(network, given)
    if hasattr(network, "peft_config"):
        del network.peft_config


def can_adapt(layer: nn.Module) -> bool:
    """Whether a layer computes what its class says: a subclass that resamples its input has a forward of its own."""
    return type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)


def _matching(network: nn.Module, target: str) -> set[str]:
    layers = {name: module for name, module in network.named_modules() if can_adapt(module)}
    if target == "convolutions":
        return {name for name, module in layers.items() if isinstance(module, nn.Conv2d)}
    if target == "attention":
        readers = [name for name, module in network.named_modules() if isinstance(module, TextReader)]
        return {name for name in layers if name.rpartition(".")[0] in readers}
    return {name for name in layers if fnmatchcase(name, target)}


def _no_match(network: nn.Module, target: str) -> str:
    names = [name for name, module in network.named_modules() if can_adapt(module)]
    text = f"LoRA target {target!r} matches no layer of {type(network).__name__}"
    others = [name for name, _ in network.named_modules() if fnmatchcase(name, target)]
    if others:
        return f"{text} that can be adapted: {others[0]!r} is no plain linear layer or convolution"
    near = difflib.get_close_matches(target, names, n=3, cutoff=0.3) or names[:3]
    return f"{text}; it has {', '.join(near)}; or use 'attention' or 'convolutions'"


def weights_digest(module: nn.Module) -> str:
    """16 hexadecimal digits of the names, shapes and evenly spaced values of a stage's weights.

    Adapters and new words' vectors (`tokens.`) do not count, so that it is what an adapter is for that counts. Values
    count as bfloat16 has them: the digest of a copy in bfloat16 is that of the weights in float32.
    """
    digest = hashlib.sha256()
    tensors = {name.replace(".base_layer.", "."): value for name, value in module.state_dict().items()}
    for name, value in sorted(tensors.items()):
        if is_adapter(name) or name.startswith("tokens."):
            continue
        digest.update(f"{name}:{tuple(value.shape)}:".encode())
        if value.is_meta:  # of a stage that is planned, which has no values
            continue
        flat, last = value.detach().flatten(), value.numel() - 1
        if flat.numel() > _SAMPLES:
            flat = flat[torch.arange(_SAMPLES, device=flat.device) * last // (_SAMPLES - 1)]
        if flat.is_floating_point():
            flat = flat.to(torch.bfloat16).view(torch.int16)
        digest.update(flat.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
