"""The command line: `python -m fastseq info | check | bench | bench-gpu | demo | train-gpt2 | generate`."""

from __future__ import annotations

import click

from fastseq.cli.bench import bench
from fastseq.cli.bench_gpu import bench_gpu
from fastseq.cli.check import check
from fastseq.cli.demo import demo
from fastseq.cli.generate import generate
from fastseq.cli.info import info
from fastseq.cli.train_gpt2 import train_gpt2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Drop-in RNN, LSTM and GRU layers and attention for PyTorch on fused kernels.

    \b
    python -m fastseq info        what was built, and what this machine runs
    python -m fastseq check       whether the kernels compute the right numbers here
    python -m fastseq bench       how fast they are here, next to other libraries
    python -m fastseq bench-gpu   the same on a GPU, next to cuDNN and FlashAttention
    python -m fastseq demo        a character language model trained with both
    python -m fastseq train-gpt2  a small GPT-2, trained on real text
    python -m fastseq generate    text by that one or another GPT-2
    """


for command in (info, check, bench, bench_gpu, demo, train_gpt2, generate):
    main.add_command(command)
