"""Builds the extension: finds the compiler, torch and Python's headers, and hands them to CMake (CMakeLists.txt).

Environment: CXX (the compiler), MAX_JOBS (parallel compilations), FASTSEQ_BUILD_TYPE (Release, RelWithDebInfo, Debug),
FASTSEQ_ISAS (instruction sets to compile for, as avx2,avx512; all of them if empty: a shorter list builds sooner),
FASTSEQ_CUDA (0 or 1; this version has no CUDA kernels yet, so 1 is refused).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

MIN_PYTHON = (3, 10)
MIN_SETUPTOOLS = 77  # the first to read the licence in pyproject.toml
MIN_TORCH = (2, 13)
ROOT = Path(__file__).resolve().parent


def stop(sentence):
    """Ends the build with one sentence, which says the fix, and no traceback."""
    raise SystemExit("fastseq: " + sentence)


if sys.version_info[:2] < MIN_PYTHON:
    stop(
        "needs Python %d.%d or newer, and this is %d.%d: run the build with a newer Python."
        % (MIN_PYTHON + tuple(sys.version_info[:2]))
    )

from setuptools import Extension, __version__, setup  # noqa: E402  (this Python can run what follows)
from setuptools.command.build_ext import build_ext  # noqa: E402

if int(__version__.split(".")[0]) < MIN_SETUPTOOLS:
    stop(
        f"needs setuptools {MIN_SETUPTOOLS} or newer, and {__version__} is installed: "
        "run `pip install --upgrade setuptools`."
    )


def find_torch():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        stop(
            f"building needs torch, and importing it failed ({error}): run `pip install torch`, "
            "then `pip install --no-build-isolation .`."
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        stop(
            f"needs torch {'.'.join(map(str, MIN_TORCH))} or newer, and {torch.__version__} is installed: "
            "run `pip install --upgrade torch`."
        )
    return {
        "FASTSEQ_TORCH_VERSION": torch.__version__,
        "FASTSEQ_TORCH_INCLUDE": ";".join(cpp_extension.include_paths()),
        "FASTSEQ_TORCH_LIB": cpp_extension.library_paths()[0],
        "FASTSEQ_TORCH_CXX11_ABI": int(torch._C._GLIBCXX_USE_CXX11_ABI),
    }


def find_compiler():
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)  # CXX may hold a launcher and options: "ccache g++"
        if shutil.which(command[0]):
            return name
    stop(
        f"found no C++ compiler ({', '.join(names)}): install GCC 11 or newer (Debian, Ubuntu: `apt install g++`) "
        "or set CXX to one."
    )


def find_tool(name):
    """The program from the pip package of the same name, which need not be on PATH, or else from PATH."""
    try:
        module = __import__(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR
    except ImportError:
        folder = None
    return (
        shutil.which(name, path=folder)
        or shutil.which(name)
        or stop(f"building needs {name}: run `pip install {name}`.")
    )


def find_python_headers():
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        stop(f"found no Python.h in {folder}: install Python's headers (Debian, Ubuntu: `apt install python3-dev`).")
    return folder


class CMakeBuild(build_ext):
    def run(self):
        if os.environ.get("FASTSEQ_CUDA", "0") not in ("", "0"):
            stop("FASTSEQ_CUDA asks for CUDA kernels, and this version has none: build without it.")
        compiler = find_compiler()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        settings = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_BUILD_TYPE": os.environ.get("FASTSEQ_BUILD_TYPE", "Release"),
            "FASTSEQ_ISAS": os.environ.get("FASTSEQ_ISAS", "").replace(",", ";"),
            "FASTSEQ_VERSION": self.distribution.get_version(),
            "FASTSEQ_PYTHON_INCLUDE": find_python_headers(),
            "FASTSEQ_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            **find_torch(),
        }
        # One build folder for each set of tools, kept, so that building again compiles only what has changed.
        tools = f"{sys.implementation.cache_tag}-torch{settings['FASTSEQ_TORCH_VERSION']}-{Path(compiler).name}"
        build = ROOT / "build" / tools.replace(" ", "_")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        strip = [] if self.in_place else ["--strip"]
        steps = {
            "configuring": ["-S", ROOT, "-B", build, "-GNinja", *(f"-D{key}={settings[key]}" for key in settings)],
            "compiling": ["--build", build, "--parallel", jobs],
            "installing": ["--install", build, "--prefix", self.package_folder, *strip],
        }
        for step, arguments in steps.items():
            if subprocess.run([cmake, *arguments], env={**os.environ, "CXX": compiler}).returncode != 0:
                stop(f"{step} failed: the message that says why is above.")

    @property
    def in_place(self):
        return self.inplace or self.editable_mode

    @property
    def package_folder(self):
        return (ROOT if self.in_place else Path(self.build_lib).resolve()) / "fastseq"

    def get_outputs(self):
        files = ("_C" + sysconfig.get_config_var("EXT_SUFFIX"), "libfastseq_ops.so")
        return [str(self.package_folder / file) for file in files]

    def get_output_mapping(self):
        return {}


setup(ext_modules=[Extension("fastseq._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
