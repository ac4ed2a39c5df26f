"""What the build must hold: no instruction leaks from one ISA into another's code, one OpenMP runtime, no Python in the
operator library, and one sentence when something is missing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(fastseq.__file__).parent
LIBRARIES = [Path(_C.__file__), PACKAGE / "libfastseq_ops.so"]


def run_tool(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


# ---- Symbols ---------------------------------------------------------------------------------------------------------


def kernel_objects() -> list[Path]:
    """kernels.cpp's object file of every ISA beyond the baseline, in the build tree of the loaded extension."""
    tree = f"{sys.implementation.cache_tag}-torch{_C.build_info()['torch']}-*"
    return sorted(
        path
        for path in (ROOT / "build").glob(f"{tree}/CMakeFiles/fastseq_cpu_*.dir/csrc/cpu/kernels.cpp.o")
        if not re.search("_(baseline|neon)[.]dir", str(path))
    )


def test_code_for_one_isa_stays_in_its_namespace():
    """The linker keeps one copy of an inline function that several objects define. Were that copy the AVX-512 one, the
    program would crash on a machine without AVX-512: so all that such an object shares must carry its ISA's name."""
    if _C.build_info()["build_type"] != "Release":
        pytest.skip("only a Release build inlines what must be inlined")
    if not kernel_objects():
        pytest.skip("no build tree here: the extension was installed from a wheel")
    for path in kernel_objects():
        isa = re.search(r"fastseq_cpu_(\w+)[.]dir", str(path)).group(1)
        namespace = f"3cpu{len(isa)}{isa}"  # fastseq::cpu::isa in a mangled name; not every demangler reads them all
        symbols = [line.split()[-2:] for line in run_tool("nm", "--defined-only", path).splitlines()]
        shared = [name for kind, name in symbols if kind.isupper() or kind == "u"]  # the rest is local to the object
        # Not code: the address of the exception handler that the compiler refers to.
        outside = [name for name in shared if namespace not in name and not name.startswith("DW.ref.")]
        assert any(namespace in name for name in shared), f"nm shows no kernel in {path}"
        assert not outside, f"{path} defines symbols outside fastseq::cpu::{isa}: {outside}"


def test_operator_library_is_free_of_python():
    undefined = run_tool("nm", "-D", "--undefined-only", PACKAGE / "libfastseq_ops.so")
    assert "TensorImpl" in undefined or "c10" in undefined
    assert not re.findall(r"\b_?Py[A-Z_]\w*", undefined)
    needed = run_tool("readelf", "-d", PACKAGE / "libfastseq_ops.so")
    assert "libtorch_cpu.so" in needed
    assert "python" not in needed


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_no_path_of_the_build_machine_in_a_library(library):
    paths = re.findall(r"(?:RPATH|RUNPATH).*\[(.*)\]", run_tool("readelf", "-d", library))
    assert paths == ["$ORIGIN"]


def test_one_openmp_runtime_in_the_process():
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    fastseq.GRU(8, 64)(torch.ones(4, 64, 8))
    maps = Path("/proc/self/maps").read_text()
    runtimes = set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)\b\S*", maps))
    assert len(runtimes) == 1, runtimes


