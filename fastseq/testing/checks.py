"""The checks: outputs, gradients and second gradients of an operator or layer, and a readable report of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import ops, reference
from fastseq.convert import convert
from fastseq.testing import torch_nn
from fastseq.testing.cases import FORMS, Case, Op, Problem, all_cases

Subject = Case | Problem | torch.nn.Module

FLOOR = 32
"""Units of rounding (`finfo.eps`), of a tensor's largest element or of 1, that an error may have beyond torch.nn's.

1 is the size of the random numbers that go in: a gradient that happens to cancel is as exact as its terms. In float64,
where the reference rounds as much as what is held to it, this is most of the bound."""

BFLOAT16_FLOOR = 4
"""The same in bfloat16, where a unit is 1/128 and torch.nn's own error says most."""

MOVES = 4
"""How often the numbers that go in are moved by a unit of rounding, to see how far the exact result follows."""

SLOW_GRADCHECK = 150
"""Numbers among the inputs up to which finite differences are taken of each; beyond, along random directions."""

ROUTES: dict[str, tuple[str, ...]] = {
    "all": ("output", "h_n", "c_n"),
    "output": ("output",),
    "h_n": ("h_n",),
    "c_n": ("c_n",),
}
"""Through which outputs a gradient arrives."""


@dataclass(frozen=True)
class Result:
    """What one check of one case found.

    Attributes:
        case: the case in words.
        check: the check's name, a key of `CHECKS`.
        passed: whether it holds.
        error: the largest error, in the tensor that comes nearest to its bound; NaN where the check has no number.
        bound: what that error may be; NaN likewise.
        message: that tensor's name; or, where the check failed, what was found.
        seconds: how long it took.
    """

    case: str
    check: str
    passed: bool
    error: float
    bound: float
    message: str
    seconds: float

    def __str__(self) -> str:
        number = "" if math.isnan(self.bound) else f"  error {self.error:.1e}, bound {self.bound:.1e}"
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.check:9}  {self.case}{number}  {self.message}".rstrip()


def check_forward(subject: Subject, op: Op = ops.rnn) -> Result:
    """The outputs are those of torch.nn, and the same bits again.

    Shapes and dtypes equal those of torch.nn's operators on the same arguments. |ours - torch's| of a tensor is at most
    three times what torch.nn loses against the float64 reference (`torch_nn.rnn`, `reference.rnn`), plus `FLOOR` units
    of rounding (in bfloat16 `BFLOAT16_FLOOR`), and where the problem is so sensitive that this is passed, how far the
    exact result moves when all that goes in moves by a unit of rounding (not in bfloat16). That holds with and without
    gradients recorded. A second call gives the same bits.

    Args:
        subject: a case, a problem, or a layer or cell of fastseq or torch.nn (a torch.nn one is converted).
        op: what is checked, if the subject is no layer: a function like `fastseq.ops.rnn`.
    """
    return _check("forward", _forward, subject, op)


def check_reference(subject: Subject, op: Op = ops.rnn) -> Result:
    """Outputs and the gradients of every tensor against `fastseq.reference` in float64.

    With random gradients arriving through every output, the error of a tensor is at most twice what torch.nn's
    operators lose on the same arguments in the same dtype, plus `FLOOR` units of rounding and, where that is passed,
    how far the exact result moves with the last bit of what goes in, as in `check_forward`. (In bfloat16 a gradient of
    rnn_relu may be farther off, in ours and in torch.nn's, where rounding takes h across the rectifier's kink.)

    Args:
        subject, op: as for `check_forward`.
    """
    return _check("reference", _reference, subject, op)


def check_gradients(subject: Subject, op: Op = ops.rnn, *, slow: bool | None = None) -> Result:
    """`torch.autograd.gradcheck` in float64 of x, the initial state and every weight.

    Once for each way that a gradient can arrive: through all outputs, the output alone, h_n alone, c_n alone. The
    finite differences go through the very operator, so that forward and backward are held against each other.

    Args:
        subject, op: as for `check_forward`; the dtype of the subject does not matter.
        slow: finite differences of each number of the input, rather than along random directions; None does so for
            small inputs.
    """
    return _check("gradients", _gradients, subject, op, slow=slow)


