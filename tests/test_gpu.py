"""The CUDA kernels on a real GPU, held to what the CPU computes in float64. Everywhere else the tests skip, and
csrc/cuda/emulation runs the same kernels."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq import _C, ops, reference
from fastseq.attention_ops import AttentionOptions, attention
from fastseq.testing import Case, all_cases, check_forward, check_gradients, check_reference, on_device
from fastseq.testing import check_second_gradients as check_second
from fastseq.testing.cases import SIZES, bfloat16_cases
from fastseq.testing.checks import outputs_and_gradients

WHY_NOT = (
    "the extension was built without CUDA"
    if not _C.cuda()["built"]
    else "torch sees no GPU"
    if not torch.cuda.is_available()
    else ""
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CELLS = list(_C.cells())
LAYERS = ["RNN", "LSTM", "GRU"]
rnn_on_gpu = on_device(ops.rnn, "cuda")


def error(actual, expected):
    """The largest difference, in units of the rounding of actual's dtype, of expected's largest number or of 1."""
    assert actual.shape == expected.shape
    if not actual.numel():
        return 0.0
    largest = max(expected.abs().max().item(), 1.0)
    difference = (actual.detach().cpu().double() - expected.detach().cpu().double()).abs().max().item()
    assert difference == difference, "NaN"
    return difference / (torch.finfo(actual.dtype).eps * largest)


def units(dtype):
    """Of what sums of some hundred terms may be off; in 16 bits they are rounded once or twice."""
    return 8 if dtype in (torch.bfloat16, torch.float16) else 64


def assert_near(actual, expected, most=None):
    found = [error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert all(f <= (most or units(a.dtype)) for f, a in zip(found, actual, strict=True)), found


# ---- The operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_outputs_and_gradients_are_the_references(case):
    result = check_reference(case, rnn_on_gpu)
    assert result.passed, str(result)


@pytest.mark.parametrize("case", list(bfloat16_cases()), ids=lambda case: case.id)
def test_float16_is_as_exact_as_its_rounding(case):
    problem = case.replace(dtype=torch.float16).problem()
    exact = outputs_and_gradients(problem.leaves(torch.float64), reference.rnn)
    actual = outputs_and_gradients(problem.leaves(), rnn_on_gpu)
    assert {name: t.dtype for name, t in actual.items()} == dict.fromkeys(exact, torch.float16)
    assert {name: e for name, t in actual.items() if (e := error(t, exact[name])) > 16} == {}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_second_call_gives_the_same_bits(cell, size):
    result = check_forward(Case(cell, **size, dtype=torch.float32, bidirectional=True, form="lengths"), rnn_on_gpu)
    assert result.passed, str(result)


@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences(cell, form):
    case = Case(cell, T=3, bidirectional=True, form=form)
    for result in (check_gradients(case, rnn_on_gpu), check_second(case, rnn_on_gpu)):
        assert result.passed, str(result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_sizes_of_real_layers(cell, dtype):
    """Where weights stay on the chip, those of large layers also in registers, and where they do not fit; in float32
    without TF32."""
    if cell == "rnn_relu" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("rounding takes h across the rectifier's kink, where the gradient is another")
    for H, B in ((64, 64), (256, 17), (512, 32), (1024, 8), (1400, 20), (1500, 3), (2048, 9)):
        problem = Case(cell, T=6, B=B, I=96, H=H, dtype=dtype).problem()
        # Smaller weights than a case has, as those of a trained layer: gradients stay of the size of the outputs.
        problem = problem.with_tensors([t / 2 for t in problem.tensors().values()])
        exact = outputs_and_gradients(problem.leaves(torch.float64), reference.rnn)
        actual = outputs_and_gradients(problem.leaves(), rnn_on_gpu)
        found = {name: error(t, exact[name]) for name, t in actual.items()}
        assert max(found.values()) <= units(dtype), (H, B, found)


def test_tf32_is_taken_where_torch_allows_it():
    case = Case("gru", T=5, B=64, I=256, H=600, dtype=torch.float32)
    problem = case.problem()
    with torch.no_grad():
        plain = problem.run(rnn_on_gpu)["output"]
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            rounded = problem.run(rnn_on_gpu)["output"]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        exact = problem.leaves(torch.float64).run(reference.rnn)["output"]
    assert error(plain, exact) <= 64
    assert error(rounded, exact) <= 64 * 2**13  # of whose 23 bits TF32 keeps 10


def test_tensors_of_two_devices_are_refused():
    case = Case("lstm", dtype=torch.float32)
    problem = case.problem()
    with pytest.raises(RuntimeError, match="must be on the"):
        ops.rnn("lstm", problem.x.cuda(), None, None, problem.weights)
    with pytest.raises(RuntimeError, match="must be on the"):
        ops.rnn("lstm", problem.x, None, None, [w.cuda() for w in problem.weights])
    with pytest.raises(RuntimeError, match="must be on the"):
        ops.rnn("lstm", problem.x.cuda(), problem.hx, problem.cx, [w.cuda() for w in problem.weights])


# ---- Layers ----------------------------------------------------------------------------------------------------------


def twins(name, dtype, **options):
    """A layer of ours on the GPU, and torch's of the same weights, in float64 on the CPU."""
    theirs = getattr(torch.nn, name)(24, 40, **options).to(dtype)
    ours = fastseq.convert(copy.deepcopy(theirs)).cuda()
    return ours, theirs.double()


