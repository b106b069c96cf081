"""Let torchvision be imported next to a CPU build of torch.

A torchvision built for CUDA next to a CPU torch raises `operator torchvision::nms does not exist` on import, and with
it lightning, torchmetrics and torch-fidelity fail. Declaring the two missing operator schemas first repairs the import;
`torchvision.ops.nms` and `torchvision.io.read_image` stay unusable, and nothing here needs them.

torch calls `mend` when it is imported, by the entry point that setup.py declares (torch.backends), so that an
installed package needs no order of imports. One that only lies on PYTHONPATH must be imported before lightning; stages,
datamodule, callbacks and the command line do so. Nothing is done where the builds match.
"""

from importlib.metadata import PackageNotFoundError, version

_libraries: list[object] = []  # kept alive: the schemas go with the object


def mend() -> None:
    """Declare torchvision's missing operators where torch is a CPU build and torchvision is not."""
    import torch  # here, since it calls this function while it is imported

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
