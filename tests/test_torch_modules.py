"""PyTorch's own inputs for its modules that recur or attend (torch.testing._internal), given to both libraries."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db
from twins import leaf_copy

import fastseq

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "MultiheadAttention")
NAMES += ("TransformerEncoderLayer", "TransformerEncoder", "TransformerDecoderLayer", "Transformer")  # torch's own
INFOS = [info for info in module_db if info.module_cls in [getattr(nn, name) for name in NAMES]]


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for part in tree for t in tensors(part)] if isinstance(tree, (tuple, list)) else []


def both(info, dtype, training, requires_grad=True):
    """Each of PyTorch's inputs with the module it is for, of torch.nn and ours, of the same weights."""
    options = {"device": "cpu", "dtype": dtype, "requires_grad": requires_grad, "training": training}
    for given in info.module_inputs_func(info, **options):
        make = given.constructor_input
        theirs = info.module_cls(*make.args, **make.kwargs).to(dtype).train(training)
        if hasattr(fastseq, info.module_cls.__name__):
            ours = getattr(fastseq, info.module_cls.__name__)(*make.args, **make.kwargs).to(dtype).train(training)
            ours.load_state_dict(theirs.state_dict())
        else:
            ours = fastseq.convert(copy.deepcopy(theirs))
        call = given.forward_input
        assert call is not None
        yield theirs, ours, call.args, call.kwargs


def run(module, args, kwargs, seed=0):
    """Results and the gradients of inputs and parameters, dropout drawn anew from the seed."""
    args, kwargs = leaf_copy((args, kwargs))  # some of PyTorch's inputs are not leaves
    torch.manual_seed(seed)
    results = tensors(module(*args, **kwargs))
    sum(r.square().sum() for r in results).backward()
    leaves = [t for t in tensors([*args, *kwargs.values()]) if t.requires_grad]
    return [r.detach() for r in results], [t.grad for t in [*leaves, *module.parameters()]]


def test_all_modules_are_in_the_database():
    assert len(INFOS) >= len(NAMES)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.formatted_name)
def test_results_and_gradients(info, dtype, training):
    tolerance = 3e-4 if dtype == torch.float32 else 1e-7  # other tests compare closely
    count = 0
    for theirs, ours, args, kwargs in both(info, dtype, training):
        expected, actual = run(theirs, args, kwargs), run(ours, args, kwargs)
        for ours_, theirs_ in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
            scale = 1 if theirs_ is None else max(1, theirs_.abs().max().item())
            torch.testing.assert_close(ours_, theirs_, rtol=tolerance, atol=tolerance * scale)
        count += 1
    assert count > 0


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.formatted_name)
def test_repr_pickle_deepcopy(info):
    for theirs, ours, args, kwargs in both(info, torch.float64, training=False):
        assert repr(ours) == repr(theirs)
        expected = run(ours, args, kwargs)
        for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            twin.zero_grad()
            torch.testing.assert_close(run(twin, args, kwargs), expected, rtol=0, atol=0)
            ours.zero_grad()


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.formatted_name)
def test_inputs_that_are_not_contiguous(info):
    for _, ours, args, kwargs in both(info, torch.float64, training=False, requires_grad=False):
        expected = tensors(ours(*args, **kwargs))
        spread = [torch.stack([t, t], -1)[..., 0] if isinstance(t, torch.Tensor) else t for t in args]
        assert all(not t.is_contiguous() for t in spread if isinstance(t, torch.Tensor) and t.numel() > 1)
        torch.testing.assert_close(tensors(ours(*spread, **kwargs)), expected)
