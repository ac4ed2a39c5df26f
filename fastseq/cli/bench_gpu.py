"""`python -m fastseq bench-gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from fastseq import _load
from fastseq.bench import gpu
from fastseq.cli.progress import progress_bar


@click.command("bench-gpu")
@click.option("--quick", is_flag=True, help="A part of the rows: a minute.")
@click.option("--dry-run", is_flag=True, help="Tiny sizes on the CPU, to see that the measurement works.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/bench-gpu"),
    show_default=True,
    help="Folder for gpu.md and gpu.json (all samples).",
)
def bench_gpu(quick: bool, dry_run: bool, output: Path) -> None:
    """Times fastseq's CUDA kernels next to cuDNN, torch's attention and flash-attn, on this machine's GPU.

    Every result is compared with ours before it is timed. Needs an extension that was built with FASTSEQ_CUDA=1.
    """
    device = "cpu" if dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("torch sees no GPU here; --dry-run shows on the CPU what would be done.")
    if device == "cuda" and not _load._C.cuda()["built"]:
        raise click.UsageError("this build has no CUDA kernels: build with FASTSEQ_CUDA=1 (README).")
    todo = list(gpu.dry_points() if dry_run else gpu.points(quick))
    document = {"machine": gpu.machine(device), "rows": []}
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=2 * len(todo))
        for point in todo:
            for training in (False, True):
                document["rows"].append(gpu.measure(point, training, device, rounds=3 if dry_run else gpu.ROUNDS))
                progress.advance(task)
    warning = ["A dry run on the CPU: its times mean nothing."] if dry_run else []
    lines = [*warning, *(f"{name}: {value}" for name, value in document["machine"].items())]
    text = "\n".join(["# fastseq on a GPU", "", *lines, "", gpu.table(document["rows"]).markdown()])
    output.mkdir(parents=True, exist_ok=True)
    (output / "gpu.json").write_text(json.dumps(document, indent=1))
    (output / "gpu.md").write_text(text)
    click.echo(text)
    click.echo(f"Written: {output / 'gpu.md'} and {output / 'gpu.json'}.")
