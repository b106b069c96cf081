"""Pages of the commands, from the parsers that read them."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from unittest import mock

from imagen_lightning.cli import main

from .markdown import code, table, text, toctree


def parser_of(words: tuple[str, ...]) -> argparse.ArgumentParser:
    """Return the parser that prints `imagen-lightning WORDS --help`."""
    found: list[argparse.ArgumentParser] = []
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda self, file=None: found.append(self)),
        mock.patch.object(sys, "argv", ["imagen-lightning"]),
        contextlib.suppress(SystemExit),
    ):
        main.main([*words, "--help"])
    return found[-1]


def commands() -> dict[tuple[str, ...], tuple[str, argparse.ArgumentParser]]:
    """Return the purpose and the parser of each command, by its words: `sample`, `shards write`."""
    found = {}
    for name, (_, purpose) in main.VERBS.items():
        found[name,] = purpose, parser_of((name,))
        for below, does in subcommands(found[name,][1]).items():
            found[name, below] = does, parser_of((name, below))
    return found


def subcommands(parser: argparse.ArgumentParser) -> Mapping[str, str]:
    """Return what the commands of a command are for, by name."""
    positional = [action.choices for action in parser._actions if not action.option_strings]
    return next((choices for choices in positional if isinstance(choices, Mapping)), {})


def page(words: tuple[str, ...], purpose: str, parser: argparse.ArgumentParser) -> str:
    formatter = parser._get_formatter()

    def names(action: argparse.Action) -> list[str]:
        value = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper()).lstrip("\b")
        return [f"{option} {value}".strip() for option in action.option_strings] or [value]

    groups = {group.title or "": group._group_actions for group in parser._action_groups}
    positional = groups.pop("positional arguments", [])
    usage = " ".join(["imagen-lightning", *words, *(names(action)[0] for action in positional), "[options]"])
    lines = [f"# {' '.join(words)}\n", text(purpose[0].upper() + purpose[1:]) + ".\n", f"```text\n{usage}\n```\n"]
    for below, does in subcommands(parser).items():
        lines.append(f"- [{below}]({'-'.join([*words, below])}.md): {text(does)}")
    for title, actions in groups.items():
        section = actions[0].dest.partition(".")[0] if actions else ""
        if title.lower() == "options":
            title, actions = "Options", [*positional, *actions] if not subcommands(parser) else []
        elif any(action.dest.startswith(f"{section}.") for action in actions):  # titled by a class's docstring
            title = code(f"--{section}")
        rows = [
            [", ".join(map(code, names(action))), text(formatter._expand_help(action) if action.help else "")]
            for action in actions
            if action.help != argparse.SUPPRESS and action.dest != "help"
        ]
        if rows:
            lines.append(f"## {title}\n\n" + table(["option", "meaning"], rows))
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Return Markdown by file name, below commands/."""
    found = commands()
    made = {f"{'-'.join(words)}.md": page(words, *about) for words, about in found.items()}
    rows = [[f"[{' '.join(words)}]({'-'.join(words)}.md)", text(purpose)] for words, (purpose, _) in found.items()]
    index = "# Commands\n\n`imagen-lightning COMMAND --help` shows the same, from the same parsers.\n\n"
    return made | {"index.md": index + table(["command", "does"], rows) + "\n" + toctree(map("-".join, found))}
