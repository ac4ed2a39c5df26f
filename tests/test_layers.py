"""What the layers add to torch.nn (`lengths=`), and how they live in programs: autograd, copies, tools, other paths."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import (
    CELLS,
    DTYPES,
    LAYERS,
    assert_same,
    assert_twins_agree,
    cell_of,
    random_state,
    run,
    tensors,
    twins,
)

import fastseq

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 5, 4, 3, 6
LENGTHS = [3, 5, 1, 5]
ALL = LAYERS + CELLS


def make(name, **options):
    options.setdefault("dtype", torch.float64)
    return getattr(fastseq, name)(I, H, **options)


def sample(layer, **options):
    options.setdefault("dtype", torch.float64)
    return torch.randn((B, I) if isinstance(layer, torch.nn.RNNCellBase) else (T, B, I), **options)


def output_of(result):
    return tensors(result)[0]


# ---- lengths= -------------------------------------------------------------------------------------------------------


def by_packing(layer, x, hx, lengths):
    """What `lengths=` must give, by a PackedSequence (which holds no empty rows)."""
    batch_first = layer.batch_first
    packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    output, state = layer(packed, hx)
    steps = x.shape[1 if batch_first else 0]
    return pad_packed_sequence(output, batch_first=batch_first, total_length=steps)[0], state


LENGTHS_OPTIONS = [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True, "batch_first": True}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name, options",
    [
        *((name, options) for name in ("RNN", "RNN/relu", "GRU", "LSTM") for options in LENGTHS_OPTIONS),
        ("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    ],
    ids=str,
)
def test_lengths_equal_torchs_packing(name, options, dtype, kernel_calls):
    theirs, ours = twins(name, I, H, dtype=dtype, **options)
    x = torch.randn((B, T, I) if options.get("batch_first") else (T, B, I), dtype=dtype, requires_grad=True)
    for hx in (None, random_state(theirs, B)):
        results = []
        for layer in (theirs, ours):
            layer.zero_grad()
            xs, states = x.detach().clone().requires_grad_(), [s.detach().clone().requires_grad_() for s in tensors(hx)]
            state = None if hx is None else (tuple(states) if len(states) == 2 else states[0])
            if layer is theirs:
                result = by_packing(theirs, xs, state, LENGTHS)
            else:
                with kernel_calls(cell_of(ours), dtype, forward=1):
                    result = ours(xs, state, lengths=LENGTHS)
            sum((t * t.detach().cos()).sum() for t in tensors(result)).backward()
            results.append([result, xs.grad, [s.grad for s in states], [p.grad for p in layer.parameters()]])
        assert_same(results[1], results[0])


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_in_any_form(name):
    layer = make(name, bidirectional=True)
    x = sample(layer)
    expected = layer(x, lengths=LENGTHS)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        assert_same(layer(x, lengths=torch.tensor(LENGTHS, dtype=dtype)), expected)
    assert_same(layer(x, lengths=tuple(LENGTHS)), expected)
    assert_same(layer(x, lengths=torch.tensor([LENGTHS, LENGTHS]).t()[:, 0]), expected)
    assert_same(layer(x, lengths=[T] * B), layer(x))
    assert_same(
        layer(x[:, :1].squeeze(1), lengths=[3])[0],
        layer(x[:3, 0])[0].new_zeros(T, 2 * H).index_copy(0, torch.arange(3), layer(x[:3, 0])[0]),
    )
    assert output_of(layer(x[:, :0], lengths=[])).shape == (T, 0, 2 * H)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_empty_rows_keep_their_state(name, with_state):
    layer = make(name, bidirectional=True, num_layers=2)
    x, hx = sample(layer, requires_grad=True), random_state(layer, B) if with_state else None
    lengths = [0, 3, 0, 5]
    output, state = layer(x, hx, lengths=lengths)
    assert not output[:, [0, 2]].any()
    for k, final in enumerate(tensors(state)):
        initial = tensors(hx)[k] if with_state else torch.zeros_like(final)
        assert torch.equal(final[:, [0, 2]], initial[:, [0, 2]])
    sum(t.sum() for t in tensors([output, state])).backward()
    assert not x.grad[:, [0, 2]].any()
    if with_state:
        for s in tensors(hx):
            assert torch.equal(s.grad[:, [0, 2]], torch.ones_like(s.grad[:, [0, 2]]))
    rest = layer(x[:, [1, 3]], None if hx is None else pick(hx, [1, 3]), lengths=[3, 5])
    assert_same([output[:, [1, 3]], pick(state, [1, 3])], rest)
    output, state = layer(x, hx, lengths=[0] * B)
    assert not output.any()
    assert_same(state, hx if with_state else [torch.zeros_like(s) for s in tensors(state)])


def pick(state, rows):
    return tuple(s[:, rows] for s in state) if isinstance(state, tuple) else state[:, rows]


@pytest.mark.parametrize("name", LAYERS)
def test_padding_has_no_influence(name):
    """NaN beyond a row's length reaches neither results nor gradients."""
    layer = make(name, bidirectional=True, num_layers=2)
    x = sample(layer)
    expected, expected_grads, _ = run(layer, lambda x: x, x.clone().requires_grad_(), None, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        x[length:, row] = float("nan")
    actual, grads, _ = run(layer, lambda x: x, x.requires_grad_(), None, lengths=LENGTHS)
    assert_same(actual, expected)
    assert_same(grads, expected_grads)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_with_lengths(name):
    """The masks are those of the padded output, so a full-length row sees the same as without lengths."""
    layer = make(name, num_layers=3, dropout=0.5)
    x = sample(layer)
    torch.manual_seed(1)
    expected, state = layer(x)
    torch.manual_seed(1)
    output, state_with_lengths = layer(x, lengths=LENGTHS)
    assert_same(output[:, [1, 3]], expected[:, [1, 3]])
    assert_same(pick(state_with_lengths, [1, 3]), pick(state, [1, 3]))


# ---- Autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_two_backwards_with_retain_graph_agree(name):
    layer = make(name)
    x = sample(layer, requires_grad=True)
    loss = output_of(layer(x)).square().sum()
    wanted = [x, *layer.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("edited", ["x", "h", "weight"])
@pytest.mark.parametrize("name", ALL)
def test_edits_between_forward_and_backward_raise(name, edited):
    layer = make(name)
    x, hx = sample(layer, requires_grad=True), random_state(layer, B)
    x_used, h_used = x * 1, [s * 1 for s in tensors(hx)]
    loss = output_of(layer(x_used, tuple(h_used) if len(h_used) == 2 else h_used[0])).sum()
    with torch.no_grad():
        {"x": x_used, "h": h_used[0], "weight": next(layer.parameters())}[edited].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_editing_the_output_in_place_is_allowed(name, batch_first):
    theirs, ours = twins(name, I, H, dtype=torch.float64, batch_first=batch_first, num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    grads = []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        output, state = layer(leaf)
        output.mul_(2).add_(1)
        output[0].zero_()
        (output.square().sum() + sum(s.sum() for s in tensors(state))).backward()
        grads.append([output, leaf.grad, [p.grad for p in layer.parameters()]])
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("name", ALL)
def test_outputs_do_not_share_memory(name):
    layer = make(name)
    x, hx = sample(layer), random_state(layer, B)
    results = tensors(layer(x, hx))
    if name in LAYERS:
        results += tensors(layer(x, hx, lengths=[0] * B))
    before = [r.detach().clone() for r in results]
    with torch.no_grad():
        for s in (x, *tensors(hx)):
            s.zero_()
        for k, result in enumerate(results):
            result.detach().fill_(k)
            for other in range(k + 1, len(results)):
                assert torch.equal(results[other], before[other])


@pytest.mark.parametrize("name", ALL)
def test_no_grad_and_inference_mode(name, kernel_calls):
    theirs, ours = twins(name, I, H, dtype=torch.float64)
    x = sample(ours, requires_grad=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, kernel_calls(cell_of(ours), torch.float64, forward=1):
            result = ours(x)
            assert_same(result, theirs(x))
            assert not any(t.requires_grad for t in tensors(result))


@pytest.mark.parametrize("name", ALL)
def test_frozen_weights_and_inputs(name, kernel_calls):
    theirs, ours = twins(name, I, H, dtype=torch.float64)
    frozen = [n for n, _ in ours.named_parameters()][::2]
    for layer in (theirs, ours):
        for n in frozen:
            getattr(layer, n).requires_grad_(False)
    assert_twins_agree(theirs, ours, lambda x: x, sample(ours))
    assert_twins_agree(theirs, ours, lambda x: x, sample(ours, requires_grad=True))
    for layer in (theirs, ours):
        layer.requires_grad_(False)
        assert not output_of(layer(sample(ours))).requires_grad
    assert_twins_agree(theirs, ours, lambda x: x, sample(ours, requires_grad=True))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_through_one_result_only(which):
    for name in LAYERS:
        theirs, ours = twins(name, I, H, dtype=torch.float64, num_layers=2, bidirectional=True)
        x, hx = sample(ours), random_state(ours, B)
        grads = []
        for layer in (theirs, ours):
            leaf = x.clone().requires_grad_()
            results = tensors(layer(leaf, hx))
            results[which % len(results)].square().sum().backward()
            grads.append([leaf.grad, [s.grad.clone() for s in tensors(hx)], [p.grad for p in layer.parameters()]])
            for s in tensors(hx):
                s.grad = None
        assert_same(grads[1], grads[0])


@pytest.mark.parametrize("name", LAYERS)
def test_truncated_backpropagation(name):
    """Chunks with the detached state carried over, as recurrent models are trained."""
    theirs, ours = twins(name, I, H, dtype=torch.float64)
    optimizers = [torch.optim.Adam(layer.parameters(), lr=0.05) for layer in (theirs, ours)]
    chunks = torch.randn(4, T, B, I, dtype=torch.float64)
    losses = []
    for layer, optimizer in zip((theirs, ours), optimizers, strict=True):
        hx = None
        for chunk in chunks:
            output, hx = layer(chunk, hx)
            loss = output.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hx = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else hx.detach()
            losses.append(loss)
    assert_same(losses[4:], losses[:4])


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward_with_tied_tensors(name):
    """Two places of one tensor each get their own second derivative."""
    layer = getattr(fastseq, name)(2, 2, bias=False, dtype=torch.float64)
    weight = layer.weight_ih_l0.detach().requires_grad_()
    x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)

    def loss(weight, x):
        weights = {"weight_ih_l0": weight, "weight_hh_l0": weight}
        return torch.func.functional_call(layer, weights, (x,))[0].sum()

    assert torch.autograd.gradgradcheck(loss, (weight, x))


# ---- Parameters are read at every call ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.data.mul_(2),
        lambda w: w.data.fill_(0.1),
        lambda w: setattr(w, "data", torch.full_like(w, 0.3)),
        lambda w: torch.nn.init.orthogonal_(w),
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_edits_of_a_weight_are_seen(name, edit):
    theirs, ours = twins(name, I, H, dtype=torch.float64)
    x = sample(ours)
    ours(x)
    for n, parameter in theirs.named_parameters():
        if n.startswith("weight"):
            edit(parameter)
            getattr(ours, n).data = parameter.detach().clone()
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", ALL)
def test_replacing_a_weight_is_seen(name):
    theirs, ours = twins(name, I, H, dtype=torch.float64)
    x = sample(ours)
    ours(x)
    for n in [n for n, _ in theirs.named_parameters()]:
        new = torch.nn.Parameter(torch.randn_like(getattr(theirs, n)))
        setattr(theirs, n, new)
        setattr(ours, n, new)
        assert_same(ours(x), theirs(x))
    if name in LAYERS:
        assert all(a is b for a, b in zip(ours._flat_weights, theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_optimizer_steps_are_seen(name):
    theirs, ours = twins(name, I, H, dtype=torch.float64)
    x = sample(ours)
    for layer in (theirs, ours):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            output_of(layer(x)).square().sum().backward()
            optimizer.step()
    assert_same(list(ours.parameters()), list(theirs.parameters()))
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", ALL)
def test_tied_parameters(name):
    theirs, ours = (getattr(package, name)(H, H, dtype=torch.float64) for package in (torch.nn, fastseq))
    ours.load_state_dict(theirs.state_dict())
    suffix = "" if name in CELLS else "_l0"
    for layer in (theirs, ours):
        setattr(layer, f"weight_hh{suffix}", getattr(layer, f"weight_ih{suffix}"))
        setattr(layer, f"bias_hh{suffix}", getattr(layer, f"bias_ih{suffix}"))
    x = torch.randn((B, H) if name in CELLS else (T, B, H), dtype=torch.float64, requires_grad=True)
    assert len(list(ours.parameters())) == 2
    assert_twins_agree(theirs, ours, lambda x: x, x)


@pytest.mark.parametrize("name", ALL)
def test_parameters_shared_by_two_layers(name):
    first, second = make(name), make(name)
    for n, parameter in list(first.named_parameters()):
        setattr(second, n, parameter)
    x = sample(first)
    (output_of(first(x)).sum() + output_of(second(x)).sum()).backward()
    both = [p.grad.clone() for p in first.parameters()]
    first.zero_grad()
    output_of(first(x)).sum().backward()
    assert_same(both, [2 * p.grad for p in first.parameters()])


class Double(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def weight_names(layer):
    return [n for n, _ in layer.named_parameters() if n.startswith("weight")]


@pytest.mark.parametrize(
    "reparametrize",
    [
        lambda layer, name: parametrize.register_parametrization(layer, name, Double()),
        lambda layer, name: torch.nn.utils.parametrizations.weight_norm(layer, name),
        lambda layer, name: torch.nn.utils.parametrizations.orthogonal(layer, name),
        lambda layer, name: torch.nn.utils.weight_norm(layer, name),
        lambda layer, name: prune.l1_unstructured(layer, name, amount=0.3),
    ],
    ids=["parametrize", "parametrizations.weight_norm", "orthogonal", "weight_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ALL)
class TestComputedWeights:
    def test_as_in_torch(self, name, reparametrize, kernel_calls):
        theirs, ours = twins(name, I, H, dtype=torch.float64)
        for weight in weight_names(theirs):
            reparametrize(theirs, weight)
            reparametrize(ours, weight)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = sample(ours, requires_grad=True)
        for _ in range(2):
            with kernel_calls(cell_of(ours), torch.float64, forward=1, backward=1):
                assert_twins_agree(theirs, ours, lambda x: x, x)
            for layer in (theirs, ours):
                torch.optim.SGD(layer.parameters(), lr=0.1).step()

    def test_deepcopy(self, name, reparametrize):
        layer = make(name)
        for weight in weight_names(layer):
            reparametrize(layer, weight)
        x = sample(layer)
        with torch.no_grad():  # torch's old weight norm and prune leave a tensor with history, which has no deepcopy
            expected = layer(x)
            twin = copy.deepcopy(layer)
            assert_same(twin(x), expected)
            for parameter in layer.parameters():
                parameter.zero_()
            assert_same(twin(x), expected)


def test_deepcopy_of_a_parametrized_layer_with_history():
    """torch.nn.LSTM cannot: its list of weights holds a tensor that is no leaf."""
    layer = make("LSTM")
    parametrize.register_parametrization(layer, "weight_hh_l0", Double())
    x = sample(layer)
    expected = layer(x)
    assert_same(copy.deepcopy(layer)(x), expected)


def test_parametrizations_run_once_a_call():
    """A parametrization may change at each evaluation (spectral norm's power iteration does)."""
    count = 0

    class Counting(torch.nn.Module):
        def forward(self, weight):
            nonlocal count
            count += 1
            return weight

    layer = make("GRU")
    parametrize.register_parametrization(layer, "weight_hh_l0", Counting(), unsafe=True)
    x = sample(layer)
    count = 0
    layer(x, random_state(layer, B))
    assert count == 1


def test_functional_call(kernel_calls):
    for name in ALL:
        theirs, ours = twins(name, I, H, dtype=torch.float64)
        weights = {n: torch.randn_like(p, requires_grad=True) for n, p in ours.named_parameters()}
        x = sample(ours)
        with kernel_calls(cell_of(ours), torch.float64, forward=1):
            result = torch.func.functional_call(ours, weights, (x,))
        assert_same(result, torch.func.functional_call(theirs, weights, (x,)))
        output_of(result).sum().backward()
        assert all(w.grad is not None for w in weights.values())


# ---- Copies, files, devices, hooks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_deepcopy_and_pickle(name):
    layer = make(name)
    layer.extra = {"mine": 1}
    x = sample(layer)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    for twin in copies:
        assert type(twin) is type(layer) and twin.extra == {"mine": 1} and repr(twin) == repr(layer)
        assert_same(twin(x), expected)
        twin.requires_grad_(False)
        next(twin.parameters()).zero_()
        assert not torch.equal(output_of(twin(x)), output_of(expected))
    assert_same(layer(x), expected)


@pytest.mark.parametrize("name", ALL)
def test_save_and_load_of_the_state_dict(name):
    theirs, ours = twins(name, I, H, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    fresh = make(name)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = sample(ours)
    assert_same(fresh(x), theirs(x))


@pytest.mark.parametrize("name", ALL)
def test_to_and_back(name, kernel_calls):
    theirs, ours = twins(name, I, H)
    for dtype in (torch.float64, torch.float32):
        assert ours.to(dtype) is ours
        x = sample(ours, dtype=dtype)
        with kernel_calls(cell_of(ours), dtype, forward=1):
            result = ours(x)
        assert_same(result, theirs.to(dtype)(x))
    meta = copy.deepcopy(ours).to("meta")
    assert output_of(meta(sample(ours, dtype=torch.float32, device="meta"))).device.type == "meta"
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(ours.state_dict())
    x = sample(ours, dtype=torch.float32)
    assert_same(empty(x), ours(x))


@pytest.mark.parametrize("name", ALL)
def test_hooks(name):
    layer = make(name)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre") or (2 * args[0], *args[1:]))
    layer.register_forward_hook(lambda module, args, result: seen.append("post"))
    layer.register_full_backward_hook(lambda module, grads, results: seen.append("backward"))
    next(layer.parameters()).register_hook(lambda grad: seen.append("parameter"))
    x = sample(layer, requires_grad=True)
    output_of(layer(x)).sum().backward()
    assert seen == ["pre", "post", "parameter", "backward"] or seen == ["pre", "post", "backward", "parameter"]


@pytest.mark.parametrize("name", LAYERS)
def test_data_parallel_replicas(name):
    """torch.nn.parallel.replicate makes its copies by this method: plain tensors in the place of parameters."""
    layer = make(name)
    x = sample(layer)
    replica = layer._replicate_for_data_parallel()
    for n, parameter in layer.named_parameters():
        setattr(replica, n, 2 * parameter)
    for parameter in layer.parameters():
        parameter.data.mul_(2)
    assert_same(replica(x), layer(x))


# ---- Other paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_float16_runs_torchs_operator(name, kernel_calls):
    theirs, ours = twins(name, I, H, dtype=torch.float16)
    x = sample(ours, dtype=torch.float16)
    with kernel_calls(), torch.no_grad():
        assert_exactly_torchs(ours(x), theirs(x))
        hx = random_state(ours, B)
        assert_exactly_torchs(ours(x, hx), theirs(x, hx))


def assert_exactly_torchs(actual, expected):
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_form_by_torchs_operator(name, options, kernel_calls):
    """float16: padded, unbatched and packed are torch's to the bit, with its dropout; lengths equal packing."""
    theirs, ours = twins(name, I, H, dtype=torch.float16, **options, dropout=0.5 if options else 0.0)
    batch_first = options.get("batch_first", False)
    x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=torch.float16)
    hx = random_state(ours, B)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=batch_first, enforce_sorted=False)
    with kernel_calls(), torch.no_grad():
        for args in ((x,), (x, hx), (x[0],), (packed,), (packed, hx)):
            results = []
            for layer in (theirs, ours):
                torch.manual_seed(2)
                results.append(layer(*args))
            assert_exactly_torchs(results[1], results[0])
        theirs.eval(), ours.eval()
        assert_exactly_torchs(ours(x, hx, lengths=LENGTHS), by_packing(theirs, x, hx, LENGTHS))


@pytest.mark.parametrize("name", LAYERS)
def test_empty_rows_by_torchs_operator(name, kernel_calls):
    layer, exact = make(name, dtype=torch.float16, bidirectional=True), make(name, bidirectional=True)
    exact.load_state_dict(layer.state_dict())
    x = sample(layer, dtype=torch.float16)
    hx = random_state(layer, B)
    doubled = tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
    for lengths in ([0, 3, 0, 5], [0] * B):
        with kernel_calls():
            actual = layer(x, hx, lengths=lengths)
        expected = exact(x.double(), doubled, lengths=lengths)
        for a, b in zip(tensors(actual), tensors(expected), strict=True):
            assert a.dtype == torch.float16
            torch.testing.assert_close(a.double(), b, rtol=0.01, atol=0.01)
        assert not output_of(actual)[:, [0, 2]].any()
    assert output_of(layer(x[:, :0], lengths=[])).shape == (T, 0, 2 * H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_autocast_gives_torchs_dtypes(name, dtype, kernel_calls):
    theirs, ours = twins(name, I, H)
    x = sample(ours, dtype=torch.float32, requires_grad=True)
    with kernel_calls(), torch.autocast("cpu", dtype=dtype):
        result = ours(x)
        try:
            expected = theirs(x)
        except RuntimeError as error:
            assert name == "LSTM" and "primitive" in str(error)  # oneDNN has no kernel of it for this processor
            assert all(t.dtype == dtype for t in tensors(result))  # as with oneDNN
            expected = None
        if name == "LSTM" and (expected is None or dtype == torch.float16):
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                expected = theirs(x)
            for a, b in zip(tensors(result), tensors(expected), strict=True):
                torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)
        else:
            assert_exactly_torchs(result, expected)
        loss = output_of(result).float().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_packed(name, kernel_calls):
    theirs, ours = twins(name, I, H)
    x = sample(ours, dtype=torch.float32)
    with kernel_calls(), torch.autocast("cpu"):
        packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        assert_exactly_torchs(ours(packed), theirs(packed))
        dense = ours(pack_padded_sequence(x, [T] * B))
        assert_exactly_torchs([dense[0].data.view(T, B, H), dense[1]], ours(x))


def test_autocast_of_another_device_changes_nothing(kernel_calls):
    layer = make("GRU", dtype=torch.float32)
    x = sample(layer, dtype=torch.float32)
    expected = layer(x)
    torch.set_autocast_enabled("cuda", True)
    try:
        with kernel_calls("gru", torch.float32, forward=1):
            assert_same(layer(x), expected)
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("name", ALL)
def test_explain_tells_what_runs(name, kernel_calls):
    layer = make(name, dtype=torch.float32)
    x = sample(layer, dtype=torch.float32)
    told = fastseq.explain(layer, x)
    assert told.path == "kernel" and cell_of(layer) in str(told) and fastseq._C.isa() in str(told)
    with kernel_calls(cell_of(layer), torch.float32, forward=1):
        layer(x)
    with torch.autocast("cpu"):
        told = fastseq.explain(layer, x)
        assert told.path == "torch" and "autocast" in told.reason
        with kernel_calls():
            layer(x)
    half = copy.deepcopy(layer).half()
    told = fastseq.explain(half, x.half())
    assert told.path == "torch" and "float16" in told.reason
    told = fastseq.explain(layer.to("meta"), x.to("meta"))
    assert told.path == "torch" and "meta" in told.reason
    layer = make(name)
    told = []
    torch.func.jvp(lambda x: told.append(fastseq.explain(layer, x)) or x, (x,), (x,))
    assert told[0].path == "reference"
    with torch.autograd.forward_ad.dual_level():
        assert fastseq.explain(layer, x).path == "reference"
    assert fastseq.explain(layer, x).path == "kernel"
    assert fastseq.explain(getattr(torch.nn, name)(I, H), x).path == "torch"


def test_explain_takes_packed_sequences_and_refuses_other_modules():
    layer = make("GRU")
    packed = pack_padded_sequence(sample(layer), LENGTHS, enforce_sorted=False)
    assert fastseq.explain(layer, packed).path == "kernel"
    with pytest.raises(TypeError, match=r"recurrent layer or cell .* got torch\.nn\.\S*Linear"):
        fastseq.explain(torch.nn.Linear(I, H), packed.data)


# ---- Tools of torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_script_is_refused_in_one_sentence(name):
    model = torch.nn.Sequential(getattr(fastseq, name)(I, H))
    for module in (model, model[0]):
        with pytest.raises(RuntimeError, match=rf"^fastseq\.{name} cannot .*torch\.jit\.trace or torch\.compile\.$"):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("name", ALL)
def test_trace(name, kernel_calls):
    layer = make(name, **({} if name in CELLS else {"num_layers": 2, "bidirectional": True, "batch_first": True}))
    x = sample(layer)
    hx = random_state(layer, B if name in CELLS else T)
    hx = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else hx.detach()
    for args in ((x,), (x, hx)):
        traced = torch.jit.trace(layer, args)
        other = (sample(layer), *args[1:])
        with kernel_calls(cell_of(layer), torch.float64, forward=1):
            result = traced(*other)
        assert_same(result, layer(*other))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        assert_same(torch.jit.load(file)(*other), layer(*other))


@pytest.mark.parametrize("name", ALL)
def test_func_transforms(name, kernel_calls):
    """grad, vmap over inputs, per-sample gradients and jvp agree with torch.nn, or autograd where torch.nn cannot."""
    layer = make(name)
    x = sample(layer)
    weights = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(weights, x):
        return output_of(torch.func.functional_call(layer, weights, (x,))).square().sum()

    output_of(layer(x)).square().sum().backward()
    expected = {n: p.grad for n, p in layer.named_parameters()}
    with kernel_calls():
        grads = torch.func.grad(loss)(weights, x)
    assert_same([grads[n] for n in expected], list(expected.values()))
    batch_dim = 0 if name in CELLS else 1
    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, batch_dim))(weights, x.unsqueeze(batch_dim + 1))
    assert_same([samples[n].sum(0) for n in expected], list(expected.values()))
    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: loss(weights, x), (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    loss(weights, leaf).backward()
    assert_same(slope, (leaf.grad * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        assert_same(torch.autograd.forward_ad.unpack_dual(loss(weights, dual)).tangent, slope)


class Model(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        options = {} if name in CELLS else {"num_layers": 2, "bidirectional": True, "batch_first": True}
        self.layer = make(name, **options)
        self.head = torch.nn.Linear(H if name in CELLS else 2 * H, 2, dtype=torch.float64)

    def forward(self, x, hx=None, **options):
        return self.head(output_of_compiled(self.layer(torch.tanh(x), hx, **options)))


def output_of_compiled(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", ALL)
def test_compile_whole_graph(name, kernel_calls):
    torch._dynamo.reset()
    model = Model(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cell = cell_of(model.layer)
    x = sample(model.layer, requires_grad=True)
    hx = random_state(model.layer, B if name in CELLS else T)
    calls = [((x,), {})]
    if name in LAYERS:
        calls.append(((x, hx), {"lengths": torch.tensor([4, 0, 2, 3, 1])}))
    else:
        calls.append(((x, hx), {}))
    for args, options in calls:
        wanted = [x, *model.parameters()]
        expected = model(*args, **options)
        expected_grads = torch.autograd.grad(expected.square().sum(), wanted)
        with kernel_calls(cell, torch.float64, forward=1, backward=1):
            result = compiled(*args, **options)
            grads = torch.autograd.grad(result.square().sum(), wanted)
        assert_same(result, expected)
        assert_same(grads, expected_grads)


def test_compile_with_dropout():
    torch._dynamo.reset()
    layer = make("GRU", num_layers=2, dropout=0.5)
    x = sample(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    result = compiled(x)
    torch.manual_seed(0)
    assert_same(result, layer(x))
    layer.eval()
    assert_same(compiled(x), layer(x))


def test_compile_with_another_length():
    """A second T or B is served by the dynamic shapes of the operator's fake rule."""
    torch._dynamo.reset()
    model = Model("LSTM")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((5, 4, I), (7, 3, I), (2, 9, I)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_same(compiled(x), model(x))


def test_export():
    model = Model("GRU").eval()
    x = sample(model.layer)
    exported = torch.export.export(model, (x,))
    assert any("fastseq.rnn_forward" in str(node.target) for node in exported.graph.nodes)
    other = torch.randn_like(x)
    assert_same(exported.module()(other), model(other))
