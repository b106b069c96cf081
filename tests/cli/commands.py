"""A working folder in which every command succeeds, and command lines with one argument changed."""

import importlib
import json
import random
import shutil

import torch
import yaml
from PIL import Image
from tiny_stages import base_stage, sr_stage

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli import shards
from imagen_lightning.cli.main import VERBS, main
from imagen_lightning.finetuning import from_cascade
from imagen_lightning.networks import LoRA
from imagen_lightning.stages import Sampling
from imagen_lightning.text import PseudoTokens

TRAINERS = [verb for verb, (module, _) in VERBS.items() if module == "fit"]  # LightningCLI's; tests/cli/test_fit.py
COMMANDS = [verb for verb in VERBS if verb not in (*TRAINERS, "shards")] + [f"shards {verb}" for verb in shards.VERBS]

# What makes each command succeed: values by the name of the argument. OUT is new at each try.
VALID = {
    "quickstart": {"out": "OUT"},
    "plan": {"": "stage.yaml"},
    "adapter": {"run": "adapter.ckpt", "out": "OUT"},
    "cascade": {"stages": "cascade", "out": "OUT"},
    "class-images": {"cascade": "cascade", "out": "OUT", "prompt": "a star", "num": "1"},
    "tokens": {"source": "taught", "out": "OUT.tokens.safetensors"},
    "import-diffusers": {"pipelines": "pipeline", "out": "OUT"},
    "export": {"cascade": "cascade", "out": "OUT", "format": "diffusers"},
    "evaluate": {"cascade": "cascade", "data": "shapes", "num": "2", "out": "OUT"},
    "compare": {"a": "cascade", "b": "cascade", "prompts": "prompts.csv", "out": "OUT", "num_images": "1"},
    "sweep": {"file": "sweep.yaml", "dry_run": None},
    "sample": {"cascade": "cascade", "prompt": "a star", "out": "OUT"},
    "report": {"folders": "run", "out": "OUT.html"},
    "finetune-report": {"before": "cascade", "after": "cascade", "data": "shapes", "num": "2", "out": "OUT.html"},
    "verify-resume": {"config": "stage.yaml", "out": "OUT"},
    "shards write": {"source": "images", "out": "OUT"},
    "shards index": {"shards": "shards"},
    "shards verify": {"shards": "shards"},
    "shards doctor": {"shards": "shards", "out": "OUT.html", "workers": "0"},
    "shards embed": {"shards": "shards", "out": "OUT", "encoder": "tiny"},
}


def parser_of(command):
    module = VERBS[command][0] if command in VERBS else command.replace(" ", ".")
    return importlib.import_module(f"imagen_lightning.cli.{module}").parser()


def arguments_of(command):
    """The names of the arguments that take a value."""
    actions = [action for action in parser_of(command)._actions if action.nargs != 0]
    return [action.dest for action in actions]


def argv_of(command, **changed):
    """The valid command line with one argument changed, or given."""
    given = VALID[command] | changed
    words = command.split()
    for action in parser_of(command)._actions:
        if action.dest in given and action.option_strings:
            value = given[action.dest]
            words.append(action.option_strings[-1] if value is None else f"{action.option_strings[-1]}={value}")
    words += [given[""]] if "" in given else []
    return words + [given[a.dest] for a in parser_of(command)._actions if not a.option_strings and a.dest in given]


