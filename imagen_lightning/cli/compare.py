"""`imagen-lightning compare A B --prompts FILE --out DIR`: a person votes between two cascades, blind."""

from __future__ import annotations

import sys
from typing import Any

from imagen_lightning.cli.arguments import NUM_IMAGES, Parser, folder, refuse_many, whole
from imagen_lightning.errors import InputError, counted

WHAT = "comparison"  # OUT holds


def parser() -> Parser:
    made = Parser(
        "compare",
        description="Draws the same prompts and seeds with two cascades and serves a local page on which a person "
        "votes, without knowing which is which (DrawBench's protocol). Votes are saved as they fall; the same command "
        "goes on.",
    )
    made.add_argument("a", metavar="A", help="a cascade folder")
    made.add_argument("b", metavar="B", help="another")
    made.add_argument(
        "--prompts", required=True, metavar="FILE", help="partiprompts .tsv, drawbench .csv, geneval .jsonl, or lines"
    )
    made.add_argument("--out", required=True, type=folder, metavar="DIR", help="new, or that of the same comparison")
    made.add_argument("--num", type=NUM_IMAGES, metavar="N", help="prompts, evenly spaced (default: all)")
    made.add_argument(
        "--num-images", type=NUM_IMAGES, default=4, metavar="N", help="images of a prompt (default %(default)s)"
    )
    made.add_sampling("guidance", "steps", each=" of both (default: each one's own)")
    made.add_argument("--port", type=whole(0, 65535), default=0, help="of the page (default: a free one)")
    made.add_argument("--result", action="store_true", help="only print the result of the votes so far")
    made.add_trust()
    return made


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from imagen_lightning.evaluation.compare import PLAN, VOTES, BallotServer
    from imagen_lightning.evaluation.prompts import read_prompts
    from imagen_lightning.evaluation.votes import Ballot
    from imagen_lightning.files import begin_folder, check_folder, unwritable
    from imagen_lightning.io.locks import LOCK, locked
    from imagen_lightning.report.ballot_page import ballot_page

    prompts = read_prompts(arguments.prompts).first(arguments.num)
    refuse_many(len(prompts), arguments.num_images)
    if arguments.result:  # whoever only reads votes needs no cascade any more, and may while another votes
        if not (arguments.out / PLAN).exists():
            raise InputError(f"--out {str(arguments.out)!r} holds no comparison yet; run without --result first")
        check_folder(arguments.out, PLAN, _plan(arguments, prompts.captions), WHAT)
        _tell(arguments, Ballot(arguments.out / VOTES, len(prompts), arguments.seed), prompts.rows())
        return 0
    cascades, plan = _load(arguments), _plan(arguments, prompts.captions)
    check_folder(arguments.out, PLAN, plan, WHAT)  # before anything is written
    with locked(arguments.out / LOCK, f"comparison {str(arguments.out)!r}"):
        begin_folder(arguments.out, PLAN, plan, WHAT)
        ballot = Ballot(arguments.out / VOTES, len(prompts), arguments.seed)
        try:
            _draw(arguments, cascades, prompts.captions)
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on", file=sys.stderr)
            raise
        except OSError as error:
            if (refusal := unwritable(error, arguments.out)) is not None:
                raise InputError(f"{refusal}; the same command goes on") from None
            raise
        with BallotServer(
            arguments.out, ballot, prompts.captions, arguments.num_images, ballot_page(), arguments.port
        ) as server:
            print(f"Vote at {server.url} (arrow keys); Ctrl-C ends and prints the result", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)
        _tell(arguments, ballot, prompts.rows())
    return 0


def _plan(arguments: Any, captions: list[str]) -> dict[str, Any]:
    from imagen_lightning.metrics.digests import digest_texts

    names = ("a", "b", "num_images", "seed", "guidance", "steps", "precision")
    plan = {name: getattr(arguments, name) for name in names} | {"prompts_sha256": digest_texts(captions)}
    if not arguments.result:
        from imagen_lightning.evaluation.identity import images_sha256

        for name in ("a", "b"):
            folder, trust = getattr(arguments, name), arguments.trust
            plan[f"{name}_sha256"] = images_sha256(folder, trust, arguments.guidance, arguments.steps)
    return plan


def _load(arguments: Any) -> dict[str, Any]:
    """Both cascades, before anything is written."""
    import torch

    from imagen_lightning.cascade import Cascade

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {name: Cascade.load(getattr(arguments, name), device, trust=arguments.trust) for name in ("a", "b")}
    for cascade in found.values():
        cascade.settings(arguments.guidance, arguments.steps)  # refuses as many values as it has no stages
    return found


def _draw(arguments: Any, cascades: dict[str, Any], captions: list[str]) -> None:
    from tqdm import tqdm

    from imagen_lightning.evaluation.compare import draw

    settings = {name: getattr(arguments, name) for name in ("guidance", "steps", "precision")}
    with tqdm(total=2 * len(captions) * arguments.num_images, unit=" images") as bar:
        for name, cascade in cascades.items():
            bar.set_description(f"drawing {name.upper()}")
            draw(
                cascade,
                captions,
                arguments.out,
                name,
                arguments.num_images,
                arguments.seed,
                arguments.batch_size,
                settings,
                bar.update,
            )


def _tell(arguments: Any, ballot: Any, categories: dict[str, list[int]]) -> None:
    from imagen_lightning.evaluation.compare import RESULT
    from imagen_lightning.evaluation.votes import preferences
    from imagen_lightning.files import write_json

    votes = list(ballot.votes.values())
    overall = preferences(votes)
    by_category = {name: preferences(votes, rows) for name, rows in categories.items()}
    result = {
        "a": arguments.a,
        "b": arguments.b,
        "votes": len(votes),
        "preferences": [vars(item) for item in overall],
        "categories": {name: [vars(item) for item in items] for name, items in by_category.items() if items},
    }
    write_json(arguments.out / RESULT, result)
    print(f"A is {arguments.a}, B is {arguments.b}; {counted(len(votes), 'vote')}")
    for item in overall:
        print(item.sentence())
    for name, items in by_category.items():
        for item in items:
            print(f"  {name}, {item.sentence()}")
    print(f"Wrote {arguments.out / RESULT}")
