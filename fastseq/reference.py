"""The operators of fastseq in plain PyTorch: the specification that the kernels are held to.

Written to be read, not to be fast. Every function is out of place and free of control flow on tensor values (lengths
and batch sizes, integers on the CPU, excepted), so it runs in any floating-point dtype and on any device,
differentiates any number of times, and works under `torch.func` (`grad`, `vmap`, `jvp`, ...) and forward-mode AD.

Words: T time steps, B batch, I input size, H hidden size, P projected size (H without projection), G gates,
D directions (1 or 2), L layers, N rows of a packed sequence. For one step, with the gates stacked as in `torch.nn`,

    gx = x W_ihᵀ + b_ih                  (B, G·H)  input-side pre-activations
    gh = h W_hhᵀ + b_hh                  (B, G·H)  hidden-side pre-activations

and a cell maps (gx, gh, the old state) to the new state. `docs/math.md` has the equations and their derivatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # (h,), or (h, c) for LSTM


def rnn_tanh_cell(gx: Tensor, gh: Tensor, h: Tensor) -> State:
    """h' = tanh(gx + gh), with gx, gh, h (B, H).  Elman, "Finding structure in time", 1990."""
    return (torch.tanh(gx + gh),)


def rnn_relu_cell(gx: Tensor, gh: Tensor, h: Tensor) -> State:
    """h' = max(gx + gh, 0), with gx, gh, h (B, H).  Le, Jaitly, Hinton, "A simple way to initialize ...", 2015."""
    return (torch.relu(gx + gh),)


def lstm_cell(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor) -> State:
    """c' = σ(f) c + σ(i) tanh(g),  h' = σ(o) tanh(c'), with gx, gh (B, 4H) in the order i f g o, and c (B, H).

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; forget gate f by Gers, Schmidhuber and Cummins,
    "Learning to forget", 2000. No peepholes.
    """
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_cell(gx: Tensor, gh: Tensor, h: Tensor) -> State:
    """r = σ(xr + hr),  z = σ(xz + hz),  n = tanh(xn + r hn),  h' = (1 - z) n + z h, with h (B, H).

    gx = (xr xz xn) and gh = (hr hz hn) are (B, 3H). Cho et al., "Learning phrase representations using RNN
    encoder-decoder", 2014, in the variant of cuDNN and PyTorch: r gates hn = W_hn h + b_hn, after the product.
    """
    xr, xz, xn = gx.chunk(3, -1)
    hr, hz, hn = gh.chunk(3, -1)
    r = torch.sigmoid(xr + hr)
    z = torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return ((1 - z) * n + z * h,)


