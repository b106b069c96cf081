"""Synthetic run folders and evaluations, and a headless Chromium to look at pages with."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from imagen_lightning.evaluation.schema import Evaluation, Row, save
from imagen_lightning.metrics.protocol import Protocol, Value

BINS = [f"{i / 10:.2f}-{(i + 1) / 10:.2f}" for i in range(10)]


def configuration(image_size=16, lr=1e-3, low_res_size=None, **model):
    kind = "BaseStage" if low_res_size is None else "SuperResolutionStage"
    sizes = {"image_size": image_size} | ({} if low_res_size is None else {"low_res_size": low_res_size})
    return {
        "seed_everything": 0,
        "trainer": {"precision": "bf16-mixed", "max_steps": 8000, "devices": "auto", "default_root_dir": "runs/x"},
        "model": {
            "class_path": f"imagen_lightning.stages.{kind}",
            "init_args": {
                **sizes,
                "network": {"class_path": "imagen_lightning.networks.UNet", "init_args": {"dim": 64}},
                "diffusion": {"parametrization": {"class_path": "imagen_lightning.diffusion.X0", "init_args": {}}},
                "optimization": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}},
                **model,
            },
        },
        "data": {
            "class_path": "imagen_lightning.data.ShapesDataModule",
            "init_args": {"image_size": image_size, "batch_size": 16, "num_val": 256, "seed": 0},
        },
        "ema": {"decay": 0.998},
    }


def write_metrics(folder, *, num=200, every=50, scale=1.0, aug=False, seed=0):
    """metrics.csv with the columns and the gaps that a real run has."""
    random = np.random.default_rng(seed)
    kinds = ["loss_t", *(["loss_aug"] if aug else [])]
    levels = [f"{part}/{kind}/{name}" for kind in kinds for part in ("train", "val") for name in BINS]
    columns = [
        "step",
        "train/loss",
        "epoch",
        "throughput/images_per_second",
        "val/loss",
        "base/caption_accuracy",
        *levels,
    ]
    lines = [",".join(columns)]
    for row in range(num):
        step = (row + 1) * every - 1
        loss = scale * (0.02 + math.exp(-row / 20)) * float(random.uniform(0.8, 1.2))
        cells = [step, loss, 0, 200 + row % 7, *[""] * (len(columns) - 4)]
        if row % 10 == 9:
            cells[4] = 0.9 * loss
            cells[5] = 1 - math.exp(-row / 50)
            for place in range(6, len(columns)):
                cells[place] = loss * (1 + (place - 6) % 10 / 10)
        lines.append(",".join(map(str, cells)))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_samples(
    folder, *, steps=(500, 1000, 2000), captions=("a red star", "a blue circle"), size=32, stage=0, seed=0
):
    for step in steps:
        place = folder / "samples" / f"{step:07d}"
        place.mkdir(parents=True)
        images = []
        for number, caption in enumerate(captions):
            ink = np.full((size, size, 3), (step // 10 + 40 * number) % 256, np.uint8)
            ink[: size // 2, : size // 2, number % 3] = 255 - step % 200
            Image.fromarray(ink).save(place / f"{number:05d}.png")
            images.append({"file": f"{number:05d}.png", "caption": caption, "image": number})
        details = {"step": step, "seed": seed, "stage": stage, "guidance": 1.5, "num_steps": 30, "images": images}
        (place / "samples.json").write_text(json.dumps(details))


def write_run(folder, *, config=None, metrics=None, samples=None, info=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration() if config is None else config))
    known = {"created": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}, "git": "0123456789abcdef-dirty"}
    (folder / "run.json").write_text(json.dumps({**known, "command": "imagen-lightning fit", **(info or {})}))
    write_metrics(folder, **(metrics or {}))
    if samples is not None:
        write_samples(folder, **samples)
    return folder


def write_values(folder, measurements):
    """values.jsonl of (step, name, value)."""
    lines = [json.dumps({"step": step, "name": name, "value": item}) for step, name, item in measurements]
    (folder / "values.jsonl").write_text("".join(f"{line}\n" for line in lines))


def value(metric, number, *, spread=0.1, image_size=64, num_samples=200, **made):
    known = {"image_size": image_size, "num_samples": num_samples, "prompts": "ab" * 32, "weights": "ema"}
    protocol = Protocol(metric, **known, **made)
    return Value(metric, number, number - spread, number + spread, protocol, "95% bootstrap").to_json()


def write_sweep(folder, *, guidances=(1, 1.5, 2, 3), steps=(10, 25), cascade="runs/quickstart/cascade"):
    rows = []
    for guidance in guidances:
        for num in steps:
            made = {"guidance": [guidance, 1], "steps": [num, 15], "seed": 0}
            accuracy = value("caption accuracy", 0.9 - 0.05 * (guidance - 2) ** 2, spread=0.03, **made)
            distance = value("FD-random", 3 + guidance / 2 + 10 / num, extractor="random", **made)
            rows.append(Row("sr_64", "chain", made, (accuracy, distance), 0.01 * num, 500 << 20))
    save(
        Evaluation("sweep", cascade, "2026-01-03T00:00:00+00:00", {"torch": "2"}, tuple(rows), "guidance 2 is best"),
        folder,
    )
    return folder


def write_matrix(folder, *, offset=0.0):
    made = {"guidance": [1.5], "steps": [30], "seed": 0}
    chain = {"guidance": [1.5, 1], "steps": [30, 15], "seed": 0}
    base = (value("caption accuracy", 0.93, spread=0.02, image_size=16, **made),)
    real = (value("caption accuracy", 0.98 + offset, spread=0.01, **made), value("PSNR", 24.0, **made))
    whole = (value("caption accuracy", 0.92 + offset, spread=0.02, **chain),)
    folder.mkdir(parents=True)
    Image.new("RGB", (400, 300), "teal").save(folder / "base.png")
    rows = (
        Row("base", None, made, base, 0.01, 100 << 20, "base.png"),
        Row("sr_64", "real", made, real, 0.02, 200 << 20),
        Row("sr_64", "chain", chain, whole, 0.03, 200 << 20),
        Row("real images", None, {}, (value("caption accuracy", 1.0, spread=0.0),)),
    )
    evaluation = Evaluation("matrix", "c", "2026-01-03T00:00:00+00:00", {"device": "cpu"}, rows, "base costs the most")
    save(evaluation, folder)
    return folder


@pytest.fixture(scope="session")
def make():
    """The functions above."""
    return SimpleNamespace(
        configuration=configuration,
        run=write_run,
        metrics=write_metrics,
        samples=write_samples,
        value=value,
        values=write_values,
        sweep=write_sweep,
        matrix=write_matrix,
    )


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, of the system or of Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a file, and at the end of the test asserts that the page logged nothing and asked for nothing."""
    open_pages, messages = [], []

    def visit(path, **options):
        page = chromium.new_page(**options)
        page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: messages.append(f"error: {error}"))
        page.on(
            "request", lambda request: messages.append(request.url[:100]) if not is_local(request.url, path) else None
        )
        page.goto(path.as_uri())
        open_pages.append(page)
        return page

    yield visit
    for page in open_pages:
        page.close()
    assert messages == []


def is_local(url, path):
    return url == path.as_uri() or url.startswith(("data:", "blob:"))
