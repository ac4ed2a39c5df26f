"""Threads: calls from several at once, the GIL, forked children, the floating-point mode of the workers."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastseq
from fastseq import ops
from fastseq.testing import Case


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


CASES = [
    Case("gru", T=40, B=1, I=20, H=256, dtype=torch.float32),  # units shared
    Case("lstm", T=20, B=24, I=20, H=64, dtype=torch.float32),  # rows shared
    Case("rnn_tanh", T=3, B=24, I=20, H=64, dtype=torch.float32),  # a matrix product each step
    Case("gru", T=200, B=1, I=20, H=32, layers=3, dtype=torch.float32),  # a wave: threads have a layer each
]


def everything(problem):
    problem = problem.leaves()
    outputs = problem.run(ops.rnn)
    gradients = problem.gradients(outputs, {name: y.detach().cos() for name, y in outputs.items()})
    return {name: tensor.detach() for name, tensor in (outputs | gradients).items()}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_calls_from_several_threads_at_once(case):
    problem = case.problem()
    expected = everything(problem)
    wrong, errors = [], []

    def work():
        try:
            for _ in range(5):
                for name, tensor in everything(problem).items():
                    if not torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6):
                        wrong.append(name)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
        assert not thread.is_alive()
    assert not errors and not wrong


def test_the_interpreter_goes_on_during_a_call():
    layer = fastseq.LSTM(256, 256)
    x = torch.randn(300, 32, 256)
    ticks, done = 0, threading.Event()

    def call():
        with torch.no_grad():
            layer(x)
        done.set()

    torch.set_num_threads(1)
    thread = threading.Thread(target=call)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks > 10  # with the GIL held for the length of the call there would be one or two


# The child calls nothing of torch before the operator: what torch shares among threads would hang there.
IN_A_CHILD = """
import os, sys
import torch
from fastseq import ops
from fastseq.testing import Case
torch.set_num_threads(2)
in_parent, in_child = (Case({case}).problem().leaves() for _ in range(2))

def everything(problem):
    outputs = problem.run(ops.rnn)
    return outputs | problem.gradients(outputs, {{name: y.detach().cos() for name, y in outputs.items()}})

expected = everything(in_parent)
child = os.fork()
if child == 0:
    actual = everything(in_child)
    same = all(torch.allclose(y, expected[name], rtol=1e-5, atol=1e-6) for name, y in actual.items())
    os._exit(0 if same and torch.get_num_threads() == 1 else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    "case",
    [
        '"gru", T=40, B=1, I=20, H=256',
        '"lstm", T=20, B=24, I=20, H=64',
        '"lstm", T=2, B=3, I=5, H=8, form="packed"',
        '"lstm", T=200, B=1, I=20, H=32, layers=2',
    ],
)
def test_a_forked_child_computes_and_does_not_hang(case):
    """It is left with one thread, as a worker of DataLoader: torch's own products would hang otherwise."""
    code = IN_A_CHILD.format(case=case)
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120).returncode == 0


class Rows(Dataset):
    def __init__(self):
        self.layer = fastseq.GRU(8, 16)
        self.x = torch.randn(4, 20, 8)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(self.x[i])[0]


def test_in_the_workers_of_a_data_loader():
    rows = Rows()
    expected = torch.stack([rows[i] for i in range(len(rows))])
    loader = DataLoader(rows, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=100)
    torch.testing.assert_close(next(iter(loader)), expected)


def test_workers_flush_denormals_where_the_caller_does():
    """All hidden units are denormal: with flushing each is zero, on whichever thread it was computed."""
    H = 2048
    w_ih, w_hh = torch.full((H, 1), 1e-30), torch.zeros(H, H)
    x = torch.full((8, 1, 1), 1e-10)
    arguments = ("rnn_relu", x, None, None, (w_ih, w_hh))
    kept = ops.rnn(*arguments, bias=False)[0]
    assert (kept > 0).all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushed = ops.rnn(*arguments, bias=False)[0]
    finally:
        torch.set_flush_denormal(False)
    assert (flushed == 0).all()
    assert torch.equal(ops.rnn(*arguments, bias=False)[0], kept)


def test_one_thread_and_two_agree():
    for case in CASES:
        problem = case.problem()
        expected = everything(problem)
        torch.set_num_threads(1)
        for name, tensor in everything(problem).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        torch.set_num_threads(2)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("H", [16, 20])
def test_more_kept_planes_than_the_caches_hold(cell, H):
    # 64 x 1100 rows of four or five planes of float32: past 16 MiB, where threads that share rows write them to memory
    # at once if they are whole lines. One thread alone writes them as ever.
    problem = Case(cell, T=64, B=1100, I=2, H=H, dtype=torch.float32).problem()
    together = everything(problem)
    torch.set_num_threads(1)
    alone = everything(problem)
    for name, tensor in together.items():
        torch.testing.assert_close(
            tensor, alone[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_more_threads_than_cores():
    torch.set_num_threads(2 * (os.cpu_count() or 1) + 1)
    for case in CASES:
        for name, tensor in everything(case.problem()).items():
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_the_same_bits_while_others_keep_a_processor(cell):
    """Threads that get on faster take more of the rows, of products and of steps; it is nothing but time."""
    case = Case(cell, T=40, B=64, I=200, H=128, dtype=torch.float32)
    problem = case.problem()
    expected = everything(problem)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            for _ in range(20):
                for name, tensor in everything(problem).items():
                    assert torch.equal(tensor, expected[name]), name
        finally:
            other.kill()
