"""`imagen-lightning class-images CASCADE OUT --prompt "…"`: what a cascade knows of a class, before fine-tuning."""

from __future__ import annotations

import sys

from imagen_lightning.cli.arguments import Parser, one_or_each
from imagen_lightning.errors import InputError, counted


def parser() -> Parser:
    made = Parser(
        "class-images",
        description="Draws class images for DreamBooth's prior preservation, each with its caption. Stopped at any "
        "moment and given again, a command goes on with the images that are missing.",
    )
    made.add_argument("cascade", metavar="CASCADE", help="the cascade folder that is to be fine-tuned")
    made.add_argument("out", metavar="OUT", help="the folder to make: OUT/STAGE/00000.png and .txt …")
    made.add_argument("--prompt", metavar="CAPTION", action="append", default=[], help="may be given several times")
    made.add_argument("--prompts", metavar="FILE", help="captions, one a line; or PartiPrompts, DrawBench, GenEval")
    made.add_argument(
        "--num", type=int, default=200, metavar="N", help="images, dealt out to the captions (%(default)s)"
    )
    made.add_argument("--last-stage", metavar="STAGE", help="number or name of the last stage to draw with (the last)")
    made.add_argument(
        "--seed", type=int, default=0, help="image i's noise depends on the seed and i alone (%(default)s)"
    )
    each = "; one value, or one a stage as in %(metavar)s (default: the cascade's)"
    made.add_argument("--guidance", type=one_or_each(float), metavar="3,1", help=f"guidance weight, 1 for none{each}")
    made.add_argument("--steps", type=one_or_each(int), metavar="25,15", help=f"sampling steps{each}")
    made.add_argument("--sampler", type=one_or_each(str), metavar="dpmpp,ddim", help=f"ddpm, ddim, dpmpp …{each}")
    made.add_argument(
        "--aug-level", type=one_or_each(float), metavar="0,0.1", help=f"noise on the low-resolution image{each}"
    )
    made.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (%(default)s)")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: cuda where there is one)")
    made.add_argument("--precision", choices=["32", "bf16"], default="32", help="of the networks (%(default)s)")
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    prompts = _prompts(arguments.prompt, arguments.prompts)

    import torch
    from tqdm import tqdm

    from imagen_lightning.cascade import Cascade
    from imagen_lightning.finetuning.class_images import draw_class_images, weights_of

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = weights_of(arguments.cascade)
    cascade = Cascade.load(arguments.cascade, device, trust=arguments.trust)
    bar = tqdm(total=max(arguments.num, 0), unit="image", disable=None)

    def progress(done: int) -> None:
        bar.update(done - bar.n)

    with bar:
        try:
            drawn = draw_class_images(
                cascade,
                arguments.out,
                prompts,
                arguments.num,
                weights=weights,
                seed=arguments.seed,
                guidance=arguments.guidance,
                steps=arguments.steps,
                sampler=arguments.sampler,
                aug_level=arguments.aug_level,
                last_stage=arguments.last_stage,
                batch_size=arguments.batch_size,
                precision=arguments.precision,
                progress=progress,
            )
        except KeyboardInterrupt:
            print(
                "imagen-lightning: stopped; the same command goes on with the images that are missing", file=sys.stderr
            )
            raise
    if not drawn.num_made:
        print(f"{str(drawn.folder)!r} is finished already: nothing to do")
        return 0
    print(f"Wrote {counted(drawn.num, 'image')} of each of {', '.join(drawn.stages)} to {drawn.folder}")
    print(f"fine-tune with DreamBoothDataModule(class_images={str(drawn.folder)!r}, …)")
    return 0


def _prompts(given: list[str], file: str | None) -> list[str]:
    """The captions of the options, then of the file."""
    for number, prompt in enumerate(given, 1):
        if not prompt.strip():
            raise InputError(f"--prompt number {number} is empty; give a caption")
    found = [" ".join(prompt.split()) for prompt in given]
    if file is not None:
        from imagen_lightning.evaluation.prompts import read_prompts

        found += read_prompts(file).captions
    if not found:
        raise InputError("there are no captions of the class; give --prompt or --prompts")
    return found
