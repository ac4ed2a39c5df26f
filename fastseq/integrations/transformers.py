"""`attn_implementation="fastseq"` in Hugging Face transformers: a function of its attention and its mask interface.

Of causal attention, within a window or not, no mask is made where the last query stands beside the last key: the kernel
knows such a pattern, and visits nothing else.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor

import fastseq

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.utils.import_utils import is_tracing
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "fastseq.integrations.transformers needs transformers, which is not installed: "
        "run `pip install 'transformers>=5.24'`."
    ) from None

__all__ = ["register"]


def register(name: str = "fastseq") -> None:
    """Makes `attn_implementation=name` run `fastseq.scaled_dot_product_attention` in the models of transformers.

    It holds for every model whose attention is transformers' `AttentionInterface`, as a whole (`from_pretrained`,
    `from_config`, `set_attn_implementation`) or, by a dict, for parts. Calling it again changes nothing.

    What the kernels do not have is never left out: attention sinks, sparse attention, `output_attentions=True` and
    sequences packed by `cu_seq_lens_q` alone raise NotImplementedError. So does a model with attention of its own that
    takes its mask from transformers; one that makes its mask itself goes on with its own attention.

    Args:
        name: what `attn_implementation` is to be.
    """
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The bool mask of transformers' sdpa_mask, or None where `_attention`'s window hides the same."""
    if not is_tracing() and not _asks_the_interface(type(config)):
        raise NotImplementedError(
            f"the model of {type(config).__name__} has attention of its own and does not ask transformers' "
            "AttentionInterface: use attn_implementation='eager'"
        )
    end = kv_offset + kv_length
    # While tracing, data must not be read, nor the tensor that a static cache has for its length.
    unpadded = attention_mask is None or (
        not is_tracing(attention_mask) and attention_mask.shape[1] >= end and attention_mask[:, kv_offset:end].all()
    )
    if allow_is_causal_skip:
        # With a local_size the pattern is a window, or chunks, which are no window unless there is but one.
        window, chunk = (getattr(config, size, None) for size in ("sliding_window", "attention_chunk_size"))
        known = local_size is None or end <= local_size or local_size == window != chunk
        at_the_end = not (isinstance(q_offset, Tensor) and is_tracing(q_offset)) and q_offset + q_length == end
        skip = known and at_the_end and unpadded
    else:
        skip = allow_is_bidirectional_skip and local_size is None and unpadded
    if skip:
        return None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )


@functools.cache
def _asks_the_interface(config_class: type) -> bool:
    """False where the modeling file beside the configuration has attention classes, and they never ask.

    transformers takes any registered name for such a model, whose attention would add a bool mask to its scores.
    """
    package, _, model = config_class.__module__.rpartition(".configuration_")
    modeling = sys.modules.get(f"{package}.modeling_{model}")
    return (
        modeling is None
        or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")
        or not any(
            isinstance(found, type) and "Attention" in name and found.__module__ == modeling.__name__
            for name, found in vars(modeling).items()
        )
    )


_UNSUPPORTED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "output_attentions": "attention weights to return",
}


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' sdpa_attention_forward: query (B, N, L, D), key (B, N_kv, S, D) to (B, L, N, Dv)."""
    for argument, what in _UNSUPPORTED.items():
        if kwargs.get(argument) is not None and kwargs[argument] is not False:
            raise NotImplementedError(
                f"{type(module).__name__} passes {argument}, and fastseq's attention has no {what}: "
                "use attn_implementation='eager'"
            )
    packed = kwargs.get("cu_seq_lens_q")
    if attention_mask is None and packed is not None and len(packed) > len(query) + 1:
        raise NotImplementedError(
            f"cu_seq_lens_q packs {len(packed) - 1} sequences into {len(query)} rows, and fastseq's attention has no "
            "packed sequences without a mask: give position_ids that start anew with each, and use_cache=False"
        )
    window = None
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        size = kwargs.get("sliding_window")
        configured = getattr(getattr(module, "config", None), "sliding_window", None)
        if "sliding_window" not in kwargs and configured is not None and key.shape[2] > configured:
            raise NotImplementedError(
                f"{type(module).__name__} does not pass sliding_window, so nothing says whether this layer's attention "
                f"is within its configuration's, {configured}, of {key.shape[2]} keys: use attn_implementation='eager'"
            )
        window = (None if size is None else size - 1, 0)
    if position_bias is not None:
        if attention_mask is None:
            attention_mask = position_bias
        elif attention_mask.dtype == torch.bool:
            attention_mask = position_bias.masked_fill(~attention_mask, -math.inf)
        else:
            attention_mask = position_bias + attention_mask
    out = fastseq.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
        window=window,
        softcap=softcap,
        causal_alignment="bottom_right",
    )
    return out.transpose(1, 2).contiguous(), None
