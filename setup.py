"""Builds the extension: finds the compiler, torch and Python's headers, and hands them to CMake (CMakeLists.txt).

Environment: CXX (the compiler), MAX_JOBS (parallel compilations), FASTSEQ_BUILD_TYPE (Release, RelWithDebInfo, Debug),
FASTSEQ_ISAS (instruction sets to compile for, as avx2,avx512; all of them if empty: a shorter list builds sooner),
FASTSEQ_CUDA (0 or 1: the CUDA kernels, too; needs a torch that was built with CUDA, and nvcc of the same major version,
of a toolkit or from pip), FASTSEQ_CUDA_ARCHS (what these are compiled for, as 8.0,9.0 or 80;90, and as PTX for what
comes after the last), FASTSEQ_NVCC (the compiler; else CUDA_HOME's, that on PATH, or pip's).
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

MIN_PYTHON = (3, 10)
MIN_SETUPTOOLS = 77  # the first to read the licence in pyproject.toml
MIN_TORCH = (2, 13)
CUDA_ARCHS = "80;86;89;90;100;120"
MIN_CUDA_ARCH = 80  # the first whose instructions the kernels are written in
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


def with_cuda():
    return os.environ.get("FASTSEQ_CUDA", "0") not in ("", "0")


def cuda_archs():
    """The numbers that nvcc takes after sm_, smallest first."""
    text = os.environ.get("FASTSEQ_CUDA_ARCHS") or CUDA_ARCHS
    archs = []
    for word in re.split(r"[;,\s]+", text.strip("; ,")):
        found = re.fullmatch(r"(?:sm_|compute_)?(\d+)[.]?(\d)([af]?)", word)
        if not found:
            stop(f"FASTSEQ_CUDA_ARCHS must name architectures, as 8.0,9.0 or 80;90 or sm_90; got {word!r}.")
        number = int(found[1] + found[2])
        if number < MIN_CUDA_ARCH:
            stop(f"the CUDA kernels need architecture {MIN_CUDA_ARCH} or newer; FASTSEQ_CUDA_ARCHS has {word}.")
        archs.append((number, found[3]))
    return [f"{number}{suffix}" for number, suffix in sorted(set(archs))]


def pip_cuda_folders():
    """site-packages/nvidia/cu13 and the like: where pip's packages of NVIDIA put include, lib and bin."""
    spec = importlib.util.find_spec("nvidia")
    parents = spec.submodule_search_locations if spec else []
    return sorted(folder for parent in parents or [] for folder in Path(parent).glob("*") if folder.is_dir())


def find_nvcc():
    named = os.environ.get("FASTSEQ_NVCC")
    if named:
        return shutil.which(named) or stop(f"FASTSEQ_NVCC names {named}, which is no program that can be run.")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [Path(home, "bin")] if home else []
    found = [shutil.which("nvcc", path=str(folder)) for folder in folders] + [shutil.which("nvcc")]
    found += [shutil.which("nvcc", path=str(folder / "bin")) for folder in pip_cuda_folders()]
    return next(filter(None, found), None) or stop(
        "FASTSEQ_CUDA=1 needs nvcc, and there is none: install a CUDA toolkit and set CUDA_HOME, or run `pip install "
        "nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 "
        "nvidia-cuda-cccl==13.0.85`."
    )


def nvcc_says(nvcc, *arguments):
    done = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        stop(f"`{nvcc} {' '.join(arguments)}` failed: {done.stdout.strip()}")
    return done.stdout


def find_cuda():
    import torch

    cuda = torch.version.cuda
    if cuda is None:
        stop(
            f"FASTSEQ_CUDA=1 needs a torch that was built with CUDA, and {torch.__version__} was not: install one, as "
            "https://pytorch.org/get-started says, or build without FASTSEQ_CUDA."
        )
    archs, nvcc = cuda_archs(), find_nvcc()
    release = re.search(r"release (\d+[.]\d+)", nvcc_says(nvcc, "--version"))
    version, major = release[1] if release else "an unknown version", cuda.split(".")[0]
    if version.split(".")[0] != major:
        stop(
            f"torch {torch.__version__} was built with CUDA {cuda}, and {nvcc} is of {version}: set FASTSEQ_NVCC to an "
            f"nvcc of CUDA {major}, or install a torch of the other."
        )
    known = nvcc_says(nvcc, "--list-gpu-code").split()
    for arch in archs:
        if f"sm_{arch}" not in known:
            stop(
                f"nvcc {version} has no architecture {arch}: set FASTSEQ_CUDA_ARCHS to some of what "
                f"`{nvcc} --list-gpu-code` prints."
            )

    # The toolkit's folder, which nvcc knows best: it may be a script in a folder of programs. What pip has comes after.
    top = re.search(r"^#\$ TOP=(.*)$", nvcc_says(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
    toolkits = ([Path(top[1]).resolve()] if top else []) + pip_cuda_folders()

    def find(what, names, patterns):
        places = [toolkit / name for toolkit in toolkits for name in names]
        found = next((path for place in places for pattern in patterns for path in sorted(place.glob(pattern))), None)
        return found or stop(f"FASTSEQ_CUDA=1 needs {what}, which is neither beside {nvcc} nor among pip's packages.")

    includes = ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
    libraries = ("lib64", "lib", "lib/x86_64-linux-gnu", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    headers = [find(name, includes, [name]).parent for name in ("cuda_runtime.h", "cublas_v2.h", "cusparse.h")]
    headers.append(find("cusolverDn.h", includes, ["cusolverDn.h"]).parent)
    return {
        "FASTSEQ_CUDA": "ON",
        "FASTSEQ_CUDA_VERSION": version,
        "FASTSEQ_CUDA_ARCHS": ";".join(archs),
        "FASTSEQ_NVCC": nvcc,
        "FASTSEQ_CUDA_INCLUDE": ";".join(map(str, dict.fromkeys(headers))),
        "FASTSEQ_CUDART": find("libcudart_static.a", libraries, ["libcudart_static.a"]),
        "FASTSEQ_CUBLAS": find("libcublas", libraries, [f"libcublas.so.{major}", "libcublas.so"]),
    }


class CMakeBuild(build_ext):
    def run(self):
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
            **(find_cuda() if with_cuda() else {"FASTSEQ_CUDA": "OFF"}),
        }
        # One build folder for each set of tools, kept, so that building again compiles only what has changed.
        tools = f"{sys.implementation.cache_tag}-torch{settings['FASTSEQ_TORCH_VERSION']}-{Path(compiler).name}"
        tools += "-cuda" if with_cuda() else ""
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