def make_workspace(folder):
    """Make a folder in which every command of VALID succeeds, with damaged inputs of each kind in `damaged`."""
    folder.mkdir()
    cascade = folder / "cascade"
    quick = Sampling(num_steps=1, guidance=1.0)
    Cascade([base_stage(sampling=quick), sr_stage(image_size=16, low_res_size=8, sampling=quick)]).save(cascade)
    adapted = {}
    stage = from_cascade(str(cascade), adapter=LoRA(2, 2.0))
    stage.on_save_checkpoint(adapted := {"state_dict": stage.state_dict()})
    torch.save(adapted, folder / "adapter.ckpt")
    stage = from_cascade(str(cascade), tokens=PseudoTokens({"<zib>": 1}, "star"))
    stage.tokens.begin(stage.text.encoder)
    Cascade([stage]).save(folder / "taught")
    (folder / "prompts.csv").write_text("Prompts,Category\nred,Colors\nblue,Colors\n")
    for number in range(4):
        (folder / "images").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(folder / f"images/{number}.png")
        (folder / f"images/{number}.txt").write_text("a star")
    assert main(["shards", "write", str(folder / "images"), str(folder / "shards")]) == 0
    assert main(["shards", "index", str(folder / "shards")]) == 0
    network = {"class_path": "imagen_lightning.networks.UNet", "init_args": {
        "dim": 8, "multipliers": [1], "num_blocks": 1, "attention": [False], "text_dim": 16, "head_dim": 8, "groups": 4
    }}  # fmt: skip
    encoder = {"class_path": "imagen_lightning.text.TinyTextEncoder", "init_args": {"dim": 16}}
    model = {"image_size": 16, "network": network, "text": {"encoder": encoder}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}
    stage = {
        "run": "OUT",
        "model": {
            "class_path": "imagen_lightning.stages.BaseStage",
            "init_args": {**model, "optimization": {"optimizer": optimizer}},
        },
        "data": {
            "class_path": "imagen_lightning.data.ShapesDataModule",
            "init_args": {"image_size": 16, "batch_size": 4, "num_val": 8},
        },
        "trainer": {"max_steps": 10, "accelerator": "cpu"},
    }
    (folder / "stage.yaml").write_text(yaml.safe_dump(stage))
    sweep = {"program": "imagen-lightning", "method": "grid", "metric": {"name": "train/loss", "goal": "minimize"}}
    command = ["${program}", "fit", "--config=stage.yaml", "${args}"]
    (folder / "sweep.yaml").write_text(
        yaml.safe_dump({**sweep, "command": command, "parameters": {"ema.decay": {"values": [0.9]}}})
    )
    run = folder / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.25\n")
    (run / "config.yaml").write_text(yaml.safe_dump(stage))
    (run / "run.json").write_text(json.dumps({"git": "abc", "command": "imagen-lightning fit"}))
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(random.Random(0).randbytes(4096))
    (folder / "folder").mkdir()
    damage(folder / "damaged", cascade, run, folder / "shards" / "train-00000.tar")


def damage(folder, cascade, run, shard):
    """Inputs of the right kind that are wrong inside."""
    folder.mkdir()
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    for name, text in {
        "broken.yaml": "model: [",
        "bomb.yaml": bomb,
        "deep.yaml": f"model: {'[' * 200}{']' * 200}",
        "deeper.yaml": "[" * 5000,
        "list.yaml": "[1, 2]",
        "self.yaml": "model: &m {again: *m}",
        "deep.json": "[" * 100_000,
        "prompts.jsonl": '{"prompt": "a"}\n{"prompt"',
        "prompts.tsv": "caption\tcategory\n",
        "text.ckpt": "not a checkpoint",
    }.items():
        (folder / name).write_text(text)

    def cascades(name):
        shutil.copytree(cascade, folder / name)
        return folder / name

    (cascades("list-manifest") / "cascade.json").write_text("[]")
    (cascades("null-manifest") / "cascade.json").write_text('{"format": null, "stages": null}')
    (cascades("deep-manifest") / "cascade.json").write_text("[" * 100_000)
    for path in cascades("no-weights").rglob("*.safetensors"):
        path.unlink()
    for path in cascades("cut-weights").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:200])

    def runs(name):
        shutil.copytree(run, folder / name)
        return folder / name

    (runs("no-config") / "config.yaml").unlink()
    (runs("nul-metrics") / "metrics.csv").write_bytes(b"step,train/loss\n1,\0\0\n\0,0.5\n")
    (runs("half-row") / "metrics.csv").write_text('step,train/loss\n1,0.5\n2,"0.2')
    for name, content in {"other-version": {"version": 99, "rows": {}}, "list-evaluation": []}.items():
        (folder / name).mkdir()
        (folder / name / "evaluation.json").write_text(json.dumps(content))
    (folder / "list-samples").mkdir()
    (folder / "list-samples" / "samples.json").write_text("[1]")
    torch.save([1, 2], folder / "list.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "list.ckpt").read_bytes()[:100])
    (folder / "shard.tar").write_bytes(shard.read_bytes()[:700])


def listing(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def remove(paths):
    """Remove what a command made."""
    for path in sorted(paths, reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
