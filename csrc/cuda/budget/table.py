"""The table: how it is measured, kept in budget.json, and compared."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import compilation, counts, launching, sass
from .compilation import Report
from .counts import Counts
from .devices import DEVICES, Device
from .launching import Launch

FILE = Path(__file__).parent / "budget.json"
COUNTED = "90"  # the architecture at whose device the named sizes are counted

Table = dict[str, Any]


@dataclass
class Kernel:
    """A kernel on one architecture."""

    report: Report
    instructions: Counter[str] | None  # None: nothing disassembles here
    launches: list[Launch] = field(default_factory=list)

    @property
    def threads(self) -> int | None:
        """None of a kernel that no case launches."""
        return max((launch.threads for launch in self.launches), default=None)

    @property
    def shared(self) -> int | None:
        return max((self.report.static_shared + launch.shared for launch in self.launches), default=None)

    def blocks(self, device: Device) -> int | None:
        """On a multiprocessor at once, of the launch with the most shared memory."""
        if self.threads is None or self.shared is None:
            return None
        return device.blocks_at_once(self.threads, self.report.registers, self.shared)

    @property
    def spills(self) -> dict[str, int]:
        """What is in local memory, in bytes, and how many instructions go there; without what is 0."""
        report, found = self.report, self.instructions or Counter()
        facts = {"stack": report.stack, "stores": report.spill_stores, "loads": report.spill_loads}
        facts["instructions"] = sum(found[kind] for kind in sass.LOCAL)
        return {fact: number for fact, number in facts.items() if number}


@dataclass
class Measurement:
    nvcc: str
    kernels: dict[str, dict[str, Kernel]]  # by architecture and name
    counted: dict[str, dict[str, tuple[int, Counts]]] | None  # by case and kernel, with how often it is launched


def measure(nvcc: str, disassembler: str | None, architectures: list[str], jobs: int) -> Measurement:
    host = COUNTED if COUNTED in architectures else architectures[0]
    compiled = compilation.compile_all(nvcc, architectures, host, jobs)
    program = compilation.link_launches(nvcc, [one.object for one in compiled[host] if one.object])
    kernels: dict[str, dict[str, Kernel]] = {}
    for architecture, files in compiled.items():
        here = kernels[architecture] = {}
        for source, one in zip(compilation.SOURCES, files, strict=True):
            reports = compilation.read_report(source.name, one.report.read_text())
            found = sass.read_sass(disassembler, one.cubin) if disassembler and reports else {}
            for name, report in reports.items():
                # A template of a header may be in two files, and is the same in both.
                here.setdefault(name, Kernel(report, found.get(name)))
        cases = [*launching.all_cases(), *counts.NAMED_CASES]
        for launch in (each for case in launching.ask(program, cases, DEVICES[architecture]) for each in case):
            here[launch.kernel].launches.append(launch)
    return Measurement(compilation.nvcc_version(nvcc), kernels, count(program) if COUNTED in architectures else None)


def count(program: Path) -> dict[str, dict[str, tuple[int, Counts]]]:
    counted = {}
    answers = launching.ask(program, counts.NAMED_CASES, DEVICES[COUNTED])
    for case, launches in zip(counts.NAMED_CASES, answers, strict=True):
        rows: dict[str, tuple[int, Counts]] = {}
        for launch in launches:
            found = counts.counts_of(launch, case)
            if found is None:
                continue
            times, before = rows.get(launch.kernel, (0, Counts(0, 0, 0, 0, 0)))
            total = Counts(*(a + b for a, b in zip(vars(before).values(), vars(found).values(), strict=True)))
            rows[launch.kernel] = times + launch.times, total
        counted[str(case)] = rows
    return counted


# ---- As it is kept ---------------------------------------------------------------------------------------------------


def table_of(measurement: Measurement) -> Table:
    architectures = list(measurement.kernels)
    first = measurement.kernels[architectures[0]]
    kernels = {}
    for name in sorted(first):
        on = [measurement.kernels[architecture][name] for architecture in architectures]
        kernels[name] = {
            "source": on[0].report.source,
            "threads": next((kernel.threads for kernel in on if kernel.threads), None),
            "registers": [kernel.report.registers for kernel in on],
            "shared": [kernel.shared for kernel in on],
            "blocks": [kernel.blocks(DEVICES[a]) for a, kernel in zip(architectures, on, strict=True)],
            "instructions": " ".join(fast_instructions(on)),
        }
        spills = {a: kernel.spills for a, kernel in zip(architectures, on, strict=True) if kernel.spills}
        if spills:
            kernels[name]["spills"] = spills
    counted = {
        case: {kernel: {"times": times, **vars(found)} for kernel, (times, found) in rows.items()}
        for case, rows in (measurement.counted or {}).items()
    }
    return {"nvcc": measurement.nvcc, "architectures": architectures, "kernels": kernels, "counts": counted}


def fast_instructions(on: list[Kernel]) -> list[str]:
    """What is there on all architectures."""
    return [kind for kind in sass.KINDS if kind not in sass.LOCAL and all((k.instructions or {}).get(kind) for k in on)]


def save(table: Table) -> None:
    """One kernel a line, so that git shows which have changed."""

    def lines(of: dict[str, Any]) -> str:
        return ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in of.items())

    counted = ",\n".join(
        f"    {json.dumps(case)}: {{\n{indent(lines(rows))}\n    }}" for case, rows in table["counts"].items()
    )
    FILE.write_text(
        f'{{\n  "nvcc": {json.dumps(table["nvcc"])},\n  "architectures": {json.dumps(table["architectures"])},\n'
        f'  "kernels": {{\n{lines(table["kernels"])}\n  }},\n  "counts": {{\n{counted}\n  }}\n}}\n'
    )


def indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def load() -> Table:
    return json.loads(FILE.read_text())


# ---- What has changed ------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    worse: list[str] = field(default_factory=list)  # or not to be told: these fail
    better: list[str] = field(default_factory=list)

    def numbers(self, what: str, before: int | None, now: int | None, less_is_better: bool = True) -> None:
        if before == now:
            return
        better = before is not None and now is not None and (now < before) == less_is_better
        (self.better if better else self.worse).append(f"{what}: {before} in the table, {now} now")


def compare(table: Table, measurement: Measurement) -> Comparison:
    found = Comparison(faults(measurement))
    for architecture, kernels in measurement.kernels.items():
        at = table["architectures"].index(architecture)
        for name in sorted(kernels.keys() | table["kernels"].keys()):
            where = f"sm_{architecture} {name}"
            if name not in kernels:
                found.worse.append(f"{where}: is in the table, and is gone")
            elif name not in table["kernels"]:
                found.worse.append(f"{where}: is new")
            else:
                compare_kernel(found, where, table["kernels"][name], at, architecture, kernels[name])
    if measurement.counted is not None and table_of(measurement)["counts"] != table["counts"]:
        found.worse.append("the operations and bytes at the named sizes are not those of the table")
    return found


def compare_kernel(found: Comparison, where: str, row: Table, at: int, architecture: str, now: Kernel) -> None:
    found.numbers(f"{where}: registers", row["registers"][at], now.report.registers)
    if now.threads is not None:
        found.numbers(f"{where}: threads of a block", row["threads"], now.threads)
    found.numbers(f"{where}: bytes of shared memory", row["shared"][at], now.shared)
    blocks = now.blocks(DEVICES[architecture])
    found.numbers(f"{where}: blocks on a multiprocessor", row["blocks"][at], blocks, less_is_better=False)
    before, spills = row.get("spills", {}).get(architecture, {}), now.spills
    for fact in ("stack", "stores", "loads", "instructions"):
        if fact != "instructions" or now.instructions is not None:
            found.numbers(f"{where}: local memory, {fact}", before.get(fact, 0), spills.get(fact, 0))
    if now.instructions is not None:
        for kind in row["instructions"].split():
            if not now.instructions[kind]:
                found.worse.append(f"{where}: has no {kind} any more")


def faults(measurement: Measurement) -> list[str]:
    """What no table makes right."""
    found = []
    for architecture, kernels in measurement.kernels.items():
        device = DEVICES[architecture]
        for name, kernel in kernels.items():
            where = f"sm_{architecture} {name}"
            if kernel.instructions is not None:
                found += [f"{where}: has no {kind}" for kind in sass.meant(name) if not kernel.instructions[kind]]
            if name.startswith(sass.WITHOUT_SPILLS) and (kernel.report.spill_stores or kernel.report.spill_loads):
                found.append(f"{where}: spills")
            for launch in kernel.launches:
                blocks = device.blocks_at_once(
                    launch.threads, kernel.report.registers, kernel.report.static_shared + launch.shared
                )
                if blocks == 0:
                    found.append(f"{where}: {launch} does not fit a multiprocessor")
                elif launch.cooperative and launch.blocks > blocks * device.multiprocessors:
                    found.append(f"{where}: {launch} does not fit an {device.name}, and its blocks wait for each other")
        for start in sass.MEANT:
            if not any(name.startswith(start) for name in kernels):
                found.append(
                    f"sm_{architecture}: there is no kernel {start}...>, of which sass.py expects instructions"
                )
    return found
