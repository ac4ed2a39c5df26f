"""The kernels over the list of cases: the oracle, torch.nn and the float64 reference; bits; what is not finite."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import oracle
import pytest
import torch

from fastseq import _C, ops, reference, testing
from fastseq.testing import Case, torch_nn
from fastseq.testing.cases import OUTPUTS, all_cases, empty_cases, long_cases, sized_cases, small_cases
from fastseq.testing.checks import FLOOR, outputs_and_gradients, sensitivity

CELLS = list(_C.cells())
DTYPES = [torch.float32, torch.float64]

# Units of rounding of a tensor's largest element, or of 1, that the kernels may be from the oracle: four times what
# was seen. Sums over many rows lose most.
ORACLE_UNITS = 64


def fresh(case):
    """The case with other numbers in every run."""
    return case.replace(seed=int(torch.randint(2**31, ())))


def each(cases):
    return [pytest.param(case, id=case.id) for case in cases]


def random_gradients(outputs):
    return {name: torch.randn_like(y) for name, y in outputs.items()}


def run_with_gradients(problem, op=ops.rnn, d_outputs=None):
    """Outputs and gradients by name, for random gradients of the outputs or these."""
    problem = problem.leaves()
    outputs = problem.run(op)
    return outputs | problem.gradients(outputs, d_outputs or random_gradients(outputs))


def passed(result):
    assert result.passed, str(result)


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", each([*small_cases(), *sized_cases(), *empty_cases()]))
@pytest.mark.usefixtures("one_thread")
def test_against_the_oracle(case, kernel_calls):
    problem = fresh(case).problem().leaves()
    with kernel_calls(case.cell, case.dtype, forward=1, backward=1):
        outputs = problem.run(ops.rnn)
        d_outputs = random_gradients(outputs)
        gradients = problem.gradients(outputs, d_outputs)
    expected = dict(zip(OUTPUTS, oracle.rnn(*problem.arguments, **problem.options), strict=True))
    d_expected = oracle.rnn_backward(*map(d_outputs.get, OUTPUTS), *problem.arguments, **problem.options)
    given = [True, problem.hx is not None, problem.cx is not None] + [True] * len(problem.weights)
    names = [name for name, is_given in zip(["x", "hx", "cx", *case.weight_shapes()], given, strict=True) if is_given]
    wanted = [d for d, is_given in zip(d_expected, given, strict=True) if is_given]
    expected = {name: expected[name] for name in outputs} | dict(zip([f"d_{n}" for n in names], wanted, strict=True))
    moves = None
    for name, exact in expected.items():
        actual = (outputs | gradients)[name].detach().numpy()
        bound = ORACLE_UNITS * torch.finfo(case.dtype).eps * np.abs(exact).max(initial=1)
        if not np.abs(actual - exact).max(initial=0) <= bound:  # a gradient that hangs on the last bits
            d_exact = {d: gradient.double() for d, gradient in d_outputs.items()}
            moves = moves or sensitivity(problem, partial(run_with_gradients, op=reference.rnn, d_outputs=d_exact))
            bound += moves[name]
            assert np.isfinite(bound), f"{name} of {problem.case}"
        np.testing.assert_allclose(actual, exact, rtol=0, atol=float(bound), err_msg=f"{name} of {problem.case}")


@pytest.mark.parametrize("case", each(all_cases()))
@pytest.mark.usefixtures("one_thread")
def test_outputs_are_those_of_torch(case):
    passed(testing.check_forward(fresh(case)))


@pytest.mark.parametrize("case", each(case for case in all_cases() if case.dtype == torch.float32))
@pytest.mark.usefixtures("one_thread")
def test_float32_loses_at_most_twice_what_torch_loses(case):
    passed(testing.check_reference(fresh(case)))


def test_a_gradient_that_hangs_on_the_last_bits():
    """One whose terms all but cancel: no order of the sum is within the floor; another weight is still seen."""
    case = Case("rnn_relu", T=9, B=1, I=3, H=1, layers=2, bidirectional=True, seed=3848)
    problem = case.problem()
    exact = outputs_and_gradients(problem.leaves(), reference.rnn)
    moves = sensitivity(problem, partial(outputs_and_gradients, op=reference.rnn))
    unit = torch.finfo(torch.float64).eps
    assert any(moves[name] > FLOOR * unit * y.detach().abs().max().clamp(min=1) for name, y in exact.items())
    passed(testing.check_reference(problem))

    def other(cell, x, hx, cx, weights, **options):
        return ops.rnn(cell, x, hx, cx, [weights[0] * (1 + 1e-12), *weights[1:]], **options)

    seen = testing.check_reference(problem, other)
    assert not seen.passed and seen.message.endswith("differs"), str(seen)


@pytest.mark.parametrize("check", [testing.check_forward, testing.check_reference])
def test_a_reference_that_is_not_finite_bounds_nothing(check):
    problem = Case("gru", dtype=torch.float32).problem()
    problem.weights[1][0, 0] = float("nan")
    result = check(problem)
    assert not result.passed, str(result)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("case", each(case for case in [*sized_cases(), *long_cases()] if case.B * case.H > 100))
def test_on_several_threads(case, threads):
    """Rows and units are shared; three threads and two directions do not divide evenly."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        passed(testing.check_reference(fresh(case)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("cell", "H"), [("rnn_tanh", 1300), ("lstm", 640), ("gru", 740)])
