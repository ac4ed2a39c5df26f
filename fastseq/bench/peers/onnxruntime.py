"""ONNX Runtime on the CPU."""

from __future__ import annotations

from fastseq.bench.grid import AnyPoint
from fastseq.bench.peers import onnx_model
from fastseq.bench.peers.base import Peer, Prepared


class OnnxRuntime(Peer):
    """The recurrent operators and Attention of ONNX, graph optimizations on, one session a point."""

    name = "onnxruntime"
    distributions = ("onnxruntime", "onnx")

    def unsupported(self, point: AnyPoint) -> str | None:
        """Inference in float32."""
        if point.dtype != "float32":
            return "its operators on the CPU take float32 alone"
        return onnx_model.unsupported(point)

    def prepare(self, point: AnyPoint, threads: int) -> Prepared:
        """A session with so many intra-op threads."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = onnxruntime.InferenceSession(onnx_model.build(point), options, providers=["CPUExecutionProvider"])
        feed = onnx_model.feed(point)
        outputs = ["output"]

        def call() -> list:
            return session.run(outputs, feed)

        return Prepared(call, {"output": call()[0]}, "all graph optimizations")
