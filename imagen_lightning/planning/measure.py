"""One real step, and the memory that it took."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from imagen_lightning.planning.plan import Training
from imagen_lightning.planning.step import example_batch, forward_loss


def measure_peak(training: Training, device: torch.device) -> int:
    """The most bytes that torch held at once in a training step on the device, with all that lies there.

    A first step makes the optimizer's state, a second is measured, with the gradients of the first in memory as in
    training. The average is a copy of the trained weights. The text encoder is left out, so is a learned word's
    gradient. On a GPU torch's allocator tells, on a CPU the profiler.

    Args:
        training: its stage with weights, on any device; it is moved, and trained by two steps.
        device: where to run it.
    """
    stage = training.stage.train().to(device)
    if training.precision.weights != torch.float32:
        stage = stage.to(training.precision.weights)
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in trained if training.average_on_device]
    batch = example_batch(stage, training.batch_size, training.num_tokens, device)
    optimizer = stage.optimization.make(stage)
    if device.type == "cuda":
        _step(training, stage, batch, optimizer)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        _step(training, stage, batch, optimizer)
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    held = sum(value.nbytes for value in [*stage.parameters(), *stage.buffers(), *average])
    # Both steps, since the profiler misses that what was made before it is freed.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        _step(training, stage, batch, optimizer)
        _step(training, stage, batch, optimizer)
    return held + _highest(trace)


def _step(training: Training, stage: Any, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    """In the trainer's order: forward, gradients freed, backward, update."""
    loss = forward_loss(stage, batch, training.precision, next(stage.parameters()).device.type)
    if training.accumulate == 1:
        optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _highest(trace: Any) -> int:
    """The highest sum of allocations, in bytes above the beginning."""
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
