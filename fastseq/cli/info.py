"""`python -m fastseq info`."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import click
import torch

from fastseq import _load


def facts() -> dict[str, str]:
    """What was built and what runs here, for people and for bug reports."""
    build, cuda = _load._C.build_info(), _load._C.cuda()
    return {
        "fastseq": build["version"],
        "torch": f"{torch.__version__} (built against {build['torch']})",
        "Python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "compiler": build["compiler"],
        "build": f"{build['build_type']}: {build['flags']}",
        "instruction set": f"{_load._C.isa()} (of {', '.join(_load._C.available_isas())}; FASTSEQ_ISA forces one)",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "cells": ", ".join(_load._C.cells()),
        "CUDA": f"yes: {cuda['version']}, for {cuda['archs']}" if cuda["built"] else f"no: {cuda['why']}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = [re.search(rf"^{name}\s*: *(.+)$", text, re.M) for name in ("model name", "cpu family", "model")]
    if not all(fields):
        return platform.processor() or "unknown"
    name, family, model = (field.group(1) for field in fields)
    return f"{name} (family {family}, model {model})"


@click.command()
def info() -> None:
    """Says what was built, and what this machine runs."""
    rows = facts()
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name:{width}}  {value}")
