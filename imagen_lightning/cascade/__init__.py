"""Trained stages in a row: a cascade is sampled, saved to a folder, and loaded from one.

A cascade folder holds `cascade.json`, the manifest, and safetensors files of weights, one or more a stage. It is made
from Lightning checkpoints, of which plain data and tensors alone are read. Nothing here unpickles, and a manifest can
only name classes of this package or of packages that the caller trusts by name.
"""

from imagen_lightning.cascade.cascade import Cascade, Progress
from imagen_lightning.cascade.checkpoints import read_checkpoint
from imagen_lightning.cascade.local import whole_folder
from imagen_lightning.cascade.manifest import FORMAT, MANIFEST, RESIZE, VALUE_RANGE, VERSION
from imagen_lightning.cascade.sampling import Samples, StageSettings, find_sampler, sampler_names
from imagen_lightning.cascade.weights import DTYPES, MAX_SHARD_SIZE, load_weights, weight_files

__all__ = [
    "DTYPES",
    "FORMAT",
    "MANIFEST",
    "MAX_SHARD_SIZE",
    "RESIZE",
    "VALUE_RANGE",
    "VERSION",
    "Cascade",
    "Progress",
    "Samples",
    "StageSettings",
    "find_sampler",
    "load_weights",
    "read_checkpoint",
    "sampler_names",
    "weight_files",
    "whole_folder",
]