def test_build_facts():
    facts = _C.build_info()
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert facts["version"] == _C.version() == fastseq.__version__ == version
    assert facts["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "-ffp-contract=off" in facts["flags"]
    assert re.fullmatch(r"\w+ \d+[.]\d+.*", facts["compiler"])
    cuda = _C.cuda()
    if cuda["built"]:
        assert cuda["version"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert re.fullmatch(r"(sm_\d+[af]? )+compute_\d+[af]?", cuda["archs"])
    else:
        assert cuda == {"built": False, "why": "it was built without FASTSEQ_CUDA=1", "version": "", "archs": ""}


# ---- setup.py: one sentence for each thing that is missing -----------------------------------------------------------

# A torch that was built with CUDA 1.0, and what setup.py takes for an nvcc of 13.0.
CUDA = (
    "import torch; torch.version.cuda = '1.0'; nvcc = pathlib.Path(tempfile.mkdtemp(), 'nvcc'); "
    "nvcc.write_text('#!/bin/sh\\necho release 13.0 sm_80 sm_90\\n'); nvcc.chmod(0o755); "
    "os.environ.update(FASTSEQ_CUDA='1', FASTSEQ_NVCC=str(nvcc))"
)

# Each prepares the interpreter in which setup.py then runs as `python setup.py build_ext`.
MISSING = {
    "python": (
        "sys.version_info = (3, 8, 1)",
        "needs Python 3.10 or newer, and this is 3.8: run the build with a newer Python.",
    ),
    "setuptools": (
        "import setuptools; setuptools.__version__ = '65.5.0'",
        "needs setuptools 77 or newer, and 65.5.0 is installed: run `pip install --upgrade setuptools`.",
    ),
    "compiler": (
        "os.environ.pop('CXX', None); os.environ['PATH'] = '/nowhere'",
        "found no C++ compiler (c++, g++, clang++): install GCC 11 or newer (Debian, Ubuntu: `apt install g++`) "
        "or set CXX to one.",
    ),
    "named compiler": (
        "os.environ['CXX'] = 'no-such-g++ -m64'",
        "found no C++ compiler (no-such-g++ -m64): install GCC 11 or newer (Debian, Ubuntu: `apt install g++`) "
        "or set CXX to one.",
    ),
    "cmake": (
        "os.environ.update(CXX=sys.executable, PATH='/nowhere'); sys.modules['cmake'] = None",
        "building needs cmake: run `pip install cmake`.",
    ),
    "ninja": (
        "os.environ.update(CXX=sys.executable, PATH='/nowhere'); sys.modules['ninja'] = None",
        "building needs ninja: run `pip install ninja`.",
    ),
    "headers": (
        "import sysconfig; sysconfig.get_path = lambda *arguments, **more: '/nowhere'",
        "found no Python.h in /nowhere: install Python's headers (Debian, Ubuntu: `apt install python3-dev`).",
    ),
    "torch": (
        "sys.modules['torch'] = None",
        "building needs torch, and importing it failed (import of torch halted; None in sys.modules): "
        "run `pip install torch`, then `pip install --no-build-isolation .`.",
    ),
    "newer torch": (
        "from types import ModuleType; torch = sys.modules['torch'] = ModuleType('torch'); "
        "torch.__version__ = '2.1.0'; utils = sys.modules['torch.utils'] = ModuleType('torch.utils'); "
        "utils.cpp_extension = None",
        "needs torch 2.13 or newer, and 2.1.0 is installed: run `pip install --upgrade torch`.",
    ),
    "torch with CUDA": (
        "os.environ['FASTSEQ_CUDA'] = '1'; import torch; torch.version.cuda = None; torch.__version__ = '2.99.0+cpu'",
        "FASTSEQ_CUDA=1 needs a torch that was built with CUDA, and 2.99.0+cpu was not: install one, as "
        "https://pytorch.org/get-started says, or build without FASTSEQ_CUDA.",
    ),
    "architectures": (
        f"{CUDA}; os.environ['FASTSEQ_CUDA_ARCHS'] = '8.0;hopper'",
        "FASTSEQ_CUDA_ARCHS must name architectures, as 8.0,9.0 or 80;90 or sm_90; got 'hopper'.",
    ),
    "newer architectures": (
        f"{CUDA}; os.environ['FASTSEQ_CUDA_ARCHS'] = '7.5'",
        "the CUDA kernels need architecture 80 or newer; FASTSEQ_CUDA_ARCHS has 7.5.",
    ),
    "named nvcc": (
        f"{CUDA}; os.environ['FASTSEQ_NVCC'] = 'no-such-nvcc'",
        "FASTSEQ_NVCC names no-such-nvcc, which is no program that can be run.",
    ),
    "nvcc of torch's CUDA": (
        f"{CUDA}; torch.__version__ = '2.99.0'",
        "torch 2.99.0 was built with CUDA 1.0, and NVCC is of 13.0: set FASTSEQ_NVCC to an nvcc of CUDA 1, or "
        "install a torch of the other.",
    ),
    "an architecture that nvcc knows": (
        f"{CUDA}; torch.version.cuda = '13.0'; os.environ['FASTSEQ_CUDA_ARCHS'] = '8.0 9.9'",
        "nvcc 13.0 has no architecture 99: set FASTSEQ_CUDA_ARCHS to some of what `NVCC --list-gpu-code` prints.",
    ),
}


@pytest.mark.parametrize("what", MISSING)
def test_setup_says_in_one_sentence_what_is_missing(what):
    prepare, sentence = MISSING[what]
    script = f"import os, pathlib, runpy, sys, tempfile; {prepare}; " + (
        "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    # A torch with CUDA tells of a machine without a GPU; the nvcc that is none is in another folder each time.
    said = [line for line in done.stderr.splitlines() if "cpp_extension" not in line]
    assert [re.sub(r"/\S*/nvcc\b", "NVCC", line) for line in said] == [f"fastseq: {sentence}"]


# ---- nvcc from pip ---------------------------------------------------------------------------------------------------
COMPILE = """
import pathlib, re, runpy, subprocess, sys
from unittest import mock
with mock.patch("setuptools.setup"), mock.patch.object(sys, "argv", ["setup.py"]):
    nvcc = runpy.run_path("setup.py")["find_nvcc"]()
flags = re.search(r"set\\(nvcc_flags ([^\\"]*?) -ccbin ", pathlib.Path("CMakeLists.txt").read_text())[1].split()
print(nvcc)
sys.exit(subprocess.run([nvcc, *flags, "-arch=sm_90", "-Icsrc", "-c", "-o", sys.argv[1], sys.argv[2]]).returncode)
"""


@pytest.mark.slow
def test_pip_has_all_that_compiling_a_kernel_takes(tmp_path):
    packages = re.findall(r"nvidia-[\w-]+==[\d.]+", (ROOT / "README.md").read_text())
    assert packages
    site, out = tmp_path / "site", tmp_path / "kernels.o"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, *packages]
    if (done := subprocess.run(pip, capture_output=True, text=True)).returncode:
        pytest.skip(f"pip has no {' '.join(packages)} for this machine: {done.stderr.strip()[-200:]}")
    # A machine without a toolkit: nvcc is in none of these folders.
    folders = [folder for folder in ("/usr/bin", "/bin") if not Path(folder, "nvcc").exists()]
    environment = {"PATH": ":".join(folders), "PYTHONPATH": str(site), "HOME": str(tmp_path)}
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE, out, "csrc/cuda/rnn_plan.cu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    assert Path(compiled.stdout.strip()).is_relative_to(site)
    assert out.stat().st_size > 0
