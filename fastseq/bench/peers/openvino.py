"""OpenVINO on the CPU: of recurrent layers the same ONNX model, of attention its own operator."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from fastseq.bench.grid import AnyPoint, AttentionPoint
from fastseq.bench.peers import onnx_model
from fastseq.bench.peers.base import Peer, Prepared, Unsupported


class OpenVino(Peer):
    """A model compiled for latency, with the precision of the point; inputs and outputs shared, not copied."""

    name = "openvino"
    distributions = ("openvino", "onnx")

    def unsupported(self, point: AnyPoint) -> str | None:
        """Inference."""
        return onnx_model.unsupported(point)

    def prepare(self, point: AnyPoint, threads: int) -> Prepared:
        """Compiles the model for so many threads."""
        import openvino

        precision = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[point.dtype]
        core = openvino.Core()
        if point.dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Unsupported("it has no bfloat16 for this processor")
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        feed = onnx_model.feed(point)
        if isinstance(point, AttentionPoint):
            model = _attention(feed, point.form == "causal")
        else:
            model = core.read_model(io.BytesIO(onnx_model.build(point)))
        request = core.compile_model(model, "CPU", options).create_infer_request()
        inputs = dict(enumerate(feed.values()))

        def call() -> object:
            return request.infer(inputs, share_inputs=True, share_outputs=True)

        output = np.array(call()[0], dtype=np.float32)
        return Prepared(call, {"output": output}, f"LATENCY, {precision.get_type_name()}, shared buffers")


def _attention(feed: dict[str, np.ndarray], causal: bool) -> Any:
    import openvino
    from openvino import opset13

    inputs = [opset13.parameter(array.shape, array.dtype) for array in feed.values()]
    return openvino.Model([opset13.scaled_dot_product_attention(*inputs, causal=causal)], inputs)
