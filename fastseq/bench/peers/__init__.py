"""Who is measured: ours and its peers, one module each behind the same small interface (`base.py`).

A peer runs in processes of its own (`fastseq.bench.worker`): thread pools of different libraries that spin, and what
they load, stay apart.
"""

from __future__ import annotations

import importlib

from fastseq.bench.peers.base import Peer, Prepared, Unsupported

OURS = "fastseq"
_CLASSES = {
    OURS: ("torch_modules", "Fastseq"),
    "torch.nn": ("torch_modules", "TorchNN"),
    "torch cells": ("torch_modules", "TorchCells"),
    "torch matmul": ("torch_modules", "TorchMatmul"),
    "onnxruntime": ("onnxruntime", "OnnxRuntime"),
    "openvino": ("openvino", "OpenVino"),
    "jax": ("jax", "Jax"),
    "onednn": ("onednn", "OneDnn"),
}
PEERS = tuple(name for name in _CLASSES if name != OURS)


def load(name: str) -> Peer:
    """The peer of that name; the library behind it is imported when something is prepared."""
    module, cls = _CLASSES[name]
    return getattr(importlib.import_module(f"fastseq.bench.peers.{module}"), cls)()


__all__ = ["OURS", "PEERS", "Peer", "Prepared", "Unsupported", "load"]
