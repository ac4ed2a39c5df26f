"""The layers and cells against those of torch.nn: results, gradients, random stream, constructors, attributes."""

import inspect
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from twins import (
    CELLS,
    DTYPES,
    LAYERS,
    assert_same,
    assert_twins_agree,
    cell_of,
    random_state,
    recorded_error,
    twins,
    without_batch,
)

import fastseq

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 5, 4, 3, 6

OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "batch_first": {"batch_first": True},
    "deep": {"num_layers": 3},
    "dropout": {"num_layers": 3, "dropout": 0.4},
    "all": {"num_layers": 2, "dropout": 0.3, "bidirectional": True, "batch_first": True},
    "proj": {"proj_size": 2},
    "proj-all": {"proj_size": 2, "num_layers": 2, "dropout": 0.3, "bidirectional": True, "bias": False},
}


def layers_with(*labels):
    """Each layer with each of these options, as test parameters."""
    return [
        pytest.param(name, OPTIONS[label], id=f"{name}-{label}")
        for name in ["RNN", "RNN/relu", "GRU", "LSTM"]
        for label in labels
        if name == "LSTM" or "proj_size" not in OPTIONS[label]
    ]


def padded(x):
    return x


def packed_sorted(batch_first):
    return lambda x: pack_padded_sequence(x, [5, 4, 4, 1], batch_first=batch_first)


def packed_unsorted(batch_first):
    return lambda x: pack_padded_sequence(x, [2, 5, 1, 4], batch_first=batch_first, enforce_sorted=False)


