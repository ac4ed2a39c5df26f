"""KVCache: decoding token by token is attention of the whole sequence."""

import pytest
import torch

import fastseq
from fastseq import _C

sdpa = fastseq.scaled_dot_product_attention


def tokens(B, L, dtype=torch.float64, N=4, N_kv=2, D=16, Dv=8):
    return [torch.randn(s).to(dtype) for s in ((B, N, L, D), (B, N_kv, L, D), (B, N_kv, L, Dv))]


def cache_of(B, dtype=torch.float64, **options):
    return fastseq.KVCache(B, 2, 16, value_dim=8, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [[1] * 40, [30, 1, 1, 5, 60, 1], [700, 1, 1]], ids=["ones", "chunks", "a prompt"])
@pytest.mark.parametrize("window", [None, 7, 50])
def test_decoding_is_attention_of_the_whole(steps, window, dtype):
    q, k, v = tokens(3, sum(steps), dtype)
    cache, got, at = cache_of(3, dtype, capacity=4, window=window), [], 0
    for n in steps:
        cache.append(k[:, :, at : at + n], v[:, :, at : at + n])
        got.append(cache.attend(q[:, :, at : at + n]))
        at += n
    assert cache.lengths.tolist() == [at] * 3
    if window is None:
        assert torch.equal(cache.keys, k) and torch.equal(cache.values, v)
    want = sdpa(q.double(), k.double(), v.double(), enable_gqa=True, is_causal=True,
                window=None if window is None else (window, 0))  # fmt: skip
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(torch.cat(got, 2).double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 9])
def test_rows_of_different_lengths(window):
    lengths = [torch.tensor(n) for n in ([3, 20, 0], [1, 1, 1], [0, 40, 2], [2, 2, 2], [1, 0, 1])]
    slopes = torch.rand(4)
    cache, alone = cache_of(3, capacity=5, window=window), [cache_of(1, window=window) for _ in range(3)]
    for step, counts in enumerate(lengths):
        L = int(counts.max()) + step % 2
        q, k, v = tokens(3, L)
        cache.append(k, v, counts)
        got = cache.attend(q, alibi_slopes=slopes, softcap=2.0)
        for b, n in enumerate(counts.tolist()):
            alone[b].append(k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            want = alone[b].attend(q[b : b + 1, :, :n], alibi_slopes=slopes, softcap=2.0)
            if window is None:
                assert torch.equal(got[b : b + 1, :, :n], want)
            torch.testing.assert_close(got[b : b + 1, :, :n], want)
            assert torch.equal(got[b, :, n:], torch.zeros(4, L - n, 8))
    assert cache.lengths.tolist() == [int(c.lengths) for c in alone] == [7, 63, 6]


def test_memory_grows_no_further_than_a_window_needs():
    cache = cache_of(1, capacity=16, window=8)
    for _ in range(200):
        q, k, v = tokens(1, 1)
        cache.append(k, v)
        cache.attend(q)
    assert cache._keys.shape[2] == 16 and int(cache.lengths) == 200


def test_reorder_is_the_batch_in_another_order():
    _q, k, v = tokens(3, 12)
    for counts in (None, torch.tensor([4, 12, 7])):
        for rows in ([2, 0, 0], [1], [0, 1, 2, 2, 1, 0]):
            cache, want = cache_of(3), cache_of(len(rows))
            cache.append(k, v, counts)
            cache.reorder(torch.tensor(rows))
            want.append(k[rows], v[rows], None if counts is None else counts[rows])
            more = tokens(len(rows), 1)
            for c in (cache, want):
                c.append(*more[1:])
            assert torch.equal(cache.attend(more[0]), want.attend(more[0]))
            assert torch.equal(cache.lengths, want.lengths)


def test_truncate_forgets_what_was_tried():
    q, k, v = tokens(2, 30)
    for to, counts in ((20, None), (torch.tensor([5, 20]), torch.tensor([5, 20]))):
        cache, want = cache_of(2), cache_of(2)
        cache.append(k, v)
        cache.truncate(to)
        want.append(k[:, :, :20], v[:, :, :20], counts)
        for c in (cache, want):
            c.append(k[:, :, 20:], v[:, :, 20:])
        assert torch.equal(cache.attend(q[:, :, 20:]), want.attend(q[:, :, 20:]))
    cache.reset()
    assert cache.lengths.tolist() == [0, 0] and cache.keys.shape == (2, 2, 0, 16)
    assert "lengths=[0, 0]" in repr(cache)


def test_the_kernel_runs():
    q, k, v = tokens(1, 1, torch.float32)
    cache = cache_of(1, torch.float32)
    _C.reset_counters()
    cache.append(k, v)
    cache.attend(q)
    assert _C.counters() == {"attention_forward/float32": 1}


def full():
    cache = cache_of(2, max_length=5)
    _, k, v = tokens(2, 5)
    cache.append(k, v)
    return cache


K = torch.zeros(2, 2, 3, 16, dtype=torch.float64)
V = torch.zeros(2, 2, 3, 8, dtype=torch.float64)
BAD = {
    "overflow": (lambda: full().append(K[:, :, :1], V[:, :, :1]), "takes 5 tokens .*; got 1 more where it has 5"),
    "key's shape": (lambda: full().append(K[:1], V), "key must be \\(2, 2, L, 16\\) .*; got \\(1, 2, 3, 16\\)"),
    "key's dimensions": (lambda: full().append(K[0], V), "key must be .*; got \\(2, 3, 16\\)"),
    "value's shape": (lambda: full().append(K, V[:, :, :2]), "value must be .*; got \\(2, 2, 2, 8\\)"),
    "dtype": (lambda: full().append(K.float(), V), "key must be .* torch.float64 .*; got .* torch.float32"),
    "lengths": (lambda: cache_of(2).append(K, V, torch.tensor([1, 4])), "values in 0..3; got \\(2,\\): \\[1, 4\\]"),
    "graph": (lambda: cache_of(2).append(K.clone().requires_grad_(), V), "use torch.no_grad"),
    "query": (lambda: full().attend(K[:, :, :2]), "of the 5 tokens that were appended last; got \\(2, 2, 2, 16\\)"),
    "rows": (lambda: full().reorder(torch.tensor([0, 2])), "within 0..1, .*; got \\[0, 2\\]"),
    "rows' dtype": (lambda: full().reorder(torch.tensor([0.0])), "got \\(1,\\) torch.float32"),
    "truncate": (lambda: full().truncate(6), "what the rows have, \\[5, 5\\]; got 6"),
    "size": (lambda: fastseq.KVCache(1, 0, 4), "num_kv_heads must be at least 1; got 0"),
    "window": (lambda: fastseq.KVCache(1, 1, 4, window=-1), "window must be at least 0; got -1"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_what_the_window_forgot_does_not_come_back():
    cache = cache_of(1, capacity=10, window=4)
    for _ in range(30):
        cache.append(K[:1, :, :1], V[:1, :, :1])
    with pytest.raises(RuntimeError, match="the window forgot"):
        cache.truncate(12)
    cache.truncate(29)
