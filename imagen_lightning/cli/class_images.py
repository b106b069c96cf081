"""`imagen-lightning class-images CASCADE OUT --prompt "…"`: what a cascade knows of a class, before fine-tuning."""

from __future__ import annotations

import sys

from imagen_lightning.cli.arguments import NUM_IMAGES, Parser, captions_of, folder
from imagen_lightning.errors import counted


def parser() -> Parser:
    made = Parser(
        "class-images",
        description="Draws class images for DreamBooth's prior preservation, each with its caption. Stopped at any "
        "moment and given again, a command goes on with the images that are missing.",
    )
    made.add_argument("cascade", metavar="CASCADE", help="the cascade folder that is to be fine-tuned")
    made.add_argument("out", type=folder, metavar="OUT", help="the folder to make: OUT/STAGE/00000.png and .txt …")
    made.add_argument("--prompt", metavar="CAPTION", action="append", default=[], help="may be given several times")
    made.add_argument("--prompts", metavar="FILE", help="captions, one a line; or PartiPrompts, DrawBench, GenEval")
    made.add_argument(
        "--num", type=NUM_IMAGES, default=200, metavar="N", help="images, dealt out to the captions (%(default)s)"
    )
    made.add_argument("--last-stage", metavar="STAGE", help="number or name of the last stage to draw with (the last)")
    made.add_sampling("guidance", "steps", "sampler", "aug-level")
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    prompts = captions_of(arguments.prompt, arguments.prompts, "there are no captions of the class")
    prompts = [" ".join(prompt.split()) for prompt in prompts]

    import torch
    from tqdm import tqdm

    from imagen_lightning.cascade import Cascade
    from imagen_lightning.finetuning.class_images import draw_class_images, weights_of

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights = weights_of(arguments.cascade)
    cascade = Cascade.load(arguments.cascade, device, trust=arguments.trust)
    bar = tqdm(total=arguments.num, unit="image", disable=None)

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
