"""Attention's dropout, slopes, softcap and ragged batches: the kernels against `reference.attention` in float64."""

import itertools
import math
import random

import pytest
import torch
from attention_operators import PLAIN, backward, bound, forward, near, sdpa

import fastseq
from fastseq import _C, reference

# ---- All options together --------------------------------------------------------------------------------------------


def ragged(kind, B, L, S):
    """Options, and the tensors' batch, L and S."""
    if kind == "starts":
        queries, keys = [[random.choice(some) for _ in range(B)] for some in ((0, 1, 5, 17, 60), (0, 1, 30, 300, 600))]
        starts = [torch.tensor([0, *itertools.accumulate(counts)]) for counts in (queries, keys)]
        options = {"query_starts": starts[0], "key_starts": starts[1].int()}
        return options, 1, sum(queries) + random.choice([0, 2]), sum(keys) + 1
    if kind == "lengths":
        options = {"query_lengths": torch.randint(L + 1, (B,)), "key_lengths": torch.randint(S + 1, (B,))}
        return dict(random.sample(sorted(options.items()), random.choice([1, 2]))), B, L, S
    return {}, B, L, S


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "starts", "lengths"])
@pytest.mark.parametrize("trial", range(20))
def test_any_options_together(trial, kind, dtype):
    random.seed(torch.randint(1 << 30, ()).item())
    pick = random.choice
    B, (N, N_kv) = pick([1, 2, 3]), pick([(1, 1), (2, 2), (4, 2), (3, 1)])
    rows, batch, L, S = ragged(kind, B, pick([1, 3, 16, 17, 50, 97]), pick([1, 5, 70, 130, 520, 700]))
    D, Dv = pick([3, 16, 33, 64]), pick([2, 16, 40])
    tensors = [torch.randn(s).to(dtype) for s in ((batch, N, L, D), (batch, N_kv, S, D), (batch, N_kv, S, Dv))]
    masks = [None] if kind == "starts" else [None, torch.rand(B, 1, L, S) < 0.7, torch.randn(N, L, S).to(dtype)]
    low, high = pick([(None, None), (None, 0), (-7, 3), (-100, 20)])
    dropout_p = pick([0.0, 0.0, 0.3, 0.3, 1.0])
    options = PLAIN._replace(
        attn_mask=pick(masks),
        alibi_slopes=pick([None, torch.rand(N), torch.rand(B, N)]),
        dropout_seed=torch.randint(1 << 62, (1,)) if dropout_p else None,
        dropout_p=dropout_p,
        softcap=pick([0.0, 2.0]),
        low=low,
        high=high,
        from_end=pick([False, True]),
        **rows,
    )
    leaves = [t.double().requires_grad_() for t in tensors]
    if (mask := options.attn_mask) is not None and mask.dtype != torch.bool:
        leaves.append(mask.double().expand(batch, N, L, S).clone().requires_grad_())
        mask = leaves[3]
    want, want_lse = reference.attention(*leaves[:3], **options._replace(attn_mask=mask)._asdict())
    out, lse = forward(*tensors, *options)
    near(out, want, bound(dtype))
    near(lse, want_lse, bound(torch.float32 if dtype == torch.bfloat16 else dtype))
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -math.inf, 0)
    loss = (want * d_out.double()).sum() + (want_lse.masked_fill(want_lse == -math.inf, 0) * d_lse.double()).sum()
    wanted = torch.autograd.grad(loss + sum(0 * t.sum() for t in leaves), leaves)
    got = backward(d_out, d_lse, *tensors, *options, out, lse, [True] * 3 + [len(leaves) == 4])
    for g, w in zip(got[:3], wanted[:3], strict=True):
        near(g, w, bound(dtype, 4))
    if len(leaves) == 4:
        squares = wanted[3].square().sum_to_size(options.attn_mask.shape)
        tolerance = bound(dtype, 4) * max(1.0, squares.max().sqrt().item())
        near(got[3], wanted[3].sum_to_size(options.attn_mask.shape), tolerance)