def packed_full(batch_first):
    return lambda x: pack_padded_sequence(x, [5] * B, batch_first=batch_first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestLayer:
    def check(self, name, options, dtype, form, steps, batch, kernel_calls):
        """Training without a state, then evaluation with one: both through exactly one kernel each way."""
        theirs, ours = twins(name, I, H, dtype=dtype, **options)
        shape = (batch, steps, I) if options.get("batch_first") else (steps, batch, I)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        with kernel_calls(cell_of(ours), dtype, forward=1, backward=1):
            assert_twins_agree(theirs, ours, form, x)
        theirs.eval(), ours.eval()
        with kernel_calls(cell_of(ours), dtype, forward=1, backward=1):
            assert_twins_agree(theirs, ours, form, x, random_state(theirs, batch))

    @pytest.mark.parametrize("name, options", layers_with(*OPTIONS))
    def test_padded(self, name, options, dtype, kernel_calls):
        self.check(name, options, dtype, padded, T, B, kernel_calls)

    @pytest.mark.parametrize("pack", [packed_sorted, packed_unsorted])
    @pytest.mark.parametrize("name, options", layers_with(*OPTIONS))
    def test_packed(self, name, options, dtype, pack, kernel_calls):
        self.check(name, options, dtype, pack(options.get("batch_first", False)), T, B, kernel_calls)

    @pytest.mark.parametrize("name, options", layers_with("plain", "all", "proj-all"))
    def test_packed_rows_of_one_length(self, name, options, dtype, kernel_calls):
        self.check(name, options, dtype, packed_full(options.get("batch_first", False)), T, B, kernel_calls)

    @pytest.mark.parametrize("name, options", layers_with("plain", "all", "proj-all"))
    def test_one_step(self, name, options, dtype, kernel_calls):
        self.check(name, options, dtype, padded, 1, B, kernel_calls)

    @pytest.mark.parametrize("name, options", layers_with("plain", "all", "proj-all"))
    def test_empty_batch(self, name, options, dtype, kernel_calls):
        self.check(name, options, dtype, padded, T, 0, kernel_calls)

    @pytest.mark.parametrize("name, options", layers_with("plain", "batch_first", "all", "proj-all"))
    def test_unbatched(self, name, options, dtype, kernel_calls):
        theirs, ours = twins(name, I, H, dtype=dtype, **options)
        x = torch.randn(T, I, dtype=dtype, requires_grad=True)
        for hx in (None, without_batch(random_state(theirs, 1), 1)):
            with kernel_calls(cell_of(ours), dtype, forward=1, backward=1):
                assert_twins_agree(theirs, ours, padded, x, hx)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "shape, form",
    [
        pytest.param((I, B, T), lambda x: x.permute(2, 1, 0), id="permuted"),
        pytest.param((T, B, 2 * I), lambda x: x[..., ::2], id="strided"),
        pytest.param((T, B, I + 1), lambda x: x[..., 1:], id="offset"),
        pytest.param((2 * T, B, I), lambda x: x[::2], id="skipping"),
        pytest.param((T, 1, I), lambda x: x.expand(T, B, I), id="expanded-batch"),
        pytest.param((B, I), lambda x: x.expand(T, B, I), id="expanded-time"),
        pytest.param((), lambda x: x.expand(T, B, I), id="expanded-scalar"),
    ],
)
def test_strides(name, shape, form, kernel_calls):
    theirs, ours = twins(name, I, H, dtype=torch.float64, bidirectional=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    state = random_state(theirs, B)
    with kernel_calls(cell_of(ours), torch.float64, forward=1, backward=1):
        assert_twins_agree(theirs, ours, form, x, state)


@pytest.mark.parametrize("name", LAYERS)
def test_state_strides(name):
    theirs, ours = twins(name, I, H, dtype=torch.float64, num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    state = torch.randn(1, 1, H, dtype=torch.float64).expand(2, B, H)
    hx = (state, torch.randn(H, B, 2, dtype=torch.float64).permute(2, 1, 0)) if name == "LSTM" else state
    assert_same(ours(x, hx), theirs(x, hx))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_draws_torchs_masks(name, p, dtype):
    """A whole training step's random stream: two calls, padded and packed, then a draw of the user's own."""
    theirs, ours = twins(name, I, H, num_layers=4, dropout=p, bidirectional=True, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(5)
        results.append((layer(x), layer(packed_unsorted(False)(x)), torch.rand(3)))
    assert_same(results[1], results[0])
    for layer in (theirs, ours):
        layer.eval()
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequence_of_variable_length_tensors(name):
    theirs, ours = twins(name, I, H, dtype=torch.float64, bidirectional=True)
    sequences = [torch.randn(length, I, dtype=torch.float64) for length in (2, 7, 1, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    (output, state), (expected, expected_state) = ours(packed), theirs(packed)
    assert type(output) is type(expected)
    assert_same(output, expected)
    assert_same(state, expected_state)
    assert_same(pad_packed_sequence(output), pad_packed_sequence(expected))


@pytest.mark.parametrize("name", LAYERS)
def test_reference_of_each_row_alone(name):
    """As torch's own test of packing: a packed batch gives what its rows give one by one."""
    _, ours = twins(name, I, H, dtype=torch.float64, bidirectional=True, num_layers=2)
    rows = [torch.randn(length, I, dtype=torch.float64) for length in (5, 1, 3)]
    output, state = ours(pack_sequence(rows, enforce_sorted=False))
    padded_output, lengths = pad_packed_sequence(output)
    for b, row in enumerate(rows):
        alone, state_alone = ours(row)
        assert_same(padded_output[: lengths[b], b], alone)
        first = (lambda s: s[0]) if name == "LSTM" else (lambda s: s)
        assert_same(first(state)[:, b], first(state_alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["RNNCell", "RNNCell/relu", "GRUCell", "LSTMCell"])
class TestCell:
    def test_batched(self, name, bias, dtype, kernel_calls):
        theirs, ours = twins(name, I, H, bias=bias, dtype=dtype)
        x = torch.randn(B, I, dtype=dtype, requires_grad=True)
        for hx in (None, random_state(theirs, B)):
            with kernel_calls(cell_of(ours), dtype, forward=1, backward=1):
                assert_twins_agree(theirs, ours, padded, x, hx)

    def test_unbatched(self, name, bias, dtype, kernel_calls):
        theirs, ours = twins(name, I, H, bias=bias, dtype=dtype)
        x = torch.randn(I, dtype=dtype, requires_grad=True)
        for hx in (None, without_batch(random_state(theirs, 1), 0)):
            with kernel_calls(cell_of(ours), dtype, forward=1, backward=1):
                assert_twins_agree(theirs, ours, padded, x, hx)

    def test_empty_batch(self, name, bias, dtype, kernel_calls):
        theirs, ours = twins(name, I, H, bias=bias, dtype=dtype)
        x = torch.randn(0, I, dtype=dtype, requires_grad=True)
        with kernel_calls(cell_of(ours), dtype, forward=1, backward=1):
            assert_twins_agree(theirs, ours, padded, x)

    def test_loop(self, name, bias, dtype, kernel_calls):
        """Backpropagation through a Python loop over steps, the state fed back."""
        theirs, ours = twins(name, I, H, bias=bias, dtype=dtype)
        xs = torch.randn(T, B, I, dtype=dtype)
        grads = []
        for cell in (theirs, ours):
            x, hx, outputs = xs.clone().requires_grad_(), None, []
            calls = T if cell is ours else 0
            with kernel_calls(cell_of(ours), dtype, forward=calls, backward=calls):
                for t in range(T):
                    hx = cell(x[t], hx)
                    outputs.append(hx[0] if isinstance(hx, tuple) else hx)
                torch.stack(outputs).square().sum().backward()
            grads.append([outputs, x.grad, *(p.grad for p in cell.parameters())])
        assert_same(grads[1], grads[0])

    def test_strides(self, name, bias, dtype):
        theirs, ours = twins(name, I, H, bias=bias, dtype=dtype)
        x = torch.randn(I, B, dtype=dtype, requires_grad=True)
        assert_twins_agree(theirs, ours, lambda x: x.t(), x)
        assert_twins_agree(theirs, ours, lambda x: x[:, :1].t().expand(B, I), x)


# ---- Constructors and attributes ------------------------------------------------------------------------------------

CONSTRUCTIONS = [
    ((3, 4), {}),
    ((3, 4, 2), {}),
    ((3, 4), {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}),
    ((3, 4, 2, False, True, 0.25, True), {}),
    ((), {"input_size": 3, "hidden_size": 4}),
    ((3,), {"hidden_size": 4, "dtype": torch.float64}),
    ((3, 4), {"dropout": 0.5}),  # warns
    ((3, 4), {"dropout": 1}),
    ((3, 4), {"device": "meta"}),
    ((3, 4), {"dtype": torch.bfloat16}),
    ((3, 4, 2), {"proj_size": 2}),
    ((3, 4), {"proj_size": 0}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
    ((3, 4), {"nonlinearity": "relu"}),
    ((3, 4), {"nonlinearity": "sin"}),
    ((3, 4, 1, "relu"), {}),
    ((3, 4, 1, "relu", False), {}),
    ((3, 4, 1, "relu"), {"nonlinearity": "tanh"}),
    ((0, 4), {}),
    ((3, 0), {}),
    ((3, -1), {}),
    ((3, 4, 0), {}),
    ((3, 4.0), {}),
    (("3", 4), {}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"batch_first": 0}),
    ((3, 4), {"dropout": 1.5}),
    ((3, 4), {"dropout": -0.1}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": "0.5"}),
    ((3, 4), {"typo": 1}),
    ((3,), {}),
    ((), {}),
]


@pytest.mark.parametrize("args, options", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_construction(name, args, options):
    """The same module, or the same error; the same warnings; the same draws from the random stream."""
    made, errors, warned, drawn = [], [], [], []
    for package in (torch.nn, fastseq):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught, recorded_error() as error:
            warnings.simplefilter("always")
            made.append(getattr(package, name)(*args, **options))
        errors.append([(type(e), str(e)) for e in error])
        warned.append([(w.category, str(w.message)) for w in caught])
        drawn.append(torch.get_rng_state())
    assert errors[0] == errors[1]
    assert warned[0] == warned[1]
    assert torch.equal(*drawn)
    if made:
        assert_same_module(*made)


@pytest.mark.parametrize(
    "args, options",
    [
        ((3, 4), {}),
        ((3, 4, False), {}),
        ((3, 4), {"bias": False, "dtype": torch.float64}),
        ((3, 4, True, "relu"), {}),
        ((3, 4), {"nonlinearity": "relu"}),
        ((3, 4), {"nonlinearity": "sin"}),
        ((3, 4), {"device": "meta"}),
        ((3,), {}),
        ((3, 4), {"typo": 1}),
        ((-3, 4), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CELLS)
def test_cell_construction(name, args, options):
    made, errors = [], []
    for package in (torch.nn, fastseq):
        torch.manual_seed(0)
        with recorded_error() as error:
            made.append(getattr(package, name)(*args, **options))
        errors.append([type(e) for e in error])
    assert errors[0] == errors[1]
    if made:
        assert_same_module(*made)


def assert_same_module(theirs, ours):
    assert repr(theirs) == repr(ours)
    assert theirs.training == ours.training
    a, b = theirs.state_dict(), ours.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert (a[key].shape, a[key].dtype, a[key].device) == (b[key].shape, b[key].dtype, b[key].device)
        assert a[key].is_meta or torch.equal(a[key], b[key])
    for constant in theirs.__constants__:
        assert getattr(theirs, constant) == getattr(ours, constant)
    if isinstance(theirs, torch.nn.RNNBase):
        assert theirs.mode == ours.mode
        assert [[w.shape for w in group] for group in theirs.all_weights] == [
            [w.shape for w in group] for group in ours.all_weights
        ]
        assert all(w is p for w, p in zip(ours._flat_weights, ours.parameters(), strict=True))
        assert theirs._flat_weights_names == ours._flat_weights_names
        ours.flatten_parameters()


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_public_methods_of_torch_are_there(name):
    theirs, ours = getattr(torch.nn, name), getattr(fastseq, name)
    assert {n for n in dir(theirs) if not n.startswith("_")} <= {n for n in dir(ours) if not n.startswith("_")}
    parameters = list(inspect.signature(ours.forward).parameters)
    assert parameters[: len(inspect.signature(theirs.forward).parameters)] == list(
        inspect.signature(theirs.forward).parameters
    )


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_class_relations(name):
    layer = getattr(fastseq, name)(3, 4)
    assert isinstance(layer, torch.nn.RNNCellBase if name in CELLS else torch.nn.RNNBase)
    assert not isinstance(layer, getattr(torch.nn, name))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_state_dict_loads_both_ways(name):
    options = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    theirs, ours = getattr(torch.nn, name)(I, H, **options), getattr(fastseq, name)(I, H, **options)
    x = torch.randn(B, I) if name in CELLS else torch.randn(T, B, I)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours(x), theirs(x))
    torch.nn.init.normal_(next(ours.parameters()))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours(x), theirs(x))
    ours.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()}, strict=True, assign=True)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate_as_in_torch(name, value):
    theirs, ours = twins(name, I, H, dtype=torch.float64, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    x[2, 1, 0] = value
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)
