"""How much a network computes."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from imagen_lightning.networks.layers import nothing_recomputed
from imagen_lightning.types import Conditioning

log = logging.getLogger(__name__)


def count_flops(network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> float | None:
    """FLOPs an image of a forward and a backward pass of `network(x_t, t, conditioning)`, counted on the meta device.

    Nothing is computed, no memory taken, no random number drawn. A masked key counts as any other. The backward pass of
    a frozen network is that to its text. None, and a warning, where the network looks at values, which a meta tensor
    lacks.
    """
    text = replace(conditioning.text, mask=None) if conditioning.text is not None else None
    weights = {
        name: torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
        for name, value in [*network.named_parameters(), *network.named_buffers()]
    }
    dtype = next(network.parameters()).dtype
    with torch.no_grad():  # the conditioning may hang on a trainable text network
        told = replace(conditioning, text=text).to("meta", dtype)
        inputs = x_t.to("meta", dtype), t.to("meta", dtype), told
    if text is not None and not any(value.requires_grad for value in weights.values()):
        told.text.states.requires_grad_()  # new words are learned so: gradients pass a frozen network
    counter = FlopCounterMode(display=False)
    try:
        with torch.compiler.set_stance("force_eager"), torch.enable_grad(), nothing_recomputed(), counter:
            torch.func.functional_call(network, weights, inputs).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        log.warning("FLOPs are not logged: the network does not run on tensors without values (%s)", error)
        return None
    return counter.get_total_flops() / len(x_t)
