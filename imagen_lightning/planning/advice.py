"""Which settings make a training fit a GPU: the cheapest of all combinations, by stated prices.

Prices order what one would rather do; they predict no time. What changes nothing but the order of sums is cheap, what
changes the training is dear.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch

from imagen_lightning.networks import LoRA
from imagen_lightning.planning.encoders import encoder_cost
from imagen_lightning.planning.optimizers import OptimizerMemory
from imagen_lightning.planning.plan import Plan, Training, make_plan

STORED_TEXT = 0.02  # captions encoded once: no work more
AVERAGE_ON_CPU = 0.15  # a copy of the weights to main memory after each step
RECOMPUTED = 0.33  # all levels; the forward pass is computed twice
HALVED = 0.02  # for each halving of what is computed at once, down to 8 images
HALVED_BELOW_8 = 0.12  # and below, where a GPU is not filled
EIGHT_BITS = 0.4  # an optimizer of a package more, that rounds
CROPPED = 1.0  # for each halving of the crop: less context
ADAPTER = 2.0  # less is learned
HALF = 0.5  # frozen weights in bfloat16

ROOM = 1.05  # of the estimate: what an allocator loses between blocks
FIXED = 1_000_000_000  # bytes: the GPU's context, libraries' workspaces


@dataclass(frozen=True)
class Change:
    """One setting.

    Attributes:
        overrides: what to type for it.
        price: see the module.
        apply: gives the training so changed.
    """

    overrides: tuple[str, ...]
    price: float
    apply: Callable[[Training], Training]


@dataclass(frozen=True)
class Advice:
    """What fits.

    Attributes:
        overrides: to type.
        plan: of the training so changed.
    """

    overrides: tuple[str, ...]
    plan: Plan


def room(memory: float) -> float:
    """Return the bytes of a GPU's memory that an estimate may take, which leaves room for what no estimate sees."""
    return (memory - FIXED) / ROOM


def fits(peak: int, memory: float) -> bool:
    """Return whether a peak fits."""
    return peak <= room(memory)


def cheapest(
    training: Training,
    memory: float,
    levers: Sequence[Sequence[Change]],
    batch_overrides: Callable[[Training], tuple[str, ...]],
) -> Advice | None:
    """The cheapest combination that fits, or None.

    Args:
        training: as it is configured.
        memory: bytes of the GPU.
        levers: of each, the changes of which at most one is made.
        batch_overrides: what to type for a training's batch and accumulation.
    """
    best: tuple[float, tuple[str, ...], Training] | None = None
    for changes in sorted(_combinations(levers), key=lambda changes: sum(change.price for change in changes)):
        price = sum(change.price for change in changes)
        if best is not None and price >= best[0]:
            break
        changed = training
        for change in changes:
            changed = change.apply(changed)
        found = _largest_batch(changed, memory)
        if found is None:
            continue
        price += _price_of_batch(found.batch_size, training.batch_size)
        if best is None or price < best[0]:
            overrides = tuple(itertools.chain.from_iterable(change.overrides for change in changes))
            if found.batch_size != training.batch_size:
                overrides += batch_overrides(found)
            best = price, overrides, found
    return None if best is None else Advice(best[1], make_plan(best[2]))


def _combinations(levers: Sequence[Sequence[Change]]) -> Iterator[tuple[Change, ...]]:
    for chosen in itertools.product(*[(None, *lever) for lever in levers]):
        yield tuple(change for change in chosen if change is not None)


def _largest_batch(training: Training, memory: float) -> Training | None:
    """The training in the largest equal parts of its batch that fit; memory grows by as much with each image."""
    sizes = [size for size in range(training.batch_size, 0, -1) if training.batch_size % size == 0]
    one = make_plan(_in_parts(training, 1))
    if not fits(one.peak, memory):
        return None
    if len(sizes) == 1:
        return training
    second = sizes[-2]
    other = make_plan(_in_parts(training, second))
    slope = (other.step.peak - one.step.peak) / (second - 1)
    rest = one.peak - max(one.step.peak, floor := one.step.gradients + (one.optimizer.working or 0))
    for size in sizes:
        dynamic = max(one.step.peak + slope * (size - 1), floor)
        encoder = (size - 1) * one.encoder.kept if one.encoder is not None and training.stage.text.tokens else 0
        if fits(int(rest + dynamic + encoder), memory):
            return _in_parts(training, size)
    return None


