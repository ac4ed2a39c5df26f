"""The operators under torch.library.opcheck, torch.compile, torch.export and torch.func."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastseq
from fastseq import _C, ops, reference
from fastseq.testing import Case

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = list(_C.cells())


def fresh(case):
    """The case with other numbers in every run."""
    return case.replace(seed=int(torch.randint(2**31, ())))


def ids(case):
    return case.id


# ---- opcheck --------------------------------------------------------------------------------------------------------

OPERATOR_CASES = [
    *(Case(cell, T=3) for cell in CELLS),
    *(Case(cell, form="step") for cell in CELLS),
    Case("rnn_relu", T=9, form="lengths", bidirectional=True, state=False),
    Case("gru", T=9, layers=2, bidirectional=True, dropout=0.3, dtype=torch.float32),
    Case("gru", T=3, form="packed", bias=False),
    Case("lstm", T=9, P=3, layers=2, bidirectional=True, form="packed", dropout=0.3),
    Case("lstm", T=3, P=2, form="lengths", dtype=torch.float32),
    Case("lstm", T=3, state=False),
    Case("lstm", B=0),
    Case("gru", T=0),
]


def forward_arguments(problem, save=False):
    options = problem.options
    return (
        *problem.arguments,
        options.get("dropout_masks", []),
        options.get("lengths"),
        options.get("batch_sizes"),
        options["num_layers"],
        options["bidirectional"],
        options["bias"],
        save,
    )


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=ids)
def test_opcheck_of_forward(case):
    problem = fresh(case).problem()
    operator = torch.ops.fastseq.rnn_forward.default
    torch.library.opcheck(operator, forward_arguments(problem))
    torch.library.opcheck(operator, forward_arguments(problem.leaves()))
    # The reserve is for the backward operator alone, empty unless `save` asks: a call that saves is not differentiated.
    torch.library.opcheck(operator, forward_arguments(problem, save=True))


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=ids)
def test_opcheck_of_backward(case, everything):
    problem = fresh(case).problem()
    outputs = torch.ops.fastseq.rnn_forward.default(*forward_arguments(problem, save=True))
    *outputs, reserve = outputs
    present = [y.numel() > 0 for y in outputs]
    gradients = [torch.randn_like(y) if is_present else None for y, is_present in zip(outputs, present, strict=True)]
    needs = [True, problem.hx is not None, problem.cx is not None] + [True] * len(problem.weights)
    if not everything:
        needs = [need and k % 2 == 0 for k, need in enumerate(needs)]
        gradients[0] = None
    if not any(g is not None for g in gradients):
        pytest.skip("nothing arrives")
    *arguments, _ = forward_arguments(problem)
    masks_and_more, options = arguments[5:8], arguments[8:]
    operator = torch.ops.fastseq.rnn_backward.default
    for leaves in (problem, problem.leaves()):
        some = [g if g is None else g.clone().requires_grad_(leaves is not problem) for g in gradients]
        torch.library.opcheck(
            operator, (*some, *leaves.arguments, *masks_and_more, *options, outputs[0], reserve, needs)
        )


# ---- torch.compile --------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Some arithmetic around a layer, so that there is something to fuse."""

    def __init__(self, layer, form="dense"):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.layer = layer
        self.form = form

    def forward(self, x, *extra):
        x = torch.sin(x * self.scale)
        if self.form == "packed":
            x = PackedSequence(x, *extra)
        output, state = self.layer(x, **({"lengths": extra[0]} if self.form == "lengths" else {}))
        output = output.data if self.form == "packed" else output
        return output * 2, state