def run_layer(layer, x, d):
    x = x.detach().requires_grad_()
    output, state = layer(x)
    states = state if isinstance(state, tuple) else (state,)
    loss = (output * d).sum() + sum(s.sum() for s in states)
    return [output, *states, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_torchs(name, dtype):
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}):
        ours, theirs = twins(name, dtype, **options)
        x = torch.randn(7, 5, 24).to(dtype)
        d = torch.randn(7, 5, 40 * (1 + bool(options.get("bidirectional")))).to(dtype)
        _C.reset_counters()
        actual = run_layer(ours, x.cuda(), d.cuda())
        assert sum(_C.counters().values()) == 2, "another path than the kernels"
        assert_near(actual, run_layer(theirs, x.double(), d.double()))


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_and_lengths(name):
    ours, theirs = twins(name, torch.float64)
    x, lengths = torch.randn(6, 4, 24, dtype=torch.float64), torch.tensor([3, 6, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected = theirs(packed)[0].data
    assert_near([ours(packed.to("cuda"))[0].data], [expected])
    output = ours(x.cuda(), lengths=lengths)[0]
    assert_near([pack_padded_sequence(output, lengths, enforce_sorted=False).data], [expected])


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_are_torchs(name):
    theirs = getattr(torch.nn, name)(24, 40).double()
    ours = fastseq.convert(copy.deepcopy(theirs)).cuda()
    x = torch.randn(5, 24, dtype=torch.float64)
    expected, actual = theirs(x), ours(x.cuda())
    pair = name == "LSTMCell"
    assert_near(actual if pair else [actual], expected if pair else [expected])


def test_explain_tells_of_the_gpu():
    layer = fastseq.LSTM(8, 8).cuda().half()
    told = fastseq.explain(layer, torch.zeros(2, 3, 8, device="cuda", dtype=torch.float16))
    assert told.path == "kernel" and "CUDA" in told.operator and "cuda:0" in told.reason
    with torch.autocast("cuda"):
        assert fastseq.explain(layer, torch.zeros(2, 3, 8, device="cuda")).path == "torch"
    q = torch.zeros(1, 1, 4, 300, device="cuda")
    assert fastseq.explain(fastseq.scaled_dot_product_attention, q, q, q).path == "reference"
    assert fastseq.explain(fastseq.scaled_dot_product_attention, q[..., :64], q, q[..., :64]).path == "kernel"


# ---- Attention -------------------------------------------------------------------------------------------------------

LENGTHS = [0, 5, 37, 100]


def options_of(scale, **changes):
    none = AttentionOptions(*[None] * 7, scale, 0.0, 0.0, None, None, False)
    return none._replace(**changes)


ATTENTION = {
    "plain": {},
    "causal": {"high": 0},
    "causal from the end": {"high": 0, "from_end": True},
    "window": {"low": -9, "high": 4},
    "window with rows that see nothing": {"low": 100, "high": 110},
    "bool mask": {"attn_mask": "bool"},
    "bias": {"attn_mask": "bias"},
    "alibi": {"alibi_slopes": "slopes", "high": 0},
    "softcap": {"softcap": 3.0},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([1234567890123])},
    "dropout of all": {"dropout_p": 1.0, "dropout_seed": torch.tensor([7])},
    "lengths": {"query_lengths": torch.tensor([70, 0]), "key_lengths": torch.tensor([3, 129])},
}


def draw(dtype, N=4, N_kv=2, L=77, S=133, D=64, Dv=48, B=2):
    tensors = [torch.randn(B, n, rows, size) for n, rows, size in ((N, L, D), (N_kv, S, D), (N_kv, S, Dv))]
    return [t.to(dtype) for t in tensors]


def draw_option(name, query, key):
    B, N, L, _ = query.shape
    S = key.shape[2]
    if name == "bool":
        mask = torch.rand(B, 1, L, S) < 0.7
        mask[:, :, 3] = False
        return mask
    return (torch.randn(N, L, S) if name == "bias" else torch.rand(N)).to(query.dtype)


def run_attention(function, tensors, options, device, dtype):
    """out, lse and the gradients, of tensors as float64 or on the GPU."""

    def moved(t):
        if not isinstance(t, torch.Tensor) or t.dtype == torch.int64:
            return t
        return t.to(device, dtype if t.dtype != torch.bool else t.dtype)

    leaves = [moved(t).detach().requires_grad_() for t in tensors]
    options = AttentionOptions(*map(moved, options))
    mask = options.attn_mask
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.detach().requires_grad_())
        options = options._replace(attn_mask=leaves[-1])
    out, lse = function(*leaves[:3], options)
    generator = torch.Generator().manual_seed(5)
    d_out = torch.randn(out.shape, generator=generator).to(tensors[0].dtype).to(device, dtype)
    d_lse = torch.randn(lse.shape, generator=generator).to(device, lse.dtype)
    seen = lse > -torch.inf
    loss = (out * d_out).sum() + torch.where(seen, lse * d_lse, 0).sum()
    return [out, torch.where(seen, lse, 0), *torch.autograd.grad(loss, leaves)]


