"""Recurrent layers and cells that stand in for those of `torch.nn`: same arguments, same parameters, same results.

A call on the CPU in float32, float64 or bfloat16 runs the fused kernels (`fastseq.ops.rnn`), and so does one on CUDA in
those or float16 where the extension was built with CUDA; another device or dtype, and autocast, run torch's own
operator, or the reference for a cell that torch does not have. `kernel_obstacle` decides, and `fastseq.explain` tells.
Where nothing is recorded, most calls on the CPU that would run the kernels reach them by a shorter way
(`_C.direct_layer`, `direct_cell`); what is written here is what those do, and what runs for all other calls.

Letters in shapes: T time steps, B batch, I input_size, H hidden_size, P proj_size (H without projection), L num_layers,
D directions (2 if bidirectional, else 1), N rows of packed data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import _load, ops, reference

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

Lengths = Tensor | Sequence[int]
Pair = tuple[Tensor, Tensor]

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CUDA_KERNEL_DTYPES = (*KERNEL_DTYPES, torch.float16)
TORCH_MODES = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")  # what RNNBase calls the cells that torch has


def kernel_obstacle(x: Tensor) -> str | None:
    """Why a call with this input runs torch's own operator; None if it runs a kernel.

    The direct call comes before this question. What is an obstacle here must not be plain there."""
    on_cuda = _load.CUDA_BUILT and x.is_cuda
    if not x.is_cpu and not on_cuda:
        where = "the CPU and on CUDA" if _load.CUDA_BUILT else "the CPU"
        return f"the input is on {x.device}, and the kernels run on {where}"
    if x.dtype not in (CUDA_KERNEL_DTYPES if on_cuda else KERNEL_DTYPES):
        half = ", torch.float16" if on_cuda else ""
        return f"the input is {x.dtype}, and the kernels take torch.float32, torch.float64{half} and torch.bfloat16"
    device = "cuda" if on_cuda else "cpu"
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device):
        return f"autocast to {torch.get_autocast_dtype(device)} is on, which casts inside torch's operator"
    return None


def _refuse_script(module: torch.nn.Module) -> NoReturn:
    raise RuntimeError(
        f"fastseq.{type(module).__name__} cannot be compiled by torch.jit.script: use torch.jit.trace or torch.compile."
    )


# ---- Layers ---------------------------------------------------------------------------------------------------------


class _Layer(torch.nn.RNNBase):
    """What the layers share. A state `hx` is h for RNN and GRU, and (h, c) for LSTM."""

    # torch.jit.trace compiles the properties of a module that are not named here.
    __jit_unused_properties__ = ["all_weights", "_cell", "_flat_weights"]

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        """`mode` is the cell's name in capitals. RNNBase knows those of torch alone; a cell of our own gets the
        parameters of a plain RNN, with the rows of as many gates as it has."""
        super().__init__(mode if mode in TORCH_MODES else "RNN_TANH", *args, **kwargs)
        if mode not in TORCH_MODES:
            self.mode = mode
            gates = _load._C.cells()[self._cell]["gates"]
            for name in self._flat_weights_names:
                rows, *columns = getattr(self, name).shape
                setattr(self, name, torch.nn.Parameter(getattr(self, name).new_empty(gates * rows, *columns)))
            self.reset_parameters()

    @property
    def _cell(self) -> str:
        """The operator's name for the cell: "rnn_tanh", "rnn_relu", "lstm", "gru", ..."""
        return self.mode.lower()

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights in torch's flat order, for code that reads this attribute of RNNBase. Never a stored copy."""
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """RNNBase stores the list, and would miss weights that change behind it."""

    def _update_flat_weights(self) -> None:
        """RNNBase brings its list up to date here."""

    def __prepare_scriptable__(self) -> NoReturn:
        _refuse_script(self)

    def _weights(self) -> list[Tensor]:
        """The weights as they are now, in torch's flat order."""
        parameters: dict[str, Any] = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:  # a weight is computed from others: parametrized, weight-normed, pruned
            return [getattr(self, name) for name in self._flat_weights_names]

    def prepack(self) -> Self:
        """Packs the weights for the kernels once, instead of at every call; returns the layer itself.

        For inference, most of all of short sequences of few rows. Calls without gradients on padded input, without
        `lengths`, use the packed weights; all other calls pack their own as always, and the results have the same bits.
        Costs the memory of the weights once more. Copies and pickles of the layer are not prepacked.

        A call raises RuntimeError when a weight has changed since: was written to by torch, or is another tensor, after
        `load_state_dict`, `to` or a step of an optimizer. What torch does not see is not seen here: writing to
        ``weight.data`` or to a NumPy array that shares a weight's memory. Call `prepack` again after those.

        Raises:
            ValueError: a weight is computed at each call (parametrized, pruned, weight-normed).
            RuntimeError: weights that the kernels do not take, or that were created under ``torch.inference_mode()``.
        """
        self.unprepack()
        for name in self._flat_weights_names:
            if name not in self._parameters:
                raise ValueError(
                    f"prepack takes weights that stay what they are: {name} is computed from others at each call. "
                    "Make it a parameter first, e.g. by torch.nn.utils.parametrize.remove_parametrizations."
                )
        self._prepacked = _load._C.prepack(self._cell, self._weights(), self.num_layers, self.bidirectional, self.bias)
        return self

    def unprepack(self) -> Self:
        """Undoes `prepack`; returns the layer itself."""
        self.__dict__.pop("_prepacked", None)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_prepacked", None)
        return state

    def _forward(self, input: Any, hx: Any, lengths: Lengths | None) -> tuple[Any, Any]:
        if lengths is None and not is_dynamo_compiling():
            # All that follows in one go, if nobody could tell the difference: csrc/torch/direct_call.cpp.
            result = _load._C.direct_layer(self.__dict__, input, hx)
            if result is not None:
                return result
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths= is for padded input: a PackedSequence has its own lengths")
            return self._forward_packed(input, hx)
        dim = input.dim()
        if dim not in (2, 3):
            raise ValueError(self._input_dim_message.format(dim))
        if hx is not None:
            self._check_hx_dim(hx, dim)
        batch_dim = 0 if self.batch_first else 1
        if dim == 2:
            input = input.unsqueeze(batch_dim)
            hx = _map(hx, lambda s: s.unsqueeze(1))
        weights = self._weights()
        T, B = input.shape[1 - batch_dim], input.shape[batch_dim]
        self._check(input, hx, None, B, weights)
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if lengths is not None:
            lengths = _check_lengths(lengths, B)

        x = input.transpose(0, 1) if self.batch_first else input
        output, hx = self._run(x, hx, weights, lengths, None)
        if self.batch_first:
            output = output.transpose(0, 1)
        if dim == 2:
            output = output.squeeze(batch_dim)
            hx = _map(hx, lambda s: s.squeeze(1))
        return output, hx

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        weights = self._weights()
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        self._check(data, hx, batch_sizes, 0 if hx is None else int(batch_sizes[0]), weights)
        output, hx = self._run(data, hx, weights, None, batch_sizes)
        output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return output, self.permute_hidden(hx, unsorted_indices)

    def _check(self, input: Tensor, hx: Any, batch_sizes: Tensor | None, B: int, weights: list[Tensor]) -> None:
        """torch's checks, in torch's words: RNNBase's methods, which are slow, and so run only when they will raise."""
        fits = (
            input.dtype == weights[0].dtype
            and input.dim() == (3 if batch_sizes is None else 2)
            and input.shape[-1] == self.input_size
        )
        if hx is None:
            if not fits:
                self.check_input(input, batch_sizes)
        elif not fits or not self._hx_fits(hx, self.num_layers * (2 if self.bidirectional else 1), B):
            self.check_forward_args(input, hx, batch_sizes)

    def _run(
        self, x: Tensor, hx: Any, weights: list[Tensor], lengths: Tensor | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Checked input, time first or packed, to the output in the same form and the final state."""
        rnn = ops.rnn
        if kernel_obstacle(x) is not None:
            if self.mode not in TORCH_MODES:
                rnn = reference.rnn
            elif lengths is not None and x.shape[1] > 0:
                return self._run_torch_with_lengths(x, hx, lengths)
            else:
                return self._run_torch(x, hx, weights, batch_sizes)
        h, c = self._split_state(hx)
        output, h_n, c_n = rnn(
            self._cell,
            x,
            h,
            c,
            weights,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            bias=self.bias,
            dropout_masks=self._dropout_masks(x),
            lengths=lengths,
            batch_sizes=batch_sizes,
        )
        return output, self._join_state(h_n, c_n)

    def _dropout_masks(self, x: Tensor) -> list[Tensor]:
        """Drawn as torch draws them: by dropout of a tensor of the shape of each layer's output, the last excepted."""
        if not self.training or self.dropout == 0:
            return []
        size = (2 if self.bidirectional else 1) * (self.proj_size or self.hidden_size)
        ones = torch.ones(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
        return [F.dropout(ones, self.dropout) for _ in range(self.num_layers - 1)]

    def _zero_state(self, x: Tensor, B: int) -> Any:
        groups = self.num_layers * (2 if self.bidirectional else 1)
        h = torch.zeros(groups, B, self.proj_size or self.hidden_size, dtype=x.dtype, device=x.device)
        c = torch.zeros(groups, B, self.hidden_size, dtype=x.dtype, device=x.device)
        return self._join_state(h, c)

    def _run_torch(self, x: Tensor, hx: Any, weights: list[Tensor], batch_sizes: Tensor | None) -> tuple[Tensor, Any]:
        """torch's own operator, called as torch.nn calls it."""
        if hx is None:
            hx = self._zero_state(x, x.shape[1] if batch_sizes is None else int(batch_sizes[0]))
        if self.mode == "LSTM" and _autocast_lstm_may_fail(x, batch_sizes):
            # What autocast is about to do inside; with x already cast, torch does not go to oneDNN.
            x, *hx = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, *hx))
        operator = getattr(_VF, self._cell)
        options = (weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if batch_sizes is not None:
            output, *state = operator(x, batch_sizes, hx, *options)
        else:
            output, *state = operator(x, hx, *options, False)
        return output, self._join_state(*state)

    def _run_torch_with_lengths(self, x: Tensor, hx: Any, lengths: Tensor) -> tuple[Tensor, Any]:
        """`lengths` by torch's own operator, which takes packed rows of one step or more: an empty row gets one of
        zeros, whose results are thrown away."""
        T, B = x.shape[:2]
        for row, length in enumerate(lengths.tolist()):
            if not 0 <= length <= T:
                raise ValueError(f"lengths must be within 0..T = 0..{T}; got {length} for row {row}")
        has_steps = (lengths > 0).to(x.device).unsqueeze(1)  # (B, 1), to broadcast over (T, B, I) and (L·D, B, H)
        hx = self._zero_state(x, B) if hx is None else hx
        packed = pack_padded_sequence(torch.where(has_steps, x, 0), lengths.clamp(min=1), enforce_sorted=False)
        packed, final = self._forward_packed(packed, _map(hx, lambda s: torch.where(has_steps, s, 0)))
        output, _ = pad_packed_sequence(packed, total_length=T)
        pairs = zip(self._split_state(final), self._split_state(hx), strict=True)
        state = (s if s is None else torch.where(has_steps, s, s0.to(s.dtype)) for s, s0 in pairs)
        return torch.where(has_steps, output, 0), self._join_state(*state)

    # What differs between one state and two.

    _input_dim_message: str

    def _check_hx_dim(self, hx: Tensor, dim: int) -> None:
        if hx.dim() != dim:
            form = "unbatched 2-D" if dim == 2 else "batched 3-D"
            raise RuntimeError(f"For {form} input, hx should also be {dim}-D but got {hx.dim()}-D tensor")

    def _hx_fits(self, hx: Tensor, groups: int, B: int) -> bool:
        return hx.shape == (groups, B, self.hidden_size)

    def _split_state(self, hx: Any) -> tuple[Tensor | None, Tensor | None]:
        return hx, None

    def _join_state(self, h: Tensor, c: Tensor | None = None) -> Any:
        return h


def _map(hx: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """f of a state: of h, or of h and c; None for none."""
    if hx is None:
        return None
    return f(hx) if isinstance(hx, Tensor) else (f(hx[0]), f(hx[1]))


def _check_lengths(lengths: Lengths, B: int) -> Tensor:
    """`lengths` in the form that the operator takes: int64, on the CPU, (B,). The operator checks the values."""
    lengths = torch.as_tensor(lengths)
    if lengths.shape != (B,):
        raise ValueError(f"lengths must be (B,) = ({B},), one for each row; got {tuple(lengths.shape)}")
    if B > 0 and (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool):
        raise TypeError(f"lengths must be integers; got {lengths.dtype}")
    return lengths.to("cpu", torch.int64)


def _onednn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN, to which torch hands an LSTM, takes `dtype` at all on this processor."""
    if not torch.backends.mkldnn.is_available():
        return True
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


_ONEDNN_SUPPORTS = {dtype: _onednn_supports(dtype) for dtype in (torch.bfloat16, torch.float16)}


def _autocast_lstm_may_fail(x: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether torch's LSTM might fail under autocast: "could not create a primitive descriptor".

    In float16 few processors have oneDNN's training kernel, and nothing tells which; those with AVX512-FP16 alone
    have only the one for inference."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0 or not torch.is_autocast_enabled("cpu"):
        return False
    dtype = torch.get_autocast_dtype("cpu")
    if _ONEDNN_SUPPORTS.get(dtype, True) and not (dtype == torch.float16 and torch.is_grad_enabled()):
        return False
    return batch_sizes is None or bool(batch_sizes[0] == batch_sizes[-1])  # packed rows of several lengths run


class _OneState(_Layer):
    """The call of RNN and GRU."""

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input: Any, hx: Tensor | None = None, *, lengths: Lengths | None = None) -> tuple[Any, Tensor]:
        """Runs the layer; the class says what goes in and what comes out."""
        return self._forward(input, hx, lengths)


class RNN(_OneState):
    r"""A stack of Elman layers, in the place of :class:`torch.nn.RNN`.

    .. math::
        h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    or max(·, 0) for ``nonlinearity="relu"``. The input of layer l > 0 is the output of layer l - 1, times a dropout
    mask in training.

    Jeffrey L. Elman, "Finding structure in time", Cognitive Science 14(2), 1990; with relu: Le, Jaitly and Hinton,
    "A simple way to initialize recurrent networks of rectified linear units", 2015.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: ``False`` for no b_ih and b_hh.
        batch_first: padded input and output are (B, T, ·), not (T, B, ·); states stay (L·D, B, ·).
        dropout: probability of zeroing an element of the output of each layer but the last, in training. The masks are
            the ones that torch.nn draws from the same random state.
        bidirectional: D = 2: a second direction runs from the last step to the first; output is [forward, backward].
        device, dtype: of the parameters.

    Call: ``output, h_n = layer(input, hx=None, *, lengths=None)``
        - input: (T, B, I), or (T, I) without a batch, or a ``PackedSequence``.
        - hx: (L·D, B, H), or (L·D, H) without a batch; zeros if not given.
        - lengths: integers (B,), a tensor on any device or a list, in any order, each 0..T, with padded input only.
          Beyond a row's length the output is zero and the input has no influence; its final state is the one at its
          last step (length 0: its initial state), and the reverse direction starts there.
        - output: (T, B, D·H) in the form of the input. h_n: (L·D, B, H), in the order layer 0 forward, layer 0
          backward, layer 1 forward, ...

    Parameters, k < L: ``weight_ih_l{k}`` (H, I), from the second layer on (H, D·H), ``weight_hh_l{k}`` (H, H),
    ``bias_ih_l{k}``, ``bias_hh_l{k}`` (H,), and the same with ``_reverse``; all from U(-1/√H, 1/√H). They are read at
    every call.

    On the CPU, float32, float64 and bfloat16 run fused kernels; all else runs torch's operator: see
    :func:`fastseq.explain`.

    Raises:
        ValueError: an input that is not 2-D or 3-D or not of the parameters' dtype; lengths outside 0..T.
        RuntimeError: an input or state of the wrong size, T = 0, tensors of several dtypes or devices.
        TypeError: lengths that are not integers.
    """

    nonlinearity: str

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_proj_size(kwargs)
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)

    _input_dim_message = "RNN: Expected input to be 2D or 3D, got {}D tensor instead"


class GRU(_OneState):
    r"""A stack of gated recurrent units, in the place of :class:`torch.nn.GRU`.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Kyunghyun Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine
    translation", EMNLP 2014; with r applied after the product with W_hn, as cuDNN and PyTorch do.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        bias: ``False`` for no b_ih and b_hh.
        batch_first: padded input and output are (B, T, ·), not (T, B, ·); states stay (L·D, B, ·).
        dropout: as in :class:`RNN`.
        bidirectional: D = 2, as in :class:`RNN`.
        device, dtype: of the parameters.

    Call: ``output, h_n = layer(input, hx=None, *, lengths=None)``, with the shapes and errors of :class:`RNN`.

    Parameters, k < L, gates stacked in the order r z n: ``weight_ih_l{k}`` (3H, I), from the second layer on
    (3H, D·H), ``weight_hh_l{k}`` (3H, H), ``bias_ih_l{k}``, ``bias_hh_l{k}`` (3H,), and the same with ``_reverse``;
    all from U(-1/√H, 1/√H). They are read at every call.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_proj_size(kwargs)
        super().__init__("GRU", *args, **kwargs)

    _input_dim_message = "GRU: Expected input to be 2D or 3D, got {}D instead"


def _refuse_proj_size(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class LSTM(_Layer):
    r"""A stack of long short-term memory layers, in the place of :class:`torch.nn.LSTM`.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t), \quad \text{or } W_{hr} (o_t \odot \tanh(c_t)) \text{ with proj\_size}

    Sepp Hochreiter and Jürgen Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997; forget gate: Gers,
    Schmidhuber and Cummins, "Learning to forget", 2000; projection: Sak, Senior and Beaufays, "Long short-term memory
    recurrent neural network architectures for large scale acoustic modeling", 2014.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        bias: ``False`` for no b_ih and b_hh.
        batch_first: padded input and output are (B, T, ·), not (T, B, ·); states stay (L·D, B, ·).
        dropout: as in :class:`RNN`.
        bidirectional: D = 2, as in :class:`RNN`.
        proj_size: P, 0 < P < H, for a projected output and state h; 0 for none (P = H).
        device, dtype: of the parameters.

    Call: ``output, (h_n, c_n) = layer(input, hx=None, *, lengths=None)``
        - input and lengths: as in :class:`RNN`.
        - hx: (h_0, c_0), of (L·D, B, P) and (L·D, B, H), or (L·D, P) and (L·D, H) without a batch; zeros if not given.
        - output: (T, B, D·P) in the form of the input; h_n and c_n have the shapes of h_0 and c_0.

    Parameters, k < L, gates stacked in the order i f g o: ``weight_ih_l{k}`` (4H, I), from the second layer on
    (4H, D·P), ``weight_hh_l{k}`` (4H, P), ``bias_ih_l{k}``, ``bias_hh_l{k}`` (4H,), ``weight_hr_l{k}`` (P, H) with
    proj_size, and the same with ``_reverse``; all from U(-1/√H, 1/√H). They are read at every call.

    Raises:
        Exception: as :class:`RNN` does.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    @overload
    def forward(
        self, input: Tensor, hx: Pair | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, Pair]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Pair | None = None) -> tuple[PackedSequence, Pair]: ...

    def forward(self, input: Any, hx: Pair | None = None, *, lengths: Lengths | None = None) -> tuple[Any, Pair]:
        """Runs the layer; the class says what goes in and what comes out."""
        return self._forward(input, hx, lengths)

    _input_dim_message = "LSTM: Expected input to be 2D or 3D, got {}D instead"

    # torch's methods for two states, which need nothing of torch.nn.LSTM but these names.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    def _check_hx_dim(self, hx: Pair, dim: int) -> None:
        if hx[0].dim() != dim or hx[1].dim() != dim:
            form = "unbatched 2-D" if dim == 2 else "batched 3-D"
            raise RuntimeError(
                f"For {form} input, hx and cx should also be {dim}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )

    def _hx_fits(self, hx: Pair, groups: int, B: int) -> bool:
        H = self.hidden_size
        return hx[0].shape == (groups, B, self.proj_size or H) and hx[1].shape == (groups, B, H)

    def _split_state(self, hx: Pair | None) -> tuple[Tensor | None, Tensor | None]:
        if hx is None:
            return None, None
        if isinstance(hx, Tensor):
            raise TypeError("lstm expects two hidden states, (h_0, c_0), and got one tensor")
        if len(hx) != 2:
            raise RuntimeError(f"lstm expects two hidden states, (h_0, c_0), and got {len(hx)}")
        return hx

    def _join_state(self, h: Tensor, c: Tensor) -> Pair:
        return h, c


# ---- Cells ----------------------------------------------------------------------------------------------------------


class _Cell(torch.nn.RNNCellBase):
    """What the cells share: one step of one layer."""

    _cell: str  # the operator's name for it

    def __prepare_scriptable__(self) -> NoReturn:
        _refuse_script(self)

    def _step(self, input: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Batched input and state to the new h and c; c is an empty tensor for a cell without."""
        parameters: dict[str, Any] = self._parameters
        try:
            w_ih, w_hh = parameters["weight_ih"], parameters["weight_hh"]
            b_ih, b_hh = parameters["bias_ih"], parameters["bias_hh"]
        except KeyError:  # a weight is computed from others: parametrized, weight-normed, pruned
            w_ih, w_hh, b_ih, b_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if kernel_obstacle(input) is not None:
            return self._step_torch(input, h, c, (w_ih, w_hh, b_ih, b_hh))

        B, I = input.shape
        if self.input_size != I:
            raise RuntimeError(f"input has inconsistent input_size: got {I} expected {self.input_size}")
        for k, s in enumerate((h, c)):
            if s is not None and s.shape != (B, self.hidden_size):
                if s.size(0) != B:
                    raise RuntimeError(f"Input batch size {B} doesn't match hidden{k} batch size {s.size(0)}")
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {s.size(1)}, expected {self.hidden_size}"
                )
        bias = b_ih is not None
        h, _, c = ops.rnn(self._cell, input, h, c, (w_ih, w_hh, b_ih, b_hh) if bias else (w_ih, w_hh), bias=bias)
        return h, c

    def _step_torch(
        self, input: Tensor, h: Tensor | None, c: Tensor | None, weights: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        """torch's own operator, called as torch.nn calls it."""
        if h is None:
            h = c = torch.zeros(input.shape[0], self.hidden_size, dtype=input.dtype, device=input.device)
        if self._cell == "lstm":
            return _VF.lstm_cell(input, (h, c), *weights)
        return getattr(_VF, f"{self._cell}_cell")(input, h, *weights), h.new_empty(0)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead")

    def _direct(self, input: Tensor, hx: Any) -> Any:
        """The new state if the direct call takes this one (csrc/torch/direct_call.cpp), or None."""
        return None if is_dynamo_compiling() else _load._C.direct_cell(self._cell, self.__dict__, input, hx)

    def _forward_one_state(self, input: Tensor, hx: Tensor | None) -> Tensor:
        if (h := self._direct(input, hx)) is not None:
            return h
        self._check_input_dim(input)
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if input.dim() == 2:
            return self._step(input, hx, None)[0]
        return self._step(input.unsqueeze(0), None if hx is None else hx.unsqueeze(0), None)[0].squeeze(0)


class RNNCell(_Cell):
    r"""One step of an Elman layer, in the place of :class:`torch.nn.RNNCell`.

    .. math::
        h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    or max(·, 0) for ``nonlinearity="relu"``. Elman, "Finding structure in time", 1990.

    Args:
        input_size: I.
        hidden_size: H.
        bias: ``False`` for no b_ih and b_hh.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.

    Call: ``h = cell(input, hx=None)``
        - input: (B, I), or (I,) without a batch.
        - hx: (B, H), or (H,) without a batch; zeros if not given.
        - h: like hx.

    Parameters: ``weight_ih`` (H, I), ``weight_hh`` (H, H), ``bias_ih``, ``bias_hh`` (H,), from U(-1/√H, 1/√H).

    Raises:
        ValueError: an input or state of more than two dimensions.
        RuntimeError: an input or state of the wrong size, several dtypes or devices, an unknown nonlinearity.
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]
    __jit_unused_properties__ = ["_cell"]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Runs one step; the class says what goes in and what comes out."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._forward_one_state(input, hx)

    @property
    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}"


class GRUCell(_Cell):
    r"""One step of a gated recurrent unit, in the place of :class:`torch.nn.GRUCell`.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", 2014.

    Args:
        input_size: I.
        hidden_size: H.
        bias: ``False`` for no b_ih and b_hh.
        device, dtype: of the parameters.

    Call: ``h = cell(input, hx=None)``, with the shapes and errors of :class:`RNNCell`.

    Parameters, gates in the order r z n: ``weight_ih`` (3H, I), ``weight_hh`` (3H, H), ``bias_ih``, ``bias_hh`` (3H,),
    from U(-1/√H, 1/√H).
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Runs one step; the class says what goes in and what comes out."""
        return self._forward_one_state(input, hx)

    _cell = "gru"


class LSTMCell(_Cell):
    r"""One step of a long short-term memory layer, in the place of :class:`torch.nn.LSTMCell`.

    .. math::
        i &= \sigma(W_{ii} x + b_{ii} + W_{hi} h + b_{hi}) \\
        f &= \sigma(W_{if} x + b_{if} + W_{hf} h + b_{hf}) \\
        g &= \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        o &= \sigma(W_{io} x + b_{io} + W_{ho} h + b_{ho}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000.

    Args:
        input_size: I.
        hidden_size: H.
        bias: ``False`` for no b_ih and b_hh.
        device, dtype: of the parameters.

    Call: ``h, c = cell(input, hx=None)``
        - input: (B, I), or (I,) without a batch.
        - hx: (h_0, c_0), each (B, H), or (H,) without a batch; zeros if not given.
        - h, c: like h_0 and c_0.

    Parameters, gates in the order i f g o: ``weight_ih`` (4H, I), ``weight_hh`` (4H, H), ``bias_ih``, ``bias_hh``
    (4H,), from U(-1/√H, 1/√H).

    Raises:
        Exception: as :class:`RNNCell` does.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Pair | None = None) -> Pair:
        """Runs one step; the class says what goes in and what comes out."""
        if (state := self._direct(input, hx)) is not None:
            return state
        self._check_input_dim(input)
        h = c = None
        if hx is not None:
            for k, s in enumerate(hx):
                if s.dim() not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {s.dim()}D instead")
            if len(hx) != 2:
                raise RuntimeError(f"lstm_cell expects two hidden states, (h_0, c_0), and got {len(hx)}")
            h, c = hx
        if input.dim() == 2:
            return self._step(input, h, c)
        h, c = (s if s is None else s.unsqueeze(0) for s in (h, c))
        h, c = self._step(input.unsqueeze(0), h, c)
        return h.squeeze(0), c.squeeze(0)

    _cell = "lstm"
