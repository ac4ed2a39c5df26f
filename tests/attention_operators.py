"""The attention operators, and how near to float64 their results have to be."""

import math

import torch

import fastseq
from fastseq.attention_ops import AttentionOptions

sdpa = fastseq.scaled_dot_product_attention
forward, backward = torch.ops.fastseq.attention_forward.default, torch.ops.fastseq.attention_backward.default

PLAIN = AttentionOptions(*[None] * 7, scale=0.3, softcap=0.0, dropout_p=0.0, low=None, high=None, from_end=False)


def bound(dtype, factor=1.0):
    return factor * {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]


def near(got, want, tolerance):
    assert got.shape == want.shape
    infinite = want == -math.inf
    assert torch.equal(got == -math.inf, infinite)
    error = (got.double() - want).masked_fill(infinite, 0).abs().max().item() if got.numel() else 0
    assert error <= tolerance * max(1.0, want.masked_fill(infinite, 0).abs().max().item() if got.numel() else 1), error
