"""Builds the programs of csrc/cuda/emulation, which run the CUDA kernels on the CPU, and runs them."""

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent

# What CMake is told, and the compiler's option.
SANITIZERS = {
    "threads": ("-DFASTSEQ_SANITIZE_THREADS=ON", "thread"),
    "addresses": ("-DFASTSEQ_SANITIZE=ON", "address,undefined"),
}
# The first report ends the program, and no end waits a second.
ENVIRONMENT = {"TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1"}


def skip_without_emulation():
    if platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        pytest.skip(f"the emulation of CUDA cannot switch stacks on {platform.machine()}")


def skip_without_sanitizer(sanitizer):
    option = SANITIZERS[sanitizer][1]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "empty.cpp"), Path(folder, "empty")
        source.write_text("int main() {}\n")
        compiler = os.environ.get("CXX", "c++")
        for command in ([compiler, f"-fsanitize={option}", source, "-o", program], [program]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"no program with -fsanitize={option} here: {(done.stdout + done.stderr)[-300:]}")


def configure(tree, folder, *options):
    command = ["cmake", "-S", tree, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={TOOLS / 'ninja'}"]
    return _run([*command, "-DFASTSEQ_TORCH=OFF", "-DFASTSEQ_EMULATE_CUDA=ON", *options])


def build(folder, *targets):
    return _run(["cmake", "--build", folder, *(["--target", *targets] if targets else [])])


def _run(command):
    done = subprocess.run([TOOLS / command[0], *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def run(folder, program, *arguments, schedule="first-to-last", timeout=900):
    """The exit code of `fastseq_cuda_PROGRAM_tests`, and all that it has printed; None if it takes too long."""
    environment = {**os.environ, **ENVIRONMENT, "FASTSEQ_EMULATION_SCHEDULE": schedule}
    command = [folder / f"fastseq_cuda_{program}_tests", *arguments]
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def assert_all_pass(folder, *commands, schedule="first-to-last"):
    """Runs `(program, *arguments)`, each on a processor of its own: a program has one thread."""
    with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
        ends = list(pool.map(lambda command: run(folder, *command, schedule=schedule), commands))
    for command, (code, output) in zip(commands, ends, strict=True):
        assert code == 0, f"{command} ended with {code}: {output[-3000:]}"
