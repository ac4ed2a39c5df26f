"""docs/cuda-budget.md, from the table."""

from __future__ import annotations

import textwrap

from .compilation import ROOT
from .devices import DEVICES, WARP
from .sass import MEANT
from .table import COUNTED, Table

FILE = ROOT / "docs/cuda-budget.md"

# Of the kernels, those whose rows the page has: of other types and cells there is the table.
SHOWN = {
    "Recurrent layers, all steps in one launch (LSTM, bfloat16 and float32)": (
        "persistent_forward_kernel<LstmCell, bfloat16",
        "persistent_forward_kernel<LstmCell, float,",
        "persistent_backward_kernel<LstmCell, bfloat16",
        "persistent_backward_kernel<LstmCell, float,",
    ),
    "Recurrent layers, step by step, and matrix products": (
        "step_forward_kernel<LstmCell",
        "step_backward_kernel<LstmCell",
        "half_gemm_kernel<bfloat16",
        "gemm_kernel<",
    ),
    "Attention on tensor cores (bfloat16 and float32)": (
        "attention_forward_tiles<bfloat16",
        "attention_forward_tiles<float,",
        "attention_key_gradients<bfloat16",
        "attention_key_gradients<float,",
        "attention_query_gradients<bfloat16",
        "attention_query_gradients<float,",
    ),
    "Attention on CUDA cores": (
        "attention_forward_simt<float,",
        "attention_forward_simt<double",
        "attention_key_gradients_simt<float>",
        "attention_query_gradients_simt<float>",
        "mask_gradient<float>",
    ),
}

INTRODUCTION = """\
# The static budget of the CUDA kernels

What can be known of the kernels of `csrc/cuda` without a GPU. Made by `make cuda-budget ARGS=--update`, from
`csrc/cuda/budget/budget.json`, by nvcc {nvcc}; do not edit.

    make cuda-budget                              # compiles for all architectures and compares with the table
    make cuda-budget ARGS="--architectures 90"    # for one; `make test` does this
    make cuda-budget ARGS=--update                # keeps what is now, as the table and as this page

The comparison fails where a kernel takes more registers, shared memory or local memory than the table says, where
fewer of its blocks fit a multiprocessor, where an instruction that it had is gone, and where a kernel is new or gone.
Where it is better it says so. It needs nvcc {nvcc} and nvdisasm, of a toolkit or from pip (`nvidia-cuda-nvcc
nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-nvdisasm`).

- **Registers, stack, spills, static shared memory** are ptxas's report.
- **Threads and shared memory of a block** are those of launches: the library's own host code runs, with a runtime that
  keeps a record and has no device (`csrc/cuda/budget/launches.cpp`), for all types, cells and options at a few hundred
  sizes, on a device of each architecture. Of the launches of a kernel the one with the most shared memory counts.
- **Blocks** are how many of them a multiprocessor holds at once, from its limits. Cooperative launches, whose blocks
  wait for each other, all have to fit the device at once; that is checked.
- **Instructions** are those of the SASS, by nvdisasm.

What none of this tells is speed: neither bank conflicts nor latencies nor clocks are in it.
"""

COUNTS = """
## Operations and bytes at named sizes

Of one call on an {device}. A multiply-add is two operations. Useful: what the formulas of a layer take. Issued: with
padding, tiles that a mask covers in part, and floats that are split in two. Device memory: each tensor once. L2: what
all blocks ask for. Shared: what warps write and read. By formula (`csrc/cuda/budget/counts.py`), checked against grids
and shared memory of the launches. Kernels that only copy or add are left out.
"""


