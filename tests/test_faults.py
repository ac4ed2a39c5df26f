"""Planted faults: each is put into a copy of the kernels' source, and the kernel tests built from it must see it. And
variants, which put what rarely happens, or happens on other machines, in the usual's place, and must change nothing.

Opt-in, as each one compiles the kernels again: `make test-faults`.
"""

import shutil
from pathlib import Path

import pytest
from kernel_program import AMX_EMULATED, build_and_run

from fastseq import _C

ROOT = Path(__file__).resolve().parent.parent
CELLS, DRIVER, PANEL = "csrc/cells.h", "csrc/cpu/rnn_driver.h", "csrc/cpu/panel.h"
GEMM, BLOCK = "csrc/cpu/gemm.h", "csrc/cpu/gemm_block.h"
DIRECT, STEP = "csrc/cpu/direct.h", "csrc/cpu/step_weights.h"
AMX, AMX_PRODUCT = "csrc/cpu/amx.h", "csrc/cpu/amx_product.h"
PARALLEL, VECTORS = "csrc/cpu/parallel.h", "csrc/cpu/vec.h"
FORWARD, BACKWARD = "csrc/cpu/rnn_forward.h", "csrc/cpu/rnn_backward.h"
STACK = "csrc/cpu/rnn_stack.h"
ATTENTION_FORWARD, ATTENTION_BACKWARD = "csrc/cpu/attention_forward.h", "csrc/cpu/attention_backward.h"

