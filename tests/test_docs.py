"""The README and docs/ say what is true: their code runs, their links, commands and tables are right."""

import inspect
import json
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import imagen_lightning.torchvision_mend  # noqa: F401  (before lightning)

# isort: split
import pytest
import torch
import yaml

from imagen_lightning import callbacks, cascade, data, diffusion, networks, samplers, stages, text
from imagen_lightning.cli import fit, main, shards
from imagen_lightning.cli.configs import find_config
from imagen_lightning.data import metadata
from imagen_lightning.data.filters import Filter
from imagen_lightning.data.skips import Reason
from imagen_lightning.errors import InputError
from imagen_lightning.metrics.features import FeatureExtractor, load_extractor

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "docs" / "reference" / "generated"  # by `make docs`, not committed
DOCS = {page.name: page for page in sorted((ROOT / "docs").rglob("*.md")) if GENERATED not in page.parents}
PAGES = [ROOT / "README.md", *DOCS.values()]
PACKAGES = (callbacks, data, diffusion, networks, samplers, stages, text)
LATER = "docs/images/quickstart"  # drawn by a run


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def sections(page: Path) -> dict[str, str]:
    """Text by the dotted class name in its heading."""
    parts = re.split(r"^### `(imagen_lightning\.[\w.]+)`$", page.read_text(), flags=re.MULTILINE)
    return {name: re.split(r"^#", body, flags=re.MULTILINE)[0] for name, body in zip(parts[1::2], parts[2::2])}


