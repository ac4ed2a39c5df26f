"""`fastseq.convert` and `fastseq.to_torch`: what a user of a built model expects to keep."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.nn.utils import parametrize, prune
from twins import CELLS, LAYERS, assert_same, cell_of, tensors

import fastseq

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
]

T, B, I, H = 5, 3, 4, 6
ALL = LAYERS + CELLS


def make(name, **options):
    return getattr(torch.nn, name)(I, H, dtype=torch.float64, **options)


def sample(module):
    return torch.randn((B, I) if isinstance(module, torch.nn.RNNCellBase) else (T, B, I), dtype=torch.float64)


class Model(torch.nn.Module):
    """Layers in a list, a dict, nested, and one in two places."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(I, I)
        self.stack = torch.nn.ModuleList([torch.nn.GRU(I, H), torch.nn.LSTM(H, H, bidirectional=True)])
        self.cells = torch.nn.ModuleDict({"a": torch.nn.RNNCell(2 * H, H), "b": torch.nn.LSTMCell(H, H)})
        self.inner = torch.nn.Sequential(torch.nn.Sequential(torch.nn.RNN(H, H, nonlinearity="relu")))
        self.first = self.stack[0]
        self.register_buffer("offset", torch.randn(I))

    def forward(self, x):
        x, _ = self.first(self.embed(x) + self.offset)
        x, _ = self.stack[1](x)
        h = self.cells["a"](x[-1])
        h, _ = self.cells["b"](h)
        return self.inner(h.expand(2, *h.shape))[0].sum(0)


def recurrent_types(model):
    return [type(m) for m in model.modules() if isinstance(m, (torch.nn.RNNBase, torch.nn.RNNCellBase))]


def test_a_model_keeps_results_parameters_and_names():
    model = Model()
    x = torch.randn(T, B, I)
    expected = model(x)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    state = model.state_dict()
    converted, report = fastseq.convert(model, report=True)
    assert converted is model
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert model.first is model.stack[0]
    assert recurrent_types(model) == [fastseq.GRU, fastseq.LSTM, fastseq.RNNCell, fastseq.LSTMCell, fastseq.RNN]
    assert report.swapped == {
        "stack.0": "torch.nn.GRU -> fastseq.GRU",
        "stack.1": "torch.nn.LSTM -> fastseq.LSTM",
        "cells.a": "torch.nn.RNNCell -> fastseq.RNNCell",
        "cells.b": "torch.nn.LSTMCell -> fastseq.LSTMCell",
        "inner.0.0": "torch.nn.RNN -> fastseq.RNN",
    }
    assert report.left == {}
    assert str(report).splitlines()[:2] == ["5 swapped, 0 left", "  stack.0: torch.nn.GRU -> fastseq.GRU"]
    fastseq._C.reset_counters()
    assert_same(model(x), expected)
    assert sum(fastseq._C.counters().values()) == 5


def test_back_to_torch():
    model = Model()
    x = torch.randn(T, B, I)
    expected, types = model(x), recurrent_types(model)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    same, report = fastseq.to_torch(fastseq.convert(model), report=True)
    assert same is model and len(report.swapped) == 5
    assert recurrent_types(model) == types
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    fastseq._C.reset_counters()
    assert_same(model(x), expected)
    assert fastseq._C.counters() == {}
    for layer in model.stack:
        assert all(w is p for w, p in zip(layer._flat_weights, layer.parameters(), strict=True))
    assert_same(copy.deepcopy(model)(x), expected)
    assert fastseq.to_torch(model) is model


def test_twice_is_once():
    model = fastseq.convert(Model())
    same, report = fastseq.convert(model, report=True)
    assert same is model and report == fastseq.ConversionReport()


@pytest.mark.parametrize("name", ALL)
def test_a_layer_itself(name):
    layer = make(name)
    x = sample(layer)
    expected = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = fastseq.convert(layer)
    assert type(converted) is getattr(fastseq, name)
    assert repr(converted) == repr(make(name))
    assert_same(converted(x), expected)
    assert str(fastseq.to_torch(layer, report=True)[1]).endswith(f"(the model): fastseq.{name} -> torch.nn.{name}")
    assert_same(layer(x), expected)


@pytest.mark.parametrize("name", ALL)
def test_an_optimizer_keeps_working(name):
    layers = [make(name)]
    layers.append(copy.deepcopy(layers[0]))
    x = sample(layers[0])
    for k, layer in enumerate(layers):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        for step in range(4):
            if k == 1 and step == 2:
                fastseq.convert(layer)
            optimizer.zero_grad()
            tensors(layer(x))[0].square().sum().backward()
            optimizer.step()
    assert_same(list(layers[1].parameters()), list(layers[0].parameters()))


