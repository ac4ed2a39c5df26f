from __future__ import annotations

import argparse
import sys

from . import compilation, page, table
from .compilation import Stopped
from .devices import DEVICES

DESCRIPTION = """\
Compiles the CUDA kernels for every architecture (a GPU is not needed) and compares registers, spills, shared memory,
occupancy and the instructions that matter with the table csrc/cuda/budget/budget.json. Fails where something is worse
than the table says, or where a kernel is new or gone: make it better, or, if it is meant, keep it with --update and
commit the table and the page docs/cuda-budget.md with the kernel."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make cuda-budget", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the table and its page instead of comparing")
    parser.add_argument(
        "--architectures",
        default=",".join(DEVICES),
        metavar="LIST",
        help="compare these alone, as 80,90: a minute or two of a processor each (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=compilation.processors(),
        metavar="N",
        help="compile so many files at once; each takes 300 MB (default: one for each processor, here %(default)s)",
    )
    parsed = parser.parse_args()
    parsed.architectures = parsed.architectures.replace("sm_", "").split(",")
    unknown = [architecture for architecture in parsed.architectures if architecture not in DEVICES]
    if unknown:
        parser.error(f"no architecture of the budget: {', '.join(unknown)}; there are {', '.join(DEVICES)}")
    if parsed.update and parsed.architectures != list(DEVICES):
        parser.error("--update needs all architectures: a table of some would have lost the others")
    return parsed


def main() -> None:
    wanted = arguments()
    nvcc, disassembler = compilation.build()["find_nvcc"](), compilation.find_disassembler()
    if disassembler is None:
        raise Stopped("there is no nvdisasm: run `pip install nvidia-cuda-nvdisasm`.")
    if not wanted.update and compilation.nvcc_version(nvcc) != table.load()["nvcc"]:
        raise Stopped(
            f"{nvcc} is of {compilation.nvcc_version(nvcc)}, and the table of {table.load()['nvcc']}, whose registers "
            "are others: set FASTSEQ_NVCC to an nvcc of that version, or keep this one's with --update."
        )
    measurement = table.measure(nvcc, disassembler, wanted.architectures, wanted.jobs)
    if wanted.update:
        new = table.table_of(measurement)
        table.save(new)
        page.FILE.write_text(page.render(new))
        print(f"Wrote {table.FILE.relative_to(compilation.ROOT)} and {page.FILE.relative_to(compilation.ROOT)}.")
        worse, better = table.faults(measurement), []
    else:
        comparison = table.compare(table.load(), measurement)
        worse, better = comparison.worse, comparison.better
    kernels = max(map(len, measurement.kernels.values()))
    print(f"{kernels} kernels for {', '.join('sm_' + a for a in measurement.kernels)}: {len(worse)} faults.")
    for line in worse:
        print(f"  {line}")
    if better:
        print(f"Better than the table, which `make cuda-budget ARGS=--update` would keep, {len(better)} times:")
        for line in better:
            print(f"  {line}")
    sys.exit(bool(worse))


if __name__ == "__main__":
    try:
        main()
    except Stopped as stopped:
        sys.exit(f"cuda-budget: {stopped}")
