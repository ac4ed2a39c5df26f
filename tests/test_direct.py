"""The direct call of layers and cells: taken where nobody could tell the difference, with the operator's results."""

import copy
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from twins import CELLS, DTYPES, LAYERS, cell_of, random_state, recorded_error, tensors, without_batch

import fastseq
from fastseq import _C

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 4, 3, 5, 6


@contextmanager
def direct_calls(count):
    _C.reset_counters()
    yield
    assert _C.direct_calls() == count


@pytest.fixture
def by_the_operator(monkeypatch):
    """Calls a module the other way, through Python and the operator."""

    def call(module, *args):
        with monkeypatch.context() as patch:
            patch.setattr(_C, "direct_layer", lambda *_: None)
            patch.setattr(_C, "direct_cell", lambda *_: None)
            with direct_calls(0):
                return module(*args)

    return call


def storages(tree):
    return [t.untyped_storage().data_ptr() for t in tensors(tree) if t.numel()]


def assert_direct(by_the_operator, module, x, hx):
    """One direct call, counted as the operator's kernel, and in every bit and stride what the operator gives."""
    with direct_calls(1):
        result = module(x, hx)
        name = f"rnn_forward/{cell_of(module)}/{str(x.dtype).removeprefix('torch.')}"
        assert _C.counters() == {name: 1}
    expected = by_the_operator(module, x, hx)
    assert type(result) is type(expected)
    for ours, theirs in zip(tensors(result), tensors(expected), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        assert ours.requires_grad is theirs.requires_grad is False
        assert ours.is_inference() == theirs.is_inference()
    used = storages(result)
    assert len(set(used)) == len(used)
    assert not set(used) & set(storages([x, hx, *module.parameters()]))


def strided(t):
    """The same numbers with gaps between them."""
    return torch.stack([t, t], -1)[..., 0]


OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "deep": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "proj": {"proj_size": 2},
    "proj-all": {"proj_size": 2, "num_layers": 2, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name, options",
    [
        pytest.param(name, options, id=f"{name}-{label}")
        for name in LAYERS
        for label, options in OPTIONS.items()
        if name == "LSTM" or "proj_size" not in options
    ],
)
@torch.no_grad()
def test_a_layer_gives_the_operators_bits(name, options, dtype, by_the_operator):
    layer = getattr(fastseq, name)(I, H, dtype=dtype, **options)
    for steps, batch in [(T, B), (1, 1), (1, B), (12, 1), (T, 0)]:
        shape = (batch, steps, I) if options.get("batch_first") else (steps, batch, I)
        x, hx = torch.randn(shape, dtype=dtype), random_state(layer, batch)
        for state in (None, hx):
            assert_direct(by_the_operator, layer, x, state)
            assert_direct(by_the_operator, layer, x.transpose(0, 1).contiguous().transpose(0, 1), state)
        spread = tuple(map(strided, hx)) if isinstance(hx, tuple) else strided(hx)
        assert_direct(by_the_operator, layer, strided(x), spread)
    x = torch.randn(T, I, dtype=dtype)
    for state in (None, without_batch(random_state(layer, 1), 1)):
        assert_direct(by_the_operator, layer, x, state)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [*CELLS, "RNNCell-relu"])
@torch.no_grad()
def test_a_cell_gives_the_operators_bits(name, bias, dtype, by_the_operator):
    name, _, nonlinearity = name.partition("-")
    more = {"nonlinearity": nonlinearity} if nonlinearity else {}
    cell = getattr(fastseq, name)(I, H, bias=bias, dtype=dtype, **more)
    for batch in (B, 1, 0):
        x, hx = torch.randn(batch, I, dtype=dtype), random_state(cell, batch)
        for state in (None, hx):
            assert_direct(by_the_operator, cell, x, state)
        assert_direct(by_the_operator, cell, strided(x), hx)
    for state in (None, without_batch(random_state(cell, 1), 0)):
        assert_direct(by_the_operator, cell, torch.randn(I, dtype=dtype), state)


