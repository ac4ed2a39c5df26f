"""Memory that is kept from call to call."""

import re
import resource
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq import _C


def train(layer, x):
    layer.zero_grad()
    output = layer(x)[0]
    output.backward(output.detach())  # not a sum, whose gradient takes memory of torch's


def resident():
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts pages")
def test_a_call_makes_no_fresh_pages_and_empty_cache_gives_them_back():
    layer, x = fastseq.GRU(128, 128), torch.randn(300, 32, 128)
    for _ in range(3):
        train(layer, x)
    before, calls = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 5
    for _ in range(calls):
        train(layer, x)
    fresh = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
    reserve = 300 * 32 * 128 * (1 + _C.cells()["gru"]["kept"]) * 4
    assert fresh < reserve / resource.getpagesize() / 20
    full = resident()
    fastseq.empty_cache()
    assert full - resident() > reserve / 2
    train(layer, x)


def test_lengths_that_vary_find_one_anothers_blocks():
    layer = fastseq.LSTM(64, 128)
    torch.manual_seed(0)
    steps = [int(t) for t in torch.randint(250, 300, (12,))]
    for t in steps:
        train(layer, torch.randn(t, 16, 64))
    expected = [layer(torch.ones(t, 16, 64))[0].detach().clone() for t in steps]
    for t, want in zip(steps, expected, strict=True):
        assert torch.equal(layer(torch.ones(t, 16, 64))[0], want)


def test_tensors_in_kept_memory_are_like_others(tmp_path):
    layer, x = fastseq.RNN(8, 300), torch.randn(100, 16, 8)
    with torch.no_grad():
        outputs = [layer(x)[0] for _ in range(3)]
        want = outputs[0].clone()
        del outputs[1]
        more = layer(x)[0]
        assert len({t.data_ptr() for t in (*outputs, more)}) == 3
        assert all(torch.equal(t, want) for t in (*outputs, more))
        torch.save(more, tmp_path / "t.pt")
        assert torch.equal(torch.load(tmp_path / "t.pt"), want)
        more.resize_(2 * more.numel())
        assert torch.equal(more[: want.numel()].view_as(want), want)
        more.share_memory_()
        assert torch.equal(more[: want.numel()].view_as(want), want)