OPTIONS = [
    {"alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 0.3])},
    {"softcap": 1.5, "is_causal": True},
    {"dropout_p": 0.4},
    {"dropout_p": 0.2, "softcap": 3.0, "window": 3, "alibi_slopes": torch.rand(2, 4, dtype=torch.float64)},
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(options, masked):
    q, k, v, m = [torch.randn(s, dtype=torch.float64, requires_grad=True)
                  for s in ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 2), (4, 1, 7))]  # fmt: skip
    if masked and options.get("is_causal"):
        pytest.skip("a mask beside is_causal is an error")
    seed = torch.randint(1 << 30, ()).item()

    def call(q, k, v, *mask):
        torch.manual_seed(seed)
        return sdpa(q, k, v, *mask, enable_gqa=True, return_lse=True, **options)

    leaves = [q, k, v, *([m] if masked else [])]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_backward_ad=False)


# ---- Dropout ---------------------------------------------------------------------------------------------------------


def test_philox():
    # The known answers of Random123, the authors' library.
    words = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, seed, want in (
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (words, 0x299F31D0A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        got = reference.philox([torch.tensor([c]) for c in counter], torch.tensor([seed]))
        assert [int(t) for t in got] == want


@pytest.mark.parametrize("L", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_is_dropped_as_by_torch(dtype, L):
    tensors = [torch.randn(2, 4, n, 8, dtype=dtype, requires_grad=True) for n in (L, 70, 70)]
    out, lse = sdpa(*tensors, dropout_p=1.0, return_lse=True)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(*tensors, dropout_p=1.0))
    assert torch.equal(lse, sdpa(*tensors, return_lse=True)[1])
    for gradient in torch.autograd.grad(out.sum(), tensors):
        assert not gradient.any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_how_much_is_dropped(p):
    N, L, S = 4, 130, 300
    v = torch.eye(S).expand(1, N, S, S)  # the result is the probabilities
    out = sdpa(torch.zeros(1, N, L, 8), torch.zeros(1, N, S, 8), v, dropout_p=p)
    values = (out * S).unique()
    assert len(values) == 2 and values[0] == 0
    assert abs(values[1].item() * (1 - round(p * 65536) / 65536) - 1) < 1e-5
    dropped = (out == 0).double()
    # Of n independent draws, within 5 standard deviations: of all, each row, each column, and pairs of neighbours.
    for share, expected in (
        (dropped, p),
        (dropped.mean((0, 1, 2)), p),
        (dropped.mean((0, 1, 3)), p),
        (dropped[..., 1:] * dropped[..., :-1], p * p),
        (dropped[:, :, 1:] * dropped[:, :, :-1], p * p),
        (dropped[:, 1:] * dropped[:, :-1], p * p),
    ):
        n = dropped.numel() / share.numel() if share.dim() == 1 else share.numel()
        deviation = (share if share.dim() == 1 else share.mean()) - expected
        assert deviation.abs().max() < 5 * math.sqrt(expected * (1 - expected) / n) * (1.2 if share.dim() == 1 else 1.5)


def test_dropout_follows_torchs_generator_and_nothing_else():
    q, k, v = [torch.randn(3, 4, 70, 16) for _ in range(3)]

    def call(q, k, v, seed=1, **options):
        torch.manual_seed(seed)
        return sdpa(q, k, v, dropout_p=0.3, **options)

    want, threads = call(q, k, v), torch.get_num_threads()
    assert torch.equal(call(q, k, v), want) and not torch.equal(call(q, k, v, seed=2), want)
    assert not torch.equal(sdpa(q, k, v, dropout_p=0.3), sdpa(q, k, v, dropout_p=0.3))
    try:
        torch.set_num_threads(1)
        assert torch.equal(call(q, k, v), want)
    finally:
        torch.set_num_threads(threads)
    # Few queries go another way through the kernels: the numbers are the same, the sums only nearly.
    torch.testing.assert_close(call(q[:, :, :8], k, v), want[:, :, :8])
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    checkpointed = torch.utils.checkpoint.checkpoint(lambda *t: sdpa(*t, dropout_p=0.3), *leaves, use_reentrant=False)
    assert torch.autograd.grad(checkpointed.sum(), leaves)[0].isfinite().all()


def test_dropout_in_compiled_and_transformed_calls():
    q, k, v = [torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def f(q, k, v):
        return sdpa(q, k, v, dropout_p=0.4)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    got = compiled(q, k, v)
    torch.manual_seed(5)
    want = f(q, k, v)
    torch.testing.assert_close(got, want)
    gradients = torch.autograd.grad(want.sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), (q, k, v)), gradients)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.func.grad(lambda q: f(q, k, v).sum())(q), gradients[0])