CELLS: dict[str, Callable[..., State]] = {
    "rnn_tanh": rnn_tanh_cell,
    "rnn_relu": rnn_relu_cell,
    "lstm": lstm_cell,
    "gru": gru_cell,
}
HAS_CELL_STATE = {"lstm"}


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
    """A stack of recurrent layers over whole sequences, or one step of one layer.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        x: (T, B, I); or (N, I), packed, when `batch_sizes` is given; or (B, I) without it: one step of one layer.
        hx: initial h, (L·D, B, P), or (B, P) for one step; None means zeros.
        cx: initial c of an LSTM, (L·D, B, H), or (B, H) for one step; None means zeros.
        weights: for each layer and each direction in it, `w_ih` (G·H, I or D·P), `w_hh` (G·H, P), then `b_ih` and
            `b_hh` (G·H,) if `bias`, then `w_hr` (P, H) if the LSTM has a projection.
        num_layers: L.
        bidirectional: whether a layer also runs backwards in time (D = 2), its output being [forward, backward].
        bias: whether `weights` has biases.
        dropout_masks: L - 1 masks, or none. Mask l, with the shape of layer l's output, is multiplied onto it.
        lengths: int64 on the CPU, (B,), in any order, 0 <= lengths <= T. Row b ends after `lengths[b]` steps: its
            output beyond is zero, its final state is the one at its last step (its initial state if it has none),
            and the backward direction starts at its last step. What x holds beyond has no influence on anything.
        batch_sizes: int64 on the CPU, (T,), not increasing: the rows alive at each step, as in `PackedSequence`.

    Returns:
        output: (T, B, D·P), packed (N, D·P), or (B, P) for one step.
        h_n: (L·D, B, P); empty, (0,), for one step, as it would equal `output`.
        c_n: (L·D, B, H), or (B, H) for one step; empty, (0,), for a cell other than the LSTM.

    Raises:
        ValueError: for an unknown cell, or options or a number of weights or masks that do not fit together.
        RuntimeError: for a tensor whose shape, or lengths whose values, do not fit.
    """
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "bias": bias}
    if batch_sizes is not None:
        if lengths is not None:
            raise ValueError("expected lengths or batch_sizes; got both")
        return _rnn_packed(cell, x, hx, cx, weights, dropout_masks, batch_sizes, options)
    if x.dim() == 2:
        if num_layers != 1 or bidirectional or dropout_masks or lengths is not None:
            raise ValueError("a 2-D x is one step of one layer: no layers, directions, masks or lengths go with it")
        hx, cx = (s if s is None else s.unsqueeze(0) for s in (hx, cx))
        output, _, c_n = rnn(cell, x.unsqueeze(0), hx, cx, weights, **options)
        return output.squeeze(0), x.new_zeros(0), c_n.squeeze(0) if cell in HAS_CELL_STATE else c_n

    directions = 2 if bidirectional else 1
    stack = _split_weights(cell, weights, num_layers * directions, bias)
    states = _initial_states(cell, x, hx, cx, stack)
    alive = None if lengths is None else _alive(lengths, x)
    if len(dropout_masks) not in (0, num_layers - 1):
        raise ValueError(f"expected num_layers - 1 = {num_layers - 1} dropout masks, or none; got {len(dropout_masks)}")

    output = x if alive is None else torch.where(alive, x, 0)
    final_states = []
    for layer in range(num_layers):
        halves = []
        for d in range(directions):
            k = layer * directions + d
            half, state = _layer(CELLS[cell], output, states[k], stack[k], alive, reverse=d == 1)
            halves.append(half)
            final_states.append(state)
        output = torch.cat(halves, -1)
        if dropout_masks and layer < num_layers - 1:
            output = output * dropout_masks[layer]
    h_n, *c_n = (torch.stack(s) for s in zip(*final_states, strict=True))
    return output, h_n, c_n[0] if c_n else x.new_zeros(0)


def rnn_backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    cell: str,
    x: Tensor,
    hx: Tensor | None = None,
    cx: Tensor | None = None,
    weights: Sequence[Tensor] = (),
    *,
    needs: Sequence[bool],
    **options: Any,
) -> list[Tensor]:
    """The gradients of `rnn`, differentiable again. Under a `torch.func` transform take `torch.func.vjp` of `rnn`.

    Args:
        d_output, d_h_n, d_c_n: ∂loss/∂output, ∂loss/∂h_n and ∂loss/∂c_n; None means zeros.
        cell, x, hx, cx, weights, options: the arguments of `rnn`.
        needs: for each of [x, hx, cx, *weights], whether to return its gradient (never that of None).

    Returns:
        The gradients asked for, in that order; zeros where the loss does not depend on the tensor.
    """
    tensors = [x, hx, cx, *weights]
    wanted = [k for k, need in enumerate(needs) if need and tensors[k] is not None]
    d_outputs = (d_output, d_h_n, d_c_n)
    again = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*d_outputs, *tensors))
    with torch.inference_mode(False), torch.enable_grad():
        for k in wanted:
            view = tensors[k].view_as(tensors[k])  # keeps apart the places of a tensor that is passed twice
            tensors[k] = view if view.requires_grad else view.requires_grad_()
        x, hx, cx, *weights = tensors
        outputs = rnn(cell, x, hx, cx, weights, **options)
    pairs = [(y, dy) for y, dy in zip(outputs, d_outputs, strict=True) if dy is not None and y.requires_grad]
    wanted = [tensors[k] for k in wanted]
    if not pairs or not wanted:
        return [torch.zeros_like(t) for t in wanted]
    ys, dys = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ys, wanted, dys, create_graph=again, allow_unused=True, materialize_grads=True))


