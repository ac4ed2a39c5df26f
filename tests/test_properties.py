"""What holds of every recurrent layer, on sizes that hypothesis chooses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastseq import ops
from fastseq.testing import Case

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = st.sampled_from([1, 3, 7, 15, 17, 33])
CELLS = st.sampled_from(["rnn_tanh", "rnn_relu", "lstm", "gru"])
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}
many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def cases(draw, **fixed):
    cell = draw(CELLS)
    H = draw(SIZES)
    options = {
        "T": draw(st.integers(1, 20)),
        "B": draw(st.integers(1, 9)),
        "I": draw(SIZES),
        "H": H,
        "P": draw(st.integers(0, H - 1)) if cell == "lstm" else 0,
        "layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": draw(st.integers(0, 2**31)),
    }
    return Case(cell, **options | fixed)


def close(actual, expected, dtype):
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


def call(problem, x, hx, cx, **options):
    return ops.rnn(problem.case.cell, x, hx, cx, problem.weights, **problem.options | options)


@many
@given(cases(bidirectional=False), st.data())
def test_chunks_with_the_state_carried_on_equal_the_whole(case, data):
    problem = case.problem()
    cut = data.draw(st.integers(1, max(1, case.T - 1)))
    output, h_n, c_n = call(problem, problem.x, problem.hx, problem.cx)
    first, h, c = call(problem, problem.x[:cut], problem.hx, problem.cx)
    parts = [first]
    if cut < case.T:
        second, h, c = call(problem, problem.x[cut:], h, c if case.has_c else None)
        parts.append(second)
    close(torch.cat(parts), output, case.dtype)
    close(h, h_n, case.dtype)
    close(c, c_n, case.dtype)


@many
@given(cases())
def test_permuting_the_batch_permutes_the_results(case):
    problem = case.problem()
    order = torch.randperm(case.B, generator=torch.Generator().manual_seed(case.seed))
    output, h_n, c_n = call(problem, problem.x, problem.hx, problem.cx)
    states = [s if s is None else s[:, order] for s in (problem.hx, problem.cx)]
    permuted = call(problem, problem.x[:, order], *states)
    close(permuted[0], output[:, order], case.dtype)
    close(permuted[1], h_n[:, order], case.dtype)
    if case.has_c:
        close(permuted[2], c_n[:, order], case.dtype)


@many
@given(cases(bidirectional=True, layers=1))
def test_reversed_time_swaps_the_directions(case):
    problem = case.problem()
    half = len(problem.weights) // 2
    swapped = problem.weights[half:] + problem.weights[:half]
    states = [s if s is None else s.flip(0) for s in (problem.hx, problem.cx)]
    output, h_n, _ = call(problem, problem.x, problem.hx, problem.cx)
    mirrored, h_mirrored, _ = ops.rnn(case.cell, problem.x.flip(0), *states, swapped, **problem.options)
    forward, backward = output.chunk(2, -1)
    close(mirrored.flip(0), torch.cat([backward, forward], -1), case.dtype)
    close(h_mirrored, h_n.flip(0), case.dtype)


@many
@given(cases(), st.data())
def test_lengths_equal_each_row_alone(case, data):
    problem = case.problem()
    lengths = data.draw(st.lists(st.integers(0, case.T), min_size=case.B, max_size=case.B))
    output, h_n, c_n = call(problem, problem.x, problem.hx, problem.cx, lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths):
        row = slice(b, b + 1)
        hx, cx = (s if s is None else s[:, row] for s in (problem.hx, problem.cx))
        assert (output[n:, b] == 0).all()
        if n == 0:
            assert (h_n[:, row] == (0 if hx is None else hx)).all()
            continue
        alone = call(problem, problem.x[:n, row], hx, cx)
        close(output[:n, row], alone[0], case.dtype)
        close(h_n[:, row], alone[1], case.dtype)
        if case.has_c:
            close(c_n[:, row], alone[2], case.dtype)


@many
@given(cases())
def test_what_lies_beyond_a_length_has_no_influence(case):
    problem = case.problem()
    lengths = torch.randint(0, case.T + 1, (case.B,), generator=torch.Generator().manual_seed(case.seed))
    beyond = torch.arange(case.T).unsqueeze(1) >= lengths
    spoilt = problem.x.masked_fill(beyond.unsqueeze(-1), float("nan"))
    expected = call(problem, problem.x, problem.hx, problem.cx, lengths=lengths)
    for actual, wanted in zip(call(problem, spoilt, problem.hx, problem.cx, lengths=lengths), expected, strict=True):
        assert torch.equal(actual, wanted)


def misaligned(t):
    """The same numbers one element past an aligned address."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype)
    storage[1:] = t.detach().flatten()
    return storage[1:].view(t.shape)


def strided(t):
    """The same numbers, every second element of a larger tensor."""
    wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


@many
@given(cases(), st.sampled_from([misaligned, strided]))
def test_the_place_of_the_numbers_does_not_matter(case, move):
    problem = case.problem()
    moved = problem.with_tensors([move(t) for t in problem.tensors().values()])
    for name, actual in moved.run(ops.rnn).items():
        close(actual, problem.run(ops.rnn)[name], case.dtype)


@many
@given(cases(layers=1))
def test_expanded_input(case):
    problem = case.problem()
    row = problem.x[:, :1]
    expected = call(problem, row.expand(-1, case.B, -1).contiguous(), problem.hx, problem.cx)
    for actual, wanted in zip(call(problem, row.expand(-1, case.B, -1), problem.hx, problem.cx), expected, strict=True):
        assert torch.equal(actual, wanted)