def check_second_gradients(subject: Subject, op: Op = ops.rnn) -> Result:
    """`torch.autograd.gradgradcheck` in float64 of x, the initial state and every weight, along random directions.

    Args:
        subject, op: as for `check_forward`; the dtype of the subject does not matter.
    """
    return _check("second", _second_gradients, subject, op)


CHECKS: dict[str, Callable[..., Result]] = {
    "forward": check_forward,
    "reference": check_reference,
    "gradients": check_gradients,
    "second": check_second_gradients,
}


def default_cases() -> Iterator[tuple[Case, str]]:
    """Every case of the list with the checks that suit it, by name.

    Finite differences take the small cases, as a large one teaches nothing more; second gradients, which are slow and
    the reference's, the shortest of these.
    """
    for case in all_cases():
        yield case, "forward"
        yield case, "reference"
        if case.dtype == torch.float64 and case.H <= 5 and case.T <= 9 and case.B > 0 and case.T > 0:
            yield case, "gradients"
            if case.form == "step" or (case.T <= 3 and case.layers * case.D <= 2 and case.bias):
                yield case, "second"


def on_device(op: Op, device: torch.device | str) -> Op:
    """`op` with its tensors on another device, `lengths` and `batch_sizes` excepted; what goes in and comes out is on
    the CPU, gradients too. So the checks hold what the device computes to what the CPU does."""

    def moved(
        cell: str,
        x: Tensor,
        hx: Tensor | None = None,
        cx: Tensor | None = None,
        weights: Sequence[Tensor] = (),
        *,
        dropout_masks: Sequence[Tensor] = (),
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, hx, cx = (t if t is None else t.to(device) for t in (x, hx, cx))
        weights, masks = ([t.to(device) for t in tensors] for tensors in (weights, dropout_masks))
        output, h_n, c_n = op(cell, x, hx, cx, weights, dropout_masks=masks, **options)
        return output.cpu(), h_n.cpu(), c_n.cpu()

    return op if torch.device(device).type == "cpu" else moved


def run_checks(
    cases: Iterable[Subject] | Subject | None = None,
    *,
    checks: Sequence[str] | None = None,
    op: Op = ops.rnn,
    device: torch.device | str = "cpu",
    on_result: Callable[[Result], Any] | None = None,
) -> list[Result]:
    """Runs checks over cases.

    Args:
        cases: cases, problems or layers, or one of them; None runs the whole list, each case with the checks that suit
            it. A layer is checked in every form of input that it takes, in evaluation mode, with the weights it has.
        checks: names of `CHECKS`; None means all (of a layer and of a case that was named).
        op: what is checked, where a case is no layer: a function like `fastseq.ops.rnn`.
        device: where it runs; what it is held to is computed on the CPU.
        on_result: called with each result as it comes, for a progress bar or a log.

    Returns:
        The results, in order. `report` makes a text of them.

    Example:
        >>> from fastseq.testing import Case, report, run_checks
        >>> print(report(run_checks(Case("gru", T=20, B=3, I=8, H=32, form="lengths"))))
        >>> print(report(run_checks(my_model.encoder.lstm)))
    """
    unknown = set(checks or ()) - set(CHECKS)
    if unknown:
        raise ValueError(f"checks are {', '.join(CHECKS)}; got {', '.join(sorted(unknown))}")
    pairs: Iterable[tuple[Any, str]]
    if cases is None:
        pairs = ((case, name) for case, name in default_cases() if checks is None or name in checks)
    else:
        subjects = [cases] if isinstance(cases, Subject) else cases
        each = (list(_prepare_layer(s)) if isinstance(s, torch.nn.Module) else [s] for s in subjects)
        pairs = ((s, name) for some in each for s in some for name in checks or CHECKS)
    results = []
    for subject, name in pairs:
        prepared = subject if isinstance(subject, _Prepared) else _prepare(subject, op)
        result = CHECKS[name](replace(prepared, op=on_device(prepared.op, device)), op)
        results.append(result)
        if on_result is not None:
            on_result(result)
    return results


def report(results: Sequence[Result], *, verbose: bool = False) -> str:
    """A text of the results: a line for each check, then the failures (or, verbose, every result) in full."""
    lines = [f"{'check':10} {'cases':>6} {'failed':>6}  worst error (of its bound)"]
    for name in dict.fromkeys(result.check for result in results):
        some = [result for result in results if result.check == name]
        numbers = [result for result in some if result.bound > 0]
        line = f"{name:10} {len(some):6} {sum(not result.passed for result in some):6}"
        if numbers:
            worst = max(numbers, key=lambda result: result.error / result.bound)
            share = worst.error / worst.bound
            line += f"  {worst.error:.1e} ({share:.0%}) {worst.message if worst.passed else ''} in {worst.case}"
        lines.append(line)
    details = [str(result) for result in results if verbose or not result.passed]
    failed = sum(not result.passed for result in results)
    seconds = sum(result.seconds for result in results)
    total = f"{len(results)} checks in {seconds:.1f} s: {f'{failed} FAILED' if failed else 'all passed'}"
    return "\n".join([*lines, *([""] if details else []), *details, "", total])


# ---- How a check runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    """What a check works on: a problem, what solves it, and what the report calls it."""

    label: str
    problem: Problem
    op: Op


def _prepare(subject: Subject, op: Op) -> _Prepared:
    if isinstance(subject, Case):
        return _Prepared(str(subject), subject.problem(), op)
    if isinstance(subject, Problem):
        return _Prepared(str(subject.case), subject, op)
    return next(_prepare_layer(subject))


def _prepare_layer(layer: torch.nn.Module) -> Iterator[_Prepared]:
    """A layer in each form of input that it takes, with an initial state and without."""
    is_cell = isinstance(layer, torch.nn.RNNCellBase)
    for form in ("step",) if is_cell else FORMS[:3]:
        for state in (True, False):
            case = Case.of_layer(layer, form=form, T=9, B=3, state=state)
            problem = case.problem([getattr(layer, name).detach() for name in _parameter_names(layer, case)])
            yield _Prepared(f"{type(layer).__name__}: {case}", problem, layer_op(layer))


def _parameter_names(layer: torch.nn.Module, case: Case) -> list[str]:
    names = list(case.weight_shapes())
    return [name.removesuffix("_l0") for name in names] if isinstance(layer, torch.nn.RNNCellBase) else names


def layer_op(layer: torch.nn.Module) -> Op:
    """A layer or cell as a function like `fastseq.ops.rnn`, which runs it with the weights that it is given.

    It runs a copy, in evaluation mode, so without dropout; a torch.nn layer is converted to fastseq's.
    """
    layer = convert(copy.deepcopy(layer)).eval()
    names = _parameter_names(layer, Case.of_layer(layer))

    def op(
        cell: str,
        x: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        weights: Sequence[Tensor],
        *,
        lengths: Tensor | None = None,
        batch_sizes: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch_first = getattr(layer, "batch_first", False) and batch_sizes is None
        sequence = x if batch_sizes is None else PackedSequence(x, batch_sizes)
        state = None if hx is None else (hx, cx) if cell == "lstm" else hx
        arguments = (x.transpose(0, 1) if batch_first else sequence, state)
        keywords = {} if lengths is None else {"lengths": lengths}
        result = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), arguments, keywords)
        nothing = x.new_zeros(0)
        if isinstance(layer, torch.nn.RNNCellBase):
            return (result[0], nothing, result[1]) if cell == "lstm" else (result, nothing, nothing)
        output, final = result
        h_n, c_n = final if cell == "lstm" else (final, nothing)
        output = output.transpose(0, 1) if batch_first else output
        return output if batch_sizes is None else output.data, h_n, c_n

    return op


