"""Prompt sets in the formats that they are published in, each prompt with its category.

PartiPrompts is a TSV of Prompt, Category, Challenge and Note (Yu et al. 2022, arXiv 2206.10789), DrawBench a CSV of
Prompts and Category (Saharia et al. 2022, arXiv 2205.11487), GenEval's metadata JSON Lines with prompt and tag (Ghosh
et al. 2023, arXiv 2310.11513). Any other file is one caption a line, without categories.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from imagen_lightning.errors import InputError
from imagen_lightning.files import read_text
from imagen_lightning.io.lines import cell_reader, lines

_PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")
_CATEGORY_COLUMNS = ("category", "tag")


@dataclass(frozen=True)
class PromptSet:
    """Captions and their categories.

    Attributes:
        name: the file's name.
        captions: N strings.
        categories: N strings, "" where there are none.
    """

    name: str
    captions: list[str]
    categories: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def rows(self) -> dict[str, list[int]]:
        """The numbers of each category's captions, in the file's order; empty where there are no categories."""
        found: dict[str, list[int]] = {}
        for number, category in enumerate(self.categories):
            if category:
                found.setdefault(category, []).append(number)
        return found

    def first(self, num: int | None) -> PromptSet:
        """`num` prompts evenly spaced, so that all categories stay; all of them for None or where there are fewer."""
        if num is None or num >= len(self):
            return self
        kept = [number * len(self) // num for number in range(num)]
        return PromptSet(self.name, [self.captions[k] for k in kept], [self.categories[k] for k in kept])


def read_prompts(path: str | Path) -> PromptSet:
    """Reads a prompt set; the suffix tells the format (.tsv, .csv, .jsonl, else one caption a line).

    Raises:
        InputError: no such file, not UTF-8, no prompt column or two of one name, a damaged line, a row without
            prompt, or no prompt at all. Blank lines are no rows.
    """
    path = Path(path)
    text = read_text(path, "--prompts")
    kind = path.suffix.lower()
    if kind in (".tsv", ".csv"):
        pairs = _table(text, kind == ".tsv", path)
    elif kind == ".jsonl":
        pairs = _json_lines(text, path)
    else:
        pairs = [(line, "") for line in lines(text)]
    pairs = [(encodable(prompt), encodable(category)) for prompt, category in pairs]
    pairs = [(" ".join(prompt.split()), category.strip()) for prompt, category in pairs if prompt.strip()]
    if not pairs:
        raise InputError(f"--prompts {str(path)!r} holds no prompt")
    return PromptSet(path.name, [prompt for prompt, _ in pairs], [category for _, category in pairs])


def encodable(text: str) -> str:
    """The text with "?" for the lone surrogates that JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _table(text: str, tabs: bool, path: Path) -> list[tuple[str, str]]:
    reader = cell_reader(io.StringIO(text, newline=""), tabs)
    pairs: list[tuple[str, str]] = []
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"--prompts {str(path)!r} has several columns {twice!r}; give each a name of its own")
        prompt = next((names.index(name) for name in _PROMPT_COLUMNS if name in names), None)
        category = next((names.index(name) for name in _CATEGORY_COLUMNS if name in names), None)
        if prompt is None:
            raise InputError(
                f"--prompts {str(path)!r} has no column {' or '.join(_PROMPT_COLUMNS)}; its columns are "
                f"{', '.join(map(repr, names))}"
            )
        for row in reader:
            cells = [*row, *[""] * (len(names) - len(row))]
            if any(cells[len(names) :]):
                raise InputError(f"--prompts {str(path)!r}: line {reader.line_num} has more cells than columns")
            if any(map(str.strip, cells)):
                pairs.append((cells[prompt], "" if category is None else cells[category]))
                _check_prompt(cells[prompt], reader.line_num, path)
    except csv.Error as error:
        raise InputError(f"--prompts {str(path)!r} is damaged near line {reader.line_num}: {error}") from None
    return pairs


def _check_prompt(prompt: str, line: int, path: Path) -> None:
    if not prompt.strip():
        raise InputError(f"--prompts {str(path)!r}: line {line} has no prompt; fill it in, or drop the line")


def _json_lines(text: str, path: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, category = record["prompt"], record.get("tag", record.get("category", ""))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f"--prompts {str(path)!r}: line {number} is no JSON object with a prompt") from None
        if not isinstance(prompt, str) or not isinstance(category, str):
            raise InputError(f"--prompts {str(path)!r}: line {number} has a prompt or tag that is no text")
        _check_prompt(prompt, number, path)
        pairs.append((prompt, category))
    return pairs