# name: file, what is there once, what it becomes
FAULTS = {
    "lstm: the forget gate reads the input gate's gx": (
        CELLS,
        "f = sigmoid(gx[1] + gh[1])",
        "f = sigmoid(gx[0] + gh[1])",
    ),
    "lstm: the old cell state is dropped": (CELLS, "c = fma(f, c, i * g);", "c = i * g;"),
    "gru: z and 1 - z change places": (CELLS, "return fma(z, h_prev - n, n);", "return fma(z, n - h_prev, h_prev);"),
    "gru: the reset gate is left out": (CELLS, "n = tanh(fma(r, q, gx[2]))", "n = tanh(q + gx[2])"),
    "reverse: rows that start late read a predecessor": (
        DRIVER,
        "return {there < here ? there : here, from};",
        "return {here, from};",
    ),
    "h_n is the first step's": (FORWARD, "last = walk_.reverse ? 0 : t - 1", "last = 0"),
    "packing drops the last unit of a part panel": (
        PANEL,
        "if (i >= rows_there) continue;",
        "if (i + 1 >= rows_there) continue;",
    ),
    "packing drops the last number of a part vector": (
        PANEL,
        "rows[i] = V::load(row, numbers);",
        "rows[i] = V::load(row, numbers - 1);",
    ),
    "a part panel that is packed straight loses its last unit": (
        PANEL,
        "V::load(from + u, valid - u) : V(0)",
        "V::load(from + u, valid - u - 1) : V(0)",
    ),
    "backward, rnn: the wrong sign in tanh's derivative": (CELLS, "V(1) - h * h", "V(1) + h * h"),
    "backward, lstm: dc does not pass the forget gate": (CELLS, "dc = dc_now * f;", "dc = dc_now;"),
    "backward, lstm: g's derivative is left out": (CELLS, "dc_now * i * (V(1) - g * g)", "dc_now * i"),
    "backward, gru: dh passes unscaled around the gates": (CELLS, "return dh * z;", "return dh;"),
    "backward, gru: W_hh of n gets gx's gradient": (CELLS, "{{0, 0, 2}, {3, 2, 1}}", "{{0, 0, 2}, {2, 2, 1}}"),
    "backward: the carry forgets what was in it": (
        BACKWARD,
        "(V::load(carry, valid) + sum).store",
        "sum.store",
    ),
    "backward: dW_hh takes h of the same step": (BACKWARD, "walk_.reverse ? begin + B : begin - B", "begin"),
    "backward: every chunk overwrites the one before": (BACKWARD, "!first, d_w_hr_.get()", "false, d_w_hr_.get()"),
    "backward: one of the small products is left out": (BACKWARD, "small[count++] = which;", "small[count] = which;"),
    "forward: a thread takes the first rows for its own": (
        FORWARD,
        "(p_->schedule.offset(t) + rows.begin) * I",
        "p_->schedule.offset(t) * I",
    ),
    "forward: a thread's rows of a step take the gx of the step before": (
        FORWARD,
        "done += rows.end - rows.begin;",
        "done += s > begin ? rows.end - rows.begin : 0;",
    ),
    "wave: no layer waits for the one it reads": (STACK, "if (i > 0) wave.wait(i - 1, end);", ""),
    "wave: dx of every piece is written where the first is": (
        BACKWARD,
        "T* const to = p_->dx + rows.begin * I",
        "T* const to = p_->dx",
    ),
    "wave: a later chunk of steps overwrites the gradients": (
        STACK,
        "all[i].gradients(s1 == T_,",
        "all[i].gradients(true,",
    ),
    "gemm, turned: a later block of K overwrites the first": (
        BLOCK,
        "      transpose_all(c, ldc, columns, a.count, sums, width);",
        "",
    ),
    "gemm, turned: columns past the first rows that go by are the first": (
        BLOCK,
        "columns{strips + j * k.size,",
        "columns{strips,",
    ),
    "gemm, turned: strips are packed on top of one another": (
        GEMM,
        "j, count, k.begin, k.size, to + j * k.size)",
        "j, count, k.begin, k.size, to)",
    ),
    "gemm: columns of a few change places": (GEMM, "left[j * k + i] =", "left[(n - 1 - j) * k + i] ="),
    "amx: the last of an odd number of blocks is left out": (AMX_PRODUCT, "if (r < rows) amx", "if (r == 0) amx"),
    "amx: sums begin anew": (AMX_PRODUCT, "if (accumulate) {\n      Amx::load", "if (false) {\n      Amx::load"),
    "amx: terms past the last are anything": (AMX_PRODUCT, "if (done % kAmxTerms)\n", "if (false)\n"),
    "amx: tiles have a row too few": (AMX, "state().rows = rows;", "state().rows = rows > 1 ? rows - 1 : 1;"),
    "amx: P and dS past the last query are anything": (
        ATTENTION_BACKWARD,
        "r < padded_terms<F>(rows); r += 2",
        "r < rows; r += 2",
    ),
    "amx: a step takes W_hh's panels for W_ih's": (STEP, "multiply(other.panel_of(j)", "multiply(panel_of(j)"),
    "forward: of vectors side by side all read the first one's c": (
        FORWARD,
        "c.part[i] = V::load(c_ + at.r * H_",
        "c.part[i] = V::load(c_ + places[0].r * H_",
    ),
    "gemm: a later block of K overwrites the first": (GEMM, "accumulate_ || k.begin > 0;", "accumulate_;"),
    "gemm: shorter blocks move their panels together": (
        GEMM,
        "to + j * layout_.panel_stride + from",
        "to + j * Shape::panel_numbers(k.size) + from",
    ),
    "packed beforehand: W_ih is looked for where W_hh is": (FORWARD, "ready ? ready + at.w_ih : nullptr", "ready"),
    "gemm: nobody waits for the others' panels": (
        GEMM,
        "wait_until([&] { return progress.packed() == pieces; });",
        "",
    ),
    "bfloat16: the second number of a pair is the first": (
        PANEL,
        "pairs_at(from + u, from + ld + u, V::size, V::size)",
        "pairs_at(from + u, from + u, V::size, V::size)",
    ),
    "products: the last vector of the last panel is not computed": (
        PANEL,
        "if (numbers <= (NV - 1) * V::size)",
        "if (numbers <= NV * V::size)",
    ),
    "attention: what was summed before a larger score is not rescaled": (
        ATTENTION_FORWARD,
        "(V::load(sums + j) * V(factor)).store(sums + j);",
        "V::load(sums + j).store(sums + j);",
    ),
    "attention: the last key of a band is left out": (
        "csrc/attention_params.h",
        "i + high < keys ? i + high + 1 : keys",
        "i + high < keys ? i + high : keys",
    ),
    "attention: grouped heads read the first keys": (
        ATTENTION_FORWARD,
        "pack_rows(p_->v.at(kv_head, j0)",
        "pack_rows(p_->v.at(0, j0)",
    ),
    "attention: slopes are measured from the first key": (
        "csrc/cpu/attention_scores.h",
        "j0 - i - p.diagonal, vectors",
        "j0 - i, vectors",
    ),
    "attention: dropout draws the same numbers for every query": (
        "csrc/random.h",
        "words[1][l] = static_cast<uint32_t>(query)",
        "words[1][l] = 0",
    ),
    "attention: entries of the batch take the first one's number of keys": (
        "csrc/attention_entry.h",
        "p.keys = p.ragged_keys.count(b, p.keys)",
        "p.keys = p.ragged_keys.count(0, p.keys)",
    ),
    "attention, backward: dV takes probabilities before dropout": (
        ATTENTION_BACKWARD,
        "if (multipliers_.get()) multiply_row(multipliers_.get(), vectors, s);",
        "",
    ),
    "attention, backward: the softcap's derivative is left out": (
        ATTENTION_BACKWARD,
        "if (cap_derivative_.get()) multiply_row(cap_derivative_.get(), vectors, d);",
        "",
    ),
    "attention, backward: delta is left out": (
        ATTENTION_BACKWARD,
        "probability * (V::load(d + j) - less) * factor",
        "probability * V::load(d + j) * factor",
    ),
    "attention, backward: a part's dQ is left out": (
        ATTENTION_BACKWARD,
        "for (int64_t n = 1; n < parts; ++n) sum = sum +",
        "for (int64_t n = 1; n < 1; ++n) sum = sum +",
    ),
    "attention, backward: of keys, queries that see them late are left out": (
        ATTENTION_BACKWARD,
        "end = j0_ + c1 - p_->band.low - i0_",
        "end = j0_ + c1 - p_->band.low - i0_ - 1",
    ),
    "direct: the last numbers of a sum are left out": (DIRECT, "add(Part<0>{}, k, k_size - k);", ""),
}


