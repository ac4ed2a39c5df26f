"""What of a kernel's SASS matters: that fast instructions are there where they are meant."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from .compilation import Stopped, plain_names, run

# Instructions by what is looked for in them. LDL and STL are what spills and arrays in local memory become.
KINDS = {
    "HMMA": re.compile(r"HMMA\."),
    "LDGSTS.128": re.compile(r"LDGSTS\.\S*128"),
    "LDSM": re.compile(r"LDSM\.\S*M88"),
    "LDSM.T": re.compile(r"LDSM\.\S*MT88"),
    "LDG.128": re.compile(r"LDG\.\S*128"),
    "LDS.128": re.compile(r"LDS\.\S*128"),
    "STS.128": re.compile(r"STS\.\S*128"),
    "MUFU.EX2": re.compile(r"MUFU\.EX2"),
    "DFMA": re.compile(r"DFMA"),
    "LDL": re.compile(r"LDL"),
    "STL": re.compile(r"STL"),
}
LOCAL = ("LDL", "STL")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)

TILES = ("attention_forward_tiles<", "attention_key_gradients<", "attention_query_gradients<")

# Of kernels whose name begins so, by the first that fits: what they have to have, whatever the table says. These are
# the hot ones.
MEANT = {
    "half_gemm_kernel<": ("HMMA", "LDGSTS.128", "LDSM"),
    **{f"{kernel}float,": ("HMMA", "LDGSTS.128", "LDSM", "MUFU.EX2") for kernel in TILES},
    **{kernel: ("HMMA", "LDGSTS.128", "LDSM", "LDSM.T", "MUFU.EX2") for kernel in TILES},
    "persistent_forward_kernel<": ("HMMA", "LDG.128", "LDS.128"),
    "persistent_backward_kernel<": ("HMMA", "LDG.128", "LDS.128"),
}

# Of kernels whose name begins so: they must not spill, whatever the table says.
WITHOUT_SPILLS = ("attention_", "gemm_kernel<", "half_gemm_kernel<", "mask_gradient<", "persistent_forward_kernel<")


def meant(kernel: str) -> tuple[str, ...]:
    return next((kinds for start, kinds in MEANT.items() if kernel.startswith(start)), ())


def read_sass(disassembler: str, cubin: Path) -> dict[str, Counter[str]]:
    """By plain name, how many of each kind there are."""
    sections = re.split(
        r"^\s*\.section\s+\.text\.(\w+),.*$", run([disassembler, "-c", cubin]).stdout, flags=re.MULTILINE
    )
    names = plain_names(sections[1::2]) if len(sections) > 1 else []
    return {name: count(text) for name, text in zip(names, sections[2::2], strict=True)}


def count(text: str) -> Counter[str]:
    """
    >>> count("        /*0010*/              @!P0 LDS.128 R4, [R2] ;\\n        /*0020*/  LDL R1, [R1] ;")
    Counter({'LDS.128': 1, 'LDL': 1})
    """
    instructions = Counter(INSTRUCTION.findall(text))
    if not instructions:
        raise Stopped("nvdisasm's text does not read as expected: see sass.py's INSTRUCTION.")
    found: Counter[str] = Counter()
    for instruction, times in instructions.items():
        for kind, pattern in KINDS.items():
            if pattern.match(instruction):
                found[kind] += times
    return found