# ---- Properties ------------------------------------------------------------------------------------------------------


def test_slopes_and_softcap_are_what_they_say():
    q, k, v = [torch.randn(2, 3, 20, 8, dtype=torch.float64) for _ in range(3)]
    k, v, slopes = k[:, :, :15], v[:, :, :15], torch.rand(2, 3, dtype=torch.float64)
    i, j = torch.arange(20.0)[:, None], torch.arange(15.0)
    close = torch.testing.assert_close
    bias = -slopes[..., None, None] * (j - i).abs()
    close(sdpa(q, k, v, alibi_slopes=slopes), sdpa(q, k, v, bias))
    close(sdpa(q, k, v, alibi_slopes=slopes[0]), sdpa(q, k, v, bias[0]))
    bias = -slopes[..., None, None] * (j - i + 5).abs()
    close(sdpa(q, k, v, alibi_slopes=slopes, causal_alignment="bottom_right"), sdpa(q, k, v, bias))
    scores = 3 * torch.tanh(q @ k.mT / math.sqrt(8) / 3)
    close(sdpa(q, k, v, softcap=3.0), scores.softmax(-1) @ v)
    close(sdpa(q, k, v, softcap=1e6), sdpa(q, k, v))


# ---- Ragged batches --------------------------------------------------------------------------------------------------

LENGTHS = [(5, 9), (0, 4), (40, 40), (17, 530), (3, 0), (1, 1200), (100, 60)]


def packed(dtype=torch.float32, N=4, N_kv=2):
    starts = [torch.tensor([0, *itertools.accumulate(n[side] for n in LENGTHS)], dtype=torch.int32) for side in (0, 1)]
    totals = [int(s[-1]) for s in starts]
    shapes = ((totals[0], N, 24), (totals[1], N_kv, 24), (totals[1], N_kv, 10))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes], starts


@pytest.mark.parametrize("options", [
    {},
    {"is_causal": True},
    {"is_causal": True, "window": 20, "softcap": 2.0},
    {"is_causal": True, "causal_alignment": "top_left", "alibi_slopes": torch.rand(4)},
], ids=str)  # fmt: skip
def test_varlen_attention_is_attention_of_each_sequence(options):
    tensors, starts = packed()
    _C.reset_counters()
    out, lse = fastseq.varlen_attention(*tensors, *starts, 100, 1200, return_lse=True, **options)
    d_out = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, d_out)
    assert _C.counters() == {"attention_forward/float32": 1, "attention_backward/float32": 1}
    assert out.is_contiguous() and lse.shape == (4, len(out))
    alone = {"causal_alignment": "bottom_right", **options}
    gradients = [torch.zeros_like(t) for t in tensors]
    for (q0, q1), (k0, k1) in zip(*[itertools.pairwise(s.tolist()) for s in starts], strict=True):
        one = [t[a:b].detach().transpose(0, 1)[None].requires_grad_()
               for t, (a, b) in zip(tensors, ((q0, q1), (k0, k1), (k0, k1)), strict=True)]  # fmt: skip
        want, want_lse = sdpa(*one, enable_gqa=True, return_lse=True, **alone)
        assert torch.equal(out[q0:q1].transpose(0, 1)[None], want) and torch.equal(lse[:, q0:q1], want_lse[0])
        d = torch.autograd.grad(want, one, d_out[q0:q1].transpose(0, 1)[None])
        for total, part, (a, b) in zip(gradients, d, ((q0, q1), (k0, k1), (k0, k1)), strict=True):
            total[a:b] = part[0].transpose(0, 1)
    for a, b in zip(got, gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("one_thread")
def test_varlen_attention_twice_differentiable_and_compiled():
    starts = [torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 4, 9])]
    tensors = [torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (6, 9, 9)]

    def call(*tensors):
        return fastseq.varlen_attention(*tensors, *starts, is_causal=True)

    assert torch.equal(call(*tensors)[5], torch.zeros(2, 3))
    assert torch.autograd.gradcheck(call, tensors) and torch.autograd.gradgradcheck(call, tensors)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*tensors).sum(), tensors), torch.autograd.grad(call(*tensors).sum(), tensors)
    )


