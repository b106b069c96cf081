"""What training a stage takes: parameters, memory, FLOPs and disk, without a byte of it being taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from imagen_lightning.networks.lora import is_adapter
from imagen_lightning.planning.encoders import EncoderCost, encoder_cost
from imagen_lightning.planning.kernels import Device
from imagen_lightning.planning.live import num_bytes
from imagen_lightning.planning.optimizers import OptimizerMemory, optimizer_memory
from imagen_lightning.planning.step import Precision, StepMemory, on_meta, simulate

PARTS = {"network": "network", "text_network": "text network", "tokens": "tokens", "null_embedding": "null text"}


@dataclass(frozen=True)
class Training:
    """How a stage is trained, as far as it takes memory.

    Attributes:
        stage: made inside `without_weights`; never changed.
        precision: the trainer's.
        batch_size: images that one process takes at once.
        accumulate: batches whose gradients are summed for one optimizer step.
        num_processes: each with a copy of all.
        num_tokens: of the longest caption in a batch.
        device: whose kernels to follow.
        average_on_device: whether the EMA's copy lies there, and not in main memory.
        encoder_on_device: whether the frozen text encoder is at work while the stage is trained.
        optimizer: what it takes, where it cannot be tried.
    """

    stage: Any
    precision: Precision
    batch_size: int
    accumulate: int = 1
    num_processes: int = 1
    num_tokens: int = 128
    device: Device = "cuda"
    average_on_device: bool = True
    encoder_on_device: bool = True
    optimizer: OptimizerMemory | None = None


@dataclass(frozen=True)
class Count:
    """Parameters of a part."""

    total: int
    trained: int


@dataclass(frozen=True)
class Plan:
    """What a stage's training takes; memory in bytes, of one process.

    Attributes:
        parameters: by part of the stage.
        weights, average: of the stage, and of what the EMA has for itself on the device.
        optimizer: its state.
        step: gradients, activations and FLOPs of one batch.
        encoder: the frozen text encoder, None for a stage without text.
        encoder_memory: what it takes on the device.
        peak: the most at once: in the forward or backward pass, or in the optimizer's step.
        flops: of an optimizer step over all processes, without the text encoder's.
        encoder_flops: of the text encoder for one, 0 where it is not at work.
        checkpoint: on disk: weights, average and optimizer state.
    """

    parameters: Mapping[str, Count]
    weights: int
    average: int
    optimizer: OptimizerMemory
    step: StepMemory
    encoder: EncoderCost | None
    encoder_memory: int
    peak: int
    flops: int
    encoder_flops: int
    checkpoint: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        return sum(count.trained for count in self.parameters.values())

    @property
    def total(self) -> int:
        return sum(count.total for count in self.parameters.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(replace(self, parameters={})),
            "parameters": {k: asdict(v) for k, v in self.parameters.items()},
        }


def make_plan(training: Training) -> Plan:
    """Plans one training; takes seconds, whatever the size."""
    stage = on_meta(training.stage, training.precision)
    parameters = list(stage.parameters())
    weights = num_bytes([*parameters, *stage.buffers()])
    shared = num_bytes(p for p in parameters if not p.requires_grad)  # weights that are not trained average themselves
    optimizer = training.optimizer or optimizer_memory(stage, training.device)
    step = simulate(
        training.stage,
        training.precision,
        training.batch_size,
        training.num_tokens,
        training.accumulate > 1,
        training.device,
    )
    encoder = encoder_cost(stage.text.encoder, training.num_tokens)
    inverting = stage.text.tokens is not None
    at_work = encoder is not None and (training.encoder_on_device or inverting)
    encoder_memory = encoder.weights if encoder is not None and at_work else 0
    if encoder is not None and inverting:
        encoder_memory += training.batch_size * encoder.kept
    average = weights - shared if training.average_on_device else 0
    images = training.batch_size * training.accumulate * training.num_processes
    return Plan(
        parameters=count_parameters(stage),
        weights=weights,
        average=average,
        optimizer=optimizer,
        step=step,
        encoder=encoder,
        encoder_memory=encoder_memory,
        peak=weights
        + average
        + optimizer.state
        + encoder_memory
        + max(step.peak, step.gradients + (optimizer.working or 0)),
        flops=step.flops * training.accumulate * training.num_processes,
        encoder_flops=encoder.flops * images * (3 if inverting else 1) if encoder is not None and at_work else 0,
        checkpoint=2 * weights + optimizer.state,
        settings={
            "precision": training.precision.name,
            "batch_size": training.batch_size,
            "accumulate": training.accumulate,
            "num_processes": training.num_processes,
            "num_tokens": training.num_tokens if encoder is not None else 0,
            "device": training.device,
            "image_size": getattr(stage, "crop_size", None) or stage.image_size,
            "recompute": getattr(stage.network, "recompute", False),
        },
    )


def count_parameters(stage: nn.Module) -> dict[str, Count]:
    """By part: the network, its adapter, the text network, pseudo-words, a learned null text; others by their name."""
    counts: dict[str, Count] = {}
    for name, parameter in stage.named_parameters():
        first = name.split(".")[0]
        part = "adapter" if is_adapter(name) else PARTS.get(first, first)
        before = counts.get(part, Count(0, 0))
        size = parameter.numel()
        counts[part] = Count(before.total + size, before.trained + size * parameter.requires_grad)
    return counts