def cell(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def heading(*cells: object) -> str:
    return line(*cells) + "|---" + "|--:" * (len(cells) - 1) + "|\n"


def same_or_all(numbers: list[int | None]) -> str:
    """One number where all are the same."""
    return cell(numbers[0]) if len(set(numbers)) == 1 else " / ".join(map(cell, numbers))


def devices(table: Table) -> str:
    text = "\n## Architectures\n\nLimits of one multiprocessor, and the device that plans are made for.\n\n"
    text += heading("", "device", "multiprocessors", "threads", "blocks", "shared memory", "of a block")
    for architecture in table["architectures"]:
        device = DEVICES[architecture]
        text += line(
            f"sm_{architecture}",
            device.name,
            device.multiprocessors,
            cell(device.warps * WARP),
            device.blocks,
            f"{device.shared >> 10} KB",
            f"{device.shared_of_block >> 10} KB",
        )
    return text + "\nAll have 65,536 registers of 32 bits a multiprocessor.\n"


def spills(table: Table) -> str:
    text = "\n## Spills\n\n"
    rows = [
        line(f"`{name}`", f"sm_{architecture}", *(cell(facts.get(fact, 0)) for fact in ("stack", "stores", "loads")))
        for name, row in table["kernels"].items()
        for architecture, facts in row.get("spills", {}).items()
    ]
    if not rows:
        return text + "No kernel has any, on any architecture, nor an array in local memory.\n"
    hot = [name for name, row in table["kernels"].items() if "spills" in row and name.startswith(tuple(MEANT))]
    text += paragraph(
        "Bytes a thread in local memory; a kernel with a stack but without spills has an array there. More than these "
        "would fail, as would any of attention's kernels, of matrix products and of the persistent forward kernels. "
        f"Kernels on tensor cores among them: {len(hot) or 'none'}."
    )
    return text + heading("kernel", "architecture", "stack", "spill stores", "spill loads") + "".join(rows)


def kernels(table: Table) -> str:
    text = "\n## Kernels\n\n" + paragraph(
        f"Where numbers differ, they are of {', '.join('sm_' + a for a in table['architectures'])}, in this order. "
        "–: at none of the sizes does the planner take this kernel on this device."
    )
    for title, starts in SHOWN.items():
        text += f"\n### {title}\n\n" + heading("kernel", "threads", "shared bytes", "registers", "blocks", "warps")
        for name, row in table["kernels"].items():
            if name.startswith(starts):
                warps = [None if blocks is None else blocks * row["threads"] // WARP for blocks in row["blocks"]]
                numbers = (same_or_all(row[fact]) for fact in ("shared", "registers", "blocks"))
                text += line(f"`{name}`", cell(row["threads"]), *numbers, same_or_all(warps))
    unused = [name for name, row in table["kernels"].items() if row["threads"] is None]
    last = f"All {len(table['kernels'])} kernels are in the table."
    if unused:
        last += f" At none of the sizes, on no device, does the library launch {', '.join(f'`{u}`' for u in unused)}."
    return text + "\n" + paragraph(last).rstrip("\n") + "\n"


def instructions(table: Table) -> str:
    text = "\n## Instructions\n\nWhat kernels have to have, on all architectures, whatever the table says.\n\n"
    text += "| kernels | number | instructions |\n|---|--:|---|\n"
    for start, kinds in MEANT.items():
        number = sum(name.startswith(start) for name in table["kernels"])
        text += line(f"`{start}...>`", number, ", ".join(kinds))
    return text + (
        "\nHMMA: tensor cores. LDGSTS.128: `cp.async` of 16 bytes. LDSM, LDSM.T: `ldmatrix`, and transposed. LDG.128,\n"
        "LDS.128: 16 bytes at once from global and from shared memory. MUFU.EX2: a power of two by the special unit.\n"
    )


def rounded(number: int, unit: float) -> str:
    return f"{number / unit:,.2f}" if number < 10 * unit else f"{number / unit:,.0f}"


def counted(table: Table) -> str:
    text = COUNTS.format(device=DEVICES[COUNTED].name)
    for case, rows in table["counts"].items():
        text += f"\n**{case}**\n\n"
        text += heading(
            "kernel", "launches", "useful GFLOP", "issued", "device MB", "L2 MB", "shared MB", "FLOP a byte"
        )
        for name, row in rows.items():
            intensity = f"{row['useful'] / row['device']:,.0f}" if row["useful"] else "–"
            text += line(
                f"`{name}`",
                row["times"],
                rounded(row["useful"], 1e9),
                rounded(row["issued"], 1e9),
                *(rounded(row[memory], 1e6) for memory in ("device", "l2", "shared")),
                intensity,
            )
    return text


def render(table: Table) -> str:
    parts = (devices, spills, kernels, instructions, counted)
    return INTRODUCTION.format(nvcc=table["nvcc"]) + "".join(part(table) for part in parts)
