"""Gradients and second gradients by finite differences in float64, through the shipping kernels."""

import pytest
import torch

import fastseq
from fastseq import _C, ops, testing
from fastseq.testing import Case
from fastseq.testing.checks import default_cases

pytestmark = pytest.mark.usefixtures("one_thread")


def named(check):
    return [pytest.param(case, id=case.id) for case, name in default_cases() if name == check]


def fresh(case):
    """The case with other numbers in every run."""
    return case.replace(seed=int(torch.randint(2**31, ())))


def passed(result):
    assert result.passed, str(result)


@pytest.mark.parametrize("case", named("gradients"))
def test_gradients(case, kernel_calls):
    """Every cell × projection × form × layers × directions × bias; x, hx, cx and every weight; through every output."""
    _C.reset_counters()
    passed(testing.check_gradients(fresh(case)))
    ran = _C.counters()
    assert {name.rpartition("/")[0] for name in ran} == {f"rnn_forward/{case.cell}", f"rnn_backward/{case.cell}"}
    assert all(name.endswith("float64") for name in ran)


@pytest.mark.parametrize("T", [2, 8])
@pytest.mark.parametrize(
    "case",
    [
        Case("rnn_tanh", B=2, I=1, H=2, bidirectional=True, form="lengths"),
        Case("rnn_relu", B=2, I=2, H=2, layers=2, form="packed"),
        Case("lstm", B=2, I=1, H=3, P=2, form="lengths"),
        Case("lstm", B=2, I=1, H=2, layers=2, form="packed"),
        Case("gru", B=2, I=2, H=2, bidirectional=True, form="lengths"),
        Case("gru", B=1, I=1, H=2, layers=2, bidirectional=True),
        Case("lstm", B=2, I=2, H=2, form="step"),
        Case("gru", B=2, I=2, H=2, form="step"),
    ],
    ids=lambda case: case.id,
)
def test_every_number_of_the_jacobian(case, T):
    """Not along random directions, as `test_gradients` does, but entry by entry."""
    passed(testing.check_gradients(fresh(case).replace(T=T), slow=True))


@pytest.mark.parametrize("case", named("second"))
def test_second_gradients(case):
    passed(testing.check_second_gradients(fresh(case)))


@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("cell", _C.cells())
def test_second_gradients_of_a_deep_stack(cell, form):
    case = Case(cell, T=8, B=2, I=1, H=2, layers=2, bidirectional=True, form=form, dropout=0.3)
    passed(testing.check_second_gradients(fresh(case)))


@pytest.mark.parametrize("through", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_second_gradients_through_one_output(cell, form, through):
    if cell == "gru" and through == "c_n":
        pytest.skip("the GRU has no c_n")
    problem = fresh(Case(cell, T=3, B=2, I=2, H=2, form=form)).problem().leaves()

    def function(*tensors):
        return problem.with_tensors(tensors).run(ops.rnn)[through]

    assert torch.autograd.gradgradcheck(function, tuple(problem.tensors().values()), fast_mode=True)


@pytest.mark.parametrize(
    "layer",
    [
        fastseq.RNN(3, 4, num_layers=2, bidirectional=True, batch_first=True),
        fastseq.RNN(3, 4, nonlinearity="relu"),
        fastseq.GRU(3, 4, batch_first=True, bias=False),
        fastseq.LSTM(3, 4, proj_size=2, bidirectional=True, batch_first=True),
        fastseq.RNNCell(3, 4),
        fastseq.LSTMCell(3, 4, bias=False),
        fastseq.GRUCell(3, 4),
        torch.nn.GRU(3, 4, num_layers=2),
    ],
    ids=str,
)
def test_layers(layer):
    results = testing.run_checks(layer, checks=["gradients"])
    assert len(results) == (2 if isinstance(layer, torch.nn.RNNCellBase) else 6)
    for result in results:
        passed(result)


def test_a_penalty_on_the_gradient_trains_as_with_torch():
    """The everyday second derivative: the norm of the input's gradient as part of the loss."""
    theirs = torch.nn.GRU(3, 5, num_layers=2, dtype=torch.float64)
    ours = fastseq.GRU(3, 5, num_layers=2, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for layer in (theirs, ours):
        layer.zero_grad()
        (d_x,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        d_x.square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)
