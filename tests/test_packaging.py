"""What a built package holds: sdist, then the wheel from it, as `python -m build` makes them."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
TORCHS_HOOK = "imagen_lightning_torchvision = imagen_lightning.torchvision_mend:mend"
SOURCES = ("imagen_lightning", "callbacks", "experiments")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The checkout's files, tracked or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    """The opened sdist's names and wheel, built from a copy."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        yield names, archive


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_name(name):
    """Where a source file goes: the top-level folders lie inside the package."""
    return name if name.startswith("imagen_lightning/") else f"imagen_lightning/{name}"


def test_the_wheel_holds_every_source_file_and_nothing_else(files, built):
    wanted = {
        installed_name(name)
        for name in files
        if name.split("/")[0] in SOURCES and name.endswith((".py", ".yaml", "/py.typed"))
    }
    assert {"imagen_lightning/callbacks/ema.py", "imagen_lightning/cli/main.py"} < wanted
    assert "imagen_lightning/experiments/quickstart/base.yaml" in wanted
    held = {name for name in built[1].namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_the_wheel_installs_one_package_and_the_command(built):
    _, wheel = built
    tops = {name.split("/")[0] for name in wheel.namelist()}
    (info,) = (name for name in tops if name.endswith(".dist-info"))
    assert tops == {"imagen_lightning", info}
    assert wheel.read(f"{info}/top_level.txt").split() == [b"imagen_lightning"]
    entry_points = wheel.read(f"{info}/entry_points.txt")
    assert b"imagen-lightning = imagen_lightning.cli.main:main" in entry_points
    assert TORCHS_HOOK.encode() in entry_points
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata["License-File"] == "LICENSE"
    stated = re.search(r'__version__ = "(.+)"', wheel.read("imagen_lightning/__init__.py").decode())[1]
    assert metadata["Version"] == stated
    wanted = {line for line in (ROOT / "requirements.txt").read_text().split("\n") if line and "pytest" not in line}
    given = {Requirement(item) for item in metadata.get_all("Requires-Dist") if "extra ==" not in item}
    assert given == {Requirement(line) for line in wanted}


def test_lightning_can_be_imported_before_the_installed_package(tmp_path):
    """Where the builds of torch and torchvision differ this fails without the entry point; elsewhere it is no news."""
    (tmp_path / "installed-0.dist-info").mkdir()
    (tmp_path / "installed-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 0\n")
    (tmp_path / "installed-0.dist-info" / "entry_points.txt").write_text(f"[torch.backends]\n{TORCHS_HOOK}\n")
    code = "import lightning, torchvision; import imagen_lightning.stages"
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_sdist_builds_alone(built):
    names, _ = built
    assert {"setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_the_checkout_is_what_is_imported(tmp_path):
    for name in ("callbacks", "experiments"):
        assert Path(find_spec(f"imagen_lightning.{name}").origin).resolve() == ROOT / name / "__init__.py"
        assert (ROOT / "imagen_lightning" / name).is_symlink()
    code = "from importlib.util import find_spec; print([find_spec(n) for n in ('callbacks', 'experiments')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[None, None]"


def requirements(built):
    _, wheel = built
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return [Requirement(line) for line in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")]


def test_the_installed_packages_satisfy_the_requirements(built):
    for requirement in requirements(built):
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}):
            assert requirement.specifier.contains(distribution(requirement.name).version, prereleases=True), requirement


def test_what_the_package_imports_is_required(built):
    required = {
        normal(requirement.name)
        for requirement in requirements(built)
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in ("parquet", "onnx"))
    }
    providers = packages_distributions()
    imported = {}
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                imported |= {name.split(".")[0]: path.name for name in names}
    foreign = imported.keys() - sys.stdlib_module_names - {"imagen_lightning", ""}
    assert {"torch", "lightning", "PIL"} <= foreign
    for name in foreign:
        assert {normal(owner) for owner in providers.get(name, [name])} & required, (
            f"{imported[name]} imports {name}, which requirements.txt lacks"
        )


@pytest.mark.parametrize("first", ["lightning", "imagen_lightning.torchvision_mend"])
def test_the_order_of_imports_is_irrelevant(first, tmp_path):
    """In a process that knows the package as installed: its entry points are those that setup.py declares."""
    metadata = tmp_path / "imagen_lightning-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: imagen-lightning\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[torch.backends]\n{TORCHS_HOOK}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    script = f"import {first}, imagen_lightning.torchvision_mend, lightning, torchvision"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
