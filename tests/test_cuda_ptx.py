"""The CUDA kernels as nvcc compiles them to PTX, translated to C++ and run on the CPU (csrc/cuda/emulation/ptx): so the
text of inline instructions is tested, and what the compiler makes of the kernels. `make cuda-test` runs these, too.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from cuda_emulation import ROOT, build, configure, run, skip_without_emulation

sys.path.insert(0, str(ROOT / "csrc/cuda"))
from budget import compilation

PTX = ROOT / "csrc/cuda/emulation/ptx"
FOLDER = ROOT / "build" / "cuda-emulated-ptx"
PROGRAMS = ["probes", "rnn", "attention"]

spec = importlib.util.spec_from_file_location("translate", PTX / "translate.py")
translation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(translation)


@pytest.fixture(scope="module")
def nvcc():
    skip_without_emulation()
    return compilation.find_nvcc() or pytest.skip("there is no nvcc here")


@pytest.fixture(scope="module")
def programs(nvcc):
    configure(ROOT, FOLDER, "-DFASTSEQ_EMULATE_PTX=ON", f"-DFASTSEQ_NVCC={nvcc}")
    build(FOLDER, *(f"fastseq_cuda_ptx_{program}_tests" for program in PROGRAMS))


def launches(output, of):
    """How often programs have launched each kernel: `of` is PTX or source."""
    out = Counter()
    for times, name in re.findall(rf"^{of}: (\d+) launches of (.+)$", output, re.MULTILINE):
        out[compilation.plain_name(name)] += int(times)
    return out


def run_all(*commands, schedule="first-to-last"):
    """What programs that pass have printed."""
    with ThreadPoolExecutor(2) as pool:
        ends = list(
            pool.map(lambda command: run(FOLDER, f"ptx_{command[0]}", *command[1:], schedule=schedule), commands)
        )
    for command, (code, output) in zip(commands, ends, strict=True):
        assert code == 0, f"{command} ended with {code}: {output[-3000:]}"
    return "".join(output for _, output in ends)


@pytest.mark.slow
def test_instructions_do_what_their_sources_do(programs):
    output = run_all(("probes",))
    assert min(launches(output, "PTX").values()) > 0


@pytest.mark.slow
def test_rnn_kernels_are_right(programs):
    output = run_all(("rnn", "--quick", "lstm"), ("rnn", "--quick", "gru"))
    from_ptx = launches(output, "PTX")
    assert {name.partition("<")[0] for name in from_ptx} == {
        "add_kernel",
        "column_sums_kernel",
        "copy_kernel",
        "gemm_kernel",
        "half_gemm_kernel",
        "persistent_backward_kernel",
        "persistent_forward_kernel",
        "step_backward_kernel",
        "step_forward_kernel",
    }
    assert [name for name, times in from_ptx.items() if times == 0] == []
    assert list(launches(output, "source")) == []


@pytest.mark.slow
def test_attention_kernels_are_right(programs):
    types = ("bfloat16", "float16", "float32", "float64")
    output = run_all(*(("attention", "--quick", of_type) for of_type in types))
    from_ptx = launches(output, "PTX")
    assert {name.partition("<")[0] for name in from_ptx} == {
        "attention_delta",
        "attention_forward_simt",
        "attention_forward_tiles",
        "attention_key_gradients",
        "attention_key_gradients_simt",
        "attention_query_gradients",
        "attention_query_gradients_simt",
        "merge_splits",
    }
    assert [name for name, times in from_ptx.items() if times == 0] == []
    # What nobody has translated, to save time: these tiles, and kernels that are translated of another type.
    tiles = (
        r"(attention_forward_tiles|attention_(key|query)_gradients)"
        r"<((b?float16|float), 256|float16, (128|64, false, true))\b"
        r"|attention_(key|query)_gradients_simt<float>|attention_delta<double>"
    )
    assert [name for name in launches(output, "source") if not re.match(tiles, name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["last-to-first", "random:1"])
def test_threads_in_another_order(programs, schedule):
    run_all(("probes",), ("attention", "--quick", "float16"), schedule=schedule)


@pytest.mark.slow
def test_the_program_that_times_attention_compiles(nvcc, tmp_path):
    source = ROOT / "csrc/cuda/tests/attention_bench.cu"
    flags = [*compilation.nvcc_flags(), "-ccbin", compilation.host_compiler(), "-I", ROOT / "csrc"]
    finish([nvcc, "-c", "-arch=sm_80", source, "-o", tmp_path / "attention_bench.o", *flags])


# ---- Faults in the text of instructions, which the kernels' sources as run elsewhere do not show --------------------
class Fault(NamedTuple):
    old: str  # once in ptx.h
    new: str
    told: str
    program: tuple = ("probes",)
    source: str = "emulation/ptx/probes.cu"  # of csrc/cuda: the kernels with the fault


FAULTS = {
    "mma: the two halves of the right side change places": Fault(
        'mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "',
        'mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%9, %8}, "',
        "mma of bfloat16",
    ),
    "mma: two words of the left side change places": Fault(
        'mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "',
        'mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %6, %5, %7}, {%8, %9}, "',
        "mma of float",
    ),
    "ldmatrix: not transposed": Fault(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ldmatrix_transposed",
    ),
    "cp.async: one group too many under way": Fault('"n"(N)', '"n"(N + 1)', "cp_async"),
    "cp.async: what is not there is copied": Fault('"r"(valid ? 16 : 0)', '"r"(16)', "cp_async"),
    "cp.async: one group too many under way, in a product": Fault(
        '"n"(N)', '"n"(N + 1)', "gru", ("rnn", "--quick", "gru"), "gemm.cu"
    ),
    "mma: the two halves of the right side change places, in a product": Fault(
        'mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "',
        'mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%9, %8}, "',
        "gru",
        ("rnn", "--quick", "gru"),
        "gemm.cu",
    ),
    "ex2: a logarithm": Fault("ex2.approx.ftz.f32", "lg2.approx.ftz.f32", "the opcode lg2.approx.ftz.f32"),
    "pack: halves change places": Fault(
        'asm("cvt.rn.f16x2.f32 %0, %1, %2;"', 'asm("cvt.rn.f16x2.f32 %0, %2, %1;"', "from_float of float16"
    ),
    "tf32: another rounding": Fault("cvt.rna.tf32.f32", "cvt.rn.tf32.f32", "the opcode cvt.rn.tf32.f32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_an_instruction_is_seen(name, programs, nvcc, tmp_path):
    fault = FAULTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc/cuda/ptx.h"
    text = header.read_text()
    assert text.count(fault.old) == 1
    header.write_text(text.replace(fault.old, fault.new))

    program, *arguments = fault.program
    source, target = tmp_path / "csrc/cuda" / fault.source, f"fastseq_cuda_ptx_{program}_tests"
    ptx, cpp = (tmp_path / f"{source.stem}.{kind}" for kind in ("ptx", "cpp"))
    flags = [*compilation.nvcc_flags(), "-ccbin", compilation.host_compiler(), "-I", tmp_path / "csrc"]
    finish([nvcc, "-ptx", "-arch=compute_80", source, "-o", ptx, *flags])
    try:
        cpp.write_text(translation.translate(ptx, [".*"]))
    except translation.Unsupported as error:
        assert fault.told in str(error)
        return
    objects, of_program = [], ["emulation", *(["emulated", f"{program}_tests"] if program != "probes" else [])]
    folders = [f"/{target}.dir/", *(f"/fastseq_cuda_{part}.dir/" for part in of_program)]
    for entry in json.loads((FOLDER / "compile_commands.json").read_text()):
        if not any(folder in entry["output"] for folder in folders):
            continue
        objects.append(FOLDER / entry["output"])
        if entry["file"].endswith(f"/ptx/{cpp.name}"):
            objects[-1] = tmp_path / "planted.o"
            command = [word.replace(entry["file"], str(cpp)) for word in shlex.split(entry["command"])]
            command[command.index("-o") + 1] = str(objects[-1])
            finish(command)
    finish([command[0], *objects, "-o", tmp_path / target])
    code, output = run(tmp_path, f"ptx_{program}", *arguments)
    assert code == 1 and re.search(rf"FAILED.*{fault.told}", output), f"{code}: {output[-3000:]}"


def finish(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- What the translator does not know -------------------------------------------------------------------------------
KERNEL = """.version 9.0
.target sm_80
.address_size 64
.visible .entry kernel(
.param .u64 kernel_param_0
)
{{
.reg .pred %p<2>;
.reg .b32 %r<4>;
.reg .b64 %rd<4>;
{}
ret;
}}
"""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("mul.hi.u32 %r1, %r2, %r3;", "the opcode mul.hi.u32 is not on the whitelist"),
        ("@%p1 add.sat.s32 %r1, %r2, %r3;", "the opcode add.sat.s32 is not on the whitelist"),
        ("ld.shared.nc.f32 %r1, [%r2];", "the opcode ld.shared.nc.f32 is not on the whitelist"),
        ("mov.u32 %r1, %clock;", "the operand %clock cannot be read as u32"),
        ("add.s32 %r1, %rd2, %r3;", "%rd2 has 64 bits, expected 32"),
        ("add.s32 %r1, %r2, 5000000000;", "5000000000 is no number of 32 bits"),
        ("add.s32 %r1, %r2;", "2 operands"),
        ("add.s32 %r9, %r2, %r3;", "%r9 is not a register"),
        ("st.global.u32 [%r1], %r2;", "%r1 is not a register of an address, of 64 bits"),
        ("ld.param.u64 %rd1, [other_param_0];", "other_param_0 is not a register of an address"),
        ("@%r1 ret;", "%r1 is not a predicate"),
        (".local .b8 array[16];", "the opcode .local is not on the whitelist"),
        (".reg .b128 %q<2>;", "registers of an unknown kind"),
    ],
)
def test_what_is_not_known_is_told(line, told, tmp_path):
    file = tmp_path / "kernels.ptx"
    file.write_text(KERNEL.format(line))
    with pytest.raises(translation.Unsupported) as error:
        translation.translate(file, [".*"])
    assert str(error.value).startswith("kernels.ptx:11: kernel: ") and told in str(error.value)


def test_a_name_that_no_kernel_has_is_told(tmp_path):
    file = tmp_path / "kernels.ptx"
    file.write_text(KERNEL.format("mov.u32 %r1, %tid.x;"))
    assert "special_tid_x()" in translation.translate(file, ["kern"])
    with pytest.raises(translation.Unsupported, match="none of the 1 kernels matches colonel"):
        translation.translate(file, ["kern", "colonel"])
