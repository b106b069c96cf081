"""Lets torchvision be imported beside a CPU build of torch.

A torchvision built for CUDA next to a CPU torch raises `operator torchvision::nms does not exist` on import, and with
it lightning, torchmetrics and torch-fidelity fail. Declaring the two missing operator schemas first mends the import;
`torchvision.ops.nms` and `torchvision.io.read_image` stay unusable, and nothing here needs them.

Imported before lightning by stages, datamodule, callbacks and the command line; does nothing where the versions match.
"""

from importlib.metadata import PackageNotFoundError, version

import torch

_libraries: list[torch.library.Library] = []  # kept alive: the schemas go with the object


def mend() -> None:
    """Declares torchvision's missing operators where a CPU torch stands beside a torchvision that is no CPU build."""
    try:
        torchvision_version = version("torchvision")
    except PackageNotFoundError:
        return
    if _libraries or not torch.__version__.endswith("+cpu") or torchvision_version.endswith("+cpu"):
        return
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


mend()
