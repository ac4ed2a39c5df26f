"""`python -m fastseq check`."""

from __future__ import annotations

import sys

import click

from fastseq import testing
from fastseq.cli.progress import progress_bar


@click.command()
@click.option("--check", "checks", multiple=True, type=click.Choice(list(testing.CHECKS)), help="Only these checks.")
@click.option("--cell", "cells", multiple=True, help="Only cases of these cells (rnn_tanh, rnn_relu, lstm, gru).")
@click.option("-v", "--verbose", is_flag=True, help="Every result in full, not the failures alone.")
def check(checks: tuple[str, ...], cells: tuple[str, ...], verbose: bool) -> None:
    """Checks on this machine that the kernels compute what they should.

    Runs the list of cases (cells, sizes, directions, layers, packed and lengths=, float32, float64 and
    bfloat16) against torch.nn, against the reference in float64 and against finite differences. The exit code is 1 if
    anything fails.
    """
    pairs = [
        (case, name)
        for case, name in testing.default_cases()
        if (not checks or name in checks) and (not cells or case.cell in cells)
    ]
    if not pairs:
        raise click.UsageError("no case of the list fits: see --help for the names of cells and checks.")
    results = []
    with progress_bar() as progress:
        task = progress.add_task("checking", total=len(pairs))
        for case, name in pairs:
            results += testing.run_checks(case, checks=[name])
            progress.advance(task)
    click.echo(testing.report(results, verbose=verbose))
    if not all(result.passed for result in results):
        sys.exit(1)
