"""A layer of torch.nn and its fastseq twin with the same weights, run alike and compared."""

from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

import fastseq

LAYERS = ["RNN", "GRU", "LSTM"]
CELLS = ["RNNCell", "GRUCell", "LSTMCell"]
DTYPES = [torch.float32, torch.float64]


def twins(name, *args, **options):
    """(torch.nn's layer, fastseq's), with the same weights. `name` is a class, "RNN", or with relu "RNN/relu"."""
    name, _, nonlinearity = name.partition("/")
    if nonlinearity:
        options["nonlinearity"] = nonlinearity
    theirs = getattr(torch.nn, name)(*args, **options)
    ours = getattr(fastseq, name)(*args, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def cell_of(layer):
    return layer._cell


def random_state(layer, B, scale=1.0):
    """A leaf h, or a tuple of leaves (h, c), that fits a layer or cell."""
    weight = next(layer.parameters())
    H = layer.hidden_size
    if isinstance(layer, torch.nn.RNNCellBase):
        shapes = [(B, H)] * (2 if "LSTM" in type(layer).__name__ else 1)
    else:
        groups = layer.num_layers * (2 if layer.bidirectional else 1)
        shapes = [(groups, B, layer.proj_size or H)] + ([(groups, B, H)] if layer.mode == "LSTM" else [])
    state = tuple((scale * torch.randn(shape, dtype=weight.dtype)).requires_grad_() for shape in shapes)
    return state if len(state) == 2 else state[0]


def without_batch(state, dim):
    """A state of one row as leaves without the batch dimension."""
    leaves = tuple(s.detach().squeeze(dim).requires_grad_() for s in tensors(state))
    return leaves if isinstance(state, tuple) else leaves[0]


def tensors(result):
    """The tensors of a result or state, in order; a PackedSequence counts as its data and its indices."""
    out = []
    for leaf in _pytree.tree_leaves(result, is_leaf=lambda node: isinstance(node, PackedSequence)):
        if isinstance(leaf, PackedSequence):
            out += leaf
        else:
            out.append(leaf)
    return [t for t in out if t is not None]


def leaf_copy(tree):
    """Fresh leaves with the same values and strides."""

    def copy(t):
        return t.detach().clone().requires_grad_(t.requires_grad)

    return _pytree.tree_map_only(torch.Tensor, copy, tree)


def assert_same(actual, expected):
    """Equal but for rounding: in float64 nearly to the last digit, in float32 to what sums in another order lose."""
    actual, expected = tensors(actual), tensors(expected)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        scale = max(1.0, theirs.detach().abs().max().item()) if theirs.numel() else 1.0
        rtol, atol = (1e-9, 1e-11 * scale) if theirs.dtype == torch.float64 else (1e-4, 2e-5 * scale)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def run(layer, form, x, hx, seed=0, **options):
    """Outputs, gradients of x, the state and every parameter for a fixed random loss, and the random state after.

    `form` makes the layer's input of the leaf x: it packs, transposes, expands, ...
    """
    x, hx = leaf_copy((x, hx))
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    result = layer(form(x), hx, **options)
    after = torch.get_rng_state()
    floating = [t for t in tensors(result) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    loss = sum((torch.randn(t.shape, generator=generator, dtype=t.dtype) * t).sum() for t in floating)
    loss.backward()
    grads = [t.grad for t in tensors((x, hx)) if t.requires_grad]
    grads += [p.grad for p in layer.parameters() if p.requires_grad]
    return result, grads, after


def assert_twins_agree(theirs, ours, form, x, hx=None):
    seed = int(torch.randint(2**31, ()))
    expected, expected_grads, expected_state = run(theirs, form, x, hx, seed)
    actual, actual_grads, actual_state = run(ours, form, x, hx, seed)
    assert_same(actual, expected)
    assert_same(actual_grads, expected_grads)
    assert torch.equal(actual_state, expected_state), "torch's random stream was consumed differently"
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        assert a.requires_grad == b.requires_grad
        assert a.stride() == b.stride() or a.numel() == 0


@contextmanager
def recorded_error():
    """Collects the error that its body raises: `with recorded_error() as errors: ...`, then `errors[0]`."""
    errors = []
    try:
        yield errors
    except Exception as error:
        errors.append(error)
