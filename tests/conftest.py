"""Fresh random inputs in every run, repeatable by the seed that the report's header prints."""

import os
import secrets
import zlib
from contextlib import contextmanager

import pytest
import torch

from fastseq import _C

SEED = int(os.environ.get("FASTSEQ_TEST_SEED") or secrets.randbits(32))


def pytest_report_header():
    return f"fastseq: {_C.isa()} kernels, {torch.get_num_threads()} threads; FASTSEQ_TEST_SEED={SEED} repeats this run"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Kernels that read what nobody wrote show NaN, not what happened to be there."""
    _C.poison_memory(True)
    yield
    _C.poison_memory(False)


@pytest.fixture(autouse=True)
def _fresh_random_inputs(request):
    torch.manual_seed(zlib.crc32(f"{SEED} {request.node.nodeid}".encode()))


@pytest.fixture
def one_thread():
    """For small sizes, at which more threads only cost time: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kernel_calls():
    """A context that asserts exactly which kernels its body ran: `with kernel_calls("gru", dtype, forward=1): ...`"""

    @contextmanager
    def expect(cell=None, dtype=None, *, forward=0, backward=0):
        _C.reset_counters()
        yield
        name = f"{cell}/{str(dtype).removeprefix('torch.')}"
        expected = {f"rnn_forward/{name}": forward, f"rnn_backward/{name}": backward}
        assert _C.counters() == {key: count for key, count in expected.items() if count}

    return expect
