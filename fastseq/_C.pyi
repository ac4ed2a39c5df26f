"""Build facts, kernel counters and test probes of fastseq's extension; importing it registers the operators."""

from typing import TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

_Array = TypeVar("_Array", NDArray[np.float32], NDArray[np.float64])

class BuildInfo(TypedDict):
    version: str
    torch: str
    compiler: str
    flags: str
    build_type: str

class CudaInfo(TypedDict):
    built: bool
    why: str

class CellFacts(TypedDict):
    gates: int
    kept: int
    states: int

def version() -> str: ...
def build_info() -> BuildInfo: ...
def cuda() -> CudaInfo: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def cells() -> dict[str, CellFacts]: ...
def counters() -> dict[str, int]: ...
def reset_counters() -> None: ...
def vec_math(function: str, x: _Array) -> _Array: ...