@pytest.mark.parametrize("name", ALL)
def test_hooks_stay(name):
    layer, seen = make(name), []
    layer.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    layer.register_forward_hook(lambda m, args, result: seen.append("post"))
    layer.register_full_backward_hook(lambda m, grads, outputs: seen.append("backward"))
    layer.register_state_dict_pre_hook(lambda *args: seen.append("state_dict"))
    layer._register_state_dict_hook(lambda *args: seen.append("state_dict post"))
    layer.register_load_state_dict_pre_hook(lambda *args: seen.append("load"))
    layer.register_load_state_dict_post_hook(lambda *args: seen.append("loaded"))
    next(layer.parameters()).register_hook(lambda grad: seen.append("parameter"))

    def use():
        seen.clear()
        tensors(layer(sample(layer).requires_grad_()))[0].sum().backward()
        layer.load_state_dict(layer.state_dict())
        return sorted(seen)

    expected = use()
    fastseq.convert(layer)
    assert use() == expected and len(expected) == 8
    fastseq.to_torch(layer)
    assert use() == expected


@pytest.mark.parametrize("name", ALL)
def test_mode_freezing_buffers_and_attributes_stay(name):
    layer = make(name).eval()
    next(layer.parameters()).requires_grad_(False)
    layer.register_buffer("mine", torch.ones(2))
    layer.note = object()
    note = layer.note
    fastseq.convert(layer)
    assert not layer.training and not next(layer.parameters()).requires_grad
    assert "mine" in layer.state_dict() and layer.note is note


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
        lambda layer, name: torch.nn.utils.weight_norm(layer, name),
        lambda layer, name: prune.l1_unstructured(layer, name, amount=0.3),
    ],
    ids=["parametrize", "parametrizations.weight_norm", "weight_norm", "prune"],
)
@pytest.mark.parametrize("name", ALL)
def test_computed_weights_stay(name, reparametrize, kernel_calls):
    layer = make(name)
    for weight in weight_names(layer):
        reparametrize(layer, weight)
    x = sample(layer)
    parameters = dict(layer.named_parameters())
    expected, expected_state = layer(x), layer.state_dict()
    class_name = type(layer).__name__
    _, report = fastseq.convert(layer, report=True)
    assert report.swapped == {"": f"torch.nn.{name} -> fastseq.{name}"}
    assert type(layer).__name__ == class_name
    assert isinstance(layer, getattr(fastseq, name)) and not isinstance(layer, getattr(torch.nn, name))
    assert all(p is parameters[n] for n, p in layer.named_parameters())
    assert list(layer.state_dict()) == list(expected_state)
    with kernel_calls(cell_of(layer), torch.float64, forward=1):
        assert_same(layer(x), expected)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.1)
        changed = layer(x)
        assert_same(copy.deepcopy(layer)(x), changed)
    fastseq.to_torch(layer)
    assert isinstance(layer, getattr(torch.nn, name)) and type(layer).__name__ == class_name
    assert_same(layer(x), changed)


@pytest.mark.parametrize("name", ALL)
def test_parametrizations_can_be_removed_afterwards(name):
    layer = make(name)
    weight = weight_names(layer)[0]
    parametrize.register_parametrization(layer, weight, Double())
    fastseq.convert(layer)
    expected = layer(sample(layer) * 0)
    parametrize.remove_parametrizations(layer, weight)
    assert type(layer) is getattr(fastseq, name)
    assert_same(layer(sample(layer) * 0), expected)


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles_of_converted_layers(name):
    layer = fastseq.convert(make(name))
    x = sample(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fastseq.to_torch(copy.deepcopy(layer))):
        assert_same(twin(x), layer(x))
    assert type(layer) is getattr(fastseq, name)


class Custom(torch.nn.LSTM):
    pass


def test_what_is_left_and_why():
    quantized = torch.ao.nn.quantized.dynamic.LSTM(I, H)
    replaced = torch.nn.GRU(I, H)
    replaced.forward = lambda x: x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(torch.nn.GRU(I, H), torch.randn(T, B, I))
    model = torch.nn.ModuleDict(
        {
            "fine": torch.nn.GRU(I, H),
            "custom": Custom(I, H),
            "quantized": quantized,
            "replaced": replaced,
            "scripted": scripted,
            "linear": torch.nn.Linear(I, H),
            "attention": torch.ao.nn.quantizable.MultiheadAttention(4, 2),
        }
    )
    types = {n: type(m) for n, m in model.named_modules()}
    with pytest.warns(UserWarning, match=r"custom: left, as .*Custom is a subclass of torch\.nn\.LSTM"):
        fastseq.convert(model)
    assert {n: type(m) for n, m in model.named_modules() if n != "fine"} == {
        n: t for n, t in types.items() if n != "fine"
    }
    model.fine = torch.nn.GRU(I, H)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = fastseq.convert(model, report=True)
    assert report.swapped == {"fine": "torch.nn.GRU -> fastseq.GRU"}
    assert sorted(report.left) == ["attention", "custom", "quantized", "replaced", "scripted"]
    assert "derive it from fastseq.LSTM" in report.left["custom"]
    assert report.left["quantized"] == "as torch.ao.nn.quantized.dynamic.modules.rnn.LSTM is for quantization"
    assert report.left["attention"].endswith("quantizable.modules.activation.MultiheadAttention is for quantization")
    assert "forward was replaced" in report.left["replaced"]
    assert "TorchScript" in report.left["scripted"]
    assert "1 swapped, 5 left" in str(report)