class LayerWeights(NamedTuple):
    """The parameters of one direction of one layer."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


def _layer(
    cell: Callable[..., State], x: Tensor, state: State, w: LayerWeights, alive: Tensor | None, reverse: bool
) -> tuple[Tensor, State]:
    """One direction of one layer: (T, B, I) -> output (T, B, P) and the final state."""
    steps = range(x.shape[0])
    output = [state[0]] * len(steps)
    gx = F.linear(x, w.w_ih, w.b_ih).unbind()  # whose gradient is one stack: that of gx[t] is a zero tensor each step
    for t in reversed(steps) if reverse else steps:
        gh = F.linear(state[0], w.w_hh, w.b_hh)
        h, *c = cell(gx[t], gh, *state)
        if w.w_hr is not None:
            h = F.linear(h, w.w_hr)  # Sak, Senior and Beaufays, "Long short-term memory recurrent ...", 2014
        new = (h, *c)
        if alive is not None:
            # Beyond its length a row keeps its state; on the way back this means that it starts at its last step.
            new = tuple(torch.where(alive[t], s1, s0) for s1, s0 in zip(new, state, strict=True))
        state = new
        output[t] = state[0]
    y = torch.stack(output) if output else state[0].new_zeros(0, *state[0].shape)
    return y if alive is None else torch.where(alive, y, 0), state


def _rnn_packed(
    cell: str,
    x: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    batch_sizes: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """`rnn` of packed data: padded to (T, B, ...), run with lengths, packed again."""
    T = len(batch_sizes)
    B = int(batch_sizes[0]) if T else 0
    is_alive = torch.arange(B) < batch_sizes.unsqueeze(1)  # (T, B)
    places = is_alive.flatten().nonzero().squeeze(1).to(x.device)  # of the packed rows among the T·B padded ones

    def pad(packed: Tensor) -> Tensor:
        size = packed.shape[1]
        return packed.new_zeros(T * B, size).index_copy(0, places, packed).reshape(T, B, size)

    output, h_n, c_n = rnn(
        cell,
        pad(x),
        hx,
        cx,
        weights,
        dropout_masks=[pad(mask) for mask in dropout_masks],
        lengths=is_alive.sum(0),
        **options,
    )
    return output.flatten(0, 1).index_select(0, places), h_n, c_n


def _split_weights(cell: str, weights: Sequence[Tensor], count: int, bias: bool) -> list[LayerWeights]:
    """The flat weights as `count` = L·D groups."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}; got {cell!r}")
    biases = 2 if bias else 0
    size, rest = divmod(len(weights), count)
    projected = size == 3 + biases
    if rest or size not in (2 + biases, 3 + biases) or (projected and cell not in HAS_CELL_STATE):
        expected = f"{2 + biases}" + (f", or {3 + biases} with a projection," if cell in HAS_CELL_STATE else "")
        raise ValueError(f"expected {expected} weights for each of {count} layers and directions; got {len(weights)}")
    groups = [list(weights[k * size : (k + 1) * size]) for k in range(count)]
    return [LayerWeights(*g[:2], *(g[2:4] if bias else (None, None)), g[-1] if projected else None) for g in groups]


def _initial_states(
    cell: str, x: Tensor, hx: Tensor | None, cx: Tensor | None, stack: Sequence[LayerWeights]
) -> list[State]:
    """The state before the first step, for each layer and direction."""
    if cx is not None and cell not in HAS_CELL_STATE:
        raise ValueError(f"only the LSTM has a cell state; got cx for {cell}")

    def initial(name: str, given: Tensor | None, size: int) -> Tensor:
        shape = (len(stack), x.shape[1], size)
        if given is not None and given.shape != shape:
            raise RuntimeError(f"{name} must be {shape}; got {tuple(given.shape)}")
        return x.new_zeros(shape) if given is None else given

    P = stack[0].w_hh.shape[1]
    h = initial("hx", hx, P)
    if cell not in HAS_CELL_STATE:
        return [(h_k,) for h_k in h]
    H = P if stack[0].w_hr is None else stack[0].w_hr.shape[1]
    return list(zip(h, initial("cx", cx, H), strict=True))


