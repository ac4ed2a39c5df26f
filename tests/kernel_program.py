"""The kernels' own tests, without torch, built from a tree of sources and run."""

import subprocess
import sys
from pathlib import Path

# AMX's tiles on a processor without them; what they have no part in is the baseline's.
AMX_EMULATED = "amx_emulated;baseline"


def build_and_run(tree, build, isas, *arguments):
    """The exit code of the tests for some instruction sets, and what they printed."""
    tools = Path(sys.executable).parent
    configure = ["cmake", "-S", tree, "-B", build, "-G", "Ninja", "-DFASTSEQ_TORCH=OFF"]
    configure += [
        f"-DFASTSEQ_ISAS={isas}",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
    ]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run([tools / command[0], *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    done = subprocess.run([build / "fastseq_kernel_tests", *arguments], capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout
