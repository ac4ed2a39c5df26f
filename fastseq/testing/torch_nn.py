"""The recurrent operators of torch.nn in the signature of fastseq's: what the checks compare rounding errors with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import reference


def rnn(
    cell: str,
    x: Tensor,
    hx: Tensor | None = None,
    cx: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    dropout_masks: Sequence[Tensor] = (),
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments, result and meaning of `fastseq.ops.rnn`, computed by the operators that torch.nn calls.

    The layers run one by one, with the dropout masks in between; torch's own dropout is not used. What torch refuses
    (no steps, or no rows) or does not have (a cell of our own) is answered by `fastseq.reference`.
    """
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias}
    groups = num_layers * (2 if bidirectional else 1)
    if x.numel() == 0 or not hasattr(_VF, cell):
        masks = {"dropout_masks": dropout_masks, "lengths": lengths, "batch_sizes": batch_sizes}
        return reference.rnn(cell, x, hx, cx, weights, **options, **masks)
    if x.dim() == 2 and batch_sizes is None:
        hx, cx = (s if s is None else s.unsqueeze(0) for s in (hx, cx))
        output, _, c_n = rnn(cell, x.unsqueeze(0), hx, cx, weights, **options)
        return output.squeeze(0), x.new_zeros(0), c_n.squeeze(0) if cell == "lstm" else c_n

    B = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    P = weights[1].shape[1]
    H = weights[len(weights) // groups - 1].shape[1] if len(weights) // groups in (3, 5) else P
    hx = x.new_zeros(groups, B, P) if hx is None else hx
    cx = x.new_zeros(groups, B, H) if cx is None and cell == "lstm" else cx
    if lengths is not None:
        return _with_lengths(cell, x, hx, cx, weights, dropout_masks, lengths, options)

    operator, per_layer = getattr(_VF, cell), len(weights) // num_layers
    D = groups // num_layers
    flags: tuple[Any, ...] = (bias, 1, 0.0, False, bidirectional)  # one layer, no dropout, not in training
    finals = []
    for layer in range(num_layers):
        h, c = (s if s is None else s[layer * D : (layer + 1) * D] for s in (hx, cx))
        state = h if c is None else (h, c)
        parameters = list(weights[layer * per_layer : (layer + 1) * per_layer])
        if batch_sizes is not None:
            x, *final = operator(x, batch_sizes, state, parameters, *flags)
        else:
            x, *final = operator(x, state, parameters, *flags, False)
        finals.append(final)
        if dropout_masks and layer < num_layers - 1:
            x = x * dropout_masks[layer]
    h_n, *c_n = (torch.cat(s) for s in zip(*finals, strict=True))
    return x, h_n, c_n[0] if c_n else x.new_zeros(0)


def _with_lengths(
    cell: str,
    x: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    lengths: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """By packing the rows that have steps, longest first; the others keep their initial state."""
    T = x.shape[0]
    order = lengths.argsort(descending=True)
    rows = order[: int((lengths > 0).sum())]
    if not len(rows):
        output = x.new_zeros(*x.shape[:2], (2 if options["bidirectional"] else 1) * hx.shape[2])
        return output, hx, x.new_zeros(0) if cx is None else cx

    def pack(t: Tensor) -> PackedSequence:
        return pack_padded_sequence(t[:, rows], lengths[rows])

    packed = pack(x)
    states = (hx[:, rows], None if cx is None else cx[:, rows])
    masks = [pack(mask).data for mask in dropout_masks]
    output, h_n, c_n = rnn(
        cell, packed.data, *states, weights, batch_sizes=packed.batch_sizes, dropout_masks=masks, **options
    )
    output, _ = pad_packed_sequence(PackedSequence(output, packed.batch_sizes), total_length=T)
    padded = x.new_zeros(T, x.shape[1], output.shape[2]).index_copy(1, rows, output)
    return padded, hx.index_copy(1, rows, h_n), c_n if cx is None else cx.index_copy(1, rows, c_n)
