"""The functional API, and the rules of the operators that are written in Python: fake tensors and double backward.

`torch.ops.fastseq.rnn_forward` and `rnn_backward` are registered by the compiled extension, first-order autograd with
them. The rest of the letters: T time steps, B batch, I input, H hidden, P projected size (H without projection),
L layers, D directions, G gates, N = T·B rows (or the rows of packed data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastseq import _load, reference

__all__ = ["rnn"]

_C = _load._C
_rnn_forward = torch.ops.fastseq.rnn_forward.default


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
    r"""A stack of recurrent layers over whole sequences, or one step of one layer, on the CPU or CUDA.

    With gx = x W_ihᵀ + b_ih and gh = h W_hhᵀ + b_hh split into the cell's gates, in PyTorch's order,

    - ``"rnn_tanh"``, ``"rnn_relu"`` (Elman, "Finding structure in time", 1990): h' = tanh(gx + gh), max(gx + gh, 0)
    - ``"lstm"`` (Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000):
      i, f, o = σ(gx + gh), g = tanh(gx + gh), c' = f c + i g, h' = o tanh(c'); with a projection h' = W_hr (o tanh(c'))
      (Sak et al., "Long short-term memory recurrent neural network architectures ...", 2014)
    - ``"gru"`` (Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, with r applied after
      the product, as cuDNN and PyTorch do): r, z = σ(gx + gh), n = tanh(gx_n + r gh_n), h' = (1 - z) n + z h

    Args:
        cell: one of the four names above.
        x: (T, B, I), time first; or (N, I), packed, with `batch_sizes`; or (B, I) without it: one step of one layer.
        hx: initial h, (L·D, B, P), or (B, P) for one step. None means zeros.
        cx: initial c of an LSTM, (L·D, B, H), or (B, H) for one step. None means zeros.
        weights: for each layer, for each direction: w_ih (G·H, I or D·P), w_hh (G·H, P), then b_ih and b_hh (G·H,) if
            `bias`, then w_hr (P, H) for an LSTM with a projection.
        num_layers: L.
        bidirectional: D = 2; a layer's output is [forward, backward] along its last dimension.
        bias: whether `weights` has biases.
        dropout_masks: none, or L - 1 tensors of the shape of a layer's output, (T, B, D·P) or packed (N, D·P), already
            scaled by 1/(1 - p). Mask l is multiplied onto the output of layer l. They get no gradient.
        lengths: int64 on the CPU, (B,), in any order, each 0..T. Beyond a row's length its output is zero; its final
            state is the one at its last step (length 0: its initial state); its reverse direction starts there.
        batch_sizes: int64 on the CPU, (T,): the rows alive at each step, as in `PackedSequence`. Not with `lengths`.

    Returns:
        output (T, B, D·P), packed (N, D·P), or (B, P) for one step; h_n (L·D, B, P), or an empty tensor for one step,
        where it would equal `output`; c_n (L·D, B, H) or (B, H), an empty tensor for a cell other than the LSTM.

    All tensors are of one dtype: float32, float64 or bfloat16, on CUDA also float16. In the last two the arithmetic is
    in float32; h is rounded as it is stored, at every step, c only where it is returned or kept for backward.

    On CUDA, which takes an extension built with it, all runs on the current stream and waits for nothing. A CUDA graph
    can capture a call, but not one with `lengths`, whose tables are made on the CPU; of `batch_sizes` every replay has
    the same.

    Differentiable twice in x, hx, cx and the weights. Under `torch.func` transforms and forward-mode AD the call runs
    `fastseq.reference.rnn`, which is plain PyTorch, so that `grad`, `vmap` and `jvp` are right there, if slow.

    Raises:
        RuntimeError: a shape, dtype, device or length that does not fit (NotImplementedError, a subclass, for devices
            without a kernel); the message has what was expected and what arrived.
        ValueError: an unknown cell, or a number of weights or masks that does not fit the options.
    """
    if not is_compiling() and is_transformed():
        return reference.rnn(
            cell,
            x,
            hx,
            cx,
            weights,
            num_layers=num_layers,
            bidirectional=bidirectional,
            bias=bias,
            dropout_masks=dropout_masks,
            lengths=lengths,
            batch_sizes=batch_sizes,
        )
    output, h_n, c_n, _ = _rnn_forward(
        cell, x, hx, cx, weights, dropout_masks, lengths, batch_sizes, num_layers, bidirectional, bias, False
    )
    return output, h_n, c_n


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active, whose rules the operators do not have."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# ---- Fake tensors: shapes without data, for torch.compile and torch.export ------------------------------------------


def _check_devices(x: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor]) -> None:
    """One tensor on the meta device brings a call here: without this, real tensors beside it would get no result."""
    for name, tensors in (("hidden", states), ("parameter", weights)):
        for tensor in tensors:
            if tensor is not None and tensor.device != x.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at {x.device} "
                    f"and {name} tensor at {tensor.device}"
                )


@torch.library.register_fake("fastseq::rnn_forward")
def _rnn_forward_fake(
    cell: str,
    x: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(x, (hx, cx), weights)
    directions = 2 if bidirectional else 1
    groups = num_layers * directions
    projected = len(weights) // groups == (5 if bias else 3)
    P = weights[1].shape[1]
    H = weights[len(weights) // groups - 1].shape[1] if projected else P
    # Saved for each row and direction: what a layer's cell keeps, its output before a projection, and, of all layers
    # but the last, the output.
    saved = num_layers * (_C.cells()[cell]["kept"] * H + (H if projected else 0)) + (num_layers - 1) * P
    reserve = x.new_empty(math.prod(x.shape[:-1]) * directions * saved if save else 0)
    nothing = x.new_empty(0)
    has_cell_state = _C.cells()[cell]["states"] == 2

    if x.dim() == 2 and batch_sizes is None:
        B = x.shape[0]
        return x.new_empty(B, P), nothing, x.new_empty(B, H) if has_cell_state else x.new_empty(0), reserve
    if batch_sizes is None:
        B = x.shape[1]
    elif hx is not None:
        B = hx.shape[1]
    else:  # batch_sizes[0], a value that a fake tensor does not have
        B = torch.library.get_ctx().new_dynamic_size()
    output = x.new_empty(*x.shape[:-1], directions * P)
    h_n = x.new_empty(groups, B, P)
    return output, h_n, x.new_empty(groups, B, H) if has_cell_state else nothing, reserve


@torch.library.register_fake("fastseq::rnn_backward")
def _rnn_backward_fake(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    cell: str,
    x: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    output: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    _check_devices(x, (hx, cx), weights)
    tensors = (x, hx, cx, *weights)
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need and t is not None]


# ---- Double backward: the reference's backward, differentiated ------------------------------------------------------


def _rnn_double_backward(
    dd: Sequence[Tensor | None],
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    cell: str,
    x: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    dropout_masks: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    needs: Sequence[bool],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients through rnn_backward of those of [d_output, d_h_n, d_c_n, x, hx, cx, *weights] that are `wanted`.

    `dd` has, for each gradient that rnn_backward returned, the gradient of the loss in it, or None.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each, so that the places of a tensor that is passed twice (tied weights) get their own gradients.
        places = [d_output, d_h_n, d_c_n, x, hx, cx, *weights]
        places = [_differentiable_view(t) if want else t for t, want in zip(places, wanted, strict=True)]
        d_output, d_h_n, d_c_n, x, hx, cx, *weights = places
        gradients = reference.rnn_backward(
            d_output,
            d_h_n,
            d_c_n,
            cell,
            x,
            hx,
            cx,
            weights,
            needs=needs,
            num_layers=num_layers,
            bidirectional=bidirectional,
            bias=bias,
            dropout_masks=dropout_masks,
            lengths=lengths,
            batch_sizes=batch_sizes,
        )
        pairs = [(g, dg) for g, dg in zip(gradients, dd, strict=True) if dg is not None and g.requires_grad]
        inputs = [t for t, want in zip(places, wanted, strict=True) if want]
        if not pairs:
            return [torch.zeros_like(t) for t in inputs]
        outputs, grad_outputs = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, inputs, grad_outputs, create_graph=create_graph, materialize_grads=True)
    return list(found)


def _differentiable_view(t: Tensor) -> Tensor:
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


# The reference steers by the values of lengths and batch_sizes, which a trace has not: there it is one opaque operator.
torch.library.define(
    "fastseq::rnn_double_backward",
    "(Tensor?[] dd, Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, str cell, Tensor x, Tensor? hx, Tensor? cx, "
    "Tensor[] weights, Tensor[] dropout_masks, Tensor? lengths, Tensor? batch_sizes, int num_layers, "
    "bool bidirectional, bool bias, bool[] needs, bool[] wanted) -> Tensor[]",
)


@torch.library.impl("fastseq::rnn_double_backward", ("cpu", "cuda"))
def _rnn_double_backward_opaque(*args: Any) -> list[Tensor]:
    return [t.detach().clone() for t in _rnn_double_backward(*args)]


@torch.library.register_fake("fastseq::rnn_double_backward")
def _rnn_double_backward_fake(*args: Any) -> list[Tensor]:
    _, d_output, d_h_n, d_c_n, _, x, hx, cx, weights, *_, wanted = args
    places = (d_output, d_h_n, d_c_n, x, hx, cx, *weights)
    return [torch.empty_like(t) for t, want in zip(places, wanted, strict=True) if want]


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    d_output, d_h_n, d_c_n, cell, x, hx, cx, weights, masks, lengths, batch_sizes, *options, _, _, needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_output, d_h_n, d_c_n, x, hx, cx, lengths, batch_sizes, *weights, *masks)
    ctx.cell, ctx.options, ctx.needs, ctx.weight_count = cell, options, needs, len(weights)


def _differentiate_rnn_backward(ctx: Any, dd: list[Tensor | None]) -> tuple[Any, ...]:
    d_output, d_h_n, d_c_n, x, hx, cx, lengths, batch_sizes, *rest = ctx.saved_tensors
    weights, masks = rest[: ctx.weight_count], rest[ctx.weight_count :]
    needed = ctx.needs_input_grad
    wanted = [*needed[:3], *needed[4:7], *needed[7]]
    function = torch.ops.fastseq.rnn_double_backward if is_in_torch_dispatch_mode() else _rnn_double_backward
    found = function(
        dd,
        d_output,
        d_h_n,
        d_c_n,
        ctx.cell,
        x,
        hx,
        cx,
        weights,
        masks,
        lengths,
        batch_sizes,
        *ctx.options,
        ctx.needs,
        wanted,
    )
    remaining = iter(found)
    places = [next(remaining) if want else None for want in wanted]
    # One entry for each argument of rnn_backward: the output and the reserve, which those arguments determine,
    # get None.
    return (*places[:3], None, *places[3:6], places[6:], [None] * len(masks), *[None] * 8)


torch.library.register_autograd(
    "fastseq::rnn_backward", _differentiate_rnn_backward, setup_context=_save_for_double_backward
)
