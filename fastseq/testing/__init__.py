"""Checks of the recurrent operators and layers, for a user's own cases as well as for the project's tests.

    >>> from fastseq.testing import Case, report, run_checks
    >>> print(report(run_checks()))                                          # the whole list of cases
    >>> print(report(run_checks(Case("lstm", T=50, B=8, I=40, H=64, P=16))))  # a case of one's own
    >>> print(report(run_checks(torch.nn.GRU(40, 64, bidirectional=True))))   # a layer, with the weights it has
    >>> print(report(run_checks(op=my_rnn)))                                  # a function like fastseq.ops.rnn
    >>> print(report(run_checks(device="cuda")))                              # what a build with CUDA computes there

- `check_forward`: the outputs are torch.nn's, and the same bits again
- `check_reference`: outputs and gradients against `fastseq.reference` in float64, as precise as torch.nn
- `check_gradients`, `check_second_gradients`: against finite differences

`run_checks` runs them over cases and returns a list of `Result`, of which `report` makes a text. A `Case` says how
large a call is and in which form, its `problem()` draws the numbers; `all_cases()` is the project's list.
"""

from fastseq.testing.cases import Case, Problem, all_cases
from fastseq.testing.checks import (
    CHECKS,
    Result,
    check_forward,
    check_gradients,
    check_reference,
    check_second_gradients,
    default_cases,
    layer_op,
    on_device,
    report,
    run_checks,
)

__all__ = [
    "CHECKS",
    "Case",
    "Problem",
    "Result",
    "all_cases",
    "check_forward",
    "check_gradients",
    "check_reference",
    "check_second_gradients",
    "default_cases",
    "layer_op",
    "on_device",
    "report",
    "run_checks",
]
