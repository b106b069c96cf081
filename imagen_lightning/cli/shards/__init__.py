"""`imagen-lightning shards`: make, index and check shards; one file a verb, imported when it runs."""

from __future__ import annotations

from importlib import import_module

from imagen_lightning.cli.arguments import Parser

VERBS = {
    "write": "make shards of a folder or table of captioned images",
    "index": "find where each sample lies, and take its SHA-256",
    "verify": "compare every sample with its SHA-256",
    "doctor": "see what they hold, and what to mend before training",
    "embed": "store the text states of captions, so that training loads no T5",
}


def main(argv: list[str]) -> int:
    """Runs `imagen-lightning shards` with the arguments after that and returns the exit code."""
    parser = Parser("shards", description="Shards of captioned images.")
    width = max(map(len, VERBS))
    parser.usage = "imagen-lightning shards VERB [options]\n\nverbs:\n" + "\n".join(
        f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()
    )
    parser.add_argument(
        "verb", choices=VERBS, metavar="VERB", help="one of those above; VERB --help says what it takes"
    )
    verb = parser.parse_args(argv[:1]).verb
    return int(import_module(f"imagen_lightning.cli.shards.{verb}").main(argv[1:]))
