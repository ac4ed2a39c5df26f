"""`prepack`: the weights packed once, for calls without gradients."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq import _C

LAYERS = {
    "RNN": lambda *sizes, **kw: fastseq.RNN(*sizes, **kw),
    "RNN relu": lambda *sizes, **kw: fastseq.RNN(*sizes, nonlinearity="relu", **kw),
    "GRU": lambda *sizes, **kw: fastseq.GRU(*sizes, **kw),
    "LSTM": lambda *sizes, **kw: fastseq.LSTM(*sizes, **kw),
    "LSTM proj": lambda *sizes, **kw: fastseq.LSTM(*sizes, proj_size=5, **kw),
}


def pair(name, *sizes, **kwargs):
    """A layer, and a prepacked one with the same weights."""
    layer = LAYERS[name](*sizes, **kwargs)
    return layer, copy.deepcopy(layer).prepack()


def flat(result):
    output, state = result
    return [output, *state] if isinstance(state, tuple) else [output, state]


def assert_same_bits(got, want):
    for a, b in zip(flat(got), flat(want), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits(name, dtype):
    for options in ({}, {"bidirectional": True, "num_layers": 2}, {"bias": False, "batch_first": True}):
        layer, packed = pair(name, 13, 37, dtype=dtype, **options)
        for T, B in ((1, 1), (7, 3), (8, 1), (8, 20), (40, 2)):
            x = torch.randn(*((B, T) if layer.batch_first else (T, B)), 13, dtype=dtype)
            with torch.no_grad():
                before = _C.direct_calls()
                result = packed(x)
                assert _C.direct_calls() == before + 1
                assert_same_bits(result, layer(x))
                assert_same_bits(packed(x[0]), layer(x[0]))  # without a batch


@pytest.mark.parametrize("name", LAYERS)
def test_many_inputs_and_large_layers(name):
    """Several blocks of K in the input projection, and panels that threads share."""
    layer, packed = pair(name, 1100, 260)
    x = torch.randn(9, 3, 1100)
    with torch.no_grad():
        assert_same_bits(packed(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_the_packed_weights_are_what_is_used(name):
    layer, packed = pair(name, 6, 40)
    x = torch.randn(12, 2, 6)
    for parameter in packed.parameters():
        if parameter.dim() == 2:
            parameter.data.zero_()  # which nobody can see, as the docstring says
    with torch.no_grad():
        assert_same_bits(packed(x), layer(x))
        packed.prepack()
        assert not torch.equal(packed(x)[0], layer(x)[0])


def step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(torch.randn(12, 2, 6))[0].sum().backward()
    optimizer.step()


def replace(layer):
    layer.weight_hh_l0 = torch.nn.Parameter(layer.weight_hh_l0.detach().clone())


def point_elsewhere(layer):
    layer.weight_hh_l0.data = layer.weight_hh_l0.detach().clone()


CHANGES = {
    "written to": lambda layer: layer.weight_hh_l0.detach().mul_(2),
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()),
    "init": lambda layer: torch.nn.init.zeros_(layer.bias_hh_l0),
    "optimizer": step,
    "another parameter": replace,
    "another tensor": point_elsewhere,
    "resized in place": lambda layer: layer.weight_hh_l0.detach().resize_(1, 1).resize_(40, 40),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("T", [1, 12])
def test_a_changed_weight_raises(change, T):
    layer = fastseq.RNN(6, 40).prepack()
    x = torch.randn(T, 2, 6)
    with torch.no_grad():
        layer(x)
    CHANGES[change](layer)
    with torch.no_grad():
        with pytest.raises(
            RuntimeError, match=r"(weight|bias)_\w+_l0 (has been written to|is another tensor) since prep"
        ):
            layer(x)
        want = copy.deepcopy(layer)(x)
        assert_same_bits(layer.prepack()(x), want)
        CHANGES["written to"](layer)
        want = copy.deepcopy(layer)(x)
        assert_same_bits(layer.unprepack()(x), want)


def test_a_weight_that_is_a_part_of_what_was_packed_raises():
    layer = fastseq.RNN(6, 40).prepack()
    layer.weight_ih_l0 = torch.nn.Parameter(layer.weight_ih_l0.data[:, :5])  # the same memory
    layer.input_size = 5
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight_ih_l0 is another tensor"):
        layer(torch.randn(12, 2, 5))


def test_prepacked_anew_while_others_call():
    layer, packed = pair("RNN", 64, 512)
    x = torch.randn(300, 1, 64)

    def call():
        with torch.no_grad():
            return packed(x)

    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        want = layer(x)
        results = [pool.submit(call) for _ in range(20)]
        while not all(result.done() for result in results):
            packed.prepack()
        for result in results:
            assert_same_bits(result.result(), want)


def test_a_changed_layer_raises():
    layer = fastseq.RNN(6, 40).prepack()
    layer.mode = "RNN_RELU"
    with torch.no_grad(), pytest.raises(RuntimeError, match="not the one that it was since prepack"):
        layer(torch.randn(12, 2, 6))


@pytest.mark.parametrize("name", LAYERS)
def test_other_calls_pack_as_always(name):
    layer, packed = pair(name, 6, 40, num_layers=2, dropout=0.5)
    x = torch.randn(12, 3, 6)
    for parameter in packed.parameters():
        parameter.detach().mul_(0.5)
    for parameter in layer.parameters():
        parameter.detach().mul_(0.5)
    torch.manual_seed(0)
    packed(x)[0].sum().backward()
    torch.manual_seed(0)
    layer(x)[0].sum().backward()
    for a, b in zip(packed.parameters(), layer.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    ragged = pack_sequence([x[:, 0], x[:5, 1]])
    with torch.no_grad():
        packed.eval(), layer.eval()
        assert_same_bits(packed(x, lengths=[12, 3, 0]), layer(x, lengths=[12, 3, 0]))
        assert torch.equal(packed(ragged)[0].data, layer(ragged)[0].data)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_are_not_prepacked(name):
    layer, packed = pair(name, 6, 40)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
    copies.append(torch.load(file, weights_only=False))
    x = torch.randn(12, 3, 6)
    for other in copies:
        for parameter in other.parameters():
            parameter.data.zero_()
        with torch.no_grad():
            assert not torch.equal(other(x)[0], layer(x)[0])
    theirs = copy.deepcopy(fastseq.to_torch(packed))
    with torch.no_grad():
        assert torch.allclose(theirs(x)[0], layer(x)[0], atol=1e-5)


def test_from_several_threads():
    layer, packed = pair("GRU", 20, 130)
    inputs = [torch.randn(16, 1, 20) for _ in range(40)]

    def call(x):
        with torch.no_grad():
            return packed(x)

    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for got, x in zip(pool.map(call, inputs), inputs, strict=True):
            assert_same_bits(got, layer(x))


def test_weights_that_cannot_be_prepacked():
    layer = fastseq.GRU(6, 8)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0 is computed from others"):
        layer.prepack()
    with torch.inference_mode():
        layer = fastseq.GRU(6, 8)
    with pytest.raises(RuntimeError, match="no version counter"):
        layer.prepack()
    with pytest.raises(RuntimeError, match="float32, float64 and bfloat16"):
        fastseq.GRU(6, 8).half().prepack()
    with pytest.raises(RuntimeError, match="on the CPU; got one on meta"):
        fastseq.GRU(6, 8, device="meta").prepack()