@pytest.mark.usefixtures("one_thread")
def test_weights_that_come_from_far_away(cell, H):
    """More than `kBytesFar` in a step and `kGemmBytesFar` in the projection, for several tiles of rows and a rest."""
    passed(testing.check_reference(fresh(Case(cell, T=9, B=31, I=H, H=H, dtype=torch.float32))))


# ---- What is asked for ----------------------------------------------------------------------------------------------

STACKS = [
    Case("rnn_tanh", T=9, layers=2),
    Case("rnn_relu", T=3, form="lengths", bidirectional=True),
    Case("lstm", T=9, P=3, layers=3, bidirectional=True, form="packed", dropout=0.3),
    Case("lstm", T=3, layers=2, form="lengths"),
    Case("lstm", T=9, P=2),
    Case("gru", T=9, layers=2, bidirectional=True, dropout=0.3),
    Case("gru", T=3, layers=2, form="packed"),
    Case("lstm", form="step"),
    Case("gru", form="step"),
]


@pytest.mark.parametrize("case", each(STACKS))
def test_gradients_of_some_tensors_are_those_of_all(case):
    """The kernels skip what nobody asked for: each tensor alone, and random halves, get what they get together.

    Beyond the lowest layer that is asked about nothing runs, so that this takes other ways through the driver."""
    problem = fresh(case).problem().leaves()
    names, tensors = list(problem.tensors()), list(problem.tensors().values())
    outputs = problem.run(ops.rnn)
    d_outputs = random_gradients(outputs)
    expected = problem.gradients(outputs, d_outputs)
    choices = [{k} for k in range(len(tensors))]
    choices += [{k for k in range(len(tensors)) if torch.rand(()) < 0.5} or {0} for _ in range(6)]
    for chosen in choices:
        some = problem.with_tensors([t.detach().requires_grad_(k in chosen) for k, t in enumerate(tensors)])
        outputs = some.run(ops.rnn)
        leaves = [t for t in some.tensors().values() if t.requires_grad]
        pairs = [(y, d_outputs[name]) for name, y in outputs.items() if y.requires_grad]
        ys, ds = zip(*pairs, strict=True)
        found = torch.autograd.grad(ys, leaves, ds)
        for k, gradient in zip(sorted(chosen), found, strict=True):
            torch.testing.assert_close(gradient, expected[f"d_{names[k]}"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("through", OUTPUTS)
@pytest.mark.parametrize("case", each(STACKS))
def test_an_absent_gradient_is_a_zero_one(case, through):
    problem = fresh(case).problem().leaves()
    outputs = problem.run(ops.rnn)
    if through not in outputs:
        pytest.skip(f"{case.cell} has no {through} here")
    gradient = torch.randn_like(outputs[through])
    absent = problem.gradients(outputs, {through: gradient})
    outputs = problem.run(ops.rnn)
    zeros = {name: torch.zeros_like(y) for name, y in outputs.items()}
    for name, expected in problem.gradients(outputs, zeros | {through: gradient}).items():
        torch.testing.assert_close(absent[name], expected, rtol=1e-12, atol=1e-14)


# ---- Bits -----------------------------------------------------------------------------------------------------------

DETERMINISM = """
import hashlib, sys
import torch
from fastseq import ops
from fastseq.testing import Case
torch.set_num_threads(2)
for case in [
    Case("lstm", T=20, B=1, I=40, H=130, dtype=torch.float32),                     # units shared
    Case("gru", T=20, B=40, I=40, H=70, form="lengths", dtype=torch.float32),      # rows shared
    Case("lstm", T=12, B=5, I=9, H=33, P=17, layers=2, bidirectional=True),        # directions shared
    Case("rnn_tanh", T=4, B=70, I=40, H=130, dtype=torch.float32),                 # a matrix product each step
    Case("gru", T=40, B=1000, I=4, H=16, dtype=torch.float32),                     # more than one chunk
]:
    problem = case.problem().leaves()
    outputs = problem.run(ops.rnn)
    everything = outputs | problem.gradients(outputs, {name: y.detach().cos() for name, y in outputs.items()})
    digest = hashlib.sha256()
    for name, tensor in everything.items():
        digest.update(tensor.detach().numpy().tobytes())
    print(case, digest.hexdigest())
"""


def test_the_same_bits_from_run_to_run():
    runs = [
        subprocess.run([sys.executable, "-c", DETERMINISM], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0].count("\n") == 5
    assert runs[0] == runs[1]


def exactly_projected(case):
    """A problem whose products x W_ihᵀ are exact in any order of summation, so that its bits are those of the steps."""
    problem = fresh(case).problem()
    tensors = problem.tensors()
    for name in ("x", "weight_ih_l0"):
        tensors[name] = torch.round(tensors[name] * 16) / 16
    return problem.with_tensors(list(tensors.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [16, 130])
@pytest.mark.parametrize("cell", CELLS)
def test_a_rows_bits_do_not_depend_on_its_company_or_on_threads(cell, H, dtype):
    """Of the recurrent part, from eight steps on: the projection of the input is a library's product."""
    B = 70
    P = H // 2 if cell == "lstm" and H == 130 else 0
    problem = exactly_projected(Case(cell, T=9, B=B, I=5, H=H, P=P, dtype=dtype))
    expected = problem.run(ops.rnn)
    before = torch.get_num_threads()
    try:
        for threads, rows in [
            (1, slice(0, B)),
            (3, slice(0, B)),
            (2, slice(40, 41)),
            (4, slice(7, 20)),
            (1, slice(69, 70)),
        ]:
            torch.set_num_threads(threads)
            x, hx, cx = (t if t is None else t[:, rows] for t in (problem.x, problem.hx, problem.cx))
            outputs = ops.rnn(cell, x, hx, cx, problem.weights, **problem.options)
            for name, actual in zip(OUTPUTS, outputs, strict=True):
                if name in expected:
                    assert torch.equal(actual, expected[name][:, rows]), f"{name}, rows {rows}, {threads} threads"
    finally:
        torch.set_num_threads(before)


# ---- Not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_go_through_as_in_torch(cell, T, value):
    case = Case(cell, T=T, H=9, bidirectional=True)
    problem = fresh(case).problem()
    for name, tensor in problem.tensors().items():
        spoilt = problem.leaves()
        with torch.no_grad():
            place = spoilt.tensors()[name].view(-1)
            place[int(torch.randint(tensor.numel(), ()))] = value
        outputs = spoilt.run(torch_nn.rnn)
        d_outputs = random_gradients(outputs)
        expected = outputs | spoilt.gradients(outputs, d_outputs)
        actual = run_with_gradients(spoilt, d_outputs=d_outputs)
        for key, e in expected.items():
            torch.testing.assert_close(
                actual[key], e, equal_nan=True, rtol=1e-9, atol=1e-11, msg=lambda m, n=name, k=key: f"{n} → {k}: {m}"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_large_numbers_saturate(cell, dtype):
    """Gates at the ends of their range are exactly 0 or 1, without overflow on the way."""
    problem = fresh(Case(cell, T=9, H=9, dtype=dtype)).problem()
    problem = problem.with_tensors([t * 1e4 for t in problem.tensors().values()])
    if cell == "rnn_relu":
        problem = problem.with_tensors([t.clamp(-1, 1) for t in problem.tensors().values()])
    d_outputs = random_gradients(problem.run(ops.rnn))
    expected = run_with_gradients(problem, torch_nn.rnn, d_outputs)
    for name, actual in run_with_gradients(problem, d_outputs=d_outputs).items():
        assert actual.isfinite().all(), name
        bound = ORACLE_UNITS * torch.finfo(dtype).eps * expected[name].detach().abs().max().clamp(min=1)
        torch.testing.assert_close(actual, expected[name], rtol=0, atol=float(bound))


# ---- Instruction sets -----------------------------------------------------------------------------------------------

ON_ONE_ISA = """
import sys
import torch
from fastseq import _C
from fastseq.testing import Case, check_forward, check_reference
from fastseq.testing.cases import sized_cases
torch.set_num_threads(2)
assert _C.isa() == sys.argv[1], _C.isa()
sizes = [case for case in sized_cases() if case.H in (1, 7, 17, 33, 130) and case.B != 9]
for k, case in enumerate(sizes):
    result = (check_reference if k % 2 else check_forward)(case.replace(seed=int(sys.argv[2])))
    assert result.passed, str(result)
print(len(sizes))
"""


@pytest.mark.parametrize("isa", _C.available_isas())
def test_each_instruction_set(isa):
    seed = str(int(torch.randint(2**31, ())))
    environment = {**os.environ, "FASTSEQ_ISA": isa}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_ONE_ISA, isa, seed], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 40


def test_a_nonsense_instruction_set_is_refused():
    environment = {**os.environ, "FASTSEQ_ISA": "avx9000"}
    run = subprocess.run([sys.executable, "-c", "import fastseq"], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: FASTSEQ_ISA must be one of ")
    assert last.endswith("; got 'avx9000'")
    for isa in _C.available_isas():
        assert isa in last