def _in_parts(training: Training, size: int) -> Training:
    return replace(training, batch_size=size, accumulate=training.accumulate * (training.batch_size // size))


def _price_of_batch(size: int, whole: int) -> float:
    halvings = math.log2(whole / size)
    below = min(max(math.log2(min(8, whole) / size), 0), halvings)
    return HALVED * (halvings - below) + HALVED_BELOW_8 * below


# ---- what may be changed


def recompute_changes(training: Training, option: str) -> list[Change]:
    """Levels from the largest maps down, or blocks from the first on; none where all are recomputed already."""
    network = training.stage.network
    levels = getattr(network, "recompute_levels", None)
    if levels is None or all(levels):
        return []
    count = len(levels)
    numbers = range(1, count + 1) if count <= 6 else sorted({math.ceil(count * part / 4) for part in (1, 2, 3, 4)})
    changes = []
    for number in numbers:
        value = [level < number or levels[level] for level in range(count)]

        def apply(training: Training, value: list[bool] = value) -> Training:
            stage = deepcopy(training.stage)
            stage.network.recompute_with(value)
            return replace(training, stage=stage)

        typed = "true" if all(value) else "[" + ",".join(str(item).lower() for item in value) + "]"
        changes.append(Change((f"--{option}={typed}",), RECOMPUTED * (sum(value) - sum(levels)) / count, apply))
    return changes


def average_changes(training: Training) -> list[Change]:
    if not training.average_on_device:
        return []
    return [Change(("--ema.device=cpu",), AVERAGE_ON_CPU, lambda given: replace(given, average_on_device=False))]


def encoder_changes(training: Training, overrides: tuple[str, ...]) -> list[Change]:
    """Captions encoded once, which needs `overrides`; none where nothing is encoded, or words are learned."""
    cost = encoder_cost(training.stage.text.encoder, training.num_tokens)
    if not training.encoder_on_device or cost is None or not cost.weights or training.stage.text.tokens is not None:
        return []
    return [Change(overrides, STORED_TEXT, lambda given: replace(given, encoder_on_device=False))]


def eight_bit_changes(training: Training) -> list[Change]:
    """bitsandbytes' AdamW8bit, by its format: two bytes a number and a scale of 4 for each 256; small tensors whole."""

    def apply(given: Training) -> Training:
        trained = [parameter.numel() for parameter in given.stage.parameters() if parameter.requires_grad]
        state = sum(2 * size + 8 * math.ceil(size / 256) if size >= 4096 else 8 * size for size in trained)
        how = "by its format; not measured here"
        return replace(given, optimizer=OptimizerMemory("bitsandbytes.optim.AdamW8bit", state, 0, how))

    override = "--model.init_args.optimization.optimizer=bitsandbytes.optim.AdamW8bit"
    return [Change((override,), EIGHT_BITS, apply)]


def crop_changes(training: Training, smallest: int = 64) -> list[Change]:
    """Halves and quarters of what a super-resolution stage is trained on, down to `smallest` px."""
    stage = training.stage
    if not hasattr(stage, "crop_size"):
        return []
    size, changes = stage.crop_size or stage.image_size, []
    for halvings in (1, 2):
        crop = size // 2**halvings
        if crop < smallest or crop % getattr(stage.network, "stride", 1):
            continue

        def apply(given: Training, crop: int = crop) -> Training:
            changed = deepcopy(given.stage)
            changed.crop_size = crop
            return replace(given, stage=changed)

        changes.append(Change((f"--model.init_args.crop_size={crop}",), CROPPED * halvings, apply))
    return changes


def adapter_changes(training: Training) -> list[Change]:
    """LoRA, and frozen weights in half the memory, for a cascade's stage that is trained as a whole."""
    if training.stage.adapter is not None:
        return []

    def apply(given: Training, dtype: torch.dtype | None = None) -> Training:
        changed = deepcopy(given.stage)
        if dtype is not None:
            changed.to(dtype)  # before there is an adapter, which stays float32
        changed.attach_adapter(LoRA())
        return replace(given, stage=changed)

    override = "--model.init_args.adapter=imagen_lightning.networks.LoRA"
    halved = (override, "--model.init_args.dtype=bfloat16")
    return [Change((override,), ADAPTER, apply), Change(halved, ADAPTER + HALF, partial(apply, dtype=torch.bfloat16))]
