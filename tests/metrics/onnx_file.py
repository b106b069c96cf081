"""ONNX files written by hand: the protobuf fields that a small graph needs, since the onnx package is no dependency."""

from __future__ import annotations

import struct


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def value_info(name: str, shape: list[int | str]) -> bytes:
    dims = b"".join(field(1, field(1 if isinstance(d, int) else 2, d)) for d in shape)
    tensor = field(1, 1) + field(2, dims)  # float32
    return field(1, name) + field(2, field(1, tensor))


def node(op: str, inputs: list[str], outputs: list[str]) -> bytes:
    return b"".join([*(field(1, i) for i in inputs), *(field(2, o) for o in outputs), field(4, op)])


def floats(name: str, values: list[float], shape: list[int]) -> bytes:
    dims = b"".join(field(1, d) for d in shape)
    return dims + field(2, 1) + field(8, name) + field(9, struct.pack(f"<{len(values)}f", *values))


def external(name: str, shape: list[int], file: str) -> bytes:
    dims = b"".join(field(1, d) for d in shape)
    return dims + field(2, 1) + field(8, name) + field(13, field(1, "location") + field(2, file)) + field(14, 1)


def model(nodes: list[bytes], output: list[int | str], initializers: list[bytes] = ()) -> bytes:
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
