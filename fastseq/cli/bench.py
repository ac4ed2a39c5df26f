"""`python -m fastseq bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table as RichTable

from fastseq._files import write
from fastseq.bench import compare, grid, memory, page, report, results, scenarios
from fastseq.bench.peers import PEERS
from fastseq.bench.results import Document
from fastseq.bench.session import ROW_SECONDS, Session, processors
from fastseq.cli.info import facts
from fastseq.cli.output import output_file, probe
from fastseq.cli.progress import progress_bar

PARTS = ("rows", "streams", "busy", "memory")
DEFAULT = "fastseq-bench/results.json"
QUICK_ROUNDS, QUICK_ROW_SECONDS = 5, 1.5


@click.group(invoke_without_command=True)
@click.option("--quick/--full", default=True, help="A choice of points in under two minutes, or all: some hours.")
@click.option(
    "--cell",
    "cells",
    multiple=True,
    type=click.Choice((*grid.CELLS, grid.ATTENTION)),
    help="Only this cell, or attention.",
)
@click.option("--mode", "modes", multiple=True, type=click.Choice(grid.MODES), help="Only this mode.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(grid.DTYPES), help="Only this dtype.")
@click.option(
    "--form",
    "forms",
    multiple=True,
    type=click.Choice((*grid.FORMS, *grid.ATTENTION_FORMS)),
    help="Only layers, cells in a loop, causal attention, ...",
)
@click.option("--layers", multiple=True, type=click.IntRange(1, 2), help="Only stacks of so many layers.")
@click.option("--directions", multiple=True, type=click.IntRange(1, 2), help="Only one direction, or two.")
@click.option(
    "--only",
    "sizes",
    multiple=True,
    help="Only sizes that fit: T>=16, B=1, H!=512, on T, B, I, H; of attention on B, N, L, S, D.",
)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only rows, streams, busy or memory.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(PEERS), help="Only this peer (then incomplete).")
@click.option("--threads", multiple=True, type=click.IntRange(min=1), help="To try; 1 and all otherwise.")
@click.option("--rounds", type=click.IntRange(min=1), help="Bursts of each side; 11, and 5 in a quick run.")
@click.option("--json", "json_path", callback=output_file, help=f"The results; {DEFAULT} otherwise.")
@click.option("--fresh", is_flag=True, help="Begin anew, where the file of results would be continued.")
@click.option("--html", "html_path", callback=output_file, help="The report; beside the results otherwise.")
@click.option("--markdown", "markdown_path", callback=output_file, help="Also write the tables to this file.")
@click.pass_context
def bench(
    context: click.Context,
    quick: bool,
    cells: tuple[str, ...],
    modes: tuple[str, ...],
    dtypes: tuple[str, ...],
    forms: tuple[str, ...],
    layers: tuple[int, ...],
    directions: tuple[int, ...],
    sizes: tuple[str, ...],
    parts: tuple[str, ...],
    peers: tuple[str, ...],
    threads: tuple[int, ...],
    rounds: int | None,
    json_path: Path | None,
    fresh: bool,
    html_path: Path | None,
    markdown_path: Path | None,
) -> None:
    """Times fastseq next to its peers: torch.nn, ONNX Runtime, OpenVINO, jax and bare oneDNN.

    Everyone has a process of its own, gets the same numbers and must give the same results; then all take turns in
    bursts of 20 ms. A ratio above 1 means that fastseq is faster. `pip install -e '.[demo,bench]'` installs the peers;
    one that is missing makes the report incomplete.

    Options that choose (--cell, --only, ...) may be repeated. Every row is written down when it is there: Ctrl-C loses
    nothing, and the same command goes on with the same file of results. So the full grid can be done in parts:

    \b
    python -m fastseq bench --full --cell GRU --mode inference --json gru.json
    python -m fastseq bench --full --only 'T>=100' --only B=1
    python -m fastseq bench --full --cell attention --form causal
    python -m fastseq bench report fastseq-bench/results.json      the tables and the page again
    python -m fastseq bench compare before.json after.json         what became slower; exit code 1 if anything did
    """
    if context.invoked_subcommand:
        return
    json_path = json_path or Path(DEFAULT)
    probe(json_path.parent)
    try:
        choice = {"cells": cells, "modes": modes, "dtypes": dtypes, "layers": layers, "directions": directions}
        choice["sizes"] = sizes
        points = grid.choose(grid.quick() if quick else grid.full(), forms=forms, **choice)
        others = {part: grid.choose(points_of(part, quick), **choice) for part in PARTS[1:]}
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    wanted = {"rows": points} | others
    wanted = {part: wanted[part] if not parts or part in parts else [] for part in PARTS}
    if not any(wanted.values()):
        raise click.UsageError("no point of the grid fits: see --help for the options that choose.")
    document = open_document(json_path, fresh, sorted(set(threads)) or sorted({1, processors()}))
    settings = {"rounds": rounds or (QUICK_ROUNDS if quick else 11)}
    settings["row_seconds"] = QUICK_ROW_SECONDS if quick else ROW_SECONDS
    with Session(document, peers or PEERS, document["threads"], **settings) as session:
        stopped = run(session, wanted, lambda: save(json_path, document), quick)
    show(document, json_path, html_path, markdown_path)
    if stopped:
        click.echo(f"\nStopped; what was measured is in {json_path}, and the same command goes on.", err=True)
        sys.exit(130)


def points_of(part: str, quick: bool) -> list[grid.Point]:
    """The points of the measures that are no rows; one of each in a quick run."""
    points = {"streams": scenarios.stream_points, "busy": scenarios.busy_points, "memory": memory.points}[part]()
    if not quick:
        return points
    return [point for point in points if point.cell == "GRU" and (part != "memory" or point.mode == "training")][:1]


def open_document(path: Path, fresh: bool, threads: list[int]) -> Document:
    """A new one, or that of the file, to be continued."""
    host = facts()
    if fresh or not path.exists():
        return results.new(host, threads)
    document = load(path)
    if reason := results.why_not_continue(document, host):
        raise click.UsageError(f"{path} {reason}: choose another --json, or --fresh to begin anew.")
    if document["threads"] != threads:
        raise click.UsageError(f"{path} was measured with --threads {document['threads']}: add --fresh to begin anew.")
    return document


def load(path: Path) -> Document:
    """The document of a file."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path} cannot be read as results: {error}") from None
    if not isinstance(document, dict) or document.get("format") != results.FORMAT:
        raise click.UsageError(f"{path} does not hold results of this version of the benchmark.")
    return document


