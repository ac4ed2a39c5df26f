"""The kernels in AMX's tiles, on any x86-64 processor: their own tests, with the tiles emulated."""

import platform
from pathlib import Path

import pytest
from kernel_program import AMX_EMULATED, build_and_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is of x86-64")
def test_the_kernels_in_emulated_tiles(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSEQ_ISA", "amx_emulated")
    code, output = build_and_run(ROOT, tmp_path, AMX_EMULATED, "--quick")
    assert code == 0 and "amx_emulated attention" in output, output[-3000:]