def test_no_sequences():
    empty = torch.zeros(1, dtype=torch.int64)
    out = fastseq.varlen_attention(torch.ones(3, 2, 4), torch.ones(5, 2, 4), torch.ones(5, 2, 6), empty, empty)
    assert torch.equal(out, torch.zeros(3, 2, 6))


Q = torch.zeros(6, 2, 8)
STARTS = torch.tensor([0, 2, 6])
BAD = {
    "dimensions": ((Q[None], Q, Q, STARTS, STARTS), "q must be \\(total, heads, size\\), .*got \\(1, 6, 2, 8\\)"),
    "decreasing": ((Q, Q, Q, torch.tensor([0, 4, 2]), STARTS), "query_starts must not decrease; got 4 and then 2"),
    "beyond": ((Q, Q, Q, STARTS, torch.tensor([0, 2, 7])), "key_starts must be within 0..6, .*got 7 at 2"),
    "negative": ((Q, Q, Q, torch.tensor([-1, 2, 6]), STARTS), "within 0..6, .*got -1 at 0"),
    "first": ((Q, Q, Q, STARTS, torch.tensor([1, 2, 6])), "key_starts must begin with 0; got 1"),
    "none": ((Q, Q, Q, torch.tensor([], dtype=torch.int64), STARTS), "query_starts must be \\(B \\+ 1\\); got \\[0\\]"),
    "as many": ((Q, Q, Q, STARTS[:2], STARTS), "as many numbers; got 2 and 3"),
    "dtype": ((Q, Q, Q, STARTS.float(), STARTS), "query_starts must be int32 or int64 on the CPU; got Float"),
    "two dimensions": ((Q, Q, Q, STARTS[None], STARTS), "got \\[1, 3\\]"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_starts(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        fastseq.varlen_attention(*arguments)


def test_bad_arguments_of_the_operator():
    q = torch.zeros(2, 1, 3, 4)
    for options, message in (
        ({"query_lengths": torch.tensor([1, 4])}, "query_lengths must be within 0..3, .*got 4 at 1"),
        ({"key_lengths": torch.tensor([1])}, "key_lengths must be \\(B\\) = \\(2\\); got \\[1\\]"),
        ({"query_starts": STARTS}, "must be given together"),
        ({"query_starts": STARTS, "key_starts": STARTS}, "of one batch entry, .*got 2"),
        ({"dropout_p": 0.5}, "dropout_seed must be one int64"),
        ({"dropout_p": 1.5}, "within \\[0, 1\\]"),
        ({"softcap": -1.0}, "softcap must not be negative; got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(q, q, q, *PLAIN._replace(**options))
    with pytest.raises(RuntimeError, match="attn_mask must be None where starts are given"):
        starts = dict.fromkeys(("query_starts", "key_starts"), torch.tensor([0, 3]))
        forward(q[:1], q[:1], q[:1], *PLAIN._replace(attn_mask=torch.ones(3, 3, dtype=torch.bool), **starts))