def assert_attention(tensors, options):
    exact = run_attention(
        lambda q, k, v, o: reference.attention(q, k, v, **o._asdict()), tensors, options, "cpu", torch.float64
    )
    dtype = tensors[0].dtype
    actual = run_attention(attention, tensors, options, "cuda", dtype)
    again = run_attention(attention, tensors, options, "cuda", dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), "other bits in a second call"
    assert_near(actual[:1] + actual[2:], exact[:1] + exact[2:])
    assert_near(actual[1:2], exact[1:2], 2**12 if units(dtype) < 64 else None)  # exp2 is an approximation there


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_references(name, dtype):
    changes = dict(ATTENTION[name])
    tensors = draw(dtype)
    for option in ("attn_mask", "alibi_slopes"):
        if option in changes:
            changes[option] = draw_option(changes[option], *tensors[:2])
    assert_attention(tensors, options_of(0.125, **changes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 3, 8, 32, 40, 64, 80, 96, 128, 129, 192, 256])
def test_head_sizes(D, dtype):
    assert_attention(draw(dtype, D=D, Dv=D, L=65, S=70), options_of(D**-0.5, high=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [1, 2, 16, 17])
def test_few_queries(L, dtype):
    assert_attention(draw(dtype, N=8, N_kv=2, L=L, S=1500), options_of(0.125, high=0, from_end=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [{"L": 1, "S": 1}, {"L": 300, "S": 5}, {"L": 5, "S": 3000, "B": 1}], ids=str)
def test_shapes(sizes, dtype):
    assert_attention(draw(dtype, **sizes), options_of(0.125))


@pytest.mark.parametrize("sizes", [{"L": 0}, {"S": 0}, {"B": 0}], ids=str)
def test_nothing_to_attend_to(sizes):
    tensors = draw(torch.float32, **sizes)
    leaves = [t.cuda().requires_grad_() for t in tensors]
    out, lse = attention(*leaves, options_of(0.125))
    assert_near([out], [reference.attention(*tensors, scale=0.125)[0]])
    assert torch.all(lse == -torch.inf)
    assert all(torch.all(d == 0) for d in torch.autograd.grad(out.sum(), leaves))


def test_heads_that_are_too_large_run_the_reference():
    q, k, v = (t.cuda() for t in draw(torch.float32, D=300))
    expected = fastseq.scaled_dot_product_attention(q.cpu(), k.cpu(), v.cpu(), enable_gqa=True)
    _C.reset_counters()
    assert_near([fastseq.scaled_dot_product_attention(q, k, v, enable_gqa=True)], [expected])
    assert not _C.counters()


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen(dtype, where):
    starts = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = int(starts[-1]) + 3  # rows that are nobody's
    tensors = [torch.randn(total, n, 32).to(dtype) for n in (4, 2, 2)]
    generator = torch.Generator().manual_seed(5)
    d = torch.randn(total, 4, 32, generator=generator).to(dtype)

    def run(device, dtype, starts):
        leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
        out = fastseq.varlen_attention(*leaves, starts, starts, is_causal=True)
        return [out, *torch.autograd.grad((out * d.to(device, dtype)).sum(), leaves)]

    assert_near(run("cuda", dtype, starts.to(where)), run("cpu", torch.float64, starts))


def test_lengths_may_be_on_the_gpu():
    tensors = [t.cuda() for t in draw(torch.float32)]
    lengths = torch.tensor([70, 0]), torch.tensor([3, 129])
    on_cpu = attention(*tensors, options_of(0.125, query_lengths=lengths[0], key_lengths=lengths[1]))
    lengths = [t.cuda() for t in lengths]
    on_gpu = attention(*tensors, options_of(0.125, query_lengths=lengths[0], key_lengths=lengths[1]))
    assert all(torch.equal(a, b) for a, b in zip(on_cpu, on_gpu, strict=True))


def test_second_gradients_of_attention():
    tensors = [t.double().cuda().requires_grad_() for t in draw(torch.float32, L=3, S=4, D=3, Dv=2, B=1)]

    def function(q, k, v):
        return fastseq.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# ---- Streams, graphs, devices ----------------------------------------------------------------------------------------


def assert_captured(step, inputs):
    """What a graph of step() computes is what step() computes, for the numbers in `inputs` at each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        for t in inputs:
            t.data.copy_(torch.randn_like(t))
        graph.replay()
        for a, e in zip(captured, step(), strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_captures_a_layer(name, dtype):
    layer = getattr(fastseq, name)(24, 40, num_layers=2, bidirectional=True, device="cuda", dtype=dtype)
    x = torch.randn(7, 5, 24, device="cuda", dtype=dtype, requires_grad=True)

    def step():
        output, _ = layer(x)
        return [output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])]

    assert_captured(step, [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_captures_attention(dtype):
    tensors = [t.cuda().requires_grad_() for t in draw(dtype)]
    lengths = torch.tensor([70, 20], device="cuda")

    def step():
        out, _ = attention(*tensors, options_of(0.125, high=0, key_lengths=lengths))
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    assert_captured(step, tensors)


def test_what_a_graph_would_freeze_is_refused():
    layer = fastseq.GRU(8, 8, device="cuda")
    x = torch.randn(4, 3, 8, device="cuda")
    q = torch.randn(1, 2, 4, 8, device="cuda")
    calls = [
        lambda: layer(x, lengths=[4, 2, 1]),
        lambda: fastseq.scaled_dot_product_attention(q, q, q, dropout_p=0.5),
        lambda: attention(q, q, q, options_of(1.0, key_lengths=torch.tensor([3]))),
    ]
    for call in calls:
        call()
        with pytest.raises(RuntimeError, match="same numbers in every replay"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                call()


def test_two_streams():
    layers = [fastseq.LSTM(64, 128, device="cuda") for _ in range(2)]
    x = torch.randn(50, 16, 64, device="cuda")
    with torch.no_grad():
        expected = [layer(x)[0] for layer in layers]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in layers]
        found = []
        for _ in range(5):
            for stream, layer in zip(streams, layers, strict=True):
                with torch.cuda.stream(stream):
                    found.append(layer(x)[0])
    torch.cuda.synchronize()
    for k, output in enumerate(found):
        assert torch.equal(output, expected[k % 2])


def test_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    assert torch.cuda.current_device() == 0
    case = Case("lstm", T=9, B=7, I=5, H=33, dtype=torch.float32, form="lengths")
    result = check_reference(case, on_device(ops.rnn, "cuda:1"))
    assert result.passed, str(result)
    q, k, v = (t.to("cuda:1") for t in draw(torch.float32))
    out = fastseq.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert out.device == q.device
    assert_near([out], [fastseq.scaled_dot_product_attention(q.cpu(), k.cpu(), v.cpu(), enable_gqa=True)])


def test_editing_an_output_in_place_does_not_disturb_backward():
    case = Case("gru", dtype=torch.float32)
    problem = case.problem().leaves()
    x, weights = problem.x.detach().cuda().requires_grad_(), [w.detach().cuda() for w in problem.weights]
    found = []
    for edit in (False, True):
        output = ops.rnn("gru", x, None, None, weights)[0]
        d = torch.ones_like(output)
        if edit:
            output.data.zero_()
        found.append(torch.autograd.grad(output, x, d)[0])
    assert torch.equal(*found)
