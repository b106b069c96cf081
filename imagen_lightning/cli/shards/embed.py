"""`imagen-lightning shards embed`: the text states of shards' captions, encoded once and stored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagen_lightning.cli.arguments import Parser, folder, whole
from imagen_lightning.cli.configs import find_config, read_config
from imagen_lightning.errors import InputError, counted

if TYPE_CHECKING:
    from imagen_lightning.data.embed import Embedding, Estimate
    from imagen_lightning.types import TextEncoder

_YAML = (".yaml", ".yml")


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning shards embed` with the arguments after that and returns the exit code."""
    arguments = parser().parse_args(argv)
    rank, world_size, local_rank = (_whole(name, default) for name, default in _PROCESS)
    import torch

    from imagen_lightning.data.embed import Embedding, Settings
    from imagen_lightning.data.shards import open_shards

    settings = Settings(
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        device=_device(arguments.device, local_rank),
        caption_field=arguments.caption_field,
        rank=rank,
        world_size=world_size,
    )
    shards = open_shards(arguments.shards, cache=arguments.cache, read_ahead=1)
    embedding = Embedding(shards, arguments.out, _encoder(arguments), settings)
    try:
        return _run(embedding, arguments.estimate_only)
    except torch.OutOfMemoryError:
        raise InputError(
            f"device {settings.device!r} has too little memory for {settings.batch_size} captions at once: lower "
            "--batch-size, or the weights' --precision"
        ) from None


def _run(embedding: Embedding, estimate_only: bool) -> int:
    from imagen_lightning.data.embed import readable_bytes

    settings, first = embedding.settings, embedding.settings.rank == 0
    if not embedding.left:
        if first:
            print(f"nothing to do: {_shards(embedding.shards.indexes)} stored in {embedding.out} already")
        return 0
    num_captions = None
    if first:
        estimate = embedding.estimate()
        _tell(embedding, estimate)
        if estimate_only:
            return 0
        embedding.check_room(estimate)
        num_captions = round(estimate.num_captions / settings.world_size)
    elif estimate_only:
        return 0
    result = embedding.run(num_captions)
    process = f"process {settings.rank + 1} of {settings.world_size}: " if settings.world_size > 1 else ""
    print(
        f"{process}{_shards(range(result.num_shards))}, {counted(result.num_captions, 'caption')}, "
        f"{readable_bytes(result.num_bytes)} stored in {embedding.out}"
    )
    if result.skips.counts:
        print(f"{process}{result.skips.summary()}")
    if first:
        print(f"train on them with LaionDataModule(…, text_states={str(embedding.out)!r})")
    return 0


def _tell(embedding: Embedding, estimate: Estimate) -> None:
    from imagen_lightning.data.embed import readable_bytes, readable_time

    encoder, settings = embedding.encoder, embedding.settings
    done = len(embedding.shards.indexes) - estimate.num_shards
    print(
        f"{encoder.name}: {encoder.dim} features, at most {encoder.max_tokens} tokens, stored as {settings.dtype}\n"
        f"{_shards(range(estimate.num_shards))} to do{f' ({done} are done)' if done else ''}: about "
        f"{estimate.num_captions:,} captions of {estimate.tokens:.1f} tokens, {estimate.at_limit:.1%} of them "
        f"{encoder.max_tokens} tokens or cut to that (judged by {estimate.num_sampled:,})\n"
        f"about {readable_bytes(estimate.num_bytes)}; {estimate.captions_per_second:,.0f} captions/s on "
        f"{settings.device}: about {readable_time(estimate.seconds or 0)}"
        + (f" with {settings.world_size} processes" if settings.world_size > 1 else ""),
        flush=True,
    )


def _shards(shards: Any) -> str:
    return counted(len(shards), "shard")


