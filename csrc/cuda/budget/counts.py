"""Operations and bytes of the kernels at a few named sizes, by formula.

The formulas know the kernels' tiles. That they still do is checked: with the tiles they give the threads, the grid and
the shared memory of a launch, which have to be those of launches.cpp. A formula that has fallen behind its kernel stops
the budget.

Bytes of device memory are the least possible: each tensor once. Bytes from the L2 cache are what all blocks together
ask for. Bytes of shared memory are what warps write and read there; what the lanes of a warp read together counts once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .compilation import Stopped
from .launching import Case, Launch

BYTES = {"float": 4, "double": 8, "bfloat16": 2, "float16": 2}
GATES = {"RnnTanhCell": 1, "RnnReluCell": 1, "LstmCell": 4, "GruCell": 3}
KEPT = {"RnnTanhCell": 0, "RnnReluCell": 0, "LstmCell": 5, "GruCell": 4}
GRADS = {"RnnTanhCell": 1, "RnnReluCell": 1, "LstmCell": 4, "GruCell": 4}

# What the budget's page counts: of the sizes that people use, one or two of each kind.
LAYER = {"steps": 100, "input": 512}
NAMED_CASES = [
    Case("rnn", "bfloat16", {"cell": "lstm", "backward": 0, "batch": 32, "hidden": 512, **LAYER}),
    Case("rnn", "bfloat16", {"cell": "lstm", "backward": 1, "batch": 32, "hidden": 512, **LAYER}),
    Case("rnn", "bfloat16", {"cell": "gru", "backward": 0, "batch": 64, "hidden": 1024, **LAYER}),
    Case("rnn", "float32", {"cell": "lstm", "backward": 0, "batch": 32, "hidden": 512, **LAYER}),
    Case("rnn", "float32", {"cell": "lstm", "backward": 1, "batch": 32, "hidden": 512, **LAYER}),
    Case("rnn", "bfloat16", {"cell": "lstm", "backward": 0, "batch": 256, "hidden": 2048, **LAYER}),
    Case("attention", "bfloat16", {"backward": 0, "batch": 4, "heads": 16, "queries": 1024, "keys": 1024, "size": 64}),
    Case("attention", "bfloat16", {"backward": 1, "batch": 4, "heads": 16, "queries": 1024, "keys": 1024, "size": 64}),
    Case(
        "attention",
        "bfloat16",
        {
            "backward": 0,
            "batch": 1,
            "heads": 32,
            "kv_heads": 8,
            "queries": 4096,
            "keys": 4096,
            "size": 128,
            "causal": 1,
        },
    ),
    Case(
        "attention",
        "bfloat16",
        {
            "backward": 1,
            "batch": 1,
            "heads": 32,
            "kv_heads": 8,
            "queries": 4096,
            "keys": 4096,
            "size": 128,
            "causal": 1,
        },
    ),
    Case(
        "attention",
        "bfloat16",
        {"backward": 0, "batch": 8, "heads": 32, "kv_heads": 8, "queries": 1, "keys": 4096, "size": 128},
    ),
    Case("attention", "float32", {"backward": 0, "batch": 4, "heads": 16, "queries": 1024, "keys": 1024, "size": 64}),
    Case("attention", "float32", {"backward": 1, "batch": 4, "heads": 16, "queries": 1024, "keys": 1024, "size": 64}),
    Case("attention", "float64", {"backward": 0, "batch": 4, "heads": 16, "queries": 1024, "keys": 1024, "size": 64}),
]


@dataclass(frozen=True)
class Counts:
    """Of all times that a kernel is launched in a call."""

    useful: int  # operations: a multiply-add is two
    issued: int  # with those of padding, of masked tiles and of split floats
    device: int  # bytes
    l2: int
    shared: int


class Shape(NamedTuple):
    """What the formula takes the launch to be."""

    grid: tuple[int, int, int]
    threads: int
    shared: int


def up(number: int, each: int) -> int:
    return -(-number // each)


# ---- Recurrent layers: rnn_persistent.cuh, rnn_steps.cuh -------------------------------------------------------------


def persistent(
    cell: str, t: str, split: str, units: str, rows: str, holds: str, case: Case, backward: bool
) -> tuple[Shape, Counts]:
    if holds == "true":
        raise ValueError("a case whose weights are in registers, too: what is read from shared memory is not counted")
    number, gates = BYTES[t], GATES[cell]
    unit, row = int(units), int(rows)
    sizes = case.sizes
    batch, hidden, steps, directions = sizes["batch"], sizes["hidden"], sizes["steps"], sizes.get("directions", 1)
    threads = 512 if backward and number == 2 else 256
    row_groups = 2 if row >= 64 else 1
    planes = threads // 32 // row_groups
    columns, parts = (unit, gates) if backward else (gates * unit, 1)
    # Along K, each part is padded to whole chunks of 64 bytes for each of the depth groups.
    depth_bytes = parts * up(hidden * number, 64 * planes) * 64 * planes
    weight_row = up(depth_bytes, 128) * 128 + 64
    grid = (up(hidden, unit), up(batch, row), directions)
    blocks = grid[0] * grid[1] * grid[2]
    shape = Shape(grid, threads, columns * weight_row + planes * row * (columns + 8) * 4)

    useful = 2 * steps * directions * batch * gates * hidden * hidden
    products = 3 if split == "true" else 1
    issued = 2 * steps * blocks * row * columns * (depth_bytes // number) * products
    weights = directions * gates * hidden * hidden * number
    state = directions * batch * hidden
    kept = KEPT[cell] * number
    if backward:
        # kept, the outputs' gradients and the state before, in; dg out, and in once more by the L2 cache.
        of_unit = kept + 2 * number + GRADS[cell] * number
    else:
        of_unit = gates * 4 + number + kept
    device = weights + steps * state * of_unit
    # Each block of units reads all of the left side of its rows.
    l2 = weights * grid[1] + steps * grid[0] * directions * batch * parts * hidden * number
    sums = 2 * planes * row * columns * 4
    shared = blocks * (columns * weight_row + steps * (columns * depth_bytes * row_groups + sums))
    return shape, Counts(useful, issued, device, l2, shared)


def persistent_forward(
    cell: str, t: str, split: str, units: str, rows: str, holds: str, *, case: Case
) -> tuple[Shape, Counts]:
    return persistent(cell, t, split, units, rows, holds, case, backward=False)


def persistent_backward(
    cell: str, t: str, split: str, units: str, rows: str, holds: str, *, case: Case
) -> tuple[Shape, Counts]:
    return persistent(cell, t, split, units, rows, holds, case, backward=True)


def step_forward(cell: str, t: str, *, case: Case) -> tuple[Shape, Counts]:
    batch, hidden = case.sizes["batch"], case.sizes["hidden"]
    computed, number = max(BYTES[t], 4), BYTES[t]
    state = computed * 2 if cell == "LstmCell" else number if cell == "GruCell" else 0
    of_unit = 2 * GATES[cell] * computed + state + number + KEPT[cell] * number
    shape = Shape((up(hidden, 128), min(batch, 65535), 1), 128, 0)
    moved = batch * hidden * of_unit
    return shape, Counts(0, 0, moved, moved, 0)


# ---- Products: gemm.cu -----------------------------------------------------------------------------------------------


def gemm(t: str, result: str, *, product: tuple[int, int, int], tensor_cores: bool) -> tuple[Shape, Counts]:
    m, n, k = product
    number, computed = BYTES[t], max(BYTES[t], 4)
    grid = (up(n, 64), up(m, 64), 1)
    blocks = grid[0] * grid[1]
    step = 32 if tensor_cores else 16
    depth = up(k, step) * step
    if tensor_cores:
        tiles = 2 * 2 * 64 * 32 * number
        # Written once; of 16 along k each of the eight warps reads 16 rows of a and 32 of b.
        shared = blocks * (2 * 64 * depth * number + 8 * depth * (16 + 32) * number)
    else:
        tiles = 2 * 16 * 65 * computed
        # A warp reads 2 numbers of a and 16 of b, four times.
        shared = blocks * (2 * 64 * depth * computed + 8 * depth * 4 * (2 + 16) * computed)
    counts = Counts(
        useful=2 * m * n * k,
        issued=2 * blocks * 64 * 64 * depth,
        device=(m * k + k * n) * number + m * n * BYTES[result],
        l2=(m * k * grid[0] + k * n * grid[1]) * number + m * n * BYTES[result],
        shared=shared,
    )
    return Shape(grid, 256, tiles), counts


def half_gemm(t: str, result: str, *, product: tuple[int, int, int]) -> tuple[Shape, Counts]:
    return gemm(t, result, product=product, tensor_cores=True)


def plain_gemm(t: str, result: str, *, product: tuple[int, int, int]) -> tuple[Shape, Counts]:
    return gemm(t, result, product=product, tensor_cores=False)


# ---- Attention: attention_*.cuh --------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Of one head: queries and keys that see each other, and the tiles with some of these."""

    seen: int
    tiles: int