def _alive(lengths: Tensor, x: Tensor) -> Tensor:
    """(T, B, 1): whether row b has a step t."""
    T, B = x.shape[:2]
    if lengths.shape != (B,) or bool(((lengths < 0) | (lengths > T)).any()):
        got = f"{tuple(lengths.shape)}: {lengths.tolist()}"
        raise RuntimeError(f"lengths must be ({B},) with values in 0..{T}; got {got}")
    return (torch.arange(T).unsqueeze(1) < lengths).unsqueeze(-1).to(x.device)


# ---- Attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionPiece:
    """Queries whose scores are computed at once: `rows` of the tensor, the `first` of them of that number in its entry.

    entry: of a ragged batch, the batch entry, with its numbers of queries and keys; else None, the queries are of all.
    """

    rows: slice
    keys: slice
    first: int
    queries: int
    entry: int | None = None


def attention_pieces(
    query: Tensor,
    key: Tensor,
    query_starts: Tensor | None = None,
    key_starts: Tensor | None = None,
    most_scores: int = 1 << 22,
) -> list[AttentionPiece]:
    """All queries, in pieces of at most `most_scores` scores, or of one row in each head."""
    B, N, L, S = *query.shape[:3], key.shape[2]
    if query_starts is None or key_starts is None:
        entries = [(slice(0, L), slice(0, S), None)]
    else:
        rows, keys = [list(itertools.pairwise(t.tolist())) for t in (query_starts, key_starts)]
        entries = [(slice(*r), slice(*k), b) for b, (r, k) in enumerate(zip(rows, keys, strict=True))]
    pieces = []
    for row, keys, entry in entries:
        count = row.stop - row.start
        step = max(most_scores // max(B * N * (keys.stop - keys.start), 1), 1)
        for first in range(0, count, step):
            piece = slice(row.start + first, row.start + min(first + step, count))
            pieces.append(AttentionPiece(piece, keys, first, count, entry))
    return pieces


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    query_starts: Tensor | None = None,
    key_starts: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(score) V with score = scale · Q Kᵀ + mask.  Vaswani et al., "Attention is all you need", 2017.

    Computed in pieces of the queries, so that memory is of a piece's scores, unless autograd keeps them.

    Args:
        query (B, N, L, D), key (B, N_kv, S, D), value (B, N_kv, S, Dv), N a multiple of N_kv: head n of queries reads
            head n·N_kv/N of keys and values (Ainslie et al., "GQA", 2023).
        attn_mask: broadcastable to (B, N, L, S): bool, False where a query does not see a key; or added to the scores.
        query_starts, key_starts: (B + 1): the rows of entry b are those from starts[b] to starts[b + 1] of tensors of
            one batch entry.
        options: those of `attention_piece`.

    Returns:
        out (B, N, L, Dv); lse (B, N, L), the log of the sum of the exponentials of a row's scores. A query that sees no
        key, and a row that no entry has, have zeros, with zero gradients, and an lse of -inf.
    """
    results = []
    for piece in attention_pieces(query, key, query_starts, key_starts):
        mask = attn_mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., piece.rows, :]
        k, v = key[:, :, piece.keys], value[:, :, piece.keys]
        results.append(attention_piece(piece, query[:, :, piece.rows], k, v, mask, **options))
    # Rows that no entry has.
    shape = (*query.shape[:2], query.shape[2] - sum(lse.shape[2] for _, lse in results))
    results.append((query.new_zeros(*shape, value.shape[-1]), query.new_full(shape, -torch.inf)))
    return torch.cat([out for out, _ in results], 2), torch.cat([lse for _, lse in results], 2)


def attention_piece(
    piece: AttentionPiece,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    alibi_slopes: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    low: int | None = None,
    high: int | None = None,
    from_end: bool = False,
) -> tuple[Tensor, Tensor]:
    """`attention` of the tensors' rows and keys that are a piece's.

    Args:
        query_lengths, key_lengths: (B), how many rows entry b has; the others are not there.
        softcap: c > 0: scale · Q Kᵀ becomes c tanh(scale · Q Kᵀ / c) ("Gemma 2", 2024).
        alibi_slopes: (N) or (B, N): less slope · |j - i|. Press et al., "Train short, test long" (ALiBi), 2022.
        low, high: query i sees key j where low ≤ j - i ≤ high; None: that side is open.
        from_end: in the two above, i is such that an entry's last query is beside its last key.
        dropout_p, dropout_seed: what `dropout_multipliers` has for them multiplies the probabilities.
    """
    B, N, L, S = *query.shape[:3], key.shape[2]
    group = N // max(key.shape[1], 1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = scale * (query @ key.transpose(-2, -1))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(piece.first, piece.first + L, device=query.device)[:, None]
    j = torch.arange(S, device=query.device)
    queries, keys = [
        count if lengths is None else lengths.view(B, 1, 1, 1).to(query.device)
        for lengths, count in ((query_lengths, piece.queries), (key_lengths, S))
    ]
    distance = j - i - (keys - queries if from_end else 0)
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 1 or piece.entry is None else alibi_slopes[piece.entry]
        scores = scores - slopes.to(scores.dtype)[..., None, None] * distance.abs()
    hidden = (i >= queries) | (j >= keys)
    if low is not None:
        hidden = hidden | (distance < low)
    if high is not None:
        hidden = hidden | (distance > high)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = hidden | ~attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
        hidden = hidden | (attn_mask == -torch.inf)  # whose difference from a largest score of -inf would be NaN
    scores = scores.masked_fill(hidden, -torch.inf)
    nothing = hidden.expand(scores.shape).all(-1, keepdim=True)
    scores = scores.masked_fill(nothing, 0)
    p = torch.softmax(scores, -1).masked_fill(nothing, 0)
    lse = (
        torch.logsumexp(scores, -1).masked_fill(nothing[..., 0], -torch.inf)
        if S
        else scores.new_full(scores.shape[:-1], -torch.inf)
    )
    if dropout_p and dropout_seed is not None:
        heads = torch.arange(B * N, device=query.device).view(B, N, 1) + (piece.entry or 0) * N
        p = p * dropout_multipliers(dropout_seed, dropout_p, heads, i.view(-1), S).to(p.dtype)
    return p @ value, lse


def philox(counter: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """Four words of 32 random bits, for a counter of four such words and a seed of 64 bits; all in int64 tensors.

    Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    word = 0xFFFFFFFF

    def product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
        high = (x * (factor >> 16) + (x * (factor & 0xFFFF) >> 16)) >> 16
        return high, (x * factor) & word

    c0, c1, c2, c3 = counter
    key0, key1 = seed & word, (seed >> 32) & word
    for _ in range(10):
        (high0, low0), (high2, low2) = product(0xD2511F53, c0), product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & word, (key1 + 0xBB67AE85) & word
    return [c0, c1, c2, c3]


def dropout_multipliers(seed: Tensor, p: float, heads: Tensor, queries: Tensor, keys: int) -> Tensor:
    """(B, N, L, S): 0 with probability p, in steps of 2⁻¹⁶, else 1 / (1 - p); all are 0 for p = 1 only.

    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014. A function of the
    seed, the head's number (B, N, 1) in the batch, and the numbers of query (L) and key: `csrc/random.h` says which.
    """
    threshold = 65536 if p == 1 else min(round(p * 65536), 65535)
    groups = -(-keys // 128)
    seed = seed.to(heads.device)
    column = torch.arange(groups * 16, device=heads.device)
    head, query = heads[..., None], queries[:, None]
    zero = torch.zeros_like(column + head + query)
    words = philox([zero + column, zero + query, zero + head, zero], seed)
    bits = torch.stack([(w >> shift) & 0xFFFF for w in words for shift in (0, 16)], -2)  # (B, N, L, 8, groups · 16)
    bits = bits.unflatten(-1, (groups, 16)).movedim(-2, -3).flatten(-3)[..., :keys]
    return (bits >= threshold).double() * (65536 / max(65536 - threshold, 1))
