"""ONNX extractors, on files written by hand: the onnx package is no dependency."""

import struct

import pytest
import torch

from imagen_lightning.errors import InputError
from imagen_lightning.metrics.features import OnnxFeatures

pytest.importorskip("onnxruntime")

# ---- the protobuf fields that a small graph needs (onnx/onnx.proto)


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def value_info(name, shape):
    dims = b"".join(field(1, field(1 if isinstance(d, int) else 2, d)) for d in shape)
    tensor = field(1, 1) + field(2, dims)  # float32
    return field(1, name) + field(2, field(1, tensor))


def node(op, inputs, outputs):
    return b"".join([*(field(1, i) for i in inputs), *(field(2, o) for o in outputs), field(4, op)])


def floats(name, values, shape):
    dims = b"".join(field(1, d) for d in shape)
    return dims + field(2, 1) + field(8, name) + field(9, struct.pack(f"<{len(values)}f", *values))


def external(name, shape, file):
    dims = b"".join(field(1, d) for d in shape)
    return dims + field(2, 1) + field(8, name) + field(13, field(1, "location") + field(2, file)) + field(14, 1)


def model(nodes, output, initializers=()):
    graph = b"".join(
        [
            *(field(1, n) for n in nodes),
            field(2, "graph"),
            *(field(5, i) for i in initializers),
            field(11, value_info("pixels", ["batch", 3, "height", "width"])),
            field(12, value_info("features", output)),
        ]
    )
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))


# ---- tests


def pictures(num, size):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)


def test_onnx_features(tmp_path):
    nodes = [node("GlobalAveragePool", ["pixels"], ["pooled"]), node("Flatten", ["pooled"], ["features"])]
    path = tmp_path / "mean.onnx"
    path.write_bytes(model(nodes, ["batch", 3]))
    features = OnnxFeatures(path, size=16)
    x = pictures(3, 16)
    assert torch.allclose(features(x).double(), x.double().mean(dim=(2, 3)) / 255, rtol=1e-5)
    assert features.num_features == 3
    # (B, D, 1, 1), as a network without its last flattening gives
    path.write_bytes(model([node("GlobalAveragePool", ["pixels"], ["features"])], ["batch", 3, 1, 1]))
    assert torch.allclose(OnnxFeatures(path, size=16)(x), features(x))


def test_an_onnx_file_holds_its_weights_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 12)
    nodes = [node("GlobalAveragePool", ["pixels"], ["pooled"]), node("Add", ["pooled", "w"], ["features"])]
    path = tmp_path / "outside.onnx"
    path.write_bytes(model(nodes, ["batch", 3, 1, 1], [external("w", [3, 1, 1], "weights.bin")]))
    with pytest.raises(InputError, match="no ONNX that onnxruntime can run"):
        OnnxFeatures(path, size=16)(pictures(1, 16))


def test_what_files_are_refused(tmp_path):
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "map.onnx").write_bytes(model([node("Relu", ["pixels"], ["features"])], ["batch", 3, 16, 16]))
    for name, message in [
        ("junk", "no ONNX that onnxruntime can run"),
        ("map.onnx", r"gives \(2, 3, 16, 16\) for 2 images; export one of \(B, D"),
    ]:
        with pytest.raises(InputError, match=message):
            OnnxFeatures(tmp_path / name, 16)(pictures(2, 16))
