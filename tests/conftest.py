"""Settings shared by every test."""

import os

import hypothesis
import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import imagen_lightning.torchvision_mend  # noqa: F401  (before anything imports lightning)

# The same examples in every run; HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True, scope="session")
def _cache_folder(tmp_path_factory):
    """Indexes of shards in folders that cannot be written, and remote shards, go with the test run."""
    os.environ["IMAGEN_LIGHTNING_CACHE"] = str(tmp_path_factory.mktemp("cache"))
