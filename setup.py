"""Packaging of imagen-lightning; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "imagen_lightning/__init__.py").read_text(), re.M).group(1)


def requirements(name: str) -> list[str]:
    lines = (HERE / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


# `callbacks/` and `experiments/` are real folders at the top and install inside the package. They are found through the
# real folders: an sdist keeps no symlinks.
packages = sorted(
    set(find_packages(include=["imagen_lightning*"]))
    | {f"imagen_lightning.{name}" for name in find_packages(include=["callbacks*", "experiments*"])}
)

# requirements.txt is what a checkout needs, tests included; the installed package needs no pytest.
runtime = [line for line in requirements("requirements.txt") if not line.startswith("pytest")]
dev = [
    "pytest>=8",
    "pytest-cov>=5",
    "hypothesis>=6.100",
    "pytest-xdist>=3.6",
    "build>=1.2",
    "setuptools>=77",
    "wheel>=0.43",
    "ruff>=0.12",
    "codespell>=2.4",
    "pre-commit>=4",
    "import-linter>=2.3",
    "mypy>=1.15",
    "diffusers>=0.39,<0.43",
    "accelerate>=1.10",
    "playwright>=1.50",
    "onnxruntime>=1.20",
]
docs = ["sphinx>=8.1", "myst-nb>=1.3", "furo>=2024.8", "sphinx-copybutton>=0.5", "docstring-parser>=0.16"]

setup(
    name="imagen-lightning",
    version=VERSION,
    description="A PyTorch Lightning framework for experiments with cascaded pixel diffusion from text",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=packages,
    package_dir={
        "imagen_lightning.callbacks": "callbacks",
        "imagen_lightning.experiments": "experiments",
    },
    package_data={"": ["*.yaml"], "imagen_lightning": ["py.typed"]},
    install_requires=runtime,
    extras_require={"dev": dev, "parquet": ["pyarrow>=16"], "onnx": ["onnxruntime>=1.20"], "docs": docs},
    entry_points={
        "console_scripts": ["imagen-lightning = imagen_lightning.cli.main:main"],
        # torch calls these when it is imported, so that lightning can be imported before this package too.
        "torch.backends": ["imagen_lightning_torchvision = imagen_lightning.torchvision_mend:mend"],
    },
)
