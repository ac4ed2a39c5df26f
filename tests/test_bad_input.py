"""Wrong calls of layers, cells and the functional API: an error of the type that torch raises, with what is wrong."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import CELLS, LAYERS, recorded_error, twins

import fastseq
from fastseq import ops

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 5, 4, 3, 6


def pair(name, state):
    """The state in the layer's form: h, or (h, h)."""
    return (state, state) if "LSTM" in name else state


def error_of(call):
    with recorded_error() as errors:
        call()
    return errors[0] if errors else None


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


# name of the mistake -> (call of a layer, None for torch's message or what ours must say). A call takes (layer, name).
LAYER_MISTAKES = {
    "1-D input": (lambda m, n: m(zeros(I)), None),
    "4-D input": (lambda m, n: m(zeros(1, T, B, I)), None),
    "no input": (lambda m, n: m(None), None),
    "a list": (lambda m, n: m([[[0.0] * I] * B] * T), None),
    "input size": (lambda m, n: m(zeros(T, B, I + 1)), None),
    "input size, unbatched": (lambda m, n: m(zeros(T, I + 1)), None),
    "input size 0": (lambda m, n: m(zeros(T, B, 0)), None),
    "no steps": (lambda m, n: m(zeros(0, B, I)), None),
    "no steps, no rows": (lambda m, n: m(zeros(0, 0, I)), None),
    "no steps, unbatched": (lambda m, n: m(zeros(0, I)), None),
    "int input": (lambda m, n: m(zeros(T, B, I, dtype=torch.int64)), None),
    "bool input": (lambda m, n: m(zeros(T, B, I, dtype=torch.bool)), None),
    "complex input": (lambda m, n: m(zeros(T, B, I, dtype=torch.complex64)), None),
    "double input": (lambda m, n: m(zeros(T, B, I, dtype=torch.float64)), None),
    "half input": (lambda m, n: m(zeros(T, B, I, dtype=torch.float16)), None),
    "meta input": (lambda m, n: m(zeros(T, B, I, device="meta")), None),
    "state batch": (lambda m, n: m(zeros(T, B, I), pair(n, zeros(1, B + 1, H))), None),
    "state size": (lambda m, n: m(zeros(T, B, I), pair(n, zeros(1, B, H + 1))), None),
    "state layers": (lambda m, n: m(zeros(T, B, I), pair(n, zeros(2, B, H))), None),
    "state 2-D, input 3-D": (lambda m, n: m(zeros(T, B, I), pair(n, zeros(B, H))), None),
    "state 3-D, input 2-D": (lambda m, n: m(zeros(T, I), pair(n, zeros(1, 1, H))), None),
    "state 4-D": (lambda m, n: m(zeros(T, B, I), pair(n, zeros(1, 1, B, H))), None),
    "state size, unbatched": (lambda m, n: m(zeros(T, I), pair(n, zeros(2, H))), None),
    "double state": (lambda m, n: m(zeros(T, B, I), pair(n, zeros(1, B, H, dtype=torch.float64))), "hx.*Float.*Double"),
    "int state": (lambda m, n: m(zeros(T, B, I), pair(n, zeros(1, B, H, dtype=torch.int64))), "hx.*Float.*Long"),
    "meta state": (lambda m, n: m(zeros(T, B, I), pair(n, zeros(1, B, H, device="meta"))), "hidden.*cpu.*meta"),
    "packed input size": (lambda m, n: m(pack_padded_sequence(zeros(T, B, I + 1), [5, 4, 2, 1])), "Expected 3, got 4"),
    "packed state batch": (
        lambda m, n: m(pack_padded_sequence(zeros(T, B, I), [5, 4, 2, 1]), pair(n, zeros(1, B + 1, H))),
        r"Expected hidden.* size \(1, 4, 6\), got \[1, 5, 6\]",
    ),
    "packed state size": (
        lambda m, n: m(pack_padded_sequence(zeros(T, B, I), [5, 4, 2, 1]), pair(n, zeros(1, B, H + 1))),
        r"Expected hidden.* size \(1, 4, 6\), got \[1, 4, 7\]",
    ),
}


def assert_error_is_torchs(theirs, ours, call, message):
    expected, actual = error_of(lambda: call(theirs)), error_of(lambda: call(ours))
    assert expected is not None and actual is not None
    assert type(actual) is type(expected)
    if message is None:
        assert str(actual) == str(expected)
    else:
        assert re.search(message, str(actual))


