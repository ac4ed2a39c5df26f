"""`python -m fastseq bench-gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    document: dict[str, Any] = {"machine": gpu.machine(device), "dry run": dry_run, "rows": []}
    output.mkdir(parents=True, exist_ok=True)
    text = ""
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=2 * len(todo))
        for point in todo:
            for training in (False, True):
                document["rows"].append(gpu.measure(point, training, device, rounds=3 if dry_run else gpu.ROUNDS))
                text = gpu.report(document)
                (output / "gpu.json").write_text(json.dumps(document, indent=1))  # what is there if it is stopped
                (output / "gpu.md").write_text(text)
                progress.advance(task)
    click.echo(text)
    click.echo(f"Written: {output / 'gpu.md'} and {output / 'gpu.json'}.")
