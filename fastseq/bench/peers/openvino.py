"""OpenVINO on the CPU, from the same ONNX model."""

from __future__ import annotations

import io

import numpy as np

from fastseq.bench.grid import Point
from fastseq.bench.peers import onnx_model
from fastseq.bench.peers.base import Peer, Prepared, Unsupported
from fastseq.bench.problem import Numbers


class OpenVino(Peer):
    """A model compiled for latency, with the precision of the point; inputs and outputs shared, not copied."""

    name = "openvino"
    distributions = ("openvino", "onnx")

    def unsupported(self, point: Point) -> str | None:
        """Inference."""
        return onnx_model.unsupported(point)

    def prepare(self, point: Point, threads: int) -> Prepared:
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
        compiled = core.compile_model(core.read_model(io.BytesIO(onnx_model.build(point))), "CPU", options)
        request = compiled.create_infer_request()
        feed = {0: Numbers.of(point).x}

        def call() -> object:
            return request.infer(feed, share_inputs=True, share_outputs=True)

        output = np.array(call()[0], dtype=np.float32)
        return Prepared(call, {"output": output}, f"LATENCY, {precision.get_type_name()}, shared buffers")
