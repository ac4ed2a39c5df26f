"""Memory that is kept from call to call."""

import os
import re
import resource
import subprocess
import sys
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts pages")
def test_it_gives_them_back_where_malloc_would_keep_them():
    script = """if True:
        import torch, fastseq
        from tests.test_memory import resident, train
        layer, x = fastseq.GRU(128, 128), torch.randn(300, 32, 128)
        train(layer, x)
        full = resident()
        fastseq.empty_cache()
        print(full - resident())"""
    # As after a program has freed blocks of this size: glibc then takes them from its heap.
    keeps = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **keeps},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 300 * 32 * 128 * 4 * (1 + _C.cells()["gru"]["kept"]) / 2


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


EDITS = {
    "in place": lambda y: y.mul_(2),
    "a view": lambda y: y[3:5].zero_(),
    "numpy": lambda y: y.numpy().fill(3),
    "data": lambda y: y.data.mul_(2),
    "dlpack": lambda y: torch.utils.dlpack.from_dlpack(y.__dlpack__()).zero_(),
    "storage": lambda y: y.untyped_storage().fill_(1),
    "share_memory": lambda y: y.share_memory_().zero_(),
    "out": lambda y: torch.zeros(y.shape, out=y),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("hidden_size", [8, 250])  # copied at once; shared until it is written to
def test_however_an_output_is_edited_backward_does_not_see_it(name, hidden_size, edit):
    layer = getattr(fastseq, name)(8, hidden_size, num_layers=2, bidirectional=True)
    x, d = torch.randn(60, 16, 8, requires_grad=True), torch.randn(60, 16, 2 * hidden_size)
    wanted = [x, *layer.parameters()]
    want = torch.autograd.grad(layer(x)[0], wanted, d)
    output = layer(x)[0]
    before = output.detach().clone()
    edit(output.detach())
    assert not torch.equal(output, before)
    for a, b in zip(torch.autograd.grad(output, wanted, d), want, strict=True):
        assert torch.equal(a, b)


def test_the_output_of_a_training_step_takes_its_memory_once():
    layer, x = fastseq.RNN(8, 256), torch.randn(200, 32, 8, requires_grad=True)
    output = layer(x)[0]
    assert torch._C._is_cow_tensor(output)
    output.square().sum().backward()  # reading does not copy
    assert torch._C._is_cow_tensor(output)
