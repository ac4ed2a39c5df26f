"""The specification (fastseq/reference.py) against the oracle, torch.nn, finite differences, and under torch.func."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import reference

T, B, I, H = 5, 4, 3, 4
CELLS = ["rnn_tanh", "rnn_relu", "lstm", "lstm_proj", "gru"]
FORMS = ["dense", "lengths", "packed"]
LENGTHS = torch.tensor([3, 5, 0, 2])
SORTED_LENGTHS = torch.tensor([5, 3, 3, 1])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """At these sizes threads only cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(cell, form="dense", *, layers=1, bidirectional=False, bias=True, dropout=False, seed=0, sizes=(T, B, I, H)):
    """-> (cell, x, hx, cx, weights), options: float64 tensors that require gradients, but for the dropout masks."""
    g = torch.Generator().manual_seed(seed)
    T, B, I, H = sizes
    P = H - 1 if cell == "lstm_proj" else H
    D = 2 if bidirectional else 1
    G = {"lstm": 4, "lstm_proj": 4, "gru": 3}.get(cell, 1)

    def rand(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    lead = (T, B)
    if form == "lengths":
        options["lengths"] = LENGTHS.clamp(max=T)[len(LENGTHS) - B :]
    elif form == "packed":
        options["batch_sizes"] = (SORTED_LENGTHS.clamp(max=T)[len(LENGTHS) - B :] > torch.arange(T).unsqueeze(1)).sum(1)
        lead = (int(options["batch_sizes"].sum()),)
    elif form == "step":
        lead = (B,)
    if dropout:
        keep = torch.rand(layers - 1, *lead, D * P, generator=g, dtype=torch.float64) < 0.7
        options["dropout_masks"] = list(keep.double() / 0.7)

    weights = []
    for k in range(layers * D):
        weights += [rand(G * H, I if k < D else D * P), rand(G * H, P)]
        weights += [rand(G * H), rand(G * H)] if bias else []
        weights += [rand(P, H)] if cell == "lstm_proj" else []
    states = (B,) if form == "step" else (layers * D, B)
    cx = rand(*states, H) if cell.startswith("lstm") else None
    return (cell.removesuffix("_proj"), rand(*lead, I), rand(*states, P), cx, weights), options


def flat(args):
    *tensors, weights = args[1:]
    return [*tensors, *weights]


def needs_of(args):
    return [t is not None for t in flat(args)]


def as_function(args, options):
    """`rnn` as a function of its tensors alone, and these; an empty output is left out."""
    tensors, needs = [t for t in flat(args) if t is not None], needs_of(args)

    def function(*values):
        remaining = iter(values)
        x, hx, cx, *weights = (next(remaining) if need else None for need in needs)
        return tuple(y for y in reference.rnn(args[0], x, hx, cx, weights, **options) if y.numel())

    return function, tensors


def assert_close(actual, expected, rtol=1e-12):
    """Relative to the largest element: a sum that cancels is as accurate as its terms."""
    actual, expected = (
        [t.detach().numpy() if isinstance(t, torch.Tensor) else t for t in some if t is not None]
        for some in (actual, expected)
    )
    assert [a.shape for a in actual] == [e.shape for e in expected]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.abs(e).max(initial=1e-3))


# ---- the oracle ----

# Every pair of the three choices, in half of the combinations.
STACKS = [
    pytest.param(
        dict(layers=layers, bidirectional=two, bias=bias, dropout=layers > 1), id=f"L{layers}D{1 + two}b{bias:d}"
    )
    for layers, two, bias in [(1, False, True), (1, True, False), (2, False, False), (2, True, True)]
]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_against_the_oracle(cell, form, stack):
    args, options = problem(cell, form, **stack)
    outputs = reference.rnn(*args, **options)
    assert_close(outputs, oracle.rnn(*args, **options))
    d_outputs = [torch.randn_like(y) for y in outputs]
    actual = reference.rnn_backward(*d_outputs, *args, **options, needs=needs_of(args))
    assert_close(actual, oracle.rnn_backward(*d_outputs, *args, **options))


