"""`imagen-lightning quickstart`: a two-stage cascade trained on built-in captioned shapes, offline, and its pictures.

It runs the verbs that a user types, as processes of their own, and prints each. Killed and started again, it goes on
where it was: the plan is kept in quickstart.json, and each stage resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_lightning.cli.arguments import Parser, folder, real, whole
from imagen_lightning.errors import InputError
from imagen_lightning.files import read_json, write_json
from imagen_lightning.io.locks import LOCK, is_lock, locked

if TYPE_CHECKING:
    from torch import Tensor

    from imagen_lightning.metrics import CaptionAccuracy

STAGES = ("base", "sr")
PLAN = "quickstart.json"
NUM_CAPTIONS = 200
CALIBRATION_STEPS = 40
CALIBRATION_SECONDS = 8.0  # a CPU without bf16 units takes very long over bf16
PRECISIONS = ("32-true", "bf16-mixed")
MARGIN = 1.1  # a machine is seldom as fast for minutes as it is for seconds
# Beside training: imports, validation, checkpoints, 200 samples, the report; as measured on 2 cores. Sample grids and
# probes while it trains add 10: 13.7 s of one core's time at the recipe's steps.
OVERHEAD_SECONDS = 120.0
CLOSING_SECONDS = 60.0  # the part of that which follows the last stage's training


def parser() -> Parser:
    made = Parser("quickstart", description="Trains a small cascade on built-in captioned shapes and samples it.")
    made.add_argument("--out", type=folder, default="runs/quickstart", metavar="DIR", help="default runs/quickstart")
    made.add_argument(
        "--minutes", type=real(3, 7 * 24 * 60), default=15.0, help="time to keep to, after installation (default 15)"
    )
    made.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of training and sampling (default 0)")
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    out = arguments.out
    _read_plan(out, arguments.seed)  # what is refused leaves nothing
    with locked(out / LOCK, f"quickstart {str(out)!r}", advice="wait for its end, or choose another --out"):
        return _run_stages(out, arguments.minutes, arguments.seed)


def _run_stages(out: Path, minutes: float, seed: int) -> int:
    start = time.monotonic()
    plan = _read_plan(out, seed)
    if plan is None:
        plan = _make_plan(minutes * 60, seed)
        write_json(out / PLAN, plan)
    else:
        print(f"resuming the quickstart in {out}")
    for stage in STAGES:
        steps = plan["steps"][stage]
        if (out / stage / "checkpoints" / f"step-{steps}.ckpt").exists():
            print(f"{stage}: trained already ({steps} steps)")
            continue
        if stage == STAGES[-1] and not (out / stage).exists():
            steps = _fitting(plan, stage, minutes * 60 - (time.monotonic() - start) - CLOSING_SECONDS)
            write_json(out / PLAN, plan)
        _say(start, f"training {stage}: {steps} steps")
        _run(
            "fit",
            *("--config", f"experiments/quickstart/{stage}.yaml", "--run", str(out / stage), "--resume"),
            *(f"--trainer.max_steps={steps}", f"--trainer.precision={plan['precision'][stage]}"),
            f"--seed_everything={plan['seed']}",
            *(f"--model.init_args.seed={plan['seed']}", f"--data.init_args.seed={plan['seed']}"),
        )
    cascade = out / "cascade"
    if not cascade.exists():
        _run("cascade", str(out / "base"), str(out / "sr"), str(cascade))
    samples = out / "samples"
    captions = _captions(plan["seed"])
    if not (samples / "samples.json").exists():
        shutil.rmtree(samples, ignore_errors=True)
        _say(start, f"sampling {len(captions)} held-out captions")
        prompts = out / "captions.txt"
        prompts.write_text("\n".join(captions) + "\n", encoding="utf-8")
        _run(
            "sample",
            *(str(cascade), "--prompts", str(prompts), "--seed", str(plan["seed"]), "--out", str(samples)),
        )
    _score(out, captions)
    page = out / "report.html"
    if not page.exists() or page.stat().st_mtime < (samples / "evaluation.json").stat().st_mtime:
        _run("report", str(out), "--out", str(page))
    _say(start, f"done. Pictures: {out / 'samples.png'}; all of them: {samples}")
    print(f"The report, to open in a browser: {page}")
    print(
        "Try: imagen-lightning sample "
        f'{cascade} --prompt "a small red star above a large blue circle on a white background" --out {out / "mine"}'
    )
    return 0


def _read_plan(out: Path, seed: int) -> dict[str, Any] | None:
    path = out / PLAN
    if not path.exists():
        if out.exists() and not all(map(is_lock, out.iterdir())):
            raise InputError(f"{out} is not empty and holds no quickstart; choose another --out")
        return None
    plan = read_json(path, "plan")
    if not _is_plan(plan):
        raise InputError(f"plan {str(path)!r} is damaged; delete {out} to begin anew")
    if plan["seed"] != seed:
        raise InputError(f"{out} was begun with --seed {plan['seed']}, not {seed}; choose another --out")
    return plan


def _is_plan(plan: Any) -> bool:
    kinds = {"steps": int, "precision": str, "step_seconds": float}
    try:
        known = [isinstance(plan[key][stage], kind) for key, kind in kinds.items() for stage in STAGES]
        return all(known) and isinstance(plan["seed"], int)
    except (KeyError, TypeError, IndexError):
        return False


def _make_plan(seconds: float, seed: int) -> dict[str, Any]:
    """Shares the time between the stages, by the speed of this machine: the recipe's steps, or fewer."""
    print("measuring this machine's speed …", flush=True)
    recipe, precision, step_seconds = {}, {}, {}
    for stage in STAGES:
        recipe[stage], seconds_in = _time_a_step(stage)
        # float32 where it is no slower than bf16 by a tenth
        precision[stage] = min(PRECISIONS, key=lambda name: seconds_in[name] * (0.9 if name == PRECISIONS[0] else 1))
        step_seconds[stage] = seconds_in[precision[stage]]
    wanted = sum(recipe[stage] * step_seconds[stage] for stage in STAGES)
    share = min(1.0, (seconds - OVERHEAD_SECONDS) / wanted)
    steps = {stage: max(100, int(recipe[stage] * share) // 50 * 50) for stage in STAGES}
    for stage in STAGES:
        print(
            f"  {stage}: {step_seconds[stage]:.3f} s a step in {precision[stage]}, {steps[stage]} of the recipe's "
            f"{recipe[stage]} steps, about {steps[stage] * step_seconds[stage] / 60:.1f} minutes"
        )
    return {
        **{"seed": seed, "steps": steps, "precision": precision},
        **{"recipe_steps": recipe, "step_seconds": step_seconds, "seconds": seconds},
    }


def _fitting(plan: dict[str, Any], stage: str, seconds: float) -> int:
    """Cuts a stage's steps, by half at most, to what the seconds left allow; earlier stages may have taken longer."""
    steps = plan["steps"][stage]
    possible = int(seconds / plan["step_seconds"][stage]) // 50 * 50
    plan["steps"][stage] = max(min(steps, possible), steps // 2)
    return plan["steps"][stage]


def _time_a_step(stage: str) -> tuple[int, dict[str, float]]:
    """The recipe's number of steps, and the median seconds of a training step here, by precision."""
    code = (
        "import sys, json; from imagen_lightning.cli.quickstart import calibrate; "
        "print(); print(json.dumps(calibrate(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, stage]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True, env=_environment())
    if result.returncode:
        raise SystemExit(result.returncode)
    steps, seconds = json.loads(result.stdout.splitlines()[-1])
    return steps, seconds


def calibrate(stage: str) -> tuple[int, dict[str, float]]:
    """Makes the stage and its data from the YAML and times a few steps in each precision without Lightning's loop."""
    import torch

    from imagen_lightning.cli.configs import find_config
    from imagen_lightning.cli.fit import Parser as StageParser
    from imagen_lightning.cli.fit import StageCLI

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.argv = sys.argv[:1]  # LightningCLI warns where arguments are given twice
    config = find_config(f"experiments/quickstart/{stage}.yaml")
    cli = StageCLI(
        run=False,
        parser_class=StageParser,
        save_config_callback=None,
        auto_configure_optimizers=False,
        args=["--config", str(config), "--trainer.logger=false"],
    )
    model, data = cli.model, cli.datamodule
    model.log = lambda *_, **__: None
    optimizer = model.optimization.optimizer(model.parameters())

    def median_seconds(precision: str) -> float:
        times: list[float] = []
        # The loader is endless.
        for number, batch in zip(range(CALIBRATION_STEPS), data.train_dataloader()):
            begin = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = model.training_step(batch, number)
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - begin)
            if sum(times) > CALIBRATION_SECONDS:
                break
        return MARGIN * statistics.median(times[len(times) // 4 :])

    return cli.trainer.max_steps, {precision: median_seconds(precision) for precision in PRECISIONS}


def _captions(seed: int) -> list[str]:
    """Captions of scenes that training never sees: half with seen pairs alone, half with an unseen one."""
    from imagen_lightning.data import shapes

    half = NUM_CAPTIONS // 2
    return [shapes.sample(seed, index, "val")[1] for index in range(half)] + shapes.held_out_captions(half, seed)


def _score(out: Path, captions: list[str]) -> None:
    """Prints and writes caption accuracy, with its protocol too, and draws samples.png."""
    import torch
    from PIL import Image

    from imagen_lightning.data import shapes
    from imagen_lightning.images import from_pil, grid, save_png
    from imagen_lightning.metrics import caption_accuracy

    pictures = [from_pil(Image.open(out / "samples" / f"{index:05d}.png")) for index in range(len(captions))]
    unseen = torch.tensor([shapes.parse_caption(caption).held_out for caption in captions])
    accuracy = caption_accuracy(torch.stack(pictures), captions)
    rows = {
        "all captions": accuracy.mean(),
        "seen pairs": accuracy.mean(~unseen),
        "unseen pairs": accuracy.mean(unseen),
    }
    names = list(rows["all captions"])
    print(f"\ncaption accuracy in %, {len(captions)} held-out captions ({int(unseen.sum())} with an unseen pair)")
    print(f"{'':14}" + "".join(f"{name:>12}" for name in names))
    for row, rates in rows.items():
        print(f"{row:14}" + "".join(f"{100 * rates[name]:12.1f}" for name in names))
    print()
    write_json(out / "caption_accuracy.json", {"num_captions": len(captions), "rates": rows})
    if not (out / "samples" / "evaluation.json").exists():
        _save_evaluation(out / "samples", captions, accuracy, unseen)
    half = len(captions) // 2
    chosen = [*range(12), *range(half, half + 12)]
    shown = [pictures[index] for index in chosen]
    rows_of_six = [shown[begin : begin + 6] for begin in range(0, len(shown), 6)]
    save_png(grid(rows_of_six, [captions[index] for index in chosen], cell=160), out / "samples.png")


def _save_evaluation(folder: Path, captions: list[str], accuracy: CaptionAccuracy, unseen: Tensor) -> None:
    """Writes FOLDER/evaluation.json: the accuracy by kind of caption and by attribute, each with its interval."""
    from imagen_lightning.cascade.sampling import protocol_fields
    from imagen_lightning.evaluation.schema import Evaluation, Row, save
    from imagen_lightning.metrics.confidence import wilson
    from imagen_lightning.metrics.digests import digest_texts
    from imagen_lightning.metrics.protocol import NOT_RECORDED, Protocol, Value, flat
    from imagen_lightning.provenance import git_revision, versions

    drawn = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    settings = protocol_fields(drawn["stages"])
    settings["weights"] = [stage.get("weights", {}).get("kind", NOT_RECORDED) for stage in drawn["stages"]]
    settings["seed"] = drawn["samples"][0]["seed"]
    made = {"image_size": 64, "precision": drawn["precision"], **settings}

    def value(part: str, right: Tensor, chosen: Tensor) -> Value:
        among = [captions[index] for index in chosen.nonzero().flatten().tolist()]
        count = int(right[chosen].sum())
        name = f"caption accuracy{part}"
        protocol = Protocol(name, num_samples=len(among), prompts=digest_texts(among), **made)
        return Value(name, count / len(among), *wilson(count, len(among)), protocol, "95% Wilson")

    every = unseen | ~unseen
    whole, rare = value("", accuracy.all, every), value(", unseen pairs", accuracy.all, unseen)
    values = [whole, value(", seen pairs", accuracy.all, ~unseen), rare]
    attributes = ("background", "number", "color", "shape", "size")
    values += [value(f", {name}", getattr(accuracy, name), every) for name in attributes]
    if accuracy.has_relation.any():
        values.append(value(", relation", accuracy.relation, accuracy.has_relation))
    verdict = (
        f"{whole.value:.0%} of {len(captions)} held-out captions are shown in every attribute, "
        f"{rare.value:.0%} of the {int(unseen.sum())} that name a pair never trained on"
    )
    row = Row(drawn["stages"][-1]["stage"], "chain", flat(settings), tuple(item.to_json() for item in values))
    environment = {"versions": versions(), "git": git_revision(), "device": drawn["device"]}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    save(Evaluation("matrix", drawn["cascade"], created, environment, (row,), verdict), folder)


def _run(*arguments: str) -> None:
    print("\n$ imagen-lightning " + shlex.join(arguments), flush=True)
    result = subprocess.run([sys.executable, "-m", "imagen_lightning", *arguments], check=False, env=_environment())
    if result.returncode:
        raise SystemExit(result.returncode)


def _environment() -> dict[str, str]:
    """Offline; and glibc keeps freed memory, since giving it back between steps costs a tenth of the time on a CPU."""
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}
    return {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **keep, **os.environ}


def _say(start: float, text: str) -> None:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    print(f"\n[{minutes:d}:{seconds:02d}] {text}", flush=True)
