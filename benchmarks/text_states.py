"""What stored text states take, and what float16 and int8 change in them and in a trained stage's validation loss.

    python benchmarks/text_states.py [--data FOLDER] [--steps 400] [--features 512] [--rounds 5]
        [--out FILE.json]

No trained T5 is at hand: the encoder is a random T5 v1.1 (two layers) with the published tokenizer. Four parts:

- bytes a caption with D = 4096 (T5-XXL), from the captions' own lengths in tokens, for each folder of shards;
- relative error of the stored states, root mean square over all of a folder's states;
- validation loss of a small base stage, trained with the live encoder on pixel art of 32 px, when it is given the live
  states, those stored in float16 and int8, and, to show what the text is worth to it, another sample's states. The
  noise and times of the validation are the same each time;
- training steps a second of that stage with a random T5 v1.1 of the base size (768 features, 12 layers) in the loop,
  and with its states stored in float16, in turns.
"""

from __future__ import annotations

import imagen_lightning.torchvision_mend  # noqa: F401  isort: skip

import argparse
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch

from imagen_lightning.data import LaionDataModule
from imagen_lightning.data.embed import Embedding, Settings
from imagen_lightning.data.shards import open_shards
from imagen_lightning.data.text_states import read_captions
from imagen_lightning.networks import UNet
from imagen_lightning.stages import BaseStage, TextSettings
from imagen_lightning.text import T5TextEncoder
from imagen_lightning.text.cached import stored_bytes
from imagen_lightning.types import Batch, Text

XXL = 4096
FOLDERS = {  # name to the json field of the captions
    "dcss-tiles-32": None,
    "fluent-emoji-3d": None,
    "flower-photos-128": None,
    "coco-mini-permissive": "captions",
}
TRAINED_ON, SIZE, BATCH = "dcss-tiles-32", 32, 32


def random_t5(folder: Path, tokenizer: Path, features: int, num_layers: int = 2) -> T5TextEncoder:
    """A T5 v1.1 of random weights, as transformers initialises them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32128,
        d_model=features,
        d_kv=64,
        d_ff=2 * features,
        num_layers=num_layers,
        num_heads=max(1, features // 64),
        feed_forward_proj="gated-gelu",
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    transformers.T5Tokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return T5TextEncoder(str(folder))


def captions_of(folder: Path, field: str | None) -> list[str]:
    """The different captions of each shard of a folder."""
    shards = open_shards(str(folder))
    captions: list[str] = []
    for shard, index in enumerate(shards.indexes):
        rows = (read_captions(shards, shard, row, field) for row in range(index.num_samples))
        captions += sorted({caption for row in rows for caption in row})
    return captions


def sizes(name: str, captions: list[str], encoder: T5TextEncoder) -> dict[str, Any]:
    lengths = encoder.num_tokens(captions)
    row: dict[str, Any] = {"data": name, "captions": len(captions), "tokens": sum(lengths) / len(lengths)}
    for dtype in ("float16", "int8"):
        row[dtype] = stored_bytes(len(captions), sum(lengths), XXL, dtype) / len(captions)
    row["padded_float32"] = encoder.max_tokens * XXL * 4
    return row


def relative_error(stored: Text, live: Text) -> tuple[float, float]:
    """Sums of squares of the error and of the live states."""
    length = stored.states.shape[1]
    error = stored.states - live.states[:, :length]
    return float(error.double().square().sum()), float(live.states.double().square().sum())


class Shifted(BaseStage):
    """A stage that is validated with the states of the sample before."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        text = self.text.encoder(batch.captions[-1:] + batch.captions[:-1])  # type: ignore[misc]
        batch.text = text
        super().validation_step(batch, batch_idx)


def make_stage(cls: type[BaseStage], encoder: T5TextEncoder) -> BaseStage:
    torch.manual_seed(1)
    network = UNet(
        dim=32, multipliers=[1, 2, 2], num_blocks=1, attention=[False, True, True], head_dim=32, text_dim=encoder.dim
    )
    return cls(SIZE, network, TextSettings(encoder=encoder, drop=0.1))


def trainer(steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_steps=steps,
        limit_val_batches=1.0,
        val_check_interval=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
    )


def data(folder: Path, states: Path | None = None) -> LaionDataModule:
    return LaionDataModule(
        str(folder / "train-*.tar"),
        str(folder / "heldout-*.tar"),
        image_size=SIZE,
        batch_size=BATCH,
        text_states=states,
    )


