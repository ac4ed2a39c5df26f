"""`python -m fastseq demo`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch

from fastseq._files import write
from fastseq.cli.info import facts
from fastseq.cli.output import probe
from fastseq.cli.progress import progress_bar
from fastseq.demo import model
from fastseq.demo.ngram import KneserNey
from fastseq.demo.race import CELLS, LIBRARIES, Race, Settings
from fastseq.demo.report import FLOAT32_BOUND, RATIO_BARS, CellReport, loss_curves
from fastseq.demo.text import Corpus, TextError, read_corpus, standard_library

FLOAT64_STEPS = 50
PROMPT = "def "


@click.command()
@click.option(
    "--cell", "cells", multiple=True, type=click.Choice([*CELLS, "all"], case_sensitive=False), default=["all"]
)
@click.option("--hidden", type=click.IntRange(min=1), default=Settings.hidden, show_default=True, help="Hidden size H.")
@click.option("--layers", type=click.IntRange(min=1), default=Settings.layers, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=Settings.steps, show_default=True, help="Training steps.")
@click.option("--batch", type=click.IntRange(min=1), default=Settings.batch, show_default=True, help="Sequences.")
@click.option("--seq", type=click.IntRange(min=1), default=Settings.seq, show_default=True, help="Their length.")
@click.option("--seed", type=click.IntRange(min=0), default=Settings.seed, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of both libraries; torch's default otherwise.")
@click.option("--sample", type=click.IntRange(min=0), default=400, show_default=True, help="Characters to generate.")
@click.option("--text", type=click.Path(path_type=Path), help="A folder of *.py files instead of the standard library.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="fastseq-demo", show_default=True, help="Folder of results."
)
def demo(
    cells: tuple[str, ...],
    threads: int | None,
    sample: int,
    text: Path | None,
    out: Path,
    **options: int,
) -> None:
    """Trains a character language model with fastseq and with torch.nn, side by side.

    The text is that of Python's own standard library. Both libraries start from the same weights and see the same
    batches, in turns. You get the loss curves of both in one picture, characters per second and their ratio, validation
    bits per character next to an order-3 n-gram, and text that the model wrote. The exit code is 1 if the two libraries
    do not compute the same losses. Ctrl-C keeps what there is.
    """
    probe(out)
    if threads:
        torch.set_num_threads(threads)
    settings = Settings(**options)
    chosen = CELLS if "all" in cells else tuple(dict.fromkeys(cells))
    begin = time.perf_counter()
    try:
        corpus = read_corpus(text or standard_library())
        races = {cell: Race(cell, corpus.train, corpus.vocabulary, settings) for cell in chosen}
    except (TextError, OSError) as error:
        raise click.UsageError(str(error)) from None
    baseline = KneserNey(corpus.train, corpus.vocabulary, order=3).bits(corpus.validation)
    click.echo(
        f"{len(corpus.train):,} characters of {corpus.train_files} files to train on, "
        f"{corpus.validation.size:,} of {corpus.validation_files} others for validation; "
        f"order-3 n-gram: {baseline:.3f} bits per character; {torch.get_num_threads()} threads"
    )

    reports: list[CellReport] = []
    interrupted = False
    try:
        for cell in chosen:
            _run_cell(races[cell], cell, corpus, sample, baseline, reports)
    except KeyboardInterrupt:
        interrupted = True
    if reports:
        _save(out, settings, baseline, reports)
    if interrupted:
        click.echo(f"\nstopped; {'what there is was saved' if reports else 'nothing was trained yet'}", err=True)
        sys.exit(130)
    click.echo(f"\n{time.perf_counter() - begin:.0f} s in all")
    if not all(passed for report in reports for _, passed in report.verdicts()):
        sys.exit(1)


def _run_cell(race: Race, cell: str, corpus: Corpus, sample: int, baseline: float, reports: list[CellReport]) -> None:
    steps = min(FLOAT64_STEPS, race.settings.steps)
    precise = Race(cell, corpus.train, corpus.vocabulary, replace(race.settings, steps=steps, dtype=torch.float64))
    try:
        _train(precise, f"{cell}, float64")
        _train(race, cell)
    except KeyboardInterrupt:
        if any(side.losses for side in race.sides.values()):
            reports.append(_report(race, precise, cell, complete=False))
        raise
    report = _report(race, precise, cell, complete=True)
    reports.append(report)
    if report.float32_difference > FLOAT32_BOUND:
        click.echo(
            f"{cell}: the losses differ by {report.float32_difference:.1e}; what rounding alone does to torch.nn's ..."
        )
        report.float32_drift = race.drift()
    report.bits = {name: model.bits_per_character(side.model, corpus.validation) for name, side in race.sides.items()}
    ids = model.generate(race.sides["fastseq"].model, corpus.encode(PROMPT), sample, temperature=0.7, seed=0)
    report.sample = PROMPT + corpus.decode(ids)
    _tell(report, baseline)


def _train(race: Race, name: str) -> None:
    """A bar with the losses where somebody looks; else a line every fifth of the way."""
    told = 0
    with progress_bar() as progress:
        task = progress.add_task(name, total=race.settings.steps)
        for done in race.run():
            losses = ", ".join(f"{library} {race.sides[library].losses[-1]:.3f}" for library in LIBRARIES)
            progress.update(task, completed=done, description=f"{name}: loss {losses}")
            if progress.disable and done * 5 // race.settings.steps > told:
                told = done * 5 // race.settings.steps
                click.echo(f"{name}: step {done} of {race.settings.steps}, loss {losses}")


def _report(race: Race, precise: Race, cell: str, complete: bool) -> CellReport:
    return CellReport(
        cell=cell,
        losses={name: side.losses for name, side in race.sides.items()},
        characters_per_second={
            name: race.characters_per_second(name) if side.seconds else float("nan")
            for name, side in race.sides.items()
        },
        float32_difference=race.difference(),
        float64_difference=precise.difference(),
        float64_steps=precise.settings.steps,
        complete=complete,
    )


def _tell(report: CellReport, baseline: float) -> None:
    speed = report.characters_per_second
    click.echo(
        f"\n{report.cell}: {speed['fastseq']:,.0f} characters per second, torch.nn {speed['torch.nn']:,.0f}: "
        f"ratio {report.ratio:.2f} (at the default size and two threads at least {RATIO_BARS[report.cell]} is expected)"
    )
    better = "better than" if report.bits["fastseq"] < baseline else "not better than"
    click.echo(
        f"  validation {report.bits['fastseq']:.3f} bits per character, {better} the n-gram's {baseline:.3f} "
        f"(torch.nn {report.bits['torch.nn']:.3f})"
    )
    for sentence, passed in report.verdicts():
        click.echo(f"  {'PASS' if passed else 'FAIL'}  {sentence}")
    click.echo("  " + report.sample.replace("\n", "\n  "))


def _save(out: Path, settings: Settings, baseline: float, reports: list[CellReport]) -> None:
    results = {
        "settings": {**asdict(settings), "dtype": str(settings.dtype)},
        "host": facts(),
        "baseline_bits": baseline,
        "cells": [report.as_dict() for report in reports],
    }
    write(out / "results.json", json.dumps(results, indent=1))
    write(out / "losses.png", loss_curves(reports, baseline))
    write(out / "samples.txt", "\n\n".join(f"--- {report.cell} ---\n{report.sample}" for report in reports))
    click.echo(f"\nsaved: {', '.join(str(out / name) for name in ('losses.png', 'results.json', 'samples.txt'))}")
