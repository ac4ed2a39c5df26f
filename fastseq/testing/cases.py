"""The one list of cases that the tests and `python -m fastseq check` run, and what a case is made of: a point of the
benchmark (`fastseq.bench.grid`) is one too.

Letters: T time steps, B batch, I input size, H hidden size, P projected size (H without projection), L layers,
D directions, N rows of packed data.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastseq import _load

Form = Literal["dense", "lengths", "packed", "step"]
FORMS: tuple[Form, ...] = ("dense", "lengths", "packed", "step")
OUTPUTS = ("output", "h_n", "c_n")

Op = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""A function with the signature and the meaning of `fastseq.ops.rnn`."""


@dataclass(frozen=True)
class Case:
    """A call of the recurrent operator: which cell, how large, in which form. `problem` draws the numbers.

    Attributes:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        T, B, I, H: steps (ignored in the form "step"), batch, input and hidden size.
        P: projected size, LSTM only; 0 for no projection.
        layers: L.
        bidirectional: D = 2.
        bias: whether there are b_ih and b_hh.
        form: "dense", x (T, B, I); "lengths", the same with rows of random lengths 0..T in any order, one of them T
            and, if B > 2, one of them 0; "packed", x (N, I) with rows of random lengths 1..T; "step", one step, (B, I).
        dropout: probability of a zero in the masks between layers.
        state: whether an initial state is given; False means none, which is zeros.
        dtype: torch.float32, torch.float64 or torch.bfloat16; on CUDA also torch.float16.
        seed: of the random numbers.
    """

    cell: str
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 5
    P: int = 0
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    form: Form = "dense"
    dropout: float = 0.0
    state: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __post_init__(self) -> None:
        known = _load._C.cells()
        if self.cell not in known:
            raise ValueError(f"cell must be one of {', '.join(known)}; got {self.cell!r}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}; got {self.form!r}")
        if self.P and (not self.has_c or self.P >= self.H):
            raise ValueError(f"a projection is the LSTM's, with 0 < P < H = {self.H}; got P = {self.P} for {self.cell}")
        if self.form == "step" and (self.layers > 1 or self.bidirectional or self.dropout):
            raise ValueError("one step is one layer in one direction, without dropout")

    def __str__(self) -> str:
        steps = "" if self.form == "step" else f"T{self.T} "
        words = [self.cell, self.form, f"{steps}B{self.B} I{self.I} H{self.H}"]
        words += [f"P{self.P}"] if self.P else []
        words += [f"L{self.layers}"] if self.layers > 1 else []
        words += ["bidirectional"] if self.bidirectional else []
        words += [f"dropout {self.dropout:g}"] if self.dropout else []
        words += [] if self.bias else ["no bias"]
        words += [] if self.state else ["no state"]
        return " ".join([*words, str(self.dtype).removeprefix("torch.")])

    @property
    def id(self) -> str:
        """The name in one word."""
        return str(self).replace(" ", "-")

    @property
    def has_c(self) -> bool:
        """Whether the cell has a cell state beside h."""
        return _load._C.cells()[self.cell]["states"] == 2

    @property
    def D(self) -> int:
        """Directions."""
        return 2 if self.bidirectional else 1

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the operator that are no tensors."""
        return {"num_layers": self.layers, "bidirectional": self.bidirectional, "bias": self.bias}

    def replace(self, **changes: Any) -> Case:
        """The same case but for these attributes."""
        return dataclasses.replace(self, **changes)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights' shapes by torch.nn's names for them, in the flat order that the operator takes."""
        G, Hout = _load._C.cells()[self.cell]["gates"], self.P or self.H
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, suffix in itertools.product(range(self.layers), ("", "_reverse")[: self.D]):
            place = f"l{layer}{suffix}"
            shapes[f"weight_ih_{place}"] = (G * self.H, self.D * Hout if layer else self.I)
            shapes[f"weight_hh_{place}"] = (G * self.H, Hout)
            if self.bias:
                shapes |= {f"bias_ih_{place}": (G * self.H,), f"bias_hh_{place}": (G * self.H,)}
            if self.P:
                shapes[f"weight_hr_{place}"] = (self.P, self.H)
        return shapes

    def problem(self, weights: Sequence[Tensor] | None = None) -> Problem:
        """Draws x, the state, the lengths and the masks from `seed`, and the weights too if none are given.

        x and the state are normal, the weights uniform within ±1.5/√H: somewhat larger than torch.nn's first ones, so
        that the gates leave their linear range.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        def uniform(*shape: int) -> Tensor:
            bound = 1.5 / math.sqrt(self.H)
            numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
            return ((2 * numbers - 1) * bound).to(self.dtype)

        options = self.options
        rows: tuple[int, ...] = (self.T, self.B)
        if self.form == "step":
            rows = (self.B,)
        elif self.form == "lengths":
            options["lengths"] = self._lengths(0, generator)
        elif self.form == "packed":
            lengths = self._lengths(1, generator)
            alive = lengths > torch.arange(self.T if self.B else 0).unsqueeze(1)
            options["batch_sizes"] = alive.sum(1)
            rows = (int(lengths.sum()),)
        Hout = self.P or self.H
        if self.dropout:
            shape = (self.layers - 1, *rows, self.D * Hout)
            keep = torch.rand(shape, generator=generator) >= self.dropout
            options["dropout_masks"] = list(keep.to(self.dtype) / (1 - self.dropout))
        states = (self.B,) if self.form == "step" else (self.layers * self.D, self.B)
        shapes = self.weight_shapes()
        return Problem(
            case=self,
            x=normal(*rows, self.I),
            hx=normal(*states, Hout) if self.state else None,
            cx=normal(*states, self.H) if self.state and self.has_c else None,
            weights=[uniform(*shape) for shape in shapes.values()] if weights is None else list(weights),
            options=options,
        )

    def _lengths(self, shortest: int, generator: torch.Generator) -> Tensor:
        if not self.B or not self.T:
            return torch.zeros(self.B, dtype=torch.int64)
        lengths = torch.randint(shortest, self.T + 1, (self.B,), generator=generator)
        lengths[0] = self.T
        if self.B > 2:
            lengths[1] = shortest
        if shortest:  # packed rows are sorted
            return lengths.sort(descending=True).values
        return lengths[torch.randperm(self.B, generator=generator)]

    @classmethod
    def of_layer(cls, layer: torch.nn.Module, **changes: Any) -> Case:
        """The case of a recurrent layer or cell of fastseq or torch.nn: its sizes, options and dtype, without dropout.

        Args:
            layer: the layer. Its weights are not part of the case: pass them to `problem`.
            changes: attributes of the case that a layer does not have: T, B, form, state, dropout, seed.

        Raises:
            TypeError: `layer` is no recurrent layer or cell.
        """
        if isinstance(layer, torch.nn.RNNCellBase):
            kind, options = type(layer).__name__.removesuffix("Cell"), {"form": "step"}
        elif isinstance(layer, torch.nn.RNNBase):
            kind = layer.mode.partition("_")[0]
            options = {
                "P": layer.proj_size,
                "layers": layer.num_layers,
                "bidirectional": layer.bidirectional,
            }
        else:
            raise TypeError(f"expected a recurrent layer or cell of fastseq or torch.nn; got {type(layer).__name__}")
        return cls(
            cell=f"rnn_{layer.nonlinearity}" if kind == "RNN" else kind.lower(),
            I=layer.input_size,
            H=layer.hidden_size,
            bias=layer.bias,
            dtype=next(layer.parameters()).dtype,
            **options | changes,
        )


@dataclass(frozen=True)
class Problem:
    """A case with its numbers.

    Attributes:
        case: where it is from.
        x, hx, cx, weights: the operator's arguments; hx and cx are None where there is no initial state.
        options: its keyword arguments.
    """

    case: Case
    x: Tensor
    hx: Tensor | None
    cx: Tensor | None
    weights: list[Tensor]
    options: dict[str, Any]

    @property
    def arguments(self) -> tuple[str, Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """The positional arguments of the operator: `ops.rnn(*problem.arguments, **problem.options)`."""
        return self.case.cell, self.x, self.hx, self.cx, self.weights

    def tensors(self) -> dict[str, Tensor]:
        """What a gradient is taken of, by name: x, hx and cx if there are any, and the weights by torch.nn's names."""
        states = {"x": self.x, "hx": self.hx, "cx": self.cx}
        named = {name: t for name, t in states.items() if t is not None}
        return named | dict(zip(self.case.weight_shapes(), self.weights, strict=True))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Problem:
        """The same problem with these in the place of `tensors()`, in its order."""
        named = dict(zip(self.tensors(), tensors, strict=True))
        x, hx, cx = (named.pop(name, None) for name in ("x", "hx", "cx"))
        assert x is not None
        return dataclasses.replace(self, x=x, hx=hx, cx=cx, weights=list(named.values()))

    def leaves(self, dtype: torch.dtype | None = None) -> Problem:
        """A copy of which every tensor requires its gradient, in another dtype if one is given."""
        copies = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in self.tensors().values()]
        options = dict(self.options)
        if "dropout_masks" in options:
            options["dropout_masks"] = [mask.to(dtype or mask.dtype) for mask in options["dropout_masks"]]
        return dataclasses.replace(self.with_tensors(copies), options=options)

    def run(self, op: Op) -> dict[str, Tensor]:
        """The operator's outputs by name, without those that the case does not have."""
        outputs = dict(zip(OUTPUTS, op(*self.arguments, **self.options), strict=True))
        if self.case.form == "step":
            del outputs["h_n"]
        if not self.case.has_c:
            del outputs["c_n"]
        return outputs

    def gradients(self, outputs: dict[str, Tensor], d_outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """∂loss/∂tensor of every tensor of `leaves()`, as "d_" and its name; outputs without a gradient count zero."""
        tensors = self.tensors()
        names = [name for name in d_outputs if outputs[name].requires_grad]  # without steps, no weight matters
        if not names:
            return {f"d_{name}": torch.zeros_like(t) for name, t in tensors.items()}
        found = torch.autograd.grad(
            [outputs[name] for name in names],
            list(tensors.values()),
            [d_outputs[name] for name in names],
            materialize_grads=True,
        )
        return {f"d_{name}": gradient for name, gradient in zip(tensors, found, strict=True)}


# ---- The list -------------------------------------------------------------------------------------------------------


def small_cases() -> Iterator[Case]:
    """Every cell × projection × form × layers × directions × bias, so small that finite differences are cheap.

    With few steps the kernels call a matrix product each step, with more they run on packed panels of the weights: both
    lengths are here.
    """
    kinds = [{"cell": cell} for cell in _load._C.cells()] + [{"cell": "lstm", "P": 3}]
    for kind, form, bias in itertools.product(kinds, FORMS, (True, False)):
        if form == "step":
            yield Case(**kind, form=form, bias=bias)
            yield Case(**kind, form=form, bias=bias, state=False)
            continue
        for layers, bidirectional, T in itertools.product((1, 2), (False, True), (3, 9)):
            stack = {"layers": layers, "bidirectional": bidirectional, "dropout": 0.3 if layers > 1 else 0.0}
            yield Case(**kind, form=form, bias=bias, T=T, state=bias or T == 9, **stack)


SIZES: tuple[dict[str, int], ...] = (
    # At and around the width of a vector, I ≠ H; one row, few, and more than one block of 64.
    {"T": 9, "B": 1, "I": 3, "H": 1},
    {"T": 9, "B": 2, "I": 1, "H": 3},
    {"T": 9, "B": 7, "I": 5, "H": 7},
    {"T": 10, "B": 5, "I": 17, "H": 15},
    {"T": 8, "B": 6, "I": 15, "H": 16},
    {"T": 7, "B": 9, "I": 33, "H": 17},
    {"T": 20, "B": 13, "I": 7, "H": 33},
    {"T": 8, "B": 130, "I": 20, "H": 24},
    # Rows over threads, units over threads; more than one chain of 128 along K.
    {"T": 12, "B": 32, "I": 31, "H": 65},
    {"T": 25, "B": 1, "I": 65, "H": 130},
    {"T": 3, "B": 3, "I": 130, "H": 129},
)


def sized_cases() -> Iterator[Case]:
    """Sizes at the edges of the kernels' blocks, in float32 and float64, in the forms and stacks that share threads."""
    kinds = [{"cell": cell} for cell in _load._C.cells()] + [{"cell": "lstm", "P": 1}]
    for kind, size, dtype in itertools.product(kinds, SIZES, (torch.float32, torch.float64)):
        case = Case(**kind | size, dtype=dtype) if size["H"] > 1 or "P" not in kind else None
        if case is None:
            continue
        if case.P:
            case = case.replace(P=(case.H + 1) // 2)
        # float64 takes the form that float32 does not, so that both are there for each size.
        ragged: Form = "lengths" if size["B"] % 2 else "packed"
        if dtype == torch.float32:
            yield case
            yield case.replace(form=ragged, bidirectional=True)
        else:
            yield case.replace(bidirectional=True, layers=2)
            yield case.replace(form=ragged)
        if size["H"] in (1, 7, 17, 130):
            yield case.replace(form="step")


def long_cases() -> Iterator[Case]:
    """More rows of all steps than are projected, or kept for the weight gradients, in one piece.

    In float32: over so many rows the float64 reference would be no more exact than what is held to it.
    """
    options: dict[str, Any] = {"I": 20, "bidirectional": True, "dtype": torch.float32}
    for cell, facts in _load._C.cells().items():
        yield Case(cell, T=70, B=1200, H=64 // facts["gates"], **options)
    yield Case("lstm", T=70, B=1200, H=18, P=5, form="lengths", **options)
    yield Case("gru", T=70, B=1200, H=22, form="packed", **options)


def bfloat16_cases() -> Iterator[Case]:
    """The same sizes in bfloat16, whose kernels take pairs of numbers: some odd, some even.

    Without the rectifier: where rounding takes h across its kink, a gradient is another one altogether.
    """
    kinds = [{"cell": cell} for cell in _load._C.cells() if cell != "rnn_relu"] + [{"cell": "lstm", "P": 1}]
    for kind, (k, size) in itertools.product(kinds, enumerate(SIZES)):
        if size["H"] == 1 and "P" in kind:
            continue
        case = Case(**kind | size, dtype=torch.bfloat16)
        if case.P:
            case = case.replace(P=(case.H + 1) // 2)
        form: Form = FORMS[k % len(FORMS)]
        yield case.replace(form=form, bidirectional=form != "step" and k % 2 == 0)


def empty_cases() -> Iterator[Case]:
    """No rows, or no steps."""
    for cell in _load._C.cells():
        yield Case(cell, B=0, bidirectional=True)
        yield Case(cell, T=0, layers=2)
        yield Case(cell, T=0, form="lengths")
        yield Case(cell, B=0, form="step")


def all_cases() -> list[Case]:
    """The whole list."""
    return [*small_cases(), *sized_cases(), *long_cases(), *bfloat16_cases(), *empty_cases()]
