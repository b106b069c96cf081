"""Every command of these pages runs, in order, on a tiny cascade at the paths that they name."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imagen_lightning.cascade import Cascade
from imagen_lightning.cli.main import main
from imagen_lightning.images import save_png, to_pil
from imagen_lightning.networks import EfficientUNet, PatchTransformer
from imagen_lightning.stages import BaseStage, Sampling, SuperResolutionStage, TextSettings
from imagen_lightning.text import TinyTextEncoder, TransformerEncoder

ROOT = Path(__file__).parents[2]
NAMES = ["how-to/finetuning", "start/fine-tune", "start/compare-stages", "start/your-own-images"]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in NAMES}
PAGE = PAGES["how-to/finetuning"]
SMALL = {"dim": 8, "multipliers": [1, 2], "num_blocks": 1, "head_dim": 8, "groups": 4, "text_dim": 16}
SHORT = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu"),
    *("--trainer.log_every_n_steps=1", "--throughput.measure_matmul=false", "--checkpoint.every_n_steps=1"),
    "--model.init_args.optimization.warmup_steps=0",
]
FOR_PEOPLE = "imagen-lightning compare"  # waits for votes


def commands():
    """The pages' command lines in order, those in lines with a backslash as one; what was run is not run again."""
    found = []
    for page in PAGES.values():
        for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line and not line.startswith(("#", FOR_PEOPLE))]
    return list(dict.fromkeys(found))


COMMANDS = commands()
MADE_BY_FIXTURE = "imagen-lightning quickstart"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny cascade where the quickstart leaves its own, and a folder of one's own pictures."""
    here = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    network = PatchTransformer(dim=16, num_layers=1, patch_size=4, bottleneck=8, head_dim=8, text_dim=16)
    base = BaseStage(16, network, TextSettings(TinyTextEncoder(16)), sampling=Sampling(num_steps=2))
    text = TextSettings(TinyTextEncoder(16), TransformerEncoder(16, 16, num_layers=1, num_heads=2))
    enlarge = EfficientUNet(**SMALL, attention=["none", "self"])
    sr = SuperResolutionStage(64, 16, enlarge, text, sampling=Sampling(num_steps=1, guidance=1.0))
    for parameter in [*base.parameters(), *sr.parameters()]:
        if parameter.abs().max() == 0:  # layers that begin at zero give no gradients
            torch.nn.init.normal_(parameter, std=0.2)
    Cascade([base, sr]).save(here / "runs/quickstart/cascade")
    (here / "domain.yaml").write_text(re.search(r"^```yaml\n(run: runs/domain/.*?)^```", PAGE, re.M | re.S)[1])
    own = PAGES["start/your-own-images"]
    (here / "mine.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", own, re.M | re.S)[1])
    code = re.search(r"^```python\n(.*?)^```", own, re.M | re.S)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        exec(compile(code.replace("400", "60"), "your-own-images.md", "exec"), {})
    for number in range(20):
        picture = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)
        save_png(to_pil(picture), here / f"my-images/{number}.png")
        (here / f"my-images/{number}.txt").write_text(f"picture {number} of my domain\n")
    return here


def shorten(words):
    """The same command with less to do."""
    verb = words[0]
    if verb == "fit":
        return words if "--resume" in words else [*words, *SHORT]
    if verb == "class-images":
        return [*words, "--num", "6"]
    if verb in ("evaluate", "finetune-report"):
        return [*words, "--num", "24"]
    if verb == "sample":
        return [*words, "--num-images", "1", "--steps", "1"]
    return words


def run_python(words):
    """`python -c CODE > FILE`, or a script of benchmarks/."""
    *words, out = words if ">" in words else [*words, "--num", "4", ">", None]
    words = [str(ROOT / word) if word.startswith("benchmarks/") else word for word in words if word != ">"]
    done = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if out:
        Path(out).write_text(done.stdout)


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_it_runs(folder, number, monkeypatch, capfd):
    command = COMMANDS[number]
    if command == MADE_BY_FIXTURE:
        assert (folder / "runs/quickstart/cascade/cascade.json").exists()
        return
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    words = shlex.split(command)
    monkeypatch.chdir(folder)
    if words[0] == "python":
        run_python(words[1:])
        return
    assert words[0] == "imagen-lightning"
    assert main(shorten(words[1:])) == 0, capfd.readouterr().err


def test_the_page_has_the_ways():
    text = " ".join(COMMANDS)
    for name in ("full", "lora", "dreambooth", "textual_inversion"):
        assert f"experiments/finetune/{name}.yaml" in text
    assert MADE_BY_FIXTURE in COMMANDS