@pytest.mark.parametrize("base", [fastseq.GRU, fastseq.MultiheadAttention])
def test_a_subclass_of_fastseq_is_left_by_to_torch(base):
    class Mine(base):
        pass

    model = torch.nn.Sequential(Mine(4, 2))
    assert fastseq.convert(model, report=True)[1] == fastseq.ConversionReport()
    _, report = fastseq.to_torch(model, report=True)
    assert report.swapped == {} and f"subclass of fastseq.{base.__name__}" in report.left["0"]


@pytest.mark.parametrize("base", [torch.nn.GRU, torch.nn.MultiheadAttention])
def test_a_subclass_of_torch_is_left_by_convert(base):
    class Mine(base):
        pass

    model = torch.nn.Sequential(Mine(4, 2))
    assert fastseq.to_torch(model, report=True)[1] == fastseq.ConversionReport()
    _, report = fastseq.convert(model, report=True)
    assert report.swapped == {} and f"subclass of torch.nn.{base.__name__}" in report.left["0"]


def test_parametrized_subclasses_are_left():
    layer = Custom(I, H)
    parametrize.register_parametrization(layer, "weight_hh_l0", Double())
    _, report = fastseq.convert(layer, report=True)
    assert report.swapped == {} and "subclass of torch.nn.LSTM" in report.left[""]


def test_only_modules():
    for wrong in (None, "model", torch.nn.GRU, [torch.nn.GRU(I, H)]):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got"):
            fastseq.convert(wrong)
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got"):
            fastseq.to_torch(wrong)


def test_a_model_compiled_afterwards():
    torch._dynamo.reset()
    model = fastseq.convert(Model()).eval()
    x = torch.randn(T, B, I)
    expected = model(x)
    with torch.no_grad():
        assert_same(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


def test_functional_call_on_a_converted_model():
    model = Model()
    x = torch.randn(T, B, I)
    expected = model(x)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    fastseq.convert(model)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert_same(torch.func.functional_call(model, weights, (x,)), expected)


# ---- Attention ------------------------------------------------------------------------------------------------------


def test_a_transformer_there_and_back():
    model = torch.nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True, dtype=torch.float64).eval()
    seen = []
    model.decoder.layers[0].self_attn.register_forward_pre_hook(lambda *args: seen.append("hook"))
    src, tgt = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    hooks = [dict(m._forward_pre_hooks) for m in model.modules()]
    attributes = [dict(vars(m)) for m in model.modules()]
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    names = [n for n, m in modules.items() if isinstance(m, torch.nn.MultiheadAttention)]
    with torch.no_grad():
        expected = model(src, tgt)
        _, report = fastseq.convert(model, report=True)
        assert report.swapped == {n: "torch.nn.MultiheadAttention -> fastseq.MultiheadAttention" for n in names}
        assert report.left == {} and len(names) == 3
        assert dict(model.named_modules()) == modules
        assert all(p is parameters[n] for n, p in model.named_parameters())
        for twin in (model, copy.deepcopy(model)):
            fastseq._C.reset_counters()
            assert_same(twin(src, tgt), expected)
            assert fastseq._C.counters() == {"attention_forward/float64": 3}
        assert fastseq.convert(model, report=True)[1] == fastseq.ConversionReport()
        _, report = fastseq.to_torch(model, report=True)
        assert list(report.swapped) == names
        assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert [dict(vars(m)) for m in model.modules()] == attributes
        fastseq._C.reset_counters()
        assert_same(model(src, tgt), expected)
        assert fastseq._C.counters() == {}
    assert len(seen) == 4
    assert type(modules[names[0]]) is torch.nn.MultiheadAttention


def test_a_pickled_converted_attention():
    layer = fastseq.convert(torch.nn.MultiheadAttention(4, 2, dtype=torch.float64))
    twin = pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    assert type(twin) is fastseq.MultiheadAttention
    assert_same(twin(x, x, x), layer(x, x, x))
    assert not fastseq.to_torch(twin)._forward_pre_hooks


def test_attention_with_a_computed_weight():
    layer = torch.nn.MultiheadAttention(4, 2, dtype=torch.float64)
    parametrize.register_parametrization(layer, "in_proj_weight", Double())
    prune.l1_unstructured(layer.out_proj, "weight", amount=0.3)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    expected = layer(x, x, x)
    fastseq.convert(layer)
    assert isinstance(layer, fastseq.MultiheadAttention) and parametrize.is_parametrized(layer)
    assert_same(layer(x, x, x), expected)
    fastseq.to_torch(layer)
    assert not isinstance(layer, fastseq.MultiheadAttention)
    assert_same(layer(x, x, x), expected)