@pytest.mark.parametrize("mistake", LAYER_MISTAKES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_errors_are_torchs(name, mistake):
    call, message = LAYER_MISTAKES[mistake]
    assert_error_is_torchs(*twins(name, I, H), lambda layer: call(layer, name), message)


@pytest.mark.parametrize(
    "x, state",
    [
        (zeros(B, T, I + 1), None),
        (zeros(B, 0, I), None),
        (zeros(T, I + 1), None),
        (zeros(0, I), None),
        (zeros(B, T, I), zeros(1, T, H)),
        (zeros(B, T, I), zeros(1, B, H + 1)),
        (zeros(B, T, I), zeros(B, 1, H)),
        (zeros(T, I), zeros(1, 1, H)),
        (zeros(T, I), zeros(T, H)),
        (zeros(B, T, I, dtype=torch.float64), None),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_batch_first_errors_are_torchs(name, x, state):
    hx = None if state is None else pair(name, state)
    assert_error_is_torchs(*twins(name, I, H, batch_first=True), lambda layer: layer(x, hx), None)


@pytest.mark.parametrize(
    "hx, error, message",
    [
        (lambda h: h, IndexError, "index 1 is out of bounds"),
        (lambda h: (h,), IndexError, "out of range"),
        (lambda h: (h, h, h), RuntimeError, "lstm expects two hidden states"),
        (lambda h: torch.stack([h, h]), TypeError, "two hidden states"),
        (lambda h: (h, h.double()), RuntimeError, "cx.*Float.*Double"),
        (lambda h: (h, h[:, :, :3]), RuntimeError, r"Expected hidden\[1\] size \(1, 4, 6\), got \[1, 4, 3\]"),
        (lambda h: (h, None), AttributeError, "'NoneType' object has no attribute 'dim'"),
    ],
)
def test_lstm_states(hx, error, message):
    theirs, ours = twins("LSTM", I, H)
    x, hx = zeros(T, B, I), hx(zeros(1, B, H))
    assert type(error_of(lambda: theirs(x, hx))) is error
    with pytest.raises(error, match=message):
        ours(x, hx)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_a_pair_of_states_where_one_belongs(name):
    theirs, ours = twins(name, I, H)
    hx = (zeros(1, B, H), zeros(1, B, H))
    assert_error_is_torchs(theirs, ours, lambda layer: layer(zeros(T, B, I), hx), None)


def test_projected_states():
    theirs, ours = twins("LSTM", I, H, proj_size=2)
    for hx in ((zeros(1, B, H), zeros(1, B, H)), (zeros(1, B, 2), zeros(1, B, 2)), (zeros(1, B, H), zeros(1, B, 2))):
        assert_error_is_torchs(theirs, ours, lambda layer, hx=hx: layer(zeros(T, B, I), hx), None)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_input_of_another_dtype(name):
    """As for padded input in torch; torch itself checks only RNN and GRU here, and lets the LSTM's product fail."""
    layer = getattr(fastseq, name)(I, H)
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float64\) does not match weight dtype"):
        layer(pack_padded_sequence(zeros(T, B, I, dtype=torch.float64), [5, 4, 2, 1]))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_of_another_dtype_device_or_shape(name):
    layer = getattr(fastseq, name)(I, H)
    x = zeros(T, B, I)

    def broken(parameter, value):
        twin = copy.deepcopy(layer)
        setattr(twin, parameter, torch.nn.Parameter(value))
        return twin

    weight, bias = layer.weight_hh_l0.detach(), layer.bias_hh_l0.detach()
    with pytest.raises(RuntimeError, match=r"w_hh.*Float.*Double"):
        broken("weight_hh_l0", weight.double())(x)
    with pytest.raises(RuntimeError, match=r"b_hh.*Float.*Double"):
        broken("bias_hh_l0", bias.double())(x)
    with pytest.raises(RuntimeError, match=r"not at the same device.* cpu .*parameter tensor at meta"):
        broken("weight_hh_l0", weight.to("meta"))(x)
    with pytest.raises(RuntimeError, match=r"w_hh must be"):
        broken("weight_hh_l0", weight[:, :-1].contiguous())(x)
    with pytest.raises(RuntimeError, match=r"b_hh must be"):
        broken("bias_hh_l0", bias[:-1].contiguous())(x)
    with pytest.raises(RuntimeError, match=r"w_ih must be"):
        broken("weight_ih_l0", torch.zeros(weight.shape[0], I + 1))(x)


@pytest.mark.parametrize("name", LAYERS)
class TestLengths:
    @pytest.mark.parametrize(
        "lengths, error, message",
        [
            ([5, 4, 6, 1], ValueError, r"lengths must be within 0\.\.T = 0\.\.5; got 6 for row 2"),
            ([5, 4, 2, -1], ValueError, r"lengths must be within 0\.\.T = 0\.\.5; got -1 for row 3"),
            ([5, 4, 2], ValueError, r"lengths must be \(B,\) = \(4,\), one for each row; got \(3,\)"),
            ([[5, 4, 2, 1]], ValueError, r"lengths must be \(B,\) = \(4,\), one for each row; got \(1, 4\)"),
            (3, ValueError, r"lengths must be \(B,\) = \(4,\), one for each row; got \(\)"),
            ([5.0, 4.0, 2.0, 1.0], TypeError, r"lengths must be integers; got torch\.float32"),
            ([True, True, False, True], TypeError, r"lengths must be integers; got torch\.bool"),
            (["5", "4", "2", "1"], (TypeError, ValueError), "str"),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the kernel, torch's operator
    def test_wrong(self, name, dtype, lengths, error, message):
        layer = getattr(fastseq, name)(I, H, dtype=dtype)
        with pytest.raises(error, match=message):
            layer(zeros(T, B, I, dtype=dtype), lengths=lengths)

    def test_with_a_packed_sequence(self, name):
        packed = pack_padded_sequence(zeros(T, B, I), [5, 4, 2, 1])
        with pytest.raises(ValueError, match="PackedSequence has its own lengths"):
            getattr(fastseq, name)(I, H)(packed, lengths=[5, 4, 2, 1])

    def test_by_position(self, name):
        with pytest.raises(TypeError, match="positional"):
            getattr(fastseq, name)(I, H)(zeros(T, B, I), None, [5, 4, 2, 1])

    def test_no_steps(self, name):
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            getattr(fastseq, name)(I, H)(zeros(0, B, I), lengths=[0] * B)


CELL_MISTAKES = {
    "0-D input": (lambda m, n: m(zeros()), None),
    "3-D input": (lambda m, n: m(zeros(1, B, I)), None),
    "3-D state": (lambda m, n: m(zeros(B, I), pair(n, zeros(1, B, H))), None),
    "no input": (lambda m, n: m(None), None),
    "input size": (lambda m, n: m(zeros(B, I + 1)), None),
    "input size, unbatched": (lambda m, n: m(zeros(I + 1)), None),
    "state batch": (lambda m, n: m(zeros(B, I), pair(n, zeros(B + 1, H))), None),
    "state size": (lambda m, n: m(zeros(B, I), pair(n, zeros(B, H + 1))), None),
    "state 1-D, input 2-D, right batch": (lambda m, n: m(zeros(H, I), pair(n, zeros(H))), None),
    "state 1-D, input 2-D": (lambda m, n: m(zeros(B, I), pair(n, zeros(H))), None),
    "state 2-D, input 1-D": (lambda m, n: m(zeros(I), pair(n, zeros(1, H))), None),
    "double input": (lambda m, n: m(zeros(B, I, dtype=torch.float64)), "w_ih.*Double.*Float"),
    "int input": (lambda m, n: m(zeros(B, I, dtype=torch.int64)), None),
    "double state": (lambda m, n: m(zeros(B, I), pair(n, zeros(B, H, dtype=torch.float64))), "hx.*Float.*Double"),
    "meta input": (lambda m, n: m(zeros(B, I, device="meta")), None),
    "meta state": (lambda m, n: m(zeros(B, I), pair(n, zeros(B, H, device="meta"))), "cpu.*meta"),
}


@pytest.mark.parametrize("mistake", CELL_MISTAKES)
@pytest.mark.parametrize("name", CELLS)
def test_cell_errors_are_torchs(name, mistake):
    call, message = CELL_MISTAKES[mistake]
    assert_error_is_torchs(*twins(name, I, H), lambda cell: call(cell, name), message)


def test_cell_of_unknown_nonlinearity():
    for package in (torch.nn, fastseq):
        with pytest.raises(RuntimeError, match=r"^Unknown nonlinearity: sin$"):
            package.RNNCell(I, H, nonlinearity="sin")(zeros(B, I))


@pytest.mark.parametrize("states", [1, 3])
def test_lstm_cell_states(states):
    with pytest.raises(RuntimeError, match="lstm_cell expects two hidden states"):
        fastseq.LSTMCell(I, H)(zeros(B, I), (zeros(B, H),) * states)


# ---- The functional API ---------------------------------------------------------------------------------------------


def gru_weights(dtype=torch.float32):
    return [zeros(*shape, dtype=dtype) for shape in ((3 * H, I), (3 * H, H), (3 * H,), (3 * H,))]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, w: ops.rnn("grru", x, None, None, w), "grru"),
        (lambda x, w: ops.rnn("gru", x, None, None, w[:3]), "weights"),
        (lambda x, w: ops.rnn("gru", x, None, None, []), "weights"),
        (lambda x, w: ops.rnn("gru", x, None, None, w, num_layers=0), "num_layers"),
        (lambda x, w: ops.rnn("gru", x, None, None, w, num_layers=2), "weights"),
        (lambda x, w: ops.rnn("gru", x, None, None, w, bias=False), "weights"),
        (lambda x, w: ops.rnn("gru", x, zeros(1, B, H + 1), None, w), "hx must be"),
        (lambda x, w: ops.rnn("gru", x, None, zeros(1, B, H), w), "cx"),
        (lambda x, w: ops.rnn("gru", x[0, 0], None, None, w), r"must be \(T, B, I\)"),
        (lambda x, w: ops.rnn("gru", x[None], None, None, w), r"must be \(T, B, I\)"),
        (lambda x, w: ops.rnn("gru", x.half(), None, None, [t.half() for t in w]), "float32, float64 and bfloat16"),
        (lambda x, w: ops.rnn("gru", x, None, None, w, lengths=torch.tensor([5, 4, 6, 1])), "got 6 for row 2"),
        (lambda x, w: ops.rnn("gru", x, None, None, w, lengths=torch.tensor([5, 4, 6])), "lengths"),
        (lambda x, w: ops.rnn("gru", x, None, None, w, lengths=torch.ones(B)), "lengths"),
        (lambda x, w: ops.rnn("gru", x, None, None, w, lengths=torch.ones(B, dtype=torch.int32)), "lengths"),
        (lambda x, w: ops.rnn("gru", x.flatten(0, 1), None, None, w, batch_sizes=torch.tensor([9, 9])), "batch_sizes"),
        (lambda x, w: ops.rnn("gru", x.flatten(0, 1), None, None, w, batch_sizes=torch.tensor([5, 15])), "batch_sizes"),
        (lambda x, w: ops.rnn("gru", x, None, None, w, dropout_masks=[x]), "dropout_masks"),
        (lambda x, w: ops.rnn("gru", x[0], None, None, w, lengths=torch.ones(B, dtype=torch.int64)), "single step"),
        (lambda x, w: ops.rnn("gru", x, None, None, [t.to("meta") for t in w]), "same device"),
        (lambda x, w: ops.rnn("gru", x.to("meta"), None, None, w), "same device"),
    ],
)
def test_functional_errors(call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(zeros(T, B, I), gru_weights())


def test_sizes_whose_buffers_would_overflow():
    x = torch.zeros(1, 1, 1).expand(2**31, 2**31, 1)
    layer = fastseq.GRU(1, 2**4)
    for call in (lambda: layer(x), lambda: layer.requires_grad_(False)(x)):
        with pytest.raises(RuntimeError):
            call()


def test_malformed_packed_sequences():
    layer = fastseq.GRU(I, H)
    for sizes in ([4, 5], [4, 0], [3, 3], [9]):
        with pytest.raises(RuntimeError, match="batch_sizes"):
            layer(PackedSequence(zeros(8, I), torch.tensor(sizes)))


# ---- Loading --------------------------------------------------------------------------------------------------------


def python(*lines, **environment):
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_a_nonsense_isa_is_an_error():
    result = python("import fastseq", FASTSEQ_ISA="sse9")
    assert result.returncode == 1
    assert "ImportError" in result.stderr and "sse9" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["import sys", "sys.modules['torch'] = None"], "pip install torch"),
        (["import sys", "sys.modules['fastseq._C'] = None"], "is not built"),
        (["import torch", "torch.__version__ = '9.9.9'"], "and torch 9.9.9 is installed"),
    ],
)
def test_a_missing_part_is_one_sentence_with_the_fix(lines, message):
    result = python(*lines, "import fastseq")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("ImportError: fastseq") and message in last and "run `pip install" in last
