"""C++-accelerated recurrent layers and attention for PyTorch, in the place of those of torch.nn."""

from fastseq._load import _C  # isort: skip  (first: it says in one sentence what is missing)
from fastseq import models, ops, reference
from fastseq.attention import scaled_dot_product_attention, varlen_attention
from fastseq.convert import ConversionReport, convert, to_torch
from fastseq.explain import Explanation, explain
from fastseq.kv_cache import KVCache
from fastseq.multihead_attention import MultiheadAttention
from fastseq.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__version__ = _C.version()


def empty_cache() -> None:
    """Gives the memory that the kernels keep for their next call, at most 256 MiB, back to the system."""
    _C.empty_cache()


__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConversionReport",
    "Explanation",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "MultiheadAttention",
    "RNNCell",
    "convert",
    "empty_cache",
    "explain",
    "models",
    "ops",
    "reference",
    "scaled_dot_product_attention",
    "to_torch",
    "varlen_attention",
]