def steps_per_second(
    encoder: T5TextEncoder, folder: Path, states: Path, rounds: int, steps: int = 3
) -> dict[str, float]:
    """Medians over turns of some steps each: with the encoder in the loop, and with its stored states."""
    import statistics
    import time
    from collections.abc import Callable

    def steps_of(module: LaionDataModule) -> Callable[[], float]:
        stage = make_stage(BaseStage, encoder)
        optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-4, fused=True)
        module.setup("fit")
        batches = iter(module.train_dataloader())

        def run() -> float:
            start = time.perf_counter()
            for _ in range(steps):
                batch = next(batches)
                optimizer.zero_grad()
                x0, conditioning = stage.condition(batch, 0, training=True)
                losses, _ = stage.diffusion_loss(x0, conditioning, batch.positions, 0)
                losses.mean().backward()
                optimizer.step()
            return steps / (time.perf_counter() - start)

        run()
        return run

    runs = {"T5 in the loop": steps_of(data(folder)), "stored states": steps_of(data(folder, states))}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(run())
    return {name: statistics.median(found) for name, found in rates.items()}


def validation_loss(stage: BaseStage, module: LaionDataModule) -> float:
    return float(trainer(1).validate(stage, module, verbose=False)[0]["val/loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("IMAGEN_LIGHTNING_TEST_DATA", "shared/data"))
    parser.add_argument("--data", type=Path, default=shared, help="folder of the shards' folders and the tokenizer")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--features", type=int, default=512, help="of the random T5, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12, help="of the T5 whose time is measured")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the measured steps")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(arguments, Path(scratch))
    show(figures)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    encoder = random_t5(scratch / "t5", arguments.data / "tokenizers" / "t5-v1_1", arguments.features)
    figures: dict[str, Any] = {"steps": arguments.steps, "features": arguments.features}
    captions = {name: captions_of(arguments.data / name, field) for name, field in FOLDERS.items()}
    figures["sizes"] = [sizes(name, found, encoder) for name, found in captions.items()]
    folder = arguments.data / TRAINED_ON
    stored = {}
    for dtype in ("float16", "int8"):
        stored[dtype] = scratch / dtype
        Embedding(open_shards(str(folder)), stored[dtype], encoder, Settings(dtype=dtype)).run(progress=False)
    figures["relative_rms_error"] = {dtype: error_of(folder, states, encoder) for dtype, states in stored.items()}

    stage = make_stage(BaseStage, encoder)
    trainer(arguments.steps).fit(stage, train_dataloaders=None, datamodule=data(folder))
    shifted = make_stage(Shifted, encoder)
    shifted.load_state_dict(stage.state_dict())
    losses = {"live": validation_loss(stage, data(folder))}
    losses |= {dtype: validation_loss(stage, data(folder, states)) for dtype, states in stored.items()}
    losses["another caption's"] = validation_loss(shifted, data(folder))
    figures["val_loss"] = losses

    features = 768 if arguments.layers == 12 else arguments.features
    tokenizer = arguments.data / "tokenizers" / "t5-v1_1"
    larger = random_t5(scratch / "t5-base", tokenizer, features, arguments.layers)
    Embedding(open_shards(str(folder)), scratch / "larger", larger, Settings(dtype="float16")).run(progress=False)
    figures["steps_per_second"] = steps_per_second(larger, folder, scratch / "larger", arguments.rounds)
    return figures


def error_of(folder: Path, states: Path, encoder: T5TextEncoder) -> float:
    module = data(folder, states)
    sums = [relative_error(batch.text, encoder(batch.captions)) for batch in module.val_dataloader()]
    wrong, whole = (sum(part) for part in zip(*sums))
    return (wrong / whole) ** 0.5


def show(figures: dict[str, Any]) -> None:
    print("| captions of | captions | tokens a caption | float16 | int8 | padded float32 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in figures["sizes"]:
        kilobytes = (f"{row[name] / 1e3:,.0f} kB" for name in ("float16", "int8", "padded_float32"))
        print(f"| {row['data']} | {row['captions']:,} | {row['tokens']:.1f} | {' | '.join(kilobytes)} |")
    live = figures["val_loss"]["live"]
    print("\n| states | relative error | validation loss | change |\n| --- | --- | --- | --- |")
    for name, loss in figures["val_loss"].items():
        error = figures["relative_rms_error"].get(name)
        print(f"| {name} | {'' if error is None else f'{error:.2%}'} | {loss:.6f} | {loss / live - 1:+.4%} |")
    print("\n| text | steps/s |\n| --- | --- |")
    for name, rate in figures["steps_per_second"].items():
        print(f"| {name} | {rate:.2f} |")


if __name__ == "__main__":
    main()
