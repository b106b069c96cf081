"""A plan as text."""

from __future__ import annotations

from imagen_lightning.planning.plan import Plan


def show_bytes(count: float) -> str:
    """In units of 1000, three digits: "23.9 GB"."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def show_count(count: float) -> str:
    """ "2.39 G" for 2387239171."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:,.0f} P"


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<24}{value:>12}" + (f"  {note}" if note else "")


def show_plan(plan: Plan, measured: int | None = None) -> str:
    """A table of one plan.

    Args:
        plan: to show.
        measured: bytes at the peak of a real step, beside the estimate.
    """
    settings, step = plan.settings, plan.step
    lines = ["parameters"]
    for part, count in plan.parameters.items():
        note = "trained" if count.trained == count.total else f"{show_count(count.trained)} trained"
        lines.append(_row(part, show_count(count.total), note if count.trained else "frozen"))
    lines.append(_row("total", show_count(plan.total), f"{show_count(plan.trained)} trained"))
    if plan.encoder is not None:
        size = show_count(plan.encoder.parameters) if plan.encoder.known else "unknown"
        lines.append(_row("text encoder", size, f"frozen, apart: {plan.encoder.name}"))
    processes = f" on each of {settings['num_processes']} processes" if settings["num_processes"] > 1 else ""
    accumulated = f", {settings['accumulate']} batches a step" if settings["accumulate"] > 1 else ""
    device = "a GPU" if settings["device"] == "cuda" else "a CPU"
    lines += [
        "",
        f"memory on {device}: {settings['batch_size']} images of {settings['image_size']} px at once{processes}"
        f"{accumulated}, {settings['precision']}"
        + (f", {settings['num_tokens']} tokens" if settings["num_tokens"] else ""),
        _row("weights", show_bytes(plan.weights)),
        _row("average (EMA)", show_bytes(plan.average), "" if plan.average else "in main memory, or shared"),
        _row("gradients", show_bytes(step.gradients)),
        _row("optimizer state", show_bytes(plan.optimizer.state), f"{plan.optimizer.name}: {plan.optimizer.how}"),
        _row("weights' copies", show_bytes(step.copies), "in the precision of autocast, until the backward pass"),
        _row("activations", show_bytes(step.activations), f"recompute: {str(settings['recompute']).lower()}"),
    ]
    if plan.encoder is not None:
        lines.append(_row("text encoder", show_bytes(plan.encoder_memory), "" if plan.encoder_memory else "not there"))
    if plan.optimizer.working:
        lines.append(_row("optimizer's step", show_bytes(plan.optimizer.working), "for its working, after backward"))
    lines.append(_row("peak", show_bytes(plan.peak), "not the sum: not all at once, and what comes and goes"))
    if measured is not None:
        lines.append(_row("measured peak", show_bytes(measured), f"the estimate is {plan.peak / measured - 1:+.1%}"))
    lines += [
        "",
        "work and disk",
        _row("a step", f"{show_count(plan.flops)}FLOP", "forward and backward, all processes"),
    ]
    if plan.encoder_flops:
        lines.append(_row("its text encoder", f"{show_count(plan.encoder_flops)}FLOP", "of the longest captions"))
    lines.append(_row("a checkpoint", show_bytes(plan.checkpoint), "weights, average, optimizer state"))
    return "\n".join(lines)