def save(path: Path, document: Document) -> None:
    """All of it, as a file that was never half-written."""
    write(path, json.dumps(document))


def run(session: Session, wanted: dict[str, list[grid.AnyPoint]], save: Callable[[], None], quick: bool) -> bool:
    """Measures what the document does not have; True if it was stopped by Ctrl-C."""
    document = session.document
    tasks: list[tuple[str, Callable[[], None]]] = []
    for point in wanted["rows"]:
        if not session.done(point):
            tasks.append((point.key, lambda point=point: session.measure(point)))
    measures: dict[str, Callable[[grid.Point], None]] = {
        "streams": lambda point: session.measure_streams(point, *((3, 0.2) if quick else (7, 0.5))),
        "busy": lambda point: session.measure_busy(point, 0.2 if quick else 1.0),
        "memory": session.measure_memory,
    }
    for part, measure in measures.items():
        for point in wanted[part]:
            if point.key not in document[part]:
                tasks.append((f"{part} {point.key}", lambda measure=measure, point=point: measure(point)))
    if tasks:  # the machine before them and after them: it may be short of a processor at one time
        tasks = [("the machine", session.measure_machine), *tasks, ("the machine again", session.measure_machine)]
    planned = [point.key for point in wanted["rows"]]
    planned += [f"{part} {point.key}" for part in measures for point in wanted[part]]
    document["planned"] = list(dict.fromkeys([*document["planned"], *planned]))
    if there := len(planned) - (len(tasks) - 2 if tasks else 0):
        click.echo(f"{there} of {len(planned)} rows were there (--fresh begins anew).", err=True)
    try:
        with progress_bar() as progress:
            bar = progress.add_task("timing", total=len(tasks))
            for name, measure in tasks:
                progress.update(bar, description=name)
                measure()
                save()
                progress.advance(bar)
    except KeyboardInterrupt:
        return True
    return False


def show(document: Document, json_path: Path, html_path: Path | None, markdown_path: Path | None) -> None:
    """The tables on the terminal; the page, and Markdown if wanted, in their files."""
    for table in report.tables(document):
        print_table(table)
    for line in report.headline(document):
        click.secho(line, fg="red" if line.startswith("INCOMPLETE") else None, bold=line.startswith("INCOMPLETE"))
    html_path = html_path or json_path.with_suffix(".html")
    write(html_path, page.render(document))
    click.echo(f"\n{json_path}: all samples. {html_path}: this with plots.")
    if markdown_path:
        write(markdown_path, report.markdown(document))


def print_table(table: report.Table) -> None:
    """With rich: marked lines in red."""
    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=240)
    made = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
    for column in table.columns:
        made.add_column(column, overflow="fold")
    for number, line in enumerate(table.lines):
        made.add_row(*line, style="bold red" if number in table.marked else None)
    console.print(made)


@bench.command("report")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--html", "html_path", callback=output_file, help="The page; beside the results otherwise.")
@click.option("--markdown", "markdown_path", callback=output_file, help="Also write the tables to this file.")
def report_command(file: Path, html_path: Path | None, markdown_path: Path | None) -> None:
    """Shows the tables of FILE, results of an earlier run, and writes its page with the plots again."""
    show(load(file), file, html_path, markdown_path)


@bench.command("compare")
@click.argument("before", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--threshold", default=compare.THRESHOLD, show_default=True, help="How much slower is too slow.")
@click.option("--relative-to", type=click.Choice(PEERS), help="Compare our times in units of this peer's.")
def compare_command(before: Path, after: Path, threshold: float, relative_to: str | None) -> None:
    """Shows which rows of AFTER are slower than in BEFORE, and ends with exit code 1 if any is.

    A row is a regression when its median grew by more than the threshold and the middle halves of the samples of the
    two runs do not overlap. Runs on a machine whose speed changes are better compared with --relative-to torch.nn.
    """
    old, new = load(before), load(after)
    if reason := compare.why_not_comparable(old, new):
        click.echo(f"Beware: {reason}.", err=True)
    changes = compare.changes(old, new, threshold, relative_to)
    if not changes:
        raise click.UsageError("the two files have no row in common.")
    print_table(report.changes_table(changes))
    regressions = [change for change in changes if change.regression]
    click.echo(f"{len(changes)} rows in both; {len(regressions)} regressions.")
    if regressions:
        sys.exit(1)
