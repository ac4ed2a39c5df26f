"""Multi-head attention that stands in for `torch.nn.MultiheadAttention`, on `fastseq.scaled_dot_product_attention`.

Letters in shapes: B batch, N num_heads, L queries, S keys, E embed_dim, D = E/N the size of a head.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.attention import scaled_dot_product_attention
from fastseq.rnn import _refuse_script

__all__ = ["MultiheadAttention"]


def refuse_fast_path(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing. That it is there is what counts.

    In eval mode without gradients, torch.nn.TransformerEncoderLayer computes the whole layer from the parameters of its
    attention, which it never calls, unless a module in it has a forward hook. Its other conditions are about attributes
    on which torch's own code and others' depend.
    """


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""Attention of N heads between projections, in the place of :class:`torch.nn.MultiheadAttention`.

    .. math::
        \text{head}_n &= \text{softmax}(Q_n K_n^T / \sqrt{D} + \text{mask}) V_n \\
        \text{out} &= [\text{head}_1, \ldots, \text{head}_N] W_{out}^T + b_{out}

    with Q, K, V = query W_qᵀ + b_q, key W_kᵀ + b_k, value W_vᵀ + b_v, and Q_n, K_n, V_n their n-th D columns.

    Ashish Vaswani et al., "Attention is all you need", NeurIPS 2017.

    The arguments, parameters, results, gradients, errors and random numbers are torch's, but that

    - a query that sees no key has zero heads and zero weights, with zero gradients, where torch can have NaN;
    - the results are the same in training and eval mode, with gradients and without: there is no other path in eval.
      In a torch.nn.TransformerEncoderLayer too, which in eval would bypass its attention: a forward pre-hook that does
      nothing keeps it from that;
    - without weights, memory beyond inputs, outputs and projections is O(L + S), masks stay of the shape that they
      have, and which weights dropout drops is not what torch draws for the same seed;
    - an additive mask may be of any floating dtype, and is converted to that of the projected query.

    Args:
        embed_dim: E, a multiple of N; E/N at most 512.
        num_heads: N.
        dropout: each weight is dropped with this probability in training, the others are scaled by 1/(1 - dropout).
        bias: ``False`` for no biases.
        add_bias_kv: one more key and value, parameters.
        add_zero_attn: one more key and value, of zeros.
        kdim, vdim: sizes of key and value; None means E.
        batch_first: input and output are (B, L, ·), not (L, B, ·).
        device, dtype: of the parameters.

    Call: ``out, weights = layer(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
    average_attn_weights=True, is_causal=False)``
        - query: (L, B, E), (B, L, E) with batch_first, or (L, E). key: likewise with S and kdim; value with S and vdim.
        - key_padding_mask: (B, S), or (S,) without a batch: bool, True where a key is hidden; or added to the scores.
        - attn_mask: (L, S) or (B·N, L, S): likewise.
        - need_weights: ``False`` for weights of None. They cost time and memory of B·N·L·S numbers.
        - average_attn_weights: weights are the mean over heads.
        - is_causal: promises that attn_mask is the causal mask, which then need not be read: query i sees keys j ≤ i.
          Without weights and key_padding_mask it is taken at its word, appended keys included.
        - out: in the form of query. weights: (B, L, S'), (B, N, L, S') not averaged, without B if query is; S' is S and
          what add_bias_kv and add_zero_attn appended.

    With batch_first, a strided nested tensor, as torch.nn.TransformerEncoder makes of padded input in eval mode, is
    taken for self-attention without masks and weights.

    Parameters: ``in_proj_weight`` (3E, E), q k v stacked, or with kdim or vdim ``q_proj_weight`` (E, E),
    ``k_proj_weight`` (E, kdim), ``v_proj_weight`` (E, vdim); ``in_proj_bias`` (3E,), ``out_proj.weight`` (E, E),
    ``out_proj.bias`` (E,), ``bias_k``, ``bias_v`` (1, 1, E). They are read at every call.

    Raises:
        AssertionError: dimensions, sizes or the dtype of a mask that do not fit, as torch.nn.MultiheadAttention does.
        RuntimeError: another shape, dtype or device that does not fit; is_causal without attn_mask; nested tensors in
            another call.
        NotImplementedError: a device without a kernel.
    """

    @functools.wraps(torch.nn.MultiheadAttention.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_forward_pre_hook(refuse_fast_path)

    def __prepare_scriptable__(self) -> NoReturn:
        _refuse_script(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the layer; the class says what goes in and what comes out."""
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            alike = query is key is value and query.layout == torch.strided
            if masked or need_weights or not alike or not self.batch_first:
                raise RuntimeError(
                    "a nested tensor must be strided, the query, key and value in one, and given without masks, with "
                    "need_weights=False and batch_first=True; for any other call give padded tensors and "
                    "key_padding_mask"
                )
            return self._attend_nested(query), None

        is_batched = self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        q, k, v = self._project(query, key, value)
        if not is_batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        # As in torch, the hint replaces the mask only where neither padding nor the weights need it.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = self._merge(None if is_causal else attn_mask, key_padding_mask, q, k)
        if self.bias_k is not None:
            k, v = (
                torch.cat([t, bias.to(t.dtype).expand(t.shape[0], 1, -1)], 1)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        if mask is not None:
            if k.shape[1] != mask.shape[-1]:
                mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))  # what was appended is seen
            mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)

        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        scale = self.head_dim**-0.5
        weights = _weights(q, k, mask, scale) if need_weights else None
        if weights is not None and dropout > 0.0:
            weights = F.dropout(weights, dropout)
            heads = weights @ v
        else:
            heads = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale)
        out = heads.transpose(1, 2).flatten(2)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not is_batched:
            out = out.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias), weights

    def _attend_nested(self, x: Tensor) -> Tensor:
        lengths = [row.shape[0] for row in x.unbind()]
        padded = torch.nested.to_padded_tensor(x, 0.0)
        S = padded.shape[1]
        padding = torch.arange(S, device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        out, _ = self.forward(padded, padded, padded, padding, need_weights=False)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(out, lengths, strict=True)])

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether the input has a batch. What the products say themselves, in torch's words, is not asked here."""
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported; got {mask.dtype}")
        if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                stacklevel=2,
            )
        is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
            )
        batch = 0 if self.batch_first else 1
        if is_batched and query.shape[batch] != key.shape[batch]:
            raise RuntimeError(
                f"query and key must have the same batch size; got {query.shape[batch]} and {key.shape[batch]} of "
                f"{tuple(query.shape)} and {tuple(key.shape)} with batch_first={self.batch_first}"
            )
        return is_batched

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            if query is key is value:
                return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _merge(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """One mask, broadcastable to (B, N, L, S): bool, True where a key is hidden, or additive."""
        B, L, S = *q.shape[:2], k.shape[1]
        if attn_mask is not None:
            expected = (L, S) if attn_mask.dim() == 2 else (B * self.num_heads, L, S)
            if attn_mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}."
                )
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (B, self.num_heads))
        if key_padding_mask is None:
            return attn_mask
        if key_padding_mask.shape != (B, S):
            raise AssertionError(f"Expected key_padding_mask.shape to be {(B, S)}, but got {key_padding_mask.shape}")
        key_padding_mask = key_padding_mask[:, None, None]
        if attn_mask is None:
            return key_padding_mask
        if attn_mask.dtype != torch.bool:
            if key_padding_mask.dtype != torch.bool:
                return attn_mask + key_padding_mask
            return attn_mask.masked_fill(key_padding_mask, -math.inf)
        if key_padding_mask.dtype != torch.bool:
            return key_padding_mask.masked_fill(attn_mask, -math.inf)
        return attn_mask | key_padding_mask


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + mask), zeros where a query sees no key; the mask is scaled_dot_product_attention's."""
    scores = (scale * q) @ k.transpose(-2, -1)
    if mask is None:
        return scores.softmax(-1)
    # Rows that see nothing are given everything, so that neither they nor their gradients are ever NaN.
    if mask.dtype == torch.bool:
        nothing = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(mask | nothing), -math.inf)
    else:
        nothing = (mask == -math.inf).all(-1, keepdim=True)
        scores = scores + mask.masked_fill(nothing, 0.0)
    return scores.softmax(-1).masked_fill(nothing, 0.0)