def rows(text: str) -> list[list[str]]:
    """The cells of a page's tables, header and ruler left out."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [line for line, following in zip(cells, [*cells[1:], []]) if not is_ruler(line) and not is_ruler(following)]


def is_ruler(line: list[str]) -> bool:
    return bool(line) and all(re.fullmatch(r":?-+:?", cell) for cell in line)


# ---- code

CODE = [(page.name, number) for page in PAGES for number in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("name", "number"), CODE)
def test_python_runs(name, number, tmp_path, monkeypatch):
    page = next(page for page in PAGES if page.name == name)
    module = ModuleType("my_package")  # where classes of the examples are at home
    monkeypatch.setitem(sys.modules, "my_package", module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(blocks(page, "python")[number], f"{name}, block {number}", "exec"), vars(module))


def test_there_is_code_to_run():
    assert sum(name == "extending.md" for name, _ in CODE) >= 6
    assert ("cascade.md", 0) in CODE


YAMLS = [(page.name, number) for page in PAGES for number in range(len(blocks(page, "yaml")))]


@pytest.mark.parametrize(("name", "number"), YAMLS)
def test_yaml_fits_a_stage(name, number, monkeypatch, tmp_path):
    """Each YAML, laid over a shipped stage, parses to the end."""
    page = next(page for page in PAGES if page.name == name)
    module = ModuleType("my_package")
    monkeypatch.chdir(tmp_path)
    for block in [block for block in blocks(page, "python") if "\nclass " in block]:
        exec(compile(block.split("\n\n\ndef test_")[0], name, "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "my_package", module)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(blocks(page, "yaml")[number])
    if "class_path" in yaml.safe_load(overlay.read_text()):  # no stage's, but an extractor's
        assert isinstance(load_extractor(overlay), FeatureExtractor)
        return
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    config = parse(["--config", str(find_config("domain/pixel_art.yaml")), "--config", str(overlay)])
    given = yaml.safe_load(overlay.read_text())
    assert contains(yaml.safe_load(config), given)


def parse(arguments: list[str]) -> str:
    """The configuration that the arguments make, as YAML, without making anything."""

    class Parsed(fit.StageCLI):
        def instantiate_classes(self):
            pass

    return Parsed(run=False, parser_class=fit.Parser, save_config_callback=None, args=arguments).dump()


def contains(whole, part) -> bool:
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return whole == part


# ---- links

LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        there = (page.parent / path).resolve() if path else page
        if there.is_relative_to(GENERATED):
            continue  # `make docs` checks it
        inside = there.relative_to(ROOT).as_posix()
        assert there.exists() or inside.startswith(LATER), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name}: {target}"


# ---- commands


def commands() -> list[tuple[str, list[str]]]:
    """(page, words after `imagen-lightning`) of every command in a block or in running text."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if line.startswith("imagen-lightning ")]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        found += [(page.name, line) for line in re.findall(r"`(imagen-lightning [^`]+)`", " ".join(prose.split()))]
    return [(name, shlex.split(line, comments=True)[1:]) for name, line in found]


@pytest.fixture(scope="module")
def options():
    """The options that each verb's --help shows."""
    shown: dict[str, set[str]] = {}

    def of(verb: tuple[str, ...], capsys) -> set[str]:
        if verb not in shown:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["imagen-lightning"])
                with pytest.raises(SystemExit):
                    main.main([*verb, "--help"])
            shown[verb] = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
        return shown[verb]

    return of


def test_commands_exist(options, capsys):
    found = commands()
    assert len(found) > 20
    for page, (verb, *words) in found:
        if verb in ("VERB", "--help", "--version"):
            continue
        assert verb in main.VERBS, f"{page}: imagen-lightning {verb}"
        path = (verb, words[0]) if verb == "shards" and words else (verb,)
        if path[1:]:
            assert path[1] in shards.VERBS, f"{page}: imagen-lightning shards {path[1]}"
        for word in words:
            option = word.partition("=")[0]
            if not option.startswith("--") or option in options(path, capsys):
                continue
            assert verb in ("fit", "plan", "verify-resume"), f"{page}: imagen-lightning {verb} has no {option}"
            assert re.fullmatch(r"--(model|data)\.init_args(\.\w+)+", option), f"{page}: {option}"


FITS = [words[1:] for _, words in commands() if words[:1] == ["fit"] and "--config" in words]
FITS = [words for words in FITS if "stage.yaml" not in words and "RUN/config.yaml" not in words]


@pytest.mark.parametrize("words", FITS, ids=" ".join)
def test_fit_commands_parse(words, tmp_path, monkeypatch):
    for word in {"mine.yaml", "laion.yaml", "dog.yaml", "zib.yaml", "domain.yaml"} & {*words}:  # which a page shows
        run = f"run: runs/{Path(word).stem}/"
        block = next(block for page in PAGES for block in blocks(page, "yaml") if run in block)
        (tmp_path / word).write_text(block)
        words = [str(tmp_path / word) if item == word else item for item in words]
    words = [str(find_config(word)) if before == "--config" else word for before, word in zip(["", *words], words)]
    monkeypatch.setattr(sys, "argv", ["imagen-lightning"])
    parsed = yaml.safe_load(parse(words))
    for option, value in pairwise(words):
        if option.startswith("--") and option != "--config":
            place = parsed
            for key in option[2:].split("."):
                place = place[key]
            assert place == yaml.safe_load(value) or place["class_path"] == value


# ---- tables

CONFIGURED = {name: (page, body) for page in DOCS.values() for name, body in sections(page).items()}


def own_parameters(cls: type, body: str) -> dict[str, inspect.Parameter]:
    """Those that the class's table must have: one that takes a parent's too names the parent, whose table has them."""
    parameters = dict(inspect.signature(vars(cls).get("__init__", lambda self, **options: None)).parameters)
    del parameters["self"]
    rest = [name for name, item in parameters.items() if item.kind is inspect.Parameter.VAR_KEYWORD]
    if rest:
        del parameters[rest[0]]
        described = {name.rpartition(".")[2] for name in CONFIGURED}
        parent = next(base.__name__ for base in cls.__mro__[1:] if base.__name__ in described)
        assert f"options of `{parent}`" in body or f"options are those of `{parent}`" in body, cls
    return parameters


@pytest.mark.parametrize("name", CONFIGURED)
def test_tables_of_options_are_complete_and_right(name):
    page, body = CONFIGURED[name]
    module, _, cls_name = name.rpartition(".")
    cls = getattr(sys.modules[module], cls_name)
    parameters = own_parameters(cls, body)
    told = {option: cells[1] for cells in rows(body) for option in re.findall(r"`(\w+)`", cells[0])}
    assert told.keys() == parameters.keys()
    required = [option for option, cell in told.items() if cell == "required"]
    assert required == [n for n in told if parameters[n].default is inspect.Parameter.empty]
    for option in told.keys() - required:
        assert re.fullmatch(r"`.*`", told[option]), f"{page.name}, {name}: {option}"
        said, default = yaml.safe_load(told[option].strip("`")), parameters[option].default
        if default is None and said is not None:  # None in the signature stands for an object or a class
            default = getattr(cls(), option)
            default = default if isinstance(default, type) else type(default)
        if isinstance(default, type):
            default = default.__name__
        assert said == (list(default) if isinstance(default, tuple) else default), f"{page.name}, {name}: {option}"


