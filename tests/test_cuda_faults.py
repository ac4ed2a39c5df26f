"""Faults planted in copies of the CUDA kernels, run on the CPU (csrc/cuda/emulation): each must be seen, by what the
kernels' tests find in some order of threads, or by a sanitizer where results do not show it.

Opt-in but for a few, as each compiles kernels again: `make test-faults`.
"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_emulation import ROOT, SANITIZERS, build, configure, run, skip_without_emulation, skip_without_sanitizer

ORDERS = ["first-to-last", "last-to-first", "random:1", "random:2"]
REPORTS = {"threads": "ThreadSanitizer: data race", "addresses": "AddressSanitizer"}


class Fault(NamedTuple):
    file: str  # of csrc/cuda
    old: str  # there once; runs of white space are the same
    new: str
    program: tuple  # the tests and their arguments
    by: str = "value"  # or a sanitizer


RNN, LSTM = ("rnn", "--quick", "rnn_tanh"), ("rnn", "--quick", "lstm")
RNN_ONCE, ATTENTION_ONCE = ("rnn", "--races", "rnn_tanh"), ("attention", "--races", "bfloat16")
FLOAT_ATTENTION_ONCE = ("attention", "--races", "float32")
HALF_ATTENTION, FLOAT_ATTENTION = ("attention", "--quick", "bfloat16"), ("attention", "--quick", "float32")

QUICK = {
    "gemm: nobody waits for the others' parts of a tile": Fault(
        "gemm.cu",
        "cp_async_wait<0>(); } __syncthreads(); const T* const tile_a",
        "cp_async_wait<0>(); } const T* const tile_a",
        RNN_ONCE,
    ),
    "gemm: of two tiles under way, one too many": Fault(
        "gemm.cu", "cp_async_wait<2>();", "cp_async_wait<4>();", RNN_ONCE
    ),
    "gemm: a tile is overwritten while others read it": Fault(
        "gemm.cu",
        "mma<T>(sums[j], x, two); } } __syncthreads();",
        "mma<T>(sums[j], x, two); } }",
        RNN_ONCE,
        "threads",
    ),
}
OTHERS = {
    "gemm: one number too many along k": Fault("gemm.cu", "l < lines && k < depth", "l < lines && k <= depth", RNN),
    "gemm: one row too many": Fault(
        "gemm.cu", "l < lines && k < depth", "l <= lines && k < depth", RNN_ONCE, "addresses"
    ),
    "gemm: too little shared memory": Fault(
        "gemm.cu",
        "2 * 2 * HalfTile::kNumbers * sizeof(T);",
        "2 * 2 * HalfTile::kNumbers * sizeof(T) - 16;",
        RNN_ONCE,
        "addresses",
    ),
    "column sums: lines are added up before they are there": Fault(
        "rnn_steps.cuh",
        "sums[line * kWarp + column] = sum; __syncthreads();",
        "sums[line * kWarp + column] = sum;",
        RNN,
    ),
    "the reverse direction goes on from the step itself": Fault(
        "rnn_steps.cuh",
        "offset_before(int64_t t) const { return schedule.offset(d == 0 ? t - 1 : t + 1); }",
        "offset_before(int64_t t) const { return schedule.offset(d == 0 ? t - 1 : t); }",
        RNN,
    ),
    "persistent, forward: blocks do not meet after a step": Fault(
        "rnn_persistent.cuh",
        "// Also before the next step's sums overwrite these. grid_sync();",
        "__syncthreads();",
        RNN,
    ),
    "persistent, backward: blocks do not meet after a step": Fault(
        "rnn_persistent.cuh",
        "and dg is there for all. grid_sync();",
        "\n__syncthreads();",
        RNN,
    ),
    "persistent, backward: sums are read before they are there": Fault(
        "rnn_persistent.cuh",
        "__syncthreads(); #pragma unroll for (int e = 0; e < kEach; ++e) { const int i = threadIdx.x + e * kThreads; "
        "if (i >= kRows * kUnits) continue;",
        "for (int e = 0; e < kEach; ++e) { const int i = threadIdx.x + e * kThreads; "
        "if (i >= kRows * kUnits) continue;",
        RNN,
    ),
    "persistent: words of two fragments of the left side change places": Fault(
        "rnn_persistent.cuh", "a[i][w % 2].word[pair + w / 2]", "a[i][w / 2].word[pair + w % 2]", RNN
    ),
    "persistent: one row too many": Fault(
        "rnn_persistent.cuh", "row < rows ? left.row(row)", "row <= rows ? left.row(row)", RNN_ONCE, "addresses"
    ),
    "persistent: too little shared memory": Fault(
        "rnn_plan.cu", "* sums_row(columns) * 4;", "* sums_row(columns) * 4 - 64;", RNN_ONCE, "addresses"
    ),
    "persistent: gates change places": Fault(
        "rnn_persistent.cuh",
        "p.w_hh[d][(column / kUnits * H + unit) * H + k]",
        "p.w_hh[d][((column / kUnits ^ 1) * H + unit) * H + k]",
        LSTM,
    ),
    "attention, forward: nobody waits for the others' parts of a tile": Fault(
        "attention_forward.cuh",
        "cp_async_wait<0>(); __syncthreads(); // Everybody",
        "cp_async_wait<0>(); // Everybody",
        HALF_ATTENTION,
    ),
    "attention, forward: a tile is not waited for": Fault(
        "attention_forward.cuh",
        "cp_async_wait<0>(); __syncthreads(); // Everybody",
        "cp_async_wait<1>(); __syncthreads(); // Everybody",
        HALF_ATTENTION,
    ),
    "attention, forward: a tile is overwritten while others read it": Fault(
        "attention_forward.cuh",
        "__syncthreads(); // Everybody is through with the tiles before these. if (kStages == 1) { "
        "load_values(keys, j0); } else if (!last) { T* const next = tiles + (stage ^ 1) * 2 * kKeys * kSize; "
        "load_keys(next, j0 + kKeys), load_values(next, j0 + kKeys); }",
        "if (kStages == 1) { load_values(keys, j0); } else if (!last) { "
        "T* const next = tiles + (stage ^ 1) * 2 * kKeys * kSize; "
        "load_keys(next, j0 + kKeys), load_values(next, j0 + kKeys); } __syncthreads();",
        ATTENTION_ONCE,
        "threads",
    ),
    "attention, forward: the one tile of keys is overwritten while others read it": Fault(
        "attention_forward.cuh",
        "__syncthreads(); if (!last) load_keys(keys, j0 + kKeys);",
        "if (!last) load_keys(keys, j0 + kKeys); __syncthreads();",
        ATTENTION_ONCE,
        "threads",
    ),
    "attention, backward: a pair does not wait for what is handed on": Fault(
        "attention_backward.cuh",
        "probabilities(std::true_type{}); __syncthreads();",
        "probabilities(std::true_type{});",
        HALF_ATTENTION,
    ),
    "attention, backward: the one tile of queries is overwritten while others read it": Fault(
        "attention_backward.cuh",
        "if (kStages == 1 && next_n < end_head) { __syncthreads();",
        "if (kStages == 1 && next_n < end_head) {",
        FLOAT_ATTENTION_ONCE,
        "threads",
    ),
    "attention, backward: the one tile of keys is overwritten while others read it": Fault(
        "attention_backward.cuh",
        "if (kStages == 1 && j0 + kKeys < end) { __syncthreads();",
        "if (kStages == 1 && j0 + kKeys < end) {",
        FLOAT_ATTENTION_ONCE,
        "threads",
    ),
    "attention of few queries: factors are read before they are there": Fault(
        "attention_few.cu", "- shift); __syncthreads();", "- shift);", HALF_ATTENTION
    ),
    "attention: two right sides change places": Fault(
        "attention_tiles.cuh",
        "{rights.parts[right][2 * i], rights.parts[right][2 * i + 1]}",
        "{rights.parts[right][2 - 2 * i], rights.parts[right][3 - 2 * i]}",
        HALF_ATTENTION,
    ),
    "attention of floats: what is left of the right sides is not multiplied": Fault(
        "attention_tiles.cuh", "add(smaller, 1, 0), add(smaller, 0, 1);", "add(smaller, 1, 0);", FLOAT_ATTENTION
    ),
    "attention of floats: terms in another order than probabilities": Fault(
        "attention_tiles.cuh",
        "words[e] = left[m][k][e % 2 * 2 + e / 2];",
        "words[e] = left[m][k][e];",
        FLOAT_ATTENTION,
    ),
    "attention: one row too many of a tile": Fault(
        "attention_tiles.cuh",
        "row < rows && valid > 0; load_chunk(tile + tile_at<kSize, T>(row, mine.chunk), there ? at",
        "row <= rows && valid > 0; load_chunk(tile + tile_at<kSize, T>(row, mine.chunk), there ? at",
        ATTENTION_ONCE,
        "addresses",
    ),
    "attention, forward: too little shared memory": Fault(
        "attention_forward.cuh",
        "(kRows + kStages * 2 * kKeys) * kBytes;",
        "(kRows + kStages * 2 * kKeys) * kBytes - 16;",
        ATTENTION_ONCE,
        "addresses",
    ),
    "attention on CUDA cores: factors are overwritten while others read them": Fault(
        "attention_simt.cuh",
        "__syncthreads(); load_terms<T>(factors, left_rows",
        "load_terms<T>(factors, left_rows",
        FLOAT_ATTENTION_ONCE,
        "threads",
    ),
}
FAULTS = QUICK | OTHERS


def place_of(fault):
    """Where the fault's old text is in the file's text: the only match."""
    text = (ROOT / "csrc/cuda" / fault.file).read_text()
    pattern = r"\s+".join(re.escape(part) for part in fault.old.split())
    places = list(re.finditer(pattern, text))
    assert len(places) == 1, f"{len(places)} times in {fault.file}: {fault.old}"
    return text, places[0].span()


@pytest.fixture(scope="module")
def folder_of():
    """The folder in which the tests are built: for a sanitizer or none, once."""
    done = {}

    def folder(by):
        if by not in done:
            if by != "value":
                skip_without_sanitizer(by)
            done[by] = ROOT / "build" / ("cuda-emulated" if by == "value" else f"cuda-emulated-{by}")
            configure(ROOT, done[by], *([] if by == "value" else [SANITIZERS[by][0]]))
            build(done[by])
        return done[by]

    skip_without_emulation()
    return folder


def includes(file, seen):
    """Adds to `seen` the file, and what it includes."""
    if file in seen or not file.exists():
        return
    seen.add(file)
    for name in re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE):
        for folder in (file.parent, ROOT / "csrc"):
            includes((folder / name).resolve(), seen)


def build_planted(fault, folder, tree):
    """The program of the tests with the fault, in the tree: what the fault changes is compiled again, the rest taken
    from the folder."""
    text, (begin, end) = place_of(fault)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "csrc/cuda" / fault.file).write_text(text[:begin] + fault.new + text[end:])
    changed, objects = ROOT / "csrc/cuda" / fault.file, []
    program = f"fastseq_cuda_{fault.program[0]}_tests"
    of_program = [f"{target}.dir" for target in ("fastseq_cuda_emulation", "fastseq_cuda_emulated", program)]
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        if not any(part in entry["output"] for part in of_program):
            continue
        source, object_file, needed = Path(entry["file"]), folder / entry["output"], set()
        includes(source, needed)
        command = shlex.split(entry["command"])
        if changed in needed:
            object_file = tree / f"{source.name}.o"
            command = [argument.replace(str(ROOT / "csrc"), str(tree / "csrc")) for argument in command]
            command[command.index("-o") + 1] = str(object_file)
            compile_or_link(command)
        objects.append(object_file)
    sanitize = [] if fault.by == "value" else [f"-fsanitize={SANITIZERS[fault.by][1]}"]
    compile_or_link([command[0], *sanitize, *objects, "-o", tree / program])


def compile_or_link(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def check_is_seen(fault, folder_of, tmp_path):
    build_planted(fault, folder_of(fault.by), tmp_path)
    program, *arguments = fault.program
    if fault.by != "value":
        code, output = run(tmp_path, program, *arguments)
        assert code != 0 and REPORTS[fault.by] in output, output[-3000:]
        return
    ends = {}
    for order in ORDERS:
        code, output = run(tmp_path, program, *arguments, schedule=order, timeout=300)
        ends[order] = f"{code}: {output[-300:]}"
        if code == 1 and "FAILED" in output:
            return
    pytest.fail(f"not seen in any order of threads: {ends}")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_planted_fault_is_seen(name, folder_of, tmp_path):
    check_is_seen(QUICK[name], folder_of, tmp_path)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("name", OTHERS)
def test_another_planted_fault_is_seen(name, folder_of, tmp_path):
    check_is_seen(OTHERS[name], folder_of, tmp_path)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_still_be_planted(name):
    place_of(FAULTS[name])
    assert FAULTS[name].old != FAULTS[name].new
