"""The static budget of the CUDA kernels (csrc/cuda/budget): compiled for one architecture, they are as the table says.
`make cuda-budget` compares all architectures."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "csrc/cuda"))

from budget import compilation, devices, page, sass, table
from budget.compilation import Report


@pytest.fixture(scope="module")
def measured():
    nvcc = compilation.find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc: docs/cuda-budget.md says what to install")
    version, wanted = compilation.nvcc_version(nvcc), table.load()["nvcc"]
    if version != wanted:
        pytest.skip(f"{nvcc} is of {version}, and the table of {wanted}, whose registers are others")
    return table.measure(nvcc, compilation.find_disassembler(), [table.COUNTED], compilation.processors())


@pytest.mark.slow
def test_the_kernels_are_as_the_table_says(measured):
    assert table.compare(table.load(), measured).worse == []


@pytest.mark.slow
def test_the_instructions_were_read(measured):
    if compilation.find_disassembler() is None:
        pytest.skip("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
    kernels = measured.kernels[table.COUNTED].items()
    assert all(kernel.instructions is not None for _, kernel in kernels)
    assert all(kernel.instructions["HMMA"] for name, kernel in kernels if name.startswith("half_gemm_kernel<"))


def test_the_page_is_that_of_the_table():
    assert page.FILE.read_text() == page.render(table.load())


# ---- What a comparison finds, of a kernel that is none ---------------------------------------------------------------

NAME = "half_gemm_kernel<float16, float>"
REPORT = Report("gemm.cu", registers=40, stack=0, spill_stores=0, spill_loads=0, static_shared=0)
FAST = Counter({"HMMA": 4, "LDGSTS.128": 2, "LDSM": 2})


def measurement(name=NAME, instructions=FAST, **changes):
    others = {f"{start}>": Counter(kinds) for start, kinds in sass.MEANT.items()}
    kernels = {other: table.Kernel(REPORT, kinds) for other, kinds in others.items()}
    kernels[name] = table.Kernel(dataclasses.replace(REPORT, **changes), instructions)
    return table.Measurement("13.0", {"90": kernels}, None)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"registers": 41}, ["registers: 40 in the table, 41 now"]),
        (
            {"stack": 8, "spill_stores": 4},
            [f"{NAME}: spills", "local memory, stack: 0 in the table, 8 now", "local memory, stores: 0 in"],
        ),
        ({"instructions": FAST + Counter({"LDL": 3})}, ["local memory, instructions: 0 in the table, 3 now"]),
        ({"instructions": FAST - Counter({"LDSM": 2})}, [f"{NAME}: has no LDSM", "has no LDSM any more"]),
        ({"name": "add_kernel<float>"}, ["add_kernel<float>: is new", "is in the table, and is gone"]),
        ({"static_shared": 64}, []),  # that of launches counts, and there are none
        ({"registers": 39}, []),
    ],
)
def test_a_comparison_tells_what_is_worse(changes, found):
    worse = table.compare(table.table_of(measurement()), measurement(**changes)).worse
    assert len(worse) == len(found), worse
    assert all(part in line for part, line in zip(found, worse, strict=True))


def test_a_comparison_tells_what_is_better():
    comparison = table.compare(table.table_of(measurement()), measurement(registers=39))
    assert comparison.better == [f"sm_90 {NAME}: registers: 40 in the table, 39 now"]


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        ("90", 128, 168, 49152, 3),  # registers: 12 warps of 168
        ("90", 128, 32, 49152, 4),  # shared memory: 49 KB each of 228
        ("90", 1024, 64, 0, 1),  # registers: 32 warps of 64 take them all
        ("90", 64, 32, 0, 32),  # blocks
        ("89", 256, 32, 0, 6),  # threads
        ("86", 128, 32, 100 << 10, 0),  # more than there is
    ],
)
def test_occupancy_is_that_of_the_programming_guide(architecture, threads, registers, shared, blocks):
    device = devices.DEVICES[architecture]
    assert device.blocks_at_once(threads, registers, shared) == blocks


def test_instructions_are_counted_by_kind():
    text = """
        /*0010*/                   LDC R1, c[0x0][0x28] ;
        /*0020*/              @!P0 LDS.128 R4, [R2] ;
        /*0030*/             @!UP0 LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0040*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0050*/                   LDSM.16.MT88.4 R4, [R2] ;
        /*0060*/                   LDG.E.64 R4, [R2.64] ;
        /*0070*/                   LDG.E.128.STRONG.GPU R4, [R2.64] ;
    """
    assert sass.count(text) == {kind: 1 for kind in ("LDS.128", "LDGSTS.128", "LDSM", "LDSM.T", "LDG.128")}
