"""A point as an ONNX model: what ONNX Runtime and OpenVINO run."""

from __future__ import annotations

import numpy as np

from fastseq.bench.grid import AnyPoint, AttentionPoint, Point
from fastseq.bench.problem import Array, AttentionNumbers, Numbers

GATE_ORDER = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}
"""ONNX's gates by their place in PyTorch's order: z r h of r z n, i o f c of i f g o."""


def build(point: AnyPoint) -> bytes:
    """The serialized model."""
    return _attention(point) if isinstance(point, AttentionPoint) else _recurrent(point)


def feed(point: AnyPoint) -> dict[str, np.ndarray]:
    """Its inputs."""
    if not isinstance(point, AttentionPoint):
        return {"x": Numbers.of(point).x}
    numbers = AttentionNumbers.of(point)
    named = {"q": numbers.q, "k": numbers.k, "v": numbers.v, "mask": numbers.mask}
    return {name: array for name, array in named.items() if array is not None}


def _attention(point: AttentionPoint) -> bytes:
    """ "q", "k", "v" and, if there is one, "mask" to "output" (B, N, L, D): one node of ONNX's Attention."""
    from onnx import TensorProto, helper

    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.bool_): TensorProto.BOOL}
    inputs = {name: (types[array.dtype], array.shape) for name, array in feed(point).items()}
    node = helper.make_node("Attention", list(inputs), ["output"], is_causal=int(point.form == "causal"))
    graph = helper.make_graph(
        [node],
        "point",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, inputs["q"][1])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11).SerializeToString()


def _recurrent(point: Point) -> bytes:
    """ "x" (T, B, I) to "output" (T, B, D*H); one recurrent node a layer, weights inside."""
    from onnx import TensorProto, helper, numpy_helper

    numbers = Numbers.of(point)
    H, D = point.H, point.directions
    nodes, constants = [], [numpy_helper.from_array(np.array([0, 0, -1], dtype=np.int64), "rows")]
    below = "x"
    for layer in range(point.layers):
        places = [[_reordered(w, point) for w in numbers.place(layer, direction)] for direction in range(D)]
        inputs = [below]
        for name, arrays in {
            "W": [w_ih for w_ih, _, _, _ in places],
            "R": [w_hh for _, w_hh, _, _ in places],
            "B": [np.concatenate((b_ih, b_hh)) for _, _, b_ih, b_hh in places],
        }.items():
            constants.append(numpy_helper.from_array(np.stack(arrays), f"{name}{layer}"))
            inputs.append(f"{name}{layer}")
        options: dict[str, object] = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
        if point.cell == "GRU":
            options["linear_before_reset"] = 1
        above = "output" if layer == point.layers - 1 else f"output{layer}"
        nodes += [
            helper.make_node(point.cell, inputs, [f"Y{layer}"], **options),  # (T, D, B, H)
            helper.make_node("Transpose", [f"Y{layer}"], [f"rows{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"rows{layer}", "rows"], [above]),
        ]
        below = above
    graph = helper.make_graph(
        nodes,
        "point",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [point.T, point.B, point.I])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [point.T, point.B, D * H])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def _reordered(w: Array, point: Point) -> Array:
    gates = w.reshape(point.gates, point.H, *w.shape[1:])
    return np.ascontiguousarray(gates[list(GATE_ORDER[point.cell])]).reshape(w.shape)


def unsupported(point: AnyPoint) -> str | None:
    """What no runtime of ONNX models does here."""
    if point.mode == "training":
        return "inference only"
    if isinstance(point, AttentionPoint):
        if point.form == "window":
            return "ONNX's Attention has no window"
        return "measured with keys in cache" if point.rotating else None
    if point.form != "layer":
        return "measured for whole layers and full rows"
    return None
