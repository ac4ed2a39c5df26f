"""Imports the compiled extension `fastseq._C`, which registers the operators, or says in one sentence how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("fastseq needs PyTorch, which is not installed: run `pip install torch`.") from None

_REBUILD = "run `pip install --no-build-isolation --force-reinstall --no-deps .` in fastseq's source folder"


def _load() -> ModuleType:
    try:
        extension = importlib.import_module("fastseq._C")
    except ModuleNotFoundError as error:
        if error.name != "fastseq._C":
            raise
        raise ImportError(f"fastseq's extension is not built for this Python: {_REBUILD}.") from None
    except ImportError as error:
        cuda_libraries = ("libc10_cuda", "libtorch_cuda", "libcublas")
        if torch.version.cuda is None and any(name in str(error) for name in cuda_libraries):
            raise ImportError(
                f"fastseq's extension was built for a torch with CUDA, and the {torch.__version__} installed has none: "
                f"{_REBUILD}."
            ) from error
        if "undefined symbol" not in str(error):
            raise
        raise ImportError(
            f"fastseq's extension was built against another torch than the {torch.__version__} installed: {_REBUILD}."
        ) from error
    built_against = extension.build_info()["torch"]
    # The part behind "+" names the device build (+cpu, +cu130), which does not change the interface.
    if built_against.partition("+")[0] != torch.__version__.partition("+")[0]:
        raise ImportError(
            f"fastseq's extension was built against torch {built_against}, and torch {torch.__version__} is installed: "
            f"{_REBUILD}."
        )
    return extension


_C = _load()
CUDA_BUILT = _C.cuda()["built"]