def _encoder(arguments: Any) -> TextEncoder:
    from imagen_lightning.text import T5TextEncoder, TinyTextEncoder

    given = {name: getattr(arguments, name) for name in ("length", "precision", "padding", "revision")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.clean_captions:
        given["clean_captions"] = True
    if arguments.encoder.endswith(_YAML):
        _refuse(given, f"the encoder's settings are those of {arguments.encoder}")
        return _encoder_of(find_config(arguments.encoder), arguments.trust)
    length = {"max_tokens": given.pop("length")} if "length" in given else {}
    if arguments.encoder == "tiny":
        _refuse(given, "the encoder 'tiny' has no such setting")
        return TinyTextEncoder(**length)
    if "precision" in given:
        given["dtype"] = given.pop("precision")
    return T5TextEncoder(arguments.encoder, **length, **given)


def _refuse(given: Mapping[str, Any], reason: str) -> None:
    if given:
        option = next(iter(given)).replace("_", "-")
        raise InputError(f"--{option}: {reason}; drop the option")


def _encoder_of(path: Path, trust: list[str]) -> TextEncoder:
    """The text encoder of the stage that a YAML configures."""
    from imagen_lightning.components import build
    from imagen_lightning.types import TextEncoder

    found: Any = read_config(path)
    for name in ("model", "init_args", "text", "encoder"):
        found = found.get(name) if isinstance(found, dict) else None
    encoder = build(found, trust) if isinstance(found, dict) and "class_path" in found else None
    if not isinstance(encoder, TextEncoder):
        raise InputError(
            f"--encoder {str(path)!r} has no text encoder under model.init_args.text.encoder; give a stage's YAML"
        )
    return encoder


def _device(name: str | None, local_rank: int) -> str:
    import torch

    from imagen_lightning.cascade.cascade import check_device

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{local_rank}"
    check_device(name)
    return name


_PROCESS = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _whole(name: str, default: int) -> int:
    """A whole number of torchrun's environment."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"the environment's {name} {text!r} is no whole number; unset it, or start by torchrun"
        ) from None


def parser() -> Parser:
    made = Parser(
        "shards embed",
        description="Encodes the captions of shards once and stores the text states, one file OUT/SHARD.safetensors a "
        "shard, so that training loads no T5. Says beforehand how large and how long. Run again, it goes on with the "
        "shards that are left; started by torchrun, its processes share the shards.",
    )
    made.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="paths, folders, globs, or patterns such as 'train-{000..009}.tar', or addresses of such",
    )
    made.add_argument("out", type=folder, metavar="OUT", help="the folder for the states")
    made.add_argument(
        "--encoder",
        required=True,
        metavar="NAME_OR_PATH",
        help="a T5's hub name or local folder; a stage's YAML, whose text encoder is taken as it is; or 'tiny'",
    )
    made.add_argument(
        "--length", type=whole(1, 100_000), metavar="N", help="tokens that captions are cut to (T5: 128, tiny: 32)"
    )
    made.add_argument(
        "--dtype",
        default="float16",
        choices=("float16", "int8"),
        help="how states are stored; int8 with a scale a token takes half the room (%(default)s)",
    )
    made.add_argument(
        "--batch-size", type=whole(1, 1_000_000), default=64, metavar="N", help="captions at once (%(default)s)"
    )
    made.add_argument("--device", metavar="NAME", help="cpu, cuda, … (cuda where there is one)")
    made.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="of the encoder's weights and computation (float32)",
    )
    made.add_argument("--clean-captions", action="store_true", help="as the encoder's clean_captions: true")
    made.add_argument("--padding", choices=("masked", "attended"), help="as the encoder's padding (masked)")
    made.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    made.add_argument(
        "--caption-field", metavar="NAME", help="the json field of the captions (the txt, or json's caption)"
    )
    made.add_argument(
        "--cache", type=folder, metavar="FOLDER", help="for remote shards, and indexes where none can be written"
    )
    made.add_argument("--estimate-only", action="store_true", help="say how large and how long, and end")
    made.add_trust()
    return made
