"""`python -m fastseq bench`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
import torch

from fastseq.bench import compare, full_grid, markdown, quick_grid, ratio_table
from fastseq.bench.compare import CELLS, LAYERS
from fastseq.cli.info import facts
from fastseq.cli.output import output_file, write
from fastseq.cli.progress import progress_bar


@click.command()
@click.option("--only", multiple=True, type=click.Choice(LAYERS + CELLS), help="Only this class; may be repeated.")
@click.option("--full", is_flag=True, help="The whole grid of T, B and H: ten minutes to half an hour.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of both sides; torch's default otherwise.")
@click.option("--json", "json_path", callback=output_file, help="Also write all figures and the machine to this file.")
@click.option(
    "--markdown",
    "markdown_path",
    callback=output_file,
    help="Also write the tables to this file.",
)
def bench(
    only: tuple[str, ...], full: bool, threads: int | None, json_path: Path | None, markdown_path: Path | None
) -> None:
    """Times fastseq's layers, and its cells in a Python loop, next to torch.nn's: inference, and training (forward and
    backward), float32.

    The two take turns in short bursts on the same weights; a ratio above 1 means that fastseq is faster. Other programs
    at work on the machine make the figures worthless: the quartiles of the ratio show it.
    """
    if threads:
        torch.set_num_threads(threads)
    points = (full_grid if full else quick_grid)(only or LAYERS + CELLS)
    rows = []
    with progress_bar() as progress:
        task = progress.add_task("timing", total=len(points))
        for point in points:
            progress.update(task, description=f"{point.name} T={point.T} B={point.B} H={point.H} {point.mode}")
            rows.append(compare(point))
            progress.advance(task)
    table = markdown(rows)
    click.echo(table)
    mean = math.exp(sum(math.log(row.ratio) for row in rows) / len(rows))
    slowest = min(rows, key=lambda row: row.ratio)
    p = slowest.point
    click.echo(
        f"\ngeometric mean of the ratios {mean:.2f}; lowest {slowest.ratio:.2f}, "
        f"{p.name} T={p.T} B={p.B} H={p.H} {p.mode}"
    )
    if json_path:
        write(json_path, json.dumps({"host": facts(), "rows": [row.as_dict() for row in rows]}, indent=1))
    if markdown_path:
        write(markdown_path, f"{ratio_table(rows)}\n\n{table}\n")