# What must change nothing: name: (file, what is there once, what it becomes), ...
VARIANTS = {
    "every wait for another thread is a stall": (
        (PARALLEL, "kStall = 300000", "kStall = -1"),
        (PARALLEL, "kAllowed = 1000000", "kAllowed = -1000000000"),
        (PARALLEL, "kSpins = 2000", "kSpins = 1"),
        (PARALLEL, "pause = 8 * nanoseconds", "pause = 0 * nanoseconds"),
    ),
    "weights always come from far away": (
        ("csrc/cpu/step_weights.h", "kBytesFar = FASTSEQ_VECTOR_BYTES == 32 ? 1 << 20 : 6 << 20", "kBytesFar = 0"),
    ),
    "tiles of a product are all taken from the back": (
        (PARALLEL, "own = all[share.member].take_first(most, least);", "own{0, 0};"),
    ),
    "rows are shared anew after every step": (
        (DRIVER, "kWorkToMeasure = 1 << 26;", "kWorkToMeasure = 1;"),
        (DRIVER, "kWorthwhile = 24;", "kWorthwhile = int64_t(1) << 60;"),
    ),
    "a layer of a wave is one step behind the one it reads": ((STACK, "kWaveRows = 12", "kWaveRows = 1"),),
    "members of a team share places at their barrier": ((PARALLEL, "kPlaces = 16", "kPlaces = 2"),),
    "vectors as wide as those of AVX-512, on any processor": (
        (
            VECTORS,
            "#if defined(__AVX512F__) || defined(FASTSEQ_AMX_EMULATED)",
            "#undef __AVX2__\n#undef __FMA__\n#if 1",
        ),
    ),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("planted")
    for name in ("csrc", "cmake"):
        shutil.copytree(ROOT / name, tree / name)
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    return tree


@pytest.mark.slow
@pytest.mark.faults
def test_without_a_fault_all_is_well(tree):
    code, output = build_and_run(tree, tree / "build", _C.isa())
    assert code == 0, output[-3000:]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, tree):
    if name.startswith("gemm, turned") and not _C.isa().startswith(("avx512", "amx")):
        pytest.skip("only panels of AVX-512's vectors are wide enough")
    file, old, new = FAULTS[name]
    text = (tree / file).read_text()
    (tree / file).write_text(text.replace(old, new))
    try:
        code, output = build_and_run(tree, tree / "build", AMX_EMULATED if name.startswith("amx") else _C.isa())
    finally:
        (tree / file).write_text(text)
    assert code == 1 and " 0 failed" not in output.splitlines()[-1], output[-3000:]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_nothing(name, tree):
    before = {file: (tree / file).read_text() for file, _, _ in VARIANTS[name]}
    for file, old, new in VARIANTS[name]:
        (tree / file).write_text((tree / file).read_text().replace(old, new))
    try:
        code, output = build_and_run(tree, tree / "build", _C.isa())
    finally:
        for file, text in before.items():
            (tree / file).write_text(text)
    assert code == 0, output[-3000:]


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, id=name) for name, change in FAULTS.items()]
    + [
        pytest.param(change, id=f"{name} {i}") for name, changes in VARIANTS.items() for i, change in enumerate(changes)
    ],
)
def test_a_change_can_still_be_planted(change):
    file, old, new = change
    assert (ROOT / file).read_text().count(old) == 1 and old != new