def pairs_of(queries: int, keys: int, causal: bool, rows: int, columns: int) -> Pairs:
    """Causal: the last query sees the last key."""
    if not causal:
        return Pairs(queries * keys, up(queries, rows) * up(keys, columns))
    ends = [max(0, keys - queries + query + 1) for query in range(queries)]  # of each query's keys
    tiles = sum(up(ends[min(first + rows, queries) - 1], columns) for first in range(0, queries, rows))
    return Pairs(sum(ends), tiles)


class Heads:
    """The sizes of a case of attention."""

    def __init__(self, case: Case) -> None:
        sizes = case.sizes
        self.batch, self.heads = sizes["batch"], sizes["heads"]
        self.kv_heads = sizes.get("kv_heads", self.heads)
        self.queries, self.keys, self.size = sizes["queries"], sizes["keys"], sizes["size"]
        self.causal = bool(sizes.get("causal", 0))

    def numbers(self, of_queries: int, of_keys: int) -> int:
        """Of so many tensors as large as Q, and as large as K."""
        rows = of_queries * self.heads * self.queries + of_keys * self.kv_heads * self.keys
        return self.batch * rows * self.size


SPLIT = {"float": 3}  # products of tensor cores for one of numbers


def parts(t: str, columns: int, tiles_of_warp: int) -> int:
    """Of a product of rows, each of which reads the left side."""
    return max(1, columns // 8 * tiles_of_warp // 4) if t == "float" else 1


def forward_tiles(t: str, size: str, options: str, few: str, *, case: Case) -> tuple[Shape, Counts]:
    at, padded, number, is_few, half = Heads(case), int(size), BYTES[t], few == "true", BYTES[t] == 2
    tiles_of_warp = 1 if is_few or padded > 128 or (options == "true" and (not half or padded > 64)) else 2
    rows = 4 * tiles_of_warp * 16
    if half:
        columns = 64 if padded > 64 or options == "true" or is_few else 128
    else:
        columns = 16 if padded > 128 else 32 if padded > 64 or tiles_of_warp == 2 else 64
    stages = 1 if padded > 128 or rows * padded * number > 32 << 10 else 2
    shared = number * (rows + stages * 2 * columns) * padded
    packs = at.kv_heads if is_few else at.heads
    queries = at.heads // at.kv_heads * at.queries if is_few else at.queries
    splits = up(at.keys, 256) if is_few else 1
    row_tiles = up(queries, rows)
    blocks = at.batch * packs * row_tiles * splits
    busy_rows = rows  # of the warps that have any
    if is_few and stages == 2:
        if row_tiles > 1:
            raise Stopped("counts.py counts few queries of one tile of rows only.")
        busy_rows = up(queries, 16) * 16
    seen = pairs_of(queries, at.keys, at.causal, rows, columns)
    heads = at.batch * packs
    # Two products a pair. Each busy warp reads all of K and V; its queries once more with each tile of keys.
    of_tile = busy_rows // (16 * tiles_of_warp) * 2 * columns + busy_rows * parts(t, columns, tiles_of_warp)
    written = heads * seen.tiles * 2 * columns + blocks * rows
    rows_out = at.batch * at.heads * at.queries
    out = rows_out * splits * (at.size + 2) * 4 if is_few else rows_out * (at.size * number + 4)
    return Shape((blocks, 1, 1), 128, shared), Counts(
        useful=4 * heads * seen.seen * at.size,
        issued=4 * SPLIT.get(t, 1) * heads * seen.tiles * busy_rows * columns * padded,
        device=at.numbers(1, 2) * number + out,
        l2=heads * seen.tiles * 2 * columns * at.size * number + at.numbers(splits, 0) * number + out,
        shared=(written + heads * seen.tiles * of_tile) * padded * number,
    )


def key_gradients(t: str, size: str, options: str, *, case: Case) -> tuple[Shape, Counts]:
    at, padded, number, half = Heads(case), int(size), BYTES[t], BYTES[t] == 2
    pairs = padded > 128  # of warps, which share keys
    tiles_of_warp = 1 if padded > 64 or options == "true" or not half else 2
    keys = (32 if pairs else 64) * tiles_of_warp
    if half:
        queries = 16 if pairs else 64 if padded > 64 and options == "false" else 32
    else:
        queries = 16 if padded > 64 else 32 if options == "true" else 64
    handed_on = keys * queries if pairs else 0
    stages = 1 if padded * number > 512 else 2
    shared = number * (2 * keys + stages * 2 * queries) * padded + (4 * queries + handed_on) * 4
    blocks = at.batch * at.kv_heads * up(at.keys, keys)
    if at.causal and (at.queries != at.keys or at.keys % keys):
        raise Stopped("counts.py counts causal key gradients of whole tiles and as many queries as keys only.")
    # Of the queries of a tile of keys, those that see some of it: as of a causal triangle from the other side.
    seen = pairs_of(at.keys, at.queries, at.causal, keys, queries)
    heads = at.batch * at.heads
    # Keys and values are read by the warp that has them, a tile of queries or of dO for each product of each warp.
    of_tile = (2 * keys * parts(t, queries, tiles_of_warp) + 4 * (2 if pairs else 4) * queries) * padded * number
    of_tile += 2 * handed_on * 4
    written = (heads * seen.tiles * 2 * queries + blocks * 2 * keys) * padded * number
    rows = at.batch * at.heads * at.queries
    out = at.numbers(0, 2) * number
    return Shape((blocks, 1, 1), 128, shared), Counts(
        useful=8 * heads * seen.seen * at.size,
        issued=8 * SPLIT.get(t, 1) * heads * seen.tiles * keys * queries * padded,
        device=at.numbers(2, 2) * number + rows * 8 + out,
        l2=heads * seen.tiles * queries * (2 * at.size * number + 8) + at.numbers(0, 2) * number + out,
        shared=written + heads * seen.tiles * of_tile,
    )


def query_gradients(t: str, size: str, options: str, *, case: Case) -> tuple[Shape, Counts]:
    at, padded, number = Heads(case), int(size), BYTES[t]
    tiles_of_warp = 1 if padded * number > 256 or options == "true" else 2
    shares, stages = (2, 1) if padded * number > 512 else (1, 2)
    rows, columns = 64 // shares * tiles_of_warp, 16 if padded * number > 256 else 32 if tiles_of_warp == 2 else 64
    shared = number * (2 * rows + stages * 2 * columns) * padded
    blocks = at.batch * at.heads * up(at.queries, rows)
    seen = pairs_of(at.queries, at.keys, at.causal, rows, columns)
    heads = at.batch * at.heads
    of_tile = 2 * rows * shares * parts(t, columns, tiles_of_warp) + 4 * (2 * columns + columns // shares)
    written = heads * seen.tiles * 2 * columns + blocks * 2 * rows
    lines = heads * at.queries * 8
    out = at.numbers(1, 0) * number
    return Shape((blocks, 1, 1), 128, shared), Counts(
        useful=6 * heads * seen.seen * at.size,
        issued=(4 * shares + 2) * SPLIT.get(t, 1) * heads * seen.tiles * rows * columns * padded,
        device=at.numbers(2, 2) * number + lines + out,
        l2=heads * seen.tiles * 2 * columns * at.size * number + at.numbers(2, 0) * number + lines + out,
        shared=(written + heads * seen.tiles * of_tile) * padded * number,
    )


def forward_simt(t: str, columns: str, few: str, *, case: Case) -> tuple[Shape, Counts]:
    at, width, computed = Heads(case), 16 * int(columns), max(BYTES[t], 4)
    if few == "true":
        raise Stopped("counts.py has no formula of attention_forward_simt with few queries.")
    slices = up(at.size, width)
    factors, block = 2 * 32 * 65, 64 * 65
    blocks = at.batch * at.heads * up(at.queries, 64)
    seen = pairs_of(at.queries, at.keys, at.causal, 64, 64)
    tiles = at.batch * at.heads * seen.tiles * slices
    padded = up(at.size, 32) * 32
    # Of Q K^T both sides are written, and of a term a warp reads 4 (2 + 16) numbers; the probabilities are written and
    # read back, 4 times 2 rows for each of 64 terms, and V is written and read by all eight warps.
    scores = 2 * 64 * padded + 8 * padded * 4 * (2 + 16)
    output = 64 * 64 + 8 * 64 * 4 * 2 + 64 * width + 8 * 64 * width
    rows = at.batch * at.heads * at.queries
    out = rows * (at.size * BYTES[t] + computed)
    return Shape((blocks, slices, 1), 256, (factors + block) * computed), Counts(
        useful=4 * at.batch * at.heads * seen.seen * at.size,
        issued=2 * tiles * 64 * 64 * (padded + width),
        device=at.numbers(1, 2) * BYTES[t] + out,
        l2=tiles * 64 * (2 * at.size + min(width, at.size)) * BYTES[t] + out,
        shared=tiles * (scores + output) * computed,
    )


Formula = Callable[..., tuple[Shape, Counts]]
OF_CASE: dict[str, Formula] = {
    "persistent_forward_kernel": persistent_forward,
    "persistent_backward_kernel": persistent_backward,
    "step_forward_kernel": step_forward,
    "attention_forward_tiles": forward_tiles,
    "attention_key_gradients": key_gradients,
    "attention_query_gradients": query_gradients,
    "attention_forward_simt": forward_simt,
}
OF_PRODUCT: dict[str, Formula] = {"half_gemm_kernel": half_gemm, "gemm_kernel": plain_gemm}


def counts_of(launch: Launch, case: Case) -> Counts | None:
    """None of kernels that only move numbers between the others."""
    name, _, arguments = launch.kernel.removesuffix(">").partition("<")
    words = re.split(r",\s*", arguments)
    if name in OF_CASE:
        shape, counts = OF_CASE[name](*words, case=case)
    elif name in OF_PRODUCT:
        shape, counts = OF_PRODUCT[name](*words, product=launch.product)
    else:
        return None
    launched = Shape(launch.grid, launch.threads, launch.shared)
    if shape != launched:
        raise Stopped(
            f"{launch.kernel} is launched as {launched}, and the formula in counts.py takes it to be {shape}: "
            f"bring the formula up to date ({case})."
        )
    return Counts(*(launch.times * count for count in vars(counts).values()))