@pytest.mark.parametrize("through", [0, 1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_through_one_output_against_the_oracle(cell, through):
    args, options = problem(cell, "lengths", bidirectional=True)
    d_outputs = [torch.randn_like(y) if k == through else None for k, y in enumerate(reference.rnn(*args, **options))]
    actual = reference.rnn_backward(*d_outputs, *args, **options, needs=needs_of(args))
    assert_close(actual, oracle.rnn_backward(*d_outputs, *args, **options))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_one_step_against_the_oracle(cell, bias):
    args, options = problem(cell, "step", bias=bias)
    outputs = reference.rnn(*args, **options)
    assert outputs[1].shape == (0,)
    assert_close(outputs, oracle.rnn(*args, **options))
    d_outputs = [torch.randn_like(y) for y in outputs]
    actual = reference.rnn_backward(*d_outputs, *args, **options, needs=needs_of(args))
    assert_close(actual, oracle.rnn_backward(*d_outputs, *args, **options))


@pytest.mark.parametrize("form", [*FORMS, "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_initial_state_means_zeros(cell, form):
    (cell, x, hx, cx, weights), options = problem(cell, form)
    zeros = [None if s is None else torch.zeros_like(s) for s in (hx, cx)]
    expected = reference.rnn(cell, x, *zeros, weights, **options)
    assert_close(reference.rnn(cell, x, None, None, weights, **options), expected, rtol=0)
    assert_close(oracle.rnn(cell, x, None, None, weights, **options), expected)


# ---- torch.nn ----


def torch_layer(args, options, dropout=0.0, like="RNN"):
    """The torch.nn layer (like="RNN") or cell ("RNNCell") that has these very weights."""
    cell, *_, weights = args
    kwargs = {"bias": options["bias"]}
    if like == "RNN":
        kwargs |= {k: options[k] for k in ("num_layers", "bidirectional")} | {"dropout": dropout}
        if len(weights) // (options["num_layers"] * (1 + options["bidirectional"])) % 2:
            kwargs["proj_size"] = H - 1
    kind = {"lstm": "LSTM", "gru": "GRU"}.get(cell, "RNN")
    if kind == "RNN":
        kwargs["nonlinearity"] = cell.removeprefix("rnn_")
    layer = getattr(torch.nn, like.replace("RNN", kind))(I, H, **kwargs)
    for name, weight in zip([name for name, _ in layer.named_parameters()], weights, strict=True):
        setattr(layer, name, torch.nn.Parameter(weight.detach()))
    return layer


def assert_same_as_torch(args, options, layer, outputs, torch_outputs):
    """The same outputs and, for random gradients of these, the same gradients of everything."""
    outputs = [y for y in outputs if y.numel()]
    assert_close(outputs, torch_outputs)
    d_outputs = [torch.randn_like(y) for y in outputs]
    actual = torch.autograd.grad(outputs, [t for t in flat(args) if t is not None], d_outputs)
    inputs = [t for t in flat(args)[:3] if t is not None]
    assert_close(actual, torch.autograd.grad(torch_outputs, [*inputs, *layer.parameters()], d_outputs))


def call_torch(layer, x, hx, cx):
    output, state = layer(x, hx if cx is None else (hx, cx))
    return [output, *(state if isinstance(state, tuple) else [state])]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_against_torch(cell, form, stack):
    args, options = problem(cell, form, **stack)
    cell, x, hx, cx, _ = args
    dropout = 0.3 if stack["dropout"] else 0.0
    layer = torch_layer(args, options, dropout)
    if dropout:  # the random stream of torch.nn: one F.dropout on each layer's output but the last, packed if x is
        shapes = [mask.shape for mask in options["dropout_masks"]]
        if form == "lengths":
            shapes = [(int(LENGTHS.sum()), shape[2]) for shape in shapes]
        torch.manual_seed(1)
        masks = [F.dropout(torch.ones(shape, dtype=torch.float64), dropout) for shape in shapes]
        if form == "lengths":
            order = LENGTHS.argsort(descending=True)
            masks = [unpack(mask, order) for mask in masks]
        options["dropout_masks"] = masks
    outputs = reference.rnn(*args, **options)

    torch.manual_seed(1)
    if form == "dense":
        torch_outputs = call_torch(layer, x, hx, cx)
    elif form == "packed":
        y, *state = call_torch(layer, PackedSequence(x, options["batch_sizes"]), hx, cx)
        torch_outputs = [y.data, *state]
    else:
        # torch refuses empty rows: it runs the others, and the empty ones have the states they began with.
        some, none = (LENGTHS > 0).nonzero()[:, 0], (LENGTHS == 0).nonzero()[:, 0]
        packed = pack_padded_sequence(x[:, some], LENGTHS[some], enforce_sorted=False)
        states = [None if s is None else s[:, some] for s in (hx, cx)]
        y, *state = call_torch(layer, packed, *states)
        y = pad_packed_sequence(y, total_length=T)[0]
        torch_outputs = [torch.zeros_like(outputs[0]).index_copy(1, some, y)]
        for begin, end in zip((hx, cx), state, strict=False):  # without c, one state
            torch_outputs.append(torch.zeros_like(begin).index_copy(1, some, end).index_copy(1, none, begin[:, none]))
    assert_same_as_torch(args, options, layer, outputs, torch_outputs)


def unpack(packed, order):
    """Rows packed in this order of LENGTHS, as (T, B, ...) in the order of LENGTHS."""
    padded = torch.zeros(T, B, packed.shape[1], dtype=packed.dtype)
    places = [(t, b) for t in range(T) for b in order.tolist() if t < LENGTHS[b]]
    for row, place in zip(packed, places, strict=True):
        padded[place] = row
    return padded


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_one_step_against_torch(cell, bias):
    args, options = problem(cell, "step", bias=bias)
    _, x, hx, cx, _ = args
    layer = torch_layer(args, options, like="RNNCell")
    state = layer(x, hx if cx is None else (hx, cx))
    torch_outputs = list(state) if isinstance(state, tuple) else [state]
    assert_same_as_torch(args, options, layer, reference.rnn(*args, **options), torch_outputs)


# ---- derivatives ----


@pytest.mark.parametrize("form", ["lengths", "packed", "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_and_gradgradcheck(cell, form):
    function, tensors = as_function(*problem(cell, form, bidirectional=form != "step", sizes=(2, 2, 2, 2)))
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    if form != "packed":  # lengths, and a permutation of the rows
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_gradcheck_and_gradgradcheck_through_layers():
    args, options = problem("gru", "lengths", layers=2, dropout=True, sizes=(2, 2, 2, 2))
    function, tensors = as_function(args, options)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_rnn_backward_is_the_gradient_and_differentiable(cell):
    args, options = problem(cell, "lengths", layers=2, dropout=True, sizes=(2, 2, 2, 2))
    needs = [False, *needs_of(args)[1:]]
    wanted = [t for t, need in zip(flat(args), needs, strict=True) if need]
    outputs = reference.rnn(*args, **options)
    d_outputs = [torch.randn_like(y).requires_grad_() for y in outputs]
    actual = reference.rnn_backward(*d_outputs, *args, **options, needs=needs)
    n = 3 if args[0] == "lstm" else 2
    assert_close(actual, torch.autograd.grad(outputs[:n], wanted, d_outputs[:n]))

    def function(*d_outputs):
        return tuple(reference.rnn_backward(*d_outputs, *args, **options, needs=needs))

    assert torch.autograd.gradcheck(function, d_outputs, fast_mode=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = function(*d_outputs)
        assert not any(t.requires_grad for t in again)
        assert_close(again, actual, rtol=0)


def test_rnn_backward_under_forward_ad_and_vmap():
    args, options = problem("lstm", "lengths", sizes=(2, 2, 2, 2))
    cell, x, *rest = args[0], *(t.detach() for t in args[1:4]), [w.detach() for w in args[4]]
    d_output = torch.randn(2, 2, 2, dtype=torch.float64)

    def d_x(d_output, x):
        return reference.rnn_backward(d_output, None, None, cell, x, *rest, **options, needs=[True] + [False] * 6)[0]

    x_moved = torch.randn_like(x)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(d_x(d_output, forward_ad.make_dual(x, x_moved))).tangent
    grads = torch.func.grad(lambda x: (reference.rnn(cell, x, *rest, **options)[0] * d_output).sum())
    assert_close([moved], [torch.func.jvp(grads, (x,), (x_moved,))[1]])

    # vmap over the gradients, as autograd.grad(..., is_grads_batched=True) does; other transforms are refused
    x.requires_grad_()
    both = torch.stack([d_output, x_moved])
    assert_close([torch.func.vmap(d_x, (0, None))(both, x)], [torch.stack([d_x(d, x) for d in both])])
    with pytest.raises(RuntimeError, match="requires_grad_"):
        torch.func.jvp(lambda x: d_x(d_output, x), (x.detach(),), (x_moved,))


def test_rnn_backward_of_nothing():
    args, options = problem("gru")
    assert reference.rnn_backward(None, None, None, *args, **options, needs=[False] * 7) == []
    zeros = reference.rnn_backward(None, None, None, *args, **options, needs=needs_of(args))
    assert_close(zeros, [torch.zeros_like(t) for t in flat(args) if t is not None], rtol=0)


def test_rnn_backward_keeps_tied_weights_apart():
    (cell, x, hx, _, weights), _ = problem("gru", sizes=(T, B, H, H))
    tied = [weights[0]] * 2 + weights[2:]
    copies = [w.detach().clone() for w in tied]
    d_output = torch.randn(T, B, H, dtype=torch.float64)
    needs = [False] * 3 + [True] * 4
    actual = reference.rnn_backward(d_output, None, None, cell, x, hx, None, tied, needs=needs)
    assert_close(actual, reference.rnn_backward(d_output, None, None, cell, x, hx, None, copies, needs=needs), rtol=0)


# ---- torch.func ----


@pytest.mark.parametrize("form", [*FORMS, "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_func_transforms(cell, form):
    args, options = problem(cell, form, bidirectional=form != "step", sizes=(2, 2, 2, 2))
    function, tensors = as_function(args, options)
    tensors = [t.detach() for t in tensors]
    outputs = function(*tensors)
    tangents = [torch.randn_like(t) for t in tensors]
    d_outputs = [torch.randn_like(y) for y in outputs]

    def loss(*values):
        return sum((y * dy).sum() for y, dy in zip(function(*values), d_outputs, strict=True))

    # grad is rnn_backward
    everything = tuple(range(len(tensors)))
    grads = torch.func.grad(loss, everything)(*tensors)
    remaining = iter(d_outputs)
    d_all = [next(remaining) if y.numel() else None for y in reference.rnn(*args, **options)]
    assert_close(grads, reference.rnn_backward(*d_all, *args, **options, needs=needs_of(args)))

    # jvp is the transpose of vjp
    primal, moved = torch.func.jvp(loss, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(primal, loss(*tensors))
    torch.testing.assert_close(moved, sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)))

    # vmap, over everything and over the weights alone, is a loop
    stacked = [torch.stack([t, t + dt]) for t, dt in zip(tensors, tangents, strict=True)]
    loop = [function(*(s[k] for s in stacked)) for k in range(2)]
    assert_close(torch.func.vmap(function)(*stacked), [torch.stack(ys) for ys in zip(*loop, strict=True)])
    head, weights = tensors[: -len(args[4])], stacked[-len(args[4]) :]
    loop = [function(*head, *(w[k] for w in weights)) for k in range(2)]
    batched = torch.func.vmap(lambda *weights: function(*head, *weights))(*weights)
    assert_close(batched, [torch.stack(ys) for ys in zip(*loop, strict=True)])
    per_sample = torch.func.vmap(torch.func.grad(loss, everything))(*stacked)
    assert_close([g[0] for g in per_sample], grads)

    # the second derivative is symmetric: forward over reverse is reverse over reverse
    gradient = torch.func.grad(loss, everything)
    _, forward = torch.func.jvp(gradient, tuple(tensors), tuple(tangents))
    _, pull_back = torch.func.vjp(gradient, *tensors)
    assert_close(forward, pull_back(tuple(tangents)), rtol=1e-10)


# ---- edges ----


@pytest.mark.parametrize("cell", CELLS)
def test_what_x_holds_beyond_a_length_has_no_influence(cell):
    args, options = problem(cell, "lengths", layers=2, bidirectional=True)
    alive = torch.arange(T).unsqueeze(1) < LENGTHS
    spoilt = torch.where(alive.unsqueeze(-1), args[1], torch.nan).detach().requires_grad_()
    expected, d_expected = outputs_and_gradients(args, options)
    actual, d_actual = outputs_and_gradients((args[0], spoilt, *args[2:]), options)
    assert_close([*actual, *d_actual], [*expected, *d_expected], rtol=0)
    assert not actual[0][~alive].any()
    assert not d_actual[0][~alive].any()


def outputs_and_gradients(args, options):
    outputs = reference.rnn(*args, **options)
    return outputs, torch.autograd.grad(sum(y.sum() for y in outputs), [t for t in flat(args) if t is not None])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, form):
    for sizes in [(0, B, I, H), (T, 0, I, H), (0, 0, I, H)]:
        if form == "packed" and 0 in sizes[:2] and sizes[0] != sizes[1]:
            continue  # without rows a packed sequence has no steps
        args, options = problem(cell, form, layers=2, bidirectional=True, dropout=True, sizes=sizes)
        output, h_n, c_n = reference.rnn(*args, **options)
        assert output.shape == (*args[1].shape[:-1], 2 * args[2].shape[2])
        assert torch.equal(h_n, args[2])
        assert c_n.shape == ((0,) if args[3] is None else args[3].shape)
        gradients = reference.rnn_backward(output, h_n, c_n, *args, **options, needs=needs_of(args))
        assert [g.shape for g in gradients] == [t.shape for t in flat(args) if t is not None]
        assert_close(gradients, oracle.rnn_backward(output, h_n, c_n, *args, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [*FORMS, "step"])
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell, form, dtype):
    args, options = problem(cell, form)
    cast = [t if not isinstance(t, torch.Tensor) else t.to(dtype) for t in args[:4]]
    outputs = reference.rnn(*cast, [w.to(dtype) for w in args[4]], **options)
    assert {y.dtype for y in outputs} == {dtype}
    assert_close([y.double() for y in outputs], reference.rnn(*args, **options), rtol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(cell="elman"), ValueError, "cell must be one of rnn_tanh, rnn_relu, lstm, gru; got 'elman'"),
        (dict(weights=[]), ValueError, "expected 4 weights for each of 1 layers and directions; got 0"),
        (dict(num_layers=3), ValueError, "expected 4 weights for each of 3 layers and directions; got 4"),
        (dict(cx=torch.zeros(1, B, H)), ValueError, "only the LSTM has a cell state; got cx for gru"),
        (dict(hx=torch.zeros(1, 1, H)), RuntimeError, r"hx must be \(1, 4, 4\); got \(1, 1, 4\)"),
        (dict(dropout_masks=[torch.ones(1)]), ValueError, "expected num_layers - 1 = 0 dropout masks, or none; got 1"),
        (
            dict(lengths=torch.tensor([1])),
            RuntimeError,
            r"lengths must be \(4,\) with values in 0..5; got \(1,\): \[1\]",
        ),
        (dict(lengths=torch.tensor([0, 1, 6, 2])), RuntimeError, r"values in 0..5; got \(4,\): \[0, 1, 6, 2\]"),
        (dict(x=torch.zeros(B, I), lengths=LENGTHS), ValueError, "a 2-D x is one step of one layer"),
        (dict(lengths=LENGTHS, batch_sizes=LENGTHS), ValueError, "expected lengths or batch_sizes; got both"),
    ],
)
def test_errors(change, error, message):
    (cell, x, hx, cx, weights), options = problem("gru")
    kwargs = dict(cell=cell, x=x, hx=hx, cx=cx, weights=weights) | options | change
    with pytest.raises(error, match=message):
        reference.rnn(**kwargs)
