"""Attention: the kernels against `reference.attention` in float64, and against torch's where both have an answer."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from attention_operators import PLAIN, backward, bound, forward, near, sdpa

import fastseq
from fastseq import _C, reference
from fastseq.bench import memory

# B, N, N_kv, L, S, D, Dv around the widths of vectors (2 to 16), tiles (6), panels (4 to 64) and the blocks of queries
# (48) and of keys (256, 512); then (low, high) and the mask's shape, "b" bool, "f" added.
SIZES = {
    "one of each": (1, 1, 1, 1, 1, 1, 1),
    "odd": (2, 3, 3, 7, 5, 3, 9),
    "grouped": (2, 4, 2, 50, 65, 20, 33),
    "whole vectors": (2, 4, 2, 50, 65, 20, 32),
    "one query": (1, 2, 2, 1, 700, 64, 64),
    "blocks": (1, 2, 1, 97, 513, 64, 64),
    "parts": (1, 1, 1, 49, 1300, 16, 40),
    "wide": (1, 1, 1, 13, 70, 130, 512),
    "wide blocks": (1, 2, 1, 20, 70, 130, 300),
}
BANDS = [(None, None), (None, 0), (-3, 2), (2, None), (-200, -150), (None, -40), (300, 1000)]
MASKS = [None, "b:BNLS", "b:L1", "b:1S", "f:NLS", "f:B11S", "f:L1", "f:1", "f:BNLS"]
CASES = list(
    {
        (size, BANDS[k % len(BANDS)], MASKS[k // 3 % len(MASKS)]): None
        for k, size in enumerate(itertools.islice(itertools.cycle(SIZES), 8 * len(MASKS)))
    }
)


def problem(size, mask, dtype, transposed=False):
    B, N, N_kv, L, S, D, Dv = SIZES.get(size, size)
    shapes = [(B, N, L, D), (B, N_kv, S, D), (B, N_kv, S, Dv)]
    if transposed:  # the heads of a row side by side, as a projection leaves them
        tensors = [torch.randn(b, r, n, d).transpose(1, 2) for b, n, r, d in shapes]
    else:
        tensors = [torch.randn(s) for s in shapes]
    attn_mask = None
    if mask:
        kind, letters = mask.split(":")
        sizes = [{"B": B, "N": N, "L": L, "S": S, "1": 1}[letter] for letter in letters]
        attn_mask = torch.rand(sizes) < 0.7 if kind == "b" else torch.randn(sizes)
        if letters == "BNLS":  # some rows see nothing
            attn_mask[:, :, ::3] = False if kind == "b" else -math.inf
    return [t.to(dtype) if t is not None and t.dtype != torch.bool else t for t in (*tensors, attn_mask)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "band", "mask"), CASES, ids=[f"{s}-{b}-{m}" for s, b, m in CASES])
def test_forward_and_backward_against_the_reference(size, band, mask, dtype):
    tensors = problem(size, mask, dtype, transposed=size in ("grouped", "blocks"))
    options = PLAIN._replace(attn_mask=tensors[3], low=band[0], high=band[1])
    # The reference starts from the very numbers, in float64.
    leaves = [t if t is None or t.dtype == torch.bool else t.double().requires_grad_() for t in tensors]
    added = mask is not None and mask[0] == "f"
    if added:  # each score with a number of its own, whose gradients are summed below
        B, N, _, L, S, _, _ = SIZES[size]
        leaves[3] = leaves[3].detach().expand(B, N, L, S).clone().requires_grad_()
    want, want_lse = reference.attention(*leaves[:3], **options._replace(attn_mask=leaves[3])._asdict())
    _C.reset_counters()
    out, lse = forward(*tensors[:3], *options)
    assert _C.counters() == {f"attention_forward/{str(dtype).removeprefix('torch.')}": 1}
    near(out, want, bound(dtype))
    near(lse, want_lse, bound(torch.float32 if dtype == torch.bfloat16 else dtype))

    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -math.inf, 0)
    wanted = [t for t in leaves if t is not None and t.dtype != torch.bool]
    needs = [True] * 3 + [len(wanted) == 4]
    seen = want_lse.masked_fill(want_lse == -math.inf, 0)
    want = torch.autograd.grad([want, seen], wanted, [d_out.double(), d_lse.double()])
    got = backward(d_out, d_lse, *tensors[:3], *options, out, lse, needs)
    for g, w in zip(got[:3], want[:3], strict=True):
        near(g, w, bound(dtype, 4))
    if added:  # terms that cancel in a sum do not cancel in its error
        squares = want[3].square().sum_to_size(tensors[3].shape)
        near(got[3], want[3].sum_to_size(tensors[3].shape), bound(dtype, 4) * max(1.0, squares.max().sqrt().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_beyond_a_view_is_not_read(dtype):
    shapes = [(2, 3, 50, 20), (2, 3, 70, 20), (2, 3, 70, 33)]
    wide = [torch.full((b, n, r + 2, d + 5), math.nan, dtype=dtype) for b, n, r, d in shapes]
    views = [w[:, :, 1:-1, 2:-3].copy_(torch.randn(s)) for w, s in zip(wide, shapes, strict=True)]
    want = sdpa(*[v.contiguous() for v in views])
    assert torch.equal(sdpa(*views), want)
    leaves = [v.detach().requires_grad_() for v in views]
    got = torch.autograd.grad(sdpa(*leaves).sum(), leaves)
    assert all(g.isfinite().all() for g in got)


OPTIONS = [
    {},
    {"is_causal": True},
    {"scale": 0.1},
    {"window": 3},
    {"is_causal": True, "window": 2, "causal_alignment": "bottom_right"},
    {"window": (None, 1)},
]


WITH_MASKS = [(o, m) for o in OPTIONS for m in (None, "b:BNLS", "f:L1", "f:BNLS") if not (m and o.get("is_causal"))]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("options", "mask"), WITH_MASKS, ids=str)
def test_gradcheck(options, mask):
    q, k, v, m = problem((2, 4, 2, 5, 7, 3, 2), mask, torch.float64)
    if mask == "f:BNLS":
        m[m == -math.inf] = -1.0  # whose neighbours gradcheck would ask about
    leaves = [t.requires_grad_() for t in (q, k, v)] + ([m.requires_grad_()] if mask and mask[0] == "f" else [])

    def call(q, k, v, *m_):
        return sdpa(q, k, v, m_[0] if m_ else m, enable_gqa=True, return_lse=not mask, **options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("shapes", [
    ((5, 4), (7, 4), (7, 3)),
    ((3, 5, 4), (3, 7, 4), (3, 7, 3)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 3)),
    ((2, 1, 5, 4), (1, 3, 7, 4), (1, 3, 7, 3)),
    ((1, 3, 5, 4), (2, 3, 7, 4), (2, 1, 7, 3)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 1, 7, 3)),
    ((0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 3)),
    ((2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
])  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_shapes_that_torch_takes(shapes, masked):
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    mask = torch.rand(shapes[0][-2], 7) < 0.6 if masked else None
    if masked:
        mask[:, 0] = True
    want, got = F.scaled_dot_product_attention(*tensors, mask), sdpa(*tensors, mask)
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want)
    d = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, tensors, d), torch.autograd.grad(want, tensors, d), strict=True):
        torch.testing.assert_close(a, b)


def test_no_keys_give_zeros():
    q, k, v = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 0, 4), torch.randn(2, 3, 0, 6)
    out, lse = sdpa(q, k, v, return_lse=True)
    assert torch.equal(out, torch.zeros(2, 3, 5, 6)) and (lse == -math.inf).all()
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.zeros_like(q))


def test_no_heads_give_nothing():
    q = torch.randn(64, 0, 100, 64, requires_grad=True)
    k, v = (torch.randn(64, 8, 100, 64, requires_grad=True) for _ in range(2))  # as many as are asked for ahead
    out = sdpa(q, k, v, enable_gqa=True)
    assert out.shape == q.shape
    _, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dk.any() and not dv.any()


def test_a_query_that_sees_nothing_gives_zeros_and_zero_gradients():
    tensors = [torch.randn(1, 2, 60, 8, requires_grad=True) for _ in range(3)]
    mask = torch.ones(60, 60, dtype=torch.bool)
    mask[7] = False
    out = sdpa(*tensors, mask)
    assert torch.equal(out[:, :, 7], torch.zeros(1, 2, 8))
    dq, dk, dv = torch.autograd.grad(out.square().sum(), tensors)
    assert torch.equal(dq[:, :, 7], torch.zeros(1, 2, 8)) and all(d.isfinite().all() for d in (dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 70}], ids=str)
def test_a_rows_bits_are_its_own(dtype, options):
    q, k, v = [torch.randn(3, 4, 600, 24).to(dtype) for _ in range(3)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out, lse = sdpa(*leaves, return_lse=True, **options)
            results.append([out, lse, *torch.autograd.grad(out.float().square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = sdpa(q[1:2, 2:3], k[1:2, 2:3], v[1:2, 2:3], **options)
    assert torch.equal(alone, results[0][0][1:2, 2:3])


def test_properties():
    q, k, v = [torch.randn(2, 4, 130, 16, dtype=torch.float64) for _ in range(3)]
    close = torch.testing.assert_close
    full = sdpa(q, k, v)
    order = torch.randperm(130)
    close(sdpa(q, k[:, :, order], v[:, :, order]), full)
    close(sdpa(q, k, v, torch.full((1,), 3.7, dtype=torch.float64)), full)
    causal = torch.ones(130, 130, dtype=torch.bool).tril()
    close(sdpa(q, k, v, is_causal=True), sdpa(q, k, v, causal))
    close(sdpa(q[:, :, :30], k, v, is_causal=True, causal_alignment="bottom_right"),
          sdpa(q[:, :, :30], k, v, causal[-30:]))  # fmt: skip
    close(sdpa(q, k, v, is_causal=True, window=9), sdpa(q, k, v, causal & ~causal.tril(-10)))
    close(sdpa(q, k[:, :2], v[:, :2], enable_gqa=True),
          sdpa(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1)))  # fmt: skip
    parts = [sdpa(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in ((0, 50), (50, 130))]
    lse = torch.stack([p[1] for p in parts]).logsumexp(0)
    close(sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in parts), full)


def test_large_scores_stay_finite_and_nan_is_seen():
    q, k, v = [torch.randn(1, 1, 40, 8) for _ in range(3)]
    close = torch.testing.assert_close
    close(sdpa(q * 1e4, k * 1e4, v), F.scaled_dot_product_attention(q * 1e4, k * 1e4, v))
    q[0, 0, 3, 0] = math.nan
    out = sdpa(q, k, v)
    assert out[0, 0, 3].isnan().all() and out[0, 0, [2, 4]].isfinite().all()


def test_float16():
    tensors = [torch.randn(1, 2, 9, 8).half().requires_grad_() for _ in range(3)]
    out, want = sdpa(*tensors), F.scaled_dot_product_attention(*[t.double() for t in tensors])
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=1e-4)
    assert torch.autograd.grad(out.sum(), tensors)[0].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    q, k, v = [torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3)]
    mask = torch.randn(6, 6)
    with torch.autocast("cpu", dtype):
        out, want = sdpa(q, k, v.to(dtype), mask), F.scaled_dot_product_attention(q, k, v.to(dtype), mask)
        assert sdpa(*[t.double() for t in (q, k, v)]).dtype == torch.float64
    assert out.dtype == want.dtype == dtype
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


def test_a_mask_of_another_floating_type():
    q = torch.randn(1, 2, 6, 8).bfloat16()
    mask = torch.randn(6, 6, requires_grad=True)
    out = sdpa(q, q, q, mask)
    assert torch.equal(out, sdpa(q, q, q, mask.bfloat16()))
    assert torch.autograd.grad(out.float().sum(), mask)[0].dtype == torch.float32


def test_no_call_goes_to_torchs_attention(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("torch's attention was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", never)
    leaves = [torch.randn(1, 4, 8, 8, requires_grad=True) for _ in range(3)]
    mask = torch.randn(8, 8, requires_grad=True)
    _C.reset_counters()
    sdpa(*leaves, mask).sum().backward()
    assert _C.counters() == {
        "attention_forward/float32": 1,
        "attention_backward/float32": 1,
        "attention_mask_backward/float32": 1,
    }


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_memory_grows_with_the_length_alone(options):
    def peak(L):
        leaves = [torch.randn(1, 1, L, 32, requires_grad=True) for _ in range(3)]

        def call():
            out = sdpa(*leaves, **options)
            return torch.autograd.grad(out, leaves, out.detach())

        call()
        return memory.peak(call)

    try:
        short, long = peak(4096), peak(16384)
    except OSError as error:
        pytest.skip(f"the peak cannot be reset here: {error}")
    # out and the gradients, 4 L D numbers, dQ of each part, lse and delta, and the threads' blocks.
    assert long < 16384 * (8 * 32 + 8) * 4 + (16 << 20)
    assert long < 16384 * 16384 * 4 / 10
    assert long < 4.5 * short + (8 << 20)


def test_opcheck():
    q, k, v, m = problem("grouped", "f:NLS", torch.float64)
    seed = torch.randint(1 << 62, (1,))
    options = PLAIN._replace(alibi_slopes=torch.rand(4), dropout_seed=seed, dropout_p=0.2, softcap=2.0, high=3)
    torch.library.opcheck(forward, (q, k, v, *options._replace(attn_mask=m)))
    leaves = [t.clone().requires_grad_() for t in (q, k, v, m)]
    with_leaves = (*leaves[:3], *options._replace(attn_mask=leaves[3]))
    torch.library.opcheck(forward, with_leaves)
    out, lse = forward(q, k, v, *options._replace(attn_mask=m))
    d = [torch.randn_like(out), torch.randn_like(lse)]
    torch.library.opcheck(backward, (*d, q, k, v, *options._replace(attn_mask=m), out, lse, [True] * 4))
    some = [t.requires_grad_() for t in d]
    torch.library.opcheck(backward, (*some, *with_leaves, out, lse, [True, False, True, False]))


def test_compile_and_transforms():
    q, k, v = [torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def f(q, k, v):
        return sdpa(q.sin(), k, v, is_causal=True).cos()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), f(q, k, v))
    got = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(f(q, k, v).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)
    per_row = torch.func.vmap(torch.func.grad(lambda q, k, v: f(q, k, v).sum()))(q, k, v)
    torch.testing.assert_close(per_row, got[0])
    _, tangent = torch.func.jvp(lambda q: f(q, k, v), (q,), (torch.ones_like(q),))
    assert tangent.abs().sum() > 0


DIRECT = {
    "plain": ({}, None),
    "causal": ({"is_causal": True}, None),
    "scale": ({"scale": 0.3}, None),
    "bool mask": ({}, "b"),
    "additive mask": ({}, "f"),
    "grouped": ({"enable_gqa": True}, "f"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("options", "kind"), DIRECT.values(), ids=DIRECT)
def test_the_direct_call_is_the_call(options, kind, dtype):
    N_kv = 2 if options.get("enable_gqa") else 4
    q, k, v = [torch.randn(2, n, 9, 8).to(dtype).requires_grad_() for n in (4, N_kv, N_kv)]
    mask = None if kind is None else torch.rand(9, 9) < 0.7 if kind == "b" else torch.randn(4, 9, 9).to(dtype)
    leaves = [q, k, v, *([mask.requires_grad_()] if kind == "f" else [])]
    _C.reset_counters()
    out = sdpa(q, k, v, mask, **options)
    with torch.no_grad():
        alone = sdpa(q, k, v, mask, **options)
    assert _C.direct_calls() == 2
    want, _ = sdpa(q, k, v, mask, return_lse=True, **options)  # which goes the other way
    assert _C.direct_calls() == 2 and torch.equal(out, want) and torch.equal(alone, want)
    assert not alone.requires_grad
    d = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, d), torch.autograd.grad(want, leaves, d), strict=True):
        assert torch.equal(a, b)


class Subclass(torch.Tensor):
    pass


def test_what_is_not_plain_is_not_called_directly():
    q = torch.randn(1, 2, 5, 8)
    double = torch.zeros(5, 5, dtype=torch.float64)
    _C.reset_counters()
    with torch.autocast("cpu", torch.bfloat16):
        assert sdpa(q, q, q).dtype == torch.bfloat16
    with torch.overrides.BaseTorchFunctionMode():
        sdpa(q, q, q)
    with torch.profiler.profile() as profile:
        sdpa(q, q, q)
    assert any("fastseq::attention_forward" in event.key for event in profile.key_averages())
    assert isinstance(sdpa(q.as_subclass(Subclass), q, q), Subclass)
    torch.func.vmap(lambda q: sdpa(q, q, q))(q[None])
    torch.func.jvp(lambda x: sdpa(x, q, q), (q,), (q,))
    sdpa(q, q, q, double)
    sdpa(q[0], q, q)
    sdpa(q, q, q, dropout_p=0.1)
    assert _C.direct_calls() == 0
    sdpa(q, q, q)
    assert _C.direct_calls() == 1


def test_explain():
    q, k, v = [torch.randn(1, 2, 20, 8) for _ in range(3)]
    told = fastseq.explain(sdpa, q, k, v, is_causal=True)
    assert told.path == "kernel" and "float32" in told.operator and "20 queries, more than 16" in told.reason
    assert "1 queries, no more than 16" in fastseq.explain(sdpa, q[:, :, :1], k, v).reason
    assert "converted to float32" in fastseq.explain(sdpa, q.half(), k.half(), v.half()).reason
    assert fastseq.explain(sdpa, q.int(), k, v).path == fastseq.explain(sdpa, q.to("meta"), k, v).path == "none"
    starts = torch.tensor([0, 20])
    assert fastseq.explain(fastseq.varlen_attention, q[0].mT, k[0].mT, v[0].mT, starts, starts).path == "kernel"
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in fastseq.explain(sdpa, q, k, v).operator
    layer, x = fastseq.MultiheadAttention(8, 2, dropout=0.1), torch.randn(20, 3, 8)
    assert fastseq.explain(layer, x, x, x).path == "torch"  # weights after dropout
    told = fastseq.explain(layer, x, x, x, need_weights=False)
    assert told.path == "kernel" and "20 queries" in told.reason and str(told).startswith("fastseq.MultiheadAttention")
    assert "by products of torch" in fastseq.explain(layer.eval(), x, x, x).reason
    assert fastseq.explain(torch.nn.MultiheadAttention(8, 2), x, x, x).path == "torch"
    told = []
    torch.func.jvp(lambda q: told.append(fastseq.explain(sdpa, q, k, v)) or q, (q,), (q,))
    assert told[0].path == "reference" and "fastseq.reference.attention" in str(told[0])
    with pytest.raises(TypeError, match="fastseq's attention functions"):
        fastseq.explain(torch.relu, q)


A = torch.zeros(1, 2, 5, 8)
BAD = {
    "query": ((A[0, 0, 0], A, A), {}, "query must be .*two dimensions or more; got \\(8,\\)"),
    "size": ((A, A[..., :4], A), {}, "key must be .*; got \\[1, 2, 5, 4\\]"),
    "keys": ((A, A, A[:, :, :3]), {}, "value must be .*; got \\[1, 2, 3, 8\\]"),
    "heads": ((A.repeat(1, 3, 1, 1), A, A), {}, "same number of heads, unless enable_gqa=True; got 6, 2 and 2"),
    "groups": ((A.repeat(1, 2, 1, 1)[:, :3], A, A), {"enable_gqa": True}, "multiple of those of key .*; got 3 and 2"),
    "dtype": ((A, A.double(), A), {}, "key must be of query's dtype, Float; got Double"),
    "integers": ((A.int(), A.int(), A.int()), {}, "float32, float64 and bfloat16; got Int"),
    "mask's shape": ((A, A, A, torch.zeros(5, 4)), {}, "broadcastable to .*\\[1, 2, 5, 5\\]; got \\[5, 4\\]"),
    "mask's dtype": ((A, A, A, torch.zeros(5, 5).int()), {}, "bool or of query's dtype, Float; got Int"),
    "mask and causal": ((A, A, A, torch.zeros(5, 5)), {"is_causal": True}, "attn_mask must be None"),
    "dropout": ((A, A, A), {"dropout_p": 1.1}, "within \\[0, 1\\]; got 1.1"),
    "negative dropout": ((A, A, A), {"dropout_p": -0.1}, "within \\[0, 1\\]; got -0.1"),
    "window": ((A, A, A), {"window": -1}, "not negative; got -1"),
    "window's side": ((A, A, A), {"window": (1, -2)}, "not negative; got \\(1, -2\\)"),
    "alignment": ((A, A, A), {"causal_alignment": "left"}, "got 'left'"),
    "softcap": ((A, A, A), {"softcap": 0.0}, "softcap must be positive, or None for none; got 0.0"),
    "slopes' shape": ((A, A, A), {"alibi_slopes": torch.ones(3)}, "\\(N\\) or \\(B, N\\) = \\(1, 2\\); got \\[3\\]"),
    "slopes' dtype": ((A, A, A), {"alibi_slopes": torch.ones(2).int()}, "alibi_slopes .* floating-point .* got Int"),
    "slopes' gradient": ((A, A, A), {"alibi_slopes": torch.ones(2, requires_grad=True)}, "have no gradient"),
    "too large": ((torch.zeros(1, 1, 2, 513),) * 3, {}, "within 1..512; got 513"),
    "device": ((A, A.to("meta"), A), {}, "device"),
}


@pytest.mark.parametrize(("arguments", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, options, message):
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=message):
        sdpa(*arguments, **options)