class StepModel(torch.nn.Module):
    """A cell in a loop."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, *extra):
        state, outputs = None, []
        for step in x.unbind(0):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs) * 2, state


LAYERS = {
    "RNN": lambda: fastseq.RNN(4, 6, num_layers=2),
    "RNN-relu": lambda: fastseq.RNN(4, 6, nonlinearity="relu", bias=False),
    "GRU": lambda: fastseq.GRU(4, 6, num_layers=2, bidirectional=True),
    "LSTM": lambda: fastseq.LSTM(4, 6, bidirectional=True),
    "LSTM-projected": lambda: fastseq.LSTM(4, 6, num_layers=2, proj_size=3),
}
CELL_LAYERS = {
    "RNNCell": lambda: fastseq.RNNCell(4, 6),
    "GRUCell": lambda: fastseq.GRUCell(4, 6, bias=False),
    "LSTMCell": lambda: fastseq.LSTMCell(4, 6),
}


def input_of(form, T=9, B=3, I=4):
    x = torch.randn(T, B, I)
    if form == "dense":
        return (x,)
    lengths = torch.randint(1, T + 1, (B,))
    if form == "lengths":
        return x, lengths
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    return packed.data, *packed[1:]


def results(model, arguments):
    """Outputs, and the gradients of x and every parameter."""
    model.zero_grad()
    x = arguments[0].detach().clone().requires_grad_()
    leaves = torch.utils._pytree.tree_leaves(model(x, *arguments[1:]))
    sum((y * y).sum() for y in leaves).backward()
    return [*leaves, x.grad, *(p.grad for p in model.parameters())]


def assert_compiles(model, inputs, **options):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, **options)
    for arguments in inputs:
        torch.testing.assert_close(results(compiled, arguments), results(model, arguments))
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(model(*arguments))
            torch.testing.assert_close(torch.utils._pytree.tree_leaves(compiled(*arguments)), expected)


@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_one_graph(name, form):
    assert_compiles(Model(LAYERS[name](), form), [input_of(form), input_of(form)], backend="aot_eager")


@pytest.mark.parametrize("name", CELL_LAYERS)
def test_a_cell_in_one_graph(name):
    assert_compiles(StepModel(CELL_LAYERS[name]()), [input_of("dense")], backend="aot_eager")


@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("name", ["GRU", "LSTM-projected"])
def test_dynamic_sizes_in_one_graph(name, form):
    """Other sizes run the same graph: nothing in it is tied to the numbers of steps and rows of the first call."""
    inputs = [input_of(form, T, B) for T, B in [(9, 3), (12, 5), (3, 2)]]
    with torch._dynamo.config.patch(error_on_recompile=form != "packed"):
        torch._dynamo.reset()
        model = Model(LAYERS[name](), form)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for arguments in inputs:
            torch.testing.assert_close(results(compiled, arguments), results(model, arguments))


def test_training_in_one_graph_draws_the_dropout_of_eager():
    model = Model(fastseq.GRU(4, 6, num_layers=3, dropout=0.5))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (x,) = input_of("dense")
    torch.manual_seed(3)
    expected = results(model, (x,))
    torch.manual_seed(3)
    torch.testing.assert_close(results(compiled, (x,)), expected)


class Everything(torch.nn.Module):
    """Every layer and every cell, one after another."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [
                fastseq.RNN(6, 6, num_layers=2),
                fastseq.RNN(6, 6, nonlinearity="relu"),
                fastseq.GRU(6, 3, bidirectional=True),
                fastseq.LSTM(6, 7, proj_size=6),
            ]
        )
        self.cells = torch.nn.ModuleList([fastseq.RNNCell(6, 6), fastseq.GRUCell(6, 6), fastseq.LSTMCell(6, 6)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)[0] + x)
        step = x[-1]
        for cell in self.cells:
            state = cell(step)
            step = torch.sigmoid(state[0] if isinstance(state, tuple) else state)
        return x, step


def test_every_layer_with_inductor():
    assert_compiles(Everything(), [(torch.randn(9, 3, 6),)])


def test_export():
    """A program that is exported, saved and loaded gives the same numbers, for other sizes than it was traced with."""
    model = Everything().eval()
    dims = {0: torch.export.Dim("T", min=2, max=1000), 1: torch.export.Dim("B", min=2, max=1000)}
    program = torch.export.export(model, (torch.randn(9, 3, 6),), dynamic_shapes=(dims,))
    for T, B in [(9, 3), (30, 5)]:
        x = torch.randn(T, B, 6)
        torch.testing.assert_close(program.module()(x), model(x))
    assert "fastseq.rnn_forward" in program.graph_module.code


# ---- torch.func and forward-mode AD ---------------------------------------------------------------------------------

FUNC_CASES = [
    *(Case(cell, T=3, B=2, I=2, H=3, bidirectional=True) for cell in CELLS),
    *(Case(cell, T=3, B=2, I=2, H=3, form="step") for cell in CELLS),
    Case("lstm", T=4, B=3, I=2, H=3, P=2, layers=2, form="lengths"),
    Case("gru", T=4, B=3, I=2, H=3, form="packed", dropout=0.3, layers=2),
]


