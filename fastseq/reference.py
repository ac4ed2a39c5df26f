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

from collections.abc import Callable, Sequence
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


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float,
    low: int | None = None,
    high: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · Q Kᵀ + mask) V.  Vaswani et al., "Attention is all you need", 2017.

    Args:
        query (B, N, L, D), key (B, N_kv, S, D), value (B, N_kv, S, Dv), N a multiple of N_kv: head n of queries reads
            head n·N_kv/N of keys and values (Ainslie et al., "GQA", 2023).
        attn_mask: broadcastable to (B, N, L, S): bool, False where a query does not see a key; or added to the scores.
        low, high: query i sees key j where low ≤ j - i ≤ high; None: that side is open.

    Returns:
        out (B, N, L, Dv); lse (B, N, L), the log of the sum of the exponentials of a row's scores. A query that sees no
        key has zeros, with zero gradients, and an lse of -inf.
    """
    L, S, group = query.shape[-2], key.shape[-2], query.shape[1] // max(key.shape[1], 1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = scale * (query @ key.transpose(-2, -1))
    distance = torch.arange(S, device=query.device) - torch.arange(L, device=query.device)[:, None]
    hidden = torch.zeros(L, S, dtype=torch.bool, device=query.device)
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
    return p @ value, lse