def frozen(module):
    return module.requires_grad_(False)


def gradients(call, module, x, hx):
    """The outputs, and the gradients of all of them in x, hx and the parameters."""
    inputs = [t.requires_grad_() for t in (x, *tensors(hx))] + [p for p in module.parameters() if p.requires_grad]
    outputs = tensors(call(module, x, hx))
    loss = sum((t.sin() * torch.arange(t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("frozen_weights", [False, True])
@pytest.mark.parametrize("name, options", [("GRU", OPTIONS["all"]), ("LSTM", OPTIONS["proj-all"]), ("RNN", {})])
def test_a_layer_gives_the_operators_gradients(name, options, frozen_weights, by_the_operator):
    layer = getattr(fastseq, name)(I, H, **options)
    if frozen_weights:
        frozen(layer)
    for shape, state in [((B, B, I), random_state(layer, B)), ((T, I), without_batch(random_state(layer, 1), 1))]:
        x = torch.randn(shape)
        with direct_calls(1):
            results = gradients(lambda module, *args: module(*args), layer, x, state)
        for ours, theirs in zip(results, gradients(by_the_operator, layer, x, state), strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_gives_the_operators_gradients(name, by_the_operator):
    cell = getattr(fastseq, name)(I, H)
    for x, state in [
        (torch.randn(B, I), random_state(cell, B)),
        (torch.randn(I), without_batch(random_state(cell, 1), 0)),
    ]:
        with direct_calls(1):
            results = gradients(lambda module, *args: module(*args), cell, x, state)
        for ours, theirs in zip(results, gradients(by_the_operator, cell, x, state), strict=True):
            assert torch.equal(ours, theirs)


def test_where_it_is_taken(by_the_operator):
    layer, x = fastseq.GRU(I, H, num_layers=2, dropout=0.5).eval(), torch.randn(T, B, I)
    with torch.inference_mode():
        assert_direct(by_the_operator, layer, x, None)
        assert_direct(by_the_operator, layer, torch.randn(T, B, I), None)
    assert_direct(by_the_operator, frozen(layer), x, None)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False), direct_calls(1):
            layer(x)
        with direct_calls(1):
            layer(x, lengths=None)
        with direct_calls(1):
            layer(input=x, hx=None)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_direct(by_the_operator, twin, x, None)
    gradless = torch.randn(T, B, I)
    with direct_calls(1):
        assert layer(gradless)[0].add_(1).grad_fn is None


def test_the_weights_are_those_of_now(by_the_operator):
    layer, x = frozen(fastseq.LSTM(I, H)), torch.randn(T, B, I)
    before = layer(x)[0]
    layer.weight_hh_l0 = torch.nn.Parameter(torch.randn(4 * H, H), requires_grad=False)
    assert not torch.equal(layer(x)[0], before)
    assert_direct(by_the_operator, layer, x, None)
    layer.weight_ih_l0.mul_(2)
    assert_direct(by_the_operator, layer, x, None)
    layer.weight_hh_l0.data = torch.randn(H, 4 * H).t()
    assert_direct(by_the_operator, layer, x, None)
    replaced = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    with direct_calls(1):
        result = torch.func.functional_call(layer, replaced, (x,))
    layer.load_state_dict(replaced)
    assert torch.equal(layer(x)[0], result[0])


class Marked(torch.Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += "rnn_forward" in str(function)
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += "rnn_forward" in str(function)
        return function(*args, **(kwargs or {}))


def in_a_mode(mode):
    def call(module, x):
        with mode:
            module(x)
        assert mode.seen == 1

    return call


def in_a_dual_level(module, x):
    with forward_ad.dual_level():
        module(x)
        out = module(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(tensors(out)[0]).tangent is not None


def profiled(module, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    assert any(event.key == "fastseq::rnn_forward" for event in profile.key_averages())


def traced(module, x):
    traced = torch.jit.trace(module, x, check_trace=False)
    assert "fastseq::rnn_forward" in str(traced.inlined_graph)


def made_fx(module, x):
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: tensors(module(x))[0])(x)
    assert "fastseq.rnn_forward" in graph.code


def compiled(module, x):
    expected = tensors(module(x))[0]
    _C.reset_counters()
    actual = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(tensors(actual)[0], expected)


def exported(module, x):
    for strict in (False, True):
        graph = torch.export.export(module, (x,), strict=strict).graph_module
        assert "fastseq.rnn_forward" in graph.code


def autocast(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        module(x)


def in_half(module, x):
    module.half()(x.half())


def of_another_device(module, x):
    assert tensors(module.to("meta")(x.to("meta")))[0].is_meta


def negated_lazily(module, x):
    x = torch.imag(torch.complex(x, x).conj())
    assert x.is_neg()
    module(x)


EXCEPTIONS = {
    "autocast": autocast,
    "a subclass": lambda module, x: module(x.as_subclass(Marked)),
    "a function mode": lambda module, x: in_a_mode(FunctionMode())(module, x),
    "a dispatch mode": lambda module, x: in_a_mode(DispatchMode())(module, x),
    "forward-mode AD": in_a_dual_level,
    "vmap": lambda module, x: torch.func.vmap(lambda x: tensors(module(x))[0])(torch.stack([x, x])),
    "jvp": lambda module, x: torch.func.jvp(lambda x: tensors(module(x))[0], (x,), (x,)),
    "a transform around it": lambda module, x: torch.func.vmap(lambda y: y + tensors(module(x))[0])(torch.ones(2)),
    "the profiler": profiled,
    "jit.trace": traced,
    "make_fx": made_fx,
    "compile": compiled,
    "export": exported,
    "float16": in_half,
    "meta": of_another_device,
    "a lazy negation": negated_lazily,
}


@pytest.mark.parametrize("how", EXCEPTIONS)
@pytest.mark.parametrize("name", ["GRU", "LSTM", "GRUCell", "LSTMCell"])
def test_where_it_is_not_taken(name, how):
    module = getattr(fastseq, name)(I, H)
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    with torch.no_grad(), direct_calls(0):
        EXCEPTIONS[how](module, x)


@torch.no_grad()
def test_a_default_device_is_a_mode():
    layer, x = fastseq.GRU(I, H), torch.randn(T, B, I)
    with torch.device("cpu"), direct_calls(0):
        layer(x)


@torch.no_grad()
def test_what_a_layer_does_in_python_stays_there():
    x = torch.randn(T, B, I)
    layer = fastseq.GRU(I, H, num_layers=2, dropout=0.5)
    with direct_calls(0):
        layer(x)
        layer(x, lengths=[T] * B)
        layer(pack_sequence([x[:, 0], x[:2, 1]]))
        fastseq.LSTM(I, H)(x, [torch.zeros(1, B, H), torch.zeros(1, B, H)])
    for change in (
        lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
        lambda layer: prune.l1_unstructured(layer, "weight_ih_l0", 3),
    ):
        layer = fastseq.GRU(I, H)
        change(layer)
        with direct_calls(0):
            layer(x)


@pytest.mark.parametrize("name", LAYERS + CELLS)
@torch.no_grad()
def test_errors_are_those_of_the_other_way(name, by_the_operator):
    """Whatever does not fit: the same error or, where torch is lenient, the same result, and no direct call."""
    cell = name in CELLS
    module = getattr(fastseq, name)(I, H)
    good = torch.randn(B, I) if cell else torch.randn(T, B, I)
    state = random_state(module, B)
    two = isinstance(state, tuple)

    def change(f):
        return tuple(map(f, state)) if two else f(state)

    wrong = [
        (torch.randn(*good.shape[:-1], I + 1), None),
        (good.double(), None),
        (good.long(), None),
        (good.to_sparse(), None),
        (torch.randn(1, *good.shape, 1), None),
        (torch.tensor(1.0), None),
        ([1.0], None),
        (None, None),
        (good[0], state),
        (good, change(lambda s: s[..., :-1])),
        (good, change(lambda s: s[..., 0])),
        (good, change(lambda s: s.double())),
        (good, change(lambda s: s[..., :1, :])),
        (good, change(lambda s: s.unsqueeze(0))),
        (good, (state, state)),
        (good, 3),
    ]
    if not cell:
        wrong.append((good[:0], None))
    if two:
        wrong += [(good, state[0]), (good, state[:1]), (good, (state[0], None)), (good, (state[0], state[1][..., :-1]))]
    for x, hx in wrong:
        with direct_calls(0), recorded_error() as errors:
            module(x, hx)
        with recorded_error() as expected:
            by_the_operator(module, x, hx)
        assert errors and [(type(e), str(e)) for e in errors] == [(type(e), str(e)) for e in expected], (x, hx)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer, "weight_hh_l0", torch.nn.Parameter(torch.randn(3 * H, H + 1))),
        lambda layer: setattr(layer, "weight_ih_l0", torch.nn.Parameter(torch.randn(3 * H, I + 1))),
        lambda layer: setattr(layer, "bias_ih_l0", torch.nn.Parameter(torch.randn(3 * H).double())),
        lambda layer: setattr(layer, "bias_ih_l0", None),
        lambda layer: setattr(layer, "weight_hh_l0", torch.nn.Parameter(torch.randn(3 * H, H, device="meta"))),
        lambda layer: setattr(layer, "num_layers", 2),
        lambda layer: setattr(layer, "bidirectional", True),
        lambda layer: setattr(layer, "input_size", I + 1),
        lambda layer: setattr(layer, "mode", "GRUU"),
        lambda layer: delattr(layer, "bias_hh_l0"),
    ],
)
@torch.no_grad()
def test_errors_of_a_spoilt_layer(spoil, by_the_operator):
    layer, x = fastseq.GRU(I, H), torch.randn(T, B, I)
    spoil(layer)
    with direct_calls(0), recorded_error() as errors:
        layer(x)
    with recorded_error() as expected:
        by_the_operator(layer, x)
    assert errors and [(type(e), str(e)) for e in errors] == [(type(e), str(e)) for e in expected]


@torch.no_grad()
def test_hooks_and_subclasses(by_the_operator):
    class Louder(fastseq.GRU):
        def forward(self, input, hx=None):
            output, state = super().forward(input, hx)
            return 2 * output, state

    layer, x = Louder(I, H), torch.randn(T, B, I)
    plain = fastseq.GRU(I, H)
    plain.load_state_dict(layer.state_dict())
    with direct_calls(2):
        assert torch.equal(layer(x)[0], 2 * plain(x)[0])
    plain.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    plain.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    with direct_calls(2):
        assert torch.equal(2 * plain(x)[0], layer(3 * x)[0] + 2)


def test_several_threads_at_once():
    """Small layers, whose calls hold the interpreter's lock, and larger ones, whose calls do not."""
    modules = [fastseq.GRU(16, 16), fastseq.LSTM(16, 128), fastseq.RNN(16, 128, num_layers=2)]
    inputs = [torch.randn(1, 1, 16) for _ in range(8)]
    with torch.no_grad():
        expected = [[tensors(module(x)) for module in modules] for x in inputs]
    wrong = []

    def stream(k):
        with torch.no_grad():
            for _ in range(50):
                for module, results in zip(modules, expected[k], strict=True):
                    out = tensors(module(inputs[k]))
                    if not all(torch.equal(a, b) for a, b in zip(out, results, strict=True)):
                        wrong.append(k)

    with direct_calls(8 * 50 * 3):
        threads = [threading.Thread(target=stream, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
    assert not wrong


def test_a_wrong_use_of_the_function_itself():
    with pytest.raises(TypeError, match="direct_layer takes"):
        _C.direct_layer(1, 2, 3)
    with pytest.raises(TypeError, match="direct_cell takes"):
        _C.direct_cell("gru", 2, 3)
    x = torch.zeros(1, 1, 1)
    assert _C.direct_layer({}, x, None) is None
    assert _C.direct_cell("gru", {}, x[0], None) is None