def as_function(problem, op=ops.rnn):
    """A scalar function of every tensor, and the tensors."""

    def function(*tensors):
        outputs = problem.with_tensors(tensors).run(op)
        return sum(
            (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs.values()
        )

    return function, tuple(problem.tensors().values())


@pytest.mark.parametrize("case", FUNC_CASES, ids=ids)
def test_func_grad_is_autograd(case):
    problem = fresh(case).problem()
    function, tensors = as_function(problem)
    everything = tuple(range(len(tensors)))
    actual = torch.func.grad(function, everything)(*tensors)
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    expected = torch.autograd.grad(function(*leaves), leaves)
    torch.testing.assert_close(actual, expected)
    # and of a gradient
    twice = torch.func.grad(lambda *t: torch.func.grad(function)(*t).square().sum())(*tensors)
    (d_x,) = torch.autograd.grad(function(*leaves), leaves[:1], create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(d_x.square().sum(), leaves[:1])[0])


@pytest.mark.parametrize("case", FUNC_CASES, ids=ids)
def test_func_vmap_is_a_loop(case):
    problem = fresh(case).problem()
    function, tensors = as_function(problem)
    stacked = tuple(torch.stack([t, 2 * t, -t]) for t in tensors)
    loop = torch.stack([function(*(t[k] for t in stacked)) for k in range(3)])
    torch.testing.assert_close(torch.func.vmap(function)(*stacked), loop)
    # x alone, and the gradients of each sample
    dims = (0,) + (None,) * (len(tensors) - 1)
    samples = (stacked[0], *tensors[1:])
    loop = torch.stack([torch.func.grad(function)(x, *tensors[1:]) for x in stacked[0]])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(function), dims)(*samples), loop)


@pytest.mark.parametrize("case", FUNC_CASES, ids=ids)
def test_jvp_is_the_derivative(case):
    """By torch.func.jvp, by dual numbers, and by linearity against the gradient; each tensor alone must contribute."""
    problem = fresh(case).problem()
    function, tensors = as_function(problem)
    gradients = torch.func.grad(function, tuple(range(len(tensors))))(*tensors)
    for k, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
        tangent = torch.randn_like(tensor)
        expected = (gradient * tangent).sum()

        def of_one(t, k=k):
            return function(*tensors[:k], t, *tensors[k + 1 :])

        _, moved = torch.func.jvp(of_one, (tensor,), (tangent,))
        torch.testing.assert_close(moved, expected)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(of_one(forward_ad.make_dual(tensor, tangent)))
        torch.testing.assert_close(dual.tangent, expected)
        assert case.cell == "rnn_relu" or moved != 0


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_forward_derivatives_of_a_layer(name):
    """A dual parameter or input of a layer: never a silent zero."""
    layer = getattr(fastseq, name)(4, 6, dtype=torch.float64)
    x = torch.randn(9, 3, 4, dtype=torch.float64)
    parameters = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    gradients = torch.func.grad(loss, (0, 1))(parameters, x)
    tangents = ({key: torch.randn_like(p) for key, p in parameters.items()}, torch.randn_like(x))
    _, moved = torch.func.jvp(loss, (parameters, x), tangents)
    expected = sum((gradients[0][key] * tangents[0][key]).sum() for key in parameters)
    torch.testing.assert_close(moved, expected + (gradients[1] * tangents[1]).sum())
    with forward_ad.dual_level():
        output, _ = layer(forward_ad.make_dual(x, tangents[1]))
        assert forward_ad.unpack_dual(output).tangent.abs().sum() > 0


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_per_sample_gradients_of_a_layer(name):
    layer = getattr(fastseq, name)(4, 6)
    parameters = {key: p.detach() for key, p in layer.named_parameters()}
    x = torch.randn(5, 9, 4)

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample,))[0].square().sum()

    actual = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for k, sample in enumerate(x):
        layer.zero_grad()
        layer(sample)[0].square().sum().backward()
        for key, p in layer.named_parameters():
            torch.testing.assert_close(actual[key][k], p.grad, rtol=1e-4, atol=1e-5)


def test_the_operator_itself_never_gives_a_silent_zero():
    """What goes past `ops.rnn`, which has the rules of torch.func, must at least say so."""
    problem = Case("gru", T=3).problem()
    arguments = forward_arguments(problem)
    operator = torch.ops.fastseq.rnn_forward.default

    def direct(x):
        return operator(arguments[0], x, *arguments[2:])[0]

    x, tangent = problem.x, torch.randn_like(problem.x)
    expected = torch.func.jvp(lambda x: ops.rnn(arguments[0], x, *arguments[2:5])[0], (x,), (tangent,))[1]
    for transform in (
        lambda: torch.func.jvp(direct, (x,), (tangent,))[1],
        lambda: torch.func.grad(lambda x: direct(x).sum())(x),
        lambda: torch.func.vmap(direct)(x.unsqueeze(0)),
    ):
        try:
            result = transform()
        except (RuntimeError, NotImplementedError):
            continue
        assert result.abs().sum() > 0
        if transform.__code__.co_names[:2] == ("torch", "func") and result.shape == expected.shape:
            pass


def test_the_hessian():
    problem = fresh(Case("gru", T=2, B=1, I=2, H=2)).problem()
    function, (x, *others) = as_function(problem)
    actual = torch.func.hessian(lambda x: function(x, *others))(x)
    reference_function, _ = as_function(problem, reference.rnn)
    expected = torch.autograd.functional.hessian(lambda x: reference_function(x, *others), x)
    torch.testing.assert_close(actual, expected)
    assert actual.abs().max() > 0
