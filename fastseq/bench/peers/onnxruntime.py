"""ONNX Runtime on the CPU."""

from __future__ import annotations

from fastseq.bench.grid import Point
from fastseq.bench.peers import onnx_model
from fastseq.bench.peers.base import Peer, Prepared
from fastseq.bench.problem import Numbers


class OnnxRuntime(Peer):
    """The recurrent operators of ONNX, graph optimizations on, one session a point."""

    name = "onnxruntime"
    distributions = ("onnxruntime", "onnx")

    def unsupported(self, point: Point) -> str | None:
        """Inference in float32."""
        if point.dtype != "float32":
            return "its recurrent operators on the CPU take float32 alone"
        return onnx_model.unsupported(point)

    def prepare(self, point: Point, threads: int) -> Prepared:
        """A session with so many intra-op threads."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = onnxruntime.InferenceSession(onnx_model.build(point), options, providers=["CPUExecutionProvider"])
        feed = {"x": Numbers.of(point).x}
        outputs = ["output"]

        def call() -> list:
            return session.run(outputs, feed)

        return Prepared(call, {"output": call()[0]}, "all graph optimizations")