class _Failure(Exception):
    """A check found a fault; the message says which."""


_Found = tuple[float, float, str]  # error, bound, message; error and bound are NaN where there is no number


def _check(name: str, body: Callable[..., _Found], subject: Any, op: Op, **options: Any) -> Result:
    start = time.perf_counter()
    error, bound, passed = math.nan, math.nan, False
    prepared = subject if isinstance(subject, _Prepared) else _prepare(subject, op)
    try:
        error, bound, message = body(prepared.problem, prepared.op, **options)
        passed = math.isnan(error) or error <= bound < math.inf  # what is not finite bounds nothing
        if not passed:
            message = f"{message} differs"
    except _Failure as failure:
        message = str(failure)
    except Exception as raised:  # an operator that raises has failed this check; the others go on
        message = f"raised {type(raised).__name__}: {raised}"
    return Result(prepared.label, name, passed, error, bound, message, time.perf_counter() - start)


# ---- What each finds ------------------------------------------------------------------------------------------------


def _forward(problem: Problem, op: Op) -> _Found:
    with torch.no_grad():
        actual = problem.run(op)
        peer = problem.run(torch_nn.rnn)
        exact = problem.leaves(torch.float64).run(reference.rnn)
        again = problem.run(op)
    with torch.enable_grad():
        recorded = problem.leaves().run(op)
    _same_form(actual, peer)
    _same_form(recorded, peer)
    _same_bits(actual, again, "a second call")
    allowance = {name: 3 * _error(peer[name], exact[name]) for name in peer}

    def solve(moved: Problem) -> dict[str, Tensor]:
        with torch.no_grad():
            return moved.run(reference.rnn)

    return max((_held(problem, outputs, peer, allowance, solve) for outputs in (actual, recorded)), key=_share)