def test_every_component_of_a_yaml_has_its_table():
    described = {name.rpartition(".")[2] for name in CONFIGURED}
    expected = {
        *stages.__all__,
        *networks.__all__,
        *data.__all__,
        *("EMA", "Checkpoint", "EncodeOnce", "NoiseLevelLoss", "SampleGrid", "SkippedSamples", "Throughput"),
        *("SampledMetric", "FID", "KID", "CLIPScore", "CaptionAccuracy", "Probes"),
        *("TinyTextEncoder", "T5TextEncoder", "TransformerEncoder", "LowResAugmentation"),
        "PseudoTokens",
    }
    assert described == expected - {"DiffusionMixin", "StepRecord"}


def test_choices_are_named():
    page = DOCS["configuration.md"].read_text()
    names = [*samplers.__all__, *diffusion.__all__]
    plumbing = {"DiffusionProcess", "Parametrization", "Thresholding", "Weighting", "guide", "threshold"}
    for name in set(names) - plumbing:
        assert re.search(rf"\b{name}\b", page), name
    for call, arguments in re.findall(r"`(\w+)\(([^)`]*)\)`", page):  # DDIM(eta=0): its defaults
        cls = getattr(samplers, call, None) or getattr(diffusion, call, None)
        if cls is not None:
            for option, value in re.findall(r"(\w+)=([^,]+)", arguments):
                assert inspect.signature(cls).parameters[option].default == yaml.safe_load(value), call


def test_defaults_of_the_trainer_are_named():
    page = " ".join(DOCS["configuration.md"].read_text().split())
    for option, value in fit.TRAINER_DEFAULTS.items():
        if option not in ("callbacks", "enable_model_summary"):
            assert f"`{option}: {json.dumps(value)}`" in page, option


def test_reasons_of_skips_are_listed():
    body = DOCS["data.md"].read_text()
    listed = {cell for cells in rows(body) for cell in cells}
    assert {reason.value for reason in Reason} <= listed
    named = {row[0]: row[1] for row in rows(body)}
    assert all(named[reason.value] == f"`{reason.name.lower()}`" for reason in Reason)


def test_conditions_of_filters_are_listed():
    listed = " ".join(row[0] for row in rows(DOCS["data.md"].read_text()))
    fields = re.search(r"^\| `FIELD_min`, .*$", DOCS["data.md"].read_text(), re.MULTILINE)[0]
    assert all(f"`{field}`" in fields for field in metadata.NUMBERS)
    with pytest.raises(InputError) as refused:
        Filter({"nothing": 1})
    known = str(refused.value).partition("some of ")[2].split(", ")
    assert len(known) > 10
    assert all(f"`{name}`" in listed for name in known if not name.endswith("_min/_max"))


def test_verbs_are_listed():
    listed = {verb for row in rows(DOCS["configuration.md"].read_text()) for verb in row[0].split(", ")}
    verbs = {f"`{verb}`" for verb in main.VERBS if verb != "shards"} | {f"`shards {verb}`" for verb in shards.VERBS}
    assert verbs <= listed


def test_options_of_shards_and_quickstart_are_listed(options, capsys):
    told = [("data.md", ("shards", verb)) for verb in shards.VERBS]
    for page, verb in [*told, ("data.md", ("verify-resume",)), ("quickstart.md", ("quickstart",))]:
        cells = [row[0] for row in rows(DOCS[page].read_text())]
        listed = {option for cell in cells for option in re.findall(r"`(--[\w-]+)`", cell)}
        own = {option for option in options(verb, capsys) if "." not in option}  # the rest are fit's
        assert own - {"--help"} <= listed, verb


def test_fields_of_the_manifest_are_listed(tmp_path):
    code = blocks(DOCS["cascade.md"], "python")[0].split("cascade = Cascade.load")[0]
    exec(code.replace('"cascade"', repr(str(tmp_path / "cascade"))), {"__name__": "my_package"})
    manifest = json.loads((tmp_path / "cascade" / cascade.MANIFEST).read_text())
    cells = " ".join(row[0] for row in rows(DOCS["cascade.md"].read_text()))
    listed = set(re.findall(r"`([\w\[\].]+)`", cells))
    fields = set(manifest) | {f"stages[].{key}" for stage in manifest["stages"] for key in stage}
    assert fields <= listed
    assert {field for field in listed if field.startswith("stages[].")} <= fields
