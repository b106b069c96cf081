"""The memory that the import of a large pipeline and its export take."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from imagen_lightning.export.diffusers_unet import names, to_diffusers, unet_arguments
from imagen_lightning.networks import UNet

GIB = 2**30
MEASURED = """
import resource, sys
import imagen_lightning.torchvision_mend, lightning, transformers
from imagen_lightning.export.export_cascade import export_cascade
from imagen_lightning.export.import_pipelines import import_pipelines
from imagen_lightning.cascade import Cascade

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

verb, given, out = sys.argv[1:]
before = peak()
if verb == "import":
    import_pipelines([given]).save(out)
elif verb == "load":
    Cascade.load(given)
else:
    export_cascade(given, out, "reference")
print(peak() - before)
"""


def write_zeros(path, shapes):
    """A safetensors file of half-precision zeros, of which the disk keeps no block; its size in bytes."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.slow
def test_a_stage_needs_its_own_size_and_less_than_a_gib(copied, tmp_path, capsys):
    folder = copied("larger stage I")
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [320, 640, 1280, 1600], "layers_per_block": 3, "attention_head_dim": 64}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    arguments = unet_arguments(config)
    with torch.device("meta"):
        state = to_diffusers(UNet(**arguments).state_dict(), arguments)
    assert len(state) == sum(map(len, names(arguments).values()))
    size = write_zeros(folder / "unet" / "diffusion_pytorch_model.safetensors", {k: v.shape for k, v in state.items()})
    assert size > 2 * GIB
    cascade, figures = tmp_path / "cascade", {}
    for verb, given, out in (("import", folder, cascade), ("load", cascade, ""), ("export", cascade, tmp_path / "out")):
        command = [sys.executable, "-c", MEASURED, verb, str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[verb] = (int(done.stdout.split()[-1]) - size) / GIB
    shutil.rmtree(tmp_path / "out")
    with capsys.disabled():
        print(
            f"\na stage of {size / GIB:.2f} GiB, beyond its own size in GiB:",
            {k: round(v, 2) for k, v in figures.items()},
        )
    assert all(figure < 1 for figure in figures.values()), figures