def _reference(problem: Problem, op: Op) -> _Found:
    exact, actual, peer = (
        outputs_and_gradients(problem.leaves(dtype), function)
        for function, dtype in ((reference.rnn, torch.float64), (op, None), (torch_nn.rnn, None))
    )
    _same_form(actual, peer)
    allowance = {name: 2 * _error(peer[name], exact[name]) for name in exact}
    return _held(problem, actual, exact, allowance, lambda moved: outputs_and_gradients(moved, reference.rnn))


def outputs_and_gradients(problem: Problem, op: Op) -> dict[str, Tensor]:
    """By name, of a problem of leaves, for gradients of the outputs that the case's seed draws."""
    with torch.enable_grad():
        outputs = problem.run(op)
        return outputs | problem.gradients(outputs, _random_gradients(problem, outputs))


def _random_gradients(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers for every operator and dtype that solves the problem."""
    generator = torch.Generator().manual_seed(problem.case.seed + 1)
    dtype = problem.case.dtype
    return {
        name: torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype).to(y.dtype)
        for name, y in outputs.items()
    }


def _gradients(problem: Problem, op: Op, slow: bool | None = None) -> _Found:
    problem = problem.leaves(torch.float64)
    if slow is None:
        slow = sum(t.numel() for t in problem.tensors().values()) <= SLOW_GRADCHECK
    for route, names in ROUTES.items():
        if not set(names) & set(problem.run(op)):
            continue  # a cell without c, a step without h_n

        def function(*tensors: Tensor, names: tuple[str, ...] = names) -> tuple[Tensor, ...]:
            outputs = problem.with_tensors(tensors).run(op)
            return tuple(y for name, y in outputs.items() if name in names)

        _finite_differences(torch.autograd.gradcheck, function, problem, f"through {route}", fast_mode=not slow)
    return math.nan, math.nan, ""


def _second_gradients(problem: Problem, op: Op) -> _Found:
    problem = problem.leaves(torch.float64)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(problem.with_tensors(tensors).run(op).values())

    _finite_differences(torch.autograd.gradgradcheck, function, problem, "of the gradients", fast_mode=True)
    return math.nan, math.nan, ""


def _finite_differences(
    check: Callable[..., bool], function: Callable[..., Any], problem: Problem, where: str, fast_mode: bool
) -> None:
    """Runs torch's check. Where a rectifier's kink lies within the difference, its other side tells: x is moved."""
    for last in (False, True) if problem.case.cell == "rnn_relu" else (True,):
        try:
            check(function, tuple(problem.tensors().values()), fast_mode=fast_mode, rtol=1e-4, atol=1e-6)
            return
        except torch.autograd.gradcheck.GradcheckError as error:
            if last:
                text = " ".join(str(error).split())
                raise _Failure(f"{where}: {text}") from None
            x, *others = problem.leaves().tensors().values()
            problem = problem.with_tensors([(x + 0.01).detach().requires_grad_(), *others])


def _same_form(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, e in expected.items():
        a = actual[name]
        if a.shape != e.shape or a.dtype != e.dtype:
            raise _Failure(f"{name} must be {tuple(e.shape)} {e.dtype}; got {tuple(a.shape)} {a.dtype}")


def _same_bits(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    for name in a:
        if not torch.equal(a[name], b[name]):
            raise _Failure(f"{name} has other bits in {what}: {_error(a[name], b[name]):.1e} apart")


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two elements; infinite where one is NaN."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max().item()
    return math.inf if math.isnan(difference) else difference


def _held(
    problem: Problem,
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    allowance: dict[str, float],
    solve: Callable[[Problem], dict[str, Tensor]],
) -> _Found:
    """The tensor nearest to its bound. Where one is beyond it, the problem's own sensitivity is allowed for, too.

    A gradient through many steps with large weights may depend on what goes in so much that no order of its sums comes
    within the floor; the exact result then moves as far when what goes in moves by its last bit. `solve` gives that
    result. In bfloat16, where a bit is large, torch.nn's error alone is allowed for.
    """
    found = _worst(actual, expected, allowance)
    if _share(found) <= 1 or problem.case.dtype == torch.bfloat16:
        return found
    moves = sensitivity(problem, solve)
    return _worst(actual, expected, {name: allowance[name] + moves[name] for name in expected})


def sensitivity(problem: Problem, solve: Callable[[Problem], dict[str, Tensor]]) -> dict[str, float]:
    """How far each exact result moves where every number that goes in moves by a unit of its rounding, up or down."""
    exact = problem.leaves(torch.float64)
    start = solve(exact)
    generator = torch.Generator().manual_seed(problem.case.seed + 2)
    step = 2.0**-30  # small enough for a straight line, large enough not to drown in the rounding of float64
    largest = dict.fromkeys(start, 0.0)
    for _ in range(MOVES):
        tensors = []
        for t in exact.tensors().values():
            sign = 1 - 2 * torch.randint(2, t.shape, generator=generator, dtype=t.dtype)
            tensors.append(t * (1 + step * sign))
        moved = solve(exact.with_tensors(tensors).leaves())
        largest = {name: max(move, _error(moved[name], start[name])) for name, move in largest.items()}
    unit = torch.finfo(problem.case.dtype).eps
    return {name: move / step * unit for name, move in largest.items()}


def _worst(actual: dict[str, Tensor], expected: dict[str, Tensor], allowance: dict[str, float]) -> _Found:
    """The tensor whose error is nearest to its bound: the allowance and a floor."""
    found: list[_Found] = []
    for name, e in expected.items():
        largest = e.detach().abs().max().item() if e.numel() else 0.0
        dtype = actual[name].dtype
        units = BFLOAT16_FLOOR if dtype == torch.bfloat16 else FLOOR
        bound = allowance[name] + units * torch.finfo(dtype).eps * max(largest, 1.0)
        found.append((_error(actual[name], e), bound, name))
    return max(found, key=_share)


def _share(found: _Found) -> float:
    error, bound, _ = found
    if 0 < bound < math.inf:
        return error / bound
    return 0.0 if error == 0 == bound else math.inf
