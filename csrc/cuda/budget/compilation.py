"""Compiles csrc/cuda as the build does, and reads ptxas's report."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "cuda-budget"
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


class Stopped(Exception):
    """Says in a sentence why there is no budget."""


@dataclass(frozen=True)
class Report:
    """What ptxas says of a kernel; all but registers in bytes."""

    source: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int


class Compiled(NamedTuple):
    cubin: Path
    report: Path
    object: Path | None  # of the architecture whose host code is linked


def run(command: list[Any], **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode != 0:
        raise Stopped(f"`{' '.join(map(str, command))}` failed:\n{(done.stdout + done.stderr).strip()[-4000:]}")
    return done


@cache
def build() -> dict[str, Any]:
    """The functions of setup.py, which finds the compilers."""
    with mock.patch("setuptools.setup"), mock.patch.object(sys, "argv", ["setup.py"]):
        return runpy.run_path(str(ROOT / "setup.py"))


def find_nvcc() -> str | None:
    try:
        return build()["find_nvcc"]()
    except SystemExit:
        return None


def host_compiler() -> str:
    """Without what CXX may have beside it: a launcher, options."""
    return [word for word in shlex.split(build()["find_compiler"]()) if not word.startswith("-")][-1]


def find_disassembler() -> str | None:
    folders = [folder / "bin" for folder in map(Path, build()["pip_cuda_folders"]())]
    return shutil.which("nvdisasm") or next(
        filter(None, (shutil.which("nvdisasm", path=str(f)) for f in folders)), None
    )


@cache
def nvcc_version(nvcc: str) -> str:
    return re.search(r"release [\d.]+, V([\d.]+)", run([nvcc, "--version"]).stdout)[1]


def nvcc_flags() -> list[str]:
    """Those of CMakeLists.txt."""
    found = re.search(r"set\(nvcc_flags ([^\"]*?) -ccbin ", (ROOT / "CMakeLists.txt").read_text())
    if not found:
        raise Stopped(
            "CMakeLists.txt has no `set(nvcc_flags ... -ccbin` any more: compilation.py reads the flags there."
        )
    return found[1].split()


def with_includes(source: Path, found: set[Path]) -> set[Path]:
    """The file and, of ours, those that it includes."""
    if source not in found and source.is_file():
        found.add(source)
        for name in re.findall(r'^\s*#include "(.*)"', source.read_text(), re.MULTILINE):
            with_includes((source.parent / name).resolve(), found)
    return found


def fingerprint(nvcc: str, source: Path) -> str:
    """Of all that the outcome depends on."""
    content = hashlib.sha256(f"{nvcc_version(nvcc)} {nvcc_flags()}".encode())
    for path in sorted(with_includes(source, set())):
        content.update(path.read_bytes())
    return content.hexdigest()


def compile_one(nvcc: str, architecture: str, source: Path, made_from: str, with_host: bool) -> Compiled:
    """With the host code, too, if wanted. What is there already from the same sources is not compiled again."""
    folder = FOLDER / f"sm_{architecture}" / source.stem
    done = Compiled(folder / f"{source.stem}.cubin", folder / "report.txt", folder / "host.o" if with_host else None)
    stamp, wanted = folder / "made-from", f"{made_from} {with_host}"
    if stamp.is_file() and stamp.read_text() == wanted:
        return done
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # The intermediate files of a compilation with the host code have the cubin, too.
    result = ["-c", "-o", done.object, "--keep", "--keep-dir", folder] if with_host else ["-cubin", "-o", done.cubin]
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *nvcc_flags(), "-ccbin", host_compiler(), "-gencode", target, "-Xptxas", "-v", source, *result]
    done.report.write_text(run(command).stderr)
    stamp.write_text(wanted)
    return done


def compile_all(nvcc: str, architectures: list[str], host: str, jobs: int) -> dict[str, list[Compiled]]:
    """By architecture, as SOURCES; `host` is the one whose host code is compiled, too."""
    made_from = [fingerprint(nvcc, source) for source in SOURCES]
    tasks = [(architecture, *both) for architecture in architectures for both in zip(SOURCES, made_from, strict=True)]
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda task: compile_one(nvcc, *task, with_host=task[0] == host), tasks))
    if made_from != [fingerprint(nvcc, source) for source in SOURCES]:
        raise Stopped("csrc was changed while it was compiled: again, please.")
    compiled: dict[str, list[Compiled]] = {architecture: [] for architecture in architectures}
    for (architecture, *_), one in zip(tasks, done, strict=True):
        compiled[architecture].append(one)
    return compiled


def link_launches(nvcc: str, objects: list[Path]) -> Path:
    """launches.cpp with the library's host code, and without CUDA's runtime."""
    program = FOLDER / "launches"
    command = [nvcc, "-std=c++17", "-ccbin", host_compiler(), "-cudart", "none", f"-I{ROOT / 'csrc'}"]
    run([*command, Path(__file__).parent / "launches.cpp", *objects, "-o", program])
    return program


def plain_names(mangled: list[str]) -> list[str]:
    """kernel<arguments>, without namespaces and parameters."""
    return [plain_name(line) for line in run(["c++filt"], input="\n".join(mangled)).stdout.splitlines()]


def plain_name(demangled: str) -> str:
    """
    >>> plain_name("void fastseq::cuda::step_kernel<fastseq::cuda::Gru, float>(fastseq::cuda::Step<float>)")
    'step_kernel<Gru, float>'
    """
    name = demangled.removeprefix("void ")
    name = re.sub(r"(fastseq|cuda|\(anonymous namespace\)|_GLOBAL__N_\w+)::", "", name)
    depth = 0
    for at, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:at]
    return name


ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def read_report(source: str, text: str) -> dict[str, Report]:
    """By plain name."""
    found = list(ENTRY.finditer(text))
    if len(found) != text.count("Compiling entry function"):
        raise Stopped(f"ptxas's report of {source} does not read as expected: see compilation.py's ENTRY.")
    reports = {}
    for name, entry in zip(plain_names([entry["kernel"] for entry in found]), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        reports[name] = Report(
            source,
            registers=int(entry["registers"]),
            stack=int(entry["stack"]),
            spill_stores=int(entry["stores"]),
            spill_loads=int(entry["loads"]),
            static_shared=int(shared[1]) if shared else 0,
        )
    return reports


def processors() -> int:
    return len(os.sched_getaffinity(0))
