"""fastseq.MultiheadAttention: torch.nn's to the letter, alone and in torch.nn's transformers."""

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from twins import assert_same, leaf_copy, recorded_error, tensors, twins

import fastseq
from fastseq import _C

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

B, N, E, L, S = 3, 2, 6, 4, 5


def kernels_ran(dtype, **counts):
    name = str(dtype).removeprefix("torch.")
    return {f"attention_{what}/{name}": count for what, count in counts.items()}


@pytest.fixture
def never_torchs(monkeypatch):
    """From a call of it on, whoever computes attention by torch fails."""

    def never(*args, **kwargs):
        raise AssertionError("attention was torch's")

    def forbid():
        monkeypatch.setattr(F, "scaled_dot_product_attention", never)
        monkeypatch.setattr(F, "multi_head_attention_forward", never)
        monkeypatch.setattr(torch, "_native_multi_head_attention", never)
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", never)

    return forbid


# ---- The layer against torch.nn's -----------------------------------------------------------------------------------


def make_twins(**options):
    theirs, ours = twins("MultiheadAttention", E, N, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter, twin in zip(theirs.parameters(), ours.parameters(), strict=True):
            twin.copy_(parameter.normal_())  # torch starts with biases of zero
    return theirs, ours


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs(form, layer):
    """query, key, value and the shapes of their masks: (L, S), (B·N, L, S), (B, S)."""
    batch = {"unbatched": None, "self": B, "key is value": B, "apart": B}[form]

    def sequence(length, size):
        if batch is None:
            return leaf(length, size)
        return leaf(batch, length, size) if layer.batch_first else leaf(length, batch, size)

    query, key, value = sequence(L, E), sequence(S, layer.kdim), sequence(S, layer.vdim)
    if form == "key is value" and layer.kdim == layer.vdim:
        value = key
    keys = S
    if form == "self" and layer.kdim == layer.vdim == E:
        query, keys = key, S
        value = key
    queries = query.shape[-2] if batch is None or layer.batch_first else query.shape[0]
    groups = N if batch is None else N * batch
    return (query, key, value), (queries, keys), (groups, queries, keys), (keys,) if batch is None else (batch, keys)


def random_mask(kind, shape):
    """Hides some keys, never the first."""
    if kind is None:
        return None
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -math.inf).requires_grad_()


def causal_mask(kind, shape):
    hidden = torch.ones(shape[-2:], dtype=torch.bool).triu(1).expand(shape)
    return hidden if kind == "bool" else torch.zeros(shape, dtype=torch.float64).masked_fill(hidden, -math.inf)


def outputs_and_gradients(layer, args, options, seed=0):
    """Results, the gradients of input and masks, those of parameters, for a random loss; and torch's random state."""
    fresh = {t: leaf_copy(t) for t in args}  # a tensor given twice stays one
    options = leaf_copy(options)
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    results = layer(*[fresh[t] for t in args], **options)
    after = torch.get_rng_state()
    backward(results, seed)
    leaves = [t for t in (*fresh.values(), *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    return results, [t.grad for t in leaves], [p.grad for p in layer.parameters()], after


def backward(results, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sum((torch.randn(t.shape, generator=generator, dtype=t.dtype) * t).sum() for t in tensors(results)).backward()


def assert_all_same(actual, expected):
    """As outputs_and_gradients returns them, None in the same places."""
    for ours, theirs in zip(actual[:3], expected[:3], strict=True):
        if isinstance(theirs, torch.Tensor):
            ours, theirs = [ours], [theirs]
        assert [t is None for t in ours] == [t is None for t in theirs]
        assert_same(list(ours), list(theirs))


CONSTRUCTIONS = [
    dict(zip(("bias", "add_bias_kv", "add_zero_attn", "batch_first"), flags, strict=True), **sizes)
    for flags, sizes in zip(
        itertools.product([True, False], repeat=4),
        itertools.cycle([{}, {"kdim": 3, "vdim": 7}, {"kdim": 3, "vdim": 7}, {}, {}]),
        strict=False,
    )
]
WEIGHTS = [{}, {"average_attn_weights": False}, {"need_weights": False}]


def calls(layer):
    """(query, key, value), options: every form with every pair of masks; and causal ones with the hint."""
    for form, weights in itertools.product(("unbatched", "self", "key is value", "apart"), WEIGHTS):
        args, two, three, padding = inputs(form, layer)
        for attn, shape, pad in itertools.product((None, "bool", "float"), (two, three), (None, "bool", "float")):
            if attn is None and shape is three:
                continue
            masks = {"attn_mask": random_mask(attn, shape), "key_padding_mask": random_mask(pad, padding)}
            yield args, {**weights, **masks}
            if attn is not None:
                yield args, {**weights, **masks, "attn_mask": causal_mask(attn, shape), "is_causal": True}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=lambda o: "-".join(k for k, v in o.items() if v) or "plain")
def test_results_and_gradients_are_torchs(options):
    theirs, ours = make_twins(**options)
    count = 0
    for args, call in calls(ours):
        expected = outputs_and_gradients(theirs, args, call)
        _C.reset_counters()
        actual = outputs_and_gradients(ours, args, call)
        added = [m for m in (call["attn_mask"], call["key_padding_mask"]) if m is not None and m.requires_grad]
        assert {name: n for name, n in _C.counters().items() if "mask" not in name} == kernels_ran(
            torch.float64, forward=1, backward=1
        ), call
        assert sum(n for name, n in _C.counters().items() if "mask" in name) == bool(added)
        assert_all_same(actual, expected)
        with torch.no_grad():
            ours.eval()
            assert all(torch.equal(a, b) for a, b in zip(tensors(ours(*args, **call)), tensors(actual[0]), strict=True))
            ours.train()
        count += 1
    assert count == 4 * 3 * (5 * 3 + 4 * 3)


@pytest.mark.parametrize("batch_first", [True, False])
def test_eval_without_gradients_where_torch_has_another_path(batch_first, never_torchs):
    theirs, ours = make_twins(batch_first=batch_first)
    theirs.eval()
    ours.eval()
    args, two, _, padding = inputs("self", ours)
    options = [{}, {"attn_mask": random_mask("bool", two)}, {"key_padding_mask": random_mask("bool", padding)}]
    with torch.no_grad():
        expected = [theirs(*args, **o) for o in options]
        never_torchs()
        for o, want in zip(options, expected, strict=True):
            assert_same(ours(*args, **o), want)
            assert_same(ours(*args, **o, need_weights=False), want[0])
    with pytest.raises(AssertionError, match="attention was torch's"):
        theirs(*args)


def test_weights_do_not_change_the_output():
    _, ours = make_twins()
    args, two, _, padding = inputs("apart", ours)
    masks = {"attn_mask": random_mask("float", two), "key_padding_mask": random_mask("bool", padding)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (out, weights), (alone, none) = ours(*args, **masks), ours(*args, **masks, need_weights=False)
    assert torch.equal(out, alone) and weights is not None and none is None


@pytest.mark.parametrize("form", ["unbatched", "self", "apart"])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("average", [True, False])
def test_dropout_with_weights_draws_as_torch_does(form, masked, average):
    theirs, ours = make_twins(dropout=0.4, add_zero_attn=True)
    args, two, _, _ = inputs(form, ours)
    options = {"attn_mask": random_mask(masked, two), "average_attn_weights": average}
    seed = int(torch.randint(2**31, ()))
    expected = outputs_and_gradients(theirs, args, options, seed)
    actual = outputs_and_gradients(ours, args, options, seed)
    assert_all_same(actual, expected)
    assert torch.equal(actual[3], expected[3])
    other = outputs_and_gradients(ours, args, options, seed + 1)
    assert not torch.equal(other[0][0], actual[0][0])
    ours.eval()
    assert_same(ours(*args, **options), theirs.eval()(*args, **options))


def test_dropout_without_weights_is_the_kernels(never_torchs):
    _, ours = make_twins(dropout=0.4, batch_first=True)
    never_torchs()
    args, two, *_ = inputs("apart", ours)
    mask = random_mask("bool", two)
    torch.manual_seed(7)
    got = ours(*args, attn_mask=mask, need_weights=False)[0]
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (N, E // N)).transpose(1, 2)
        for x, w, b in zip(args, ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3), strict=True)
    )
    torch.manual_seed(7)
    heads = fastseq.scaled_dot_product_attention(q, k, v, ~mask, dropout_p=0.4)
    assert_same(got, ours.out_proj(heads.transpose(1, 2).flatten(2)))
    assert not torch.allclose(got, ours(*args, attn_mask=mask, need_weights=False)[0])
    ours.eval()
    assert_same(ours(*args, attn_mask=mask, need_weights=False)[0], ours(*args, attn_mask=mask)[0])


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("place", ["attn_mask", "key_padding_mask", "both"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_queries_that_see_no_key_give_zeros(kind, place, dropout):
    theirs, ours = make_twins(batch_first=True, dropout=dropout)
    args, two, _, padding = inputs("apart", ours)
    attn_mask, key_padding_mask = torch.zeros(two, dtype=torch.bool), torch.zeros(padding, dtype=torch.bool)
    empty = torch.zeros(B, L, dtype=torch.bool)
    if place == "attn_mask":
        attn_mask[2] = True
        empty[:, 2] = True
    elif place == "key_padding_mask":
        key_padding_mask[1] = True
        empty[1] = True
    else:  # each of them lets something through
        attn_mask[1, :2] = True
        key_padding_mask[0, 2:] = True
        empty[0, 1] = True
    if kind == "float":
        attn_mask, key_padding_mask = (
            torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, -math.inf).requires_grad_()
            for m in (attn_mask, key_padding_mask)
        )
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    for need_weights in (True, False):
        with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
            (out, weights), grads, parameter_grads, _ = outputs_and_gradients(
                ours, args, {**masks, "need_weights": need_weights}
            )
        (want, _), *_ = outputs_and_gradients(theirs, args, {**masks, "need_weights": need_weights})
        assert need_weights == want[empty].isnan().all()
        assert torch.equal(out[empty], ours.out_proj.bias.expand_as(out[empty]))
        if need_weights or not dropout:  # without weights the kernel draws
            assert_same(out[~empty], want[~empty])
        assert torch.equal(grads[0][empty], torch.zeros_like(grads[0][empty]))
        assert all(g.isfinite().all() for g in (*grads, *parameter_grads))
        if need_weights:
            assert torch.equal(weights[empty], torch.zeros_like(weights[empty]))
            assert dropout or torch.allclose(weights[~empty].sum(-1), torch.ones((), dtype=torch.float64))


def test_a_wrong_hint_is_taken_at_its_word_where_torch_does():
    theirs, ours = make_twins()
    args, two, *_ = inputs("apart", ours)
    nothing_hidden = torch.zeros(two, dtype=torch.bool)
    for options in WEIGHTS:
        call = {"attn_mask": nothing_hidden, "is_causal": True, **options}
        assert_same(tensors(ours(*args, **call)), tensors(theirs(*args, **call)))
    causal = ours(*args, attn_mask=causal_mask("bool", two), need_weights=False)[0]
    assert_same(ours(*args, attn_mask=nothing_hidden, is_causal=True, need_weights=False)[0], causal)


def test_mismatched_masks_warn_as_torch_does():
    theirs, ours = make_twins()
    args, two, _, padding = inputs("apart", ours)
    for layer in (theirs, ours):
        with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask is deprecated"):
            layer(*args, attn_mask=random_mask("float", two), key_padding_mask=random_mask("bool", padding))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    theirs, ours = make_twins(add_bias_kv=True)
    args, two, _, padding = inputs("apart", ours)
    masks = {"attn_mask": random_mask("float", two), "key_padding_mask": random_mask("float", padding)}
    expected = theirs(*args, **masks)
    ours.to(dtype)
    _C.reset_counters()
    # a mask of another floating dtype is converted
    actual = ours(*[t.to(dtype) for t in args], attn_mask=masks["attn_mask"].to(dtype),
                  key_padding_mask=masks["key_padding_mask"])  # fmt: skip
    assert _C.counters() == kernels_ran(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, forward=1)
    assert [t.dtype for t in actual] == [dtype, dtype]
    relative = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for a, w in zip(actual, expected, strict=True):
        assert (a.double() - w).abs().max() <= relative * w.abs().max()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", [None, "bool", "float"])
def test_autocast(kind, need_weights):
    theirs, ours = twins("MultiheadAttention", E, N, add_bias_kv=True, add_zero_attn=True)
    args = [torch.randn(n, B, E, requires_grad=True) for n in (L, S, S)]
    mask = random_mask(kind, (L, S))
    options = {"attn_mask": mask if mask is None or kind == "bool" else mask.float(), "need_weights": need_weights}
    exact = tensors(ours(*args, **options))
    with torch.autocast("cpu"):
        expected = tensors(theirs(*args, **options))
        _C.reset_counters()
        actual = tensors(ours(*args, **options))
    assert _C.counters() == kernels_ran(torch.bfloat16, forward=1)
    assert [t.dtype for t in actual] == [t.dtype for t in expected] == [torch.bfloat16] * len(actual)
    for a, w in zip(actual, exact, strict=True):
        assert (a - w).abs().max() <= 5e-2 * max(1, w.abs().max().item())
    actual[0].float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


# ---- As a module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 7, "bias": False}, {"add_bias_kv": True}], ids=str)
def test_module(options):
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(E, N, **options)
    torch.manual_seed(1)
    ours = fastseq.MultiheadAttention(E, N, **options)
    assert isinstance(ours, nn.MultiheadAttention) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    again = nn.MultiheadAttention(E, N, **options)
    again.load_state_dict(ours.state_dict())
    args = [torch.randn(n, B, size) for n, size in ((L, E), (S, again.kdim), (S, again.vdim))]
    assert_same(ours(*args), again(*args))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is fastseq.MultiheadAttention
        assert all(torch.equal(a, b) for a, b in zip(twin(*args), ours(*args), strict=True))
        twin._reset_parameters()


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parameters_are_read_at_every_call():
    theirs, ours = make_twins()
    args, *_ = inputs("apart", ours)
    for layer in (theirs, ours):
        parametrize.register_parametrization(layer, "in_proj_weight", Double())
        parametrize.register_parametrization(layer.out_proj, "weight", Double())
    assert_same(ours(*args), theirs(*args))
    before = ours(*args)[0]
    with torch.no_grad():
        for layer in (theirs, ours):
            layer.out_proj.bias += 1
    assert_same(ours(*args), theirs(*args))
    assert_same(ours(*args)[0], before + 1)


def test_hooks():
    _, ours = make_twins()
    seen = []
    ours.register_forward_hook(lambda module, args, result: seen.append(len(result)))
    args, *_ = inputs("self", ours)
    ours(*args)
    assert seen == [2]


def test_torchscript_is_refused_and_traces_work():
    _, ours = make_twins()
    args, *_ = inputs("apart", ours)
    with pytest.raises(RuntimeError, match=r"fastseq\.MultiheadAttention cannot be compiled by torch\.jit\.script"):
        torch.jit.script(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, args)
    other, *_ = inputs("apart", ours)
    assert_same(traced(*other), ours(*other))


# ---- Compilers and transforms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
@pytest.mark.parametrize("masks", [(None, None), ("bool", "bool"), ("float", "float")], ids=str)
def test_compile(options, masks):
    _, ours = make_twins(add_bias_kv=True, batch_first=True)
    args, two, _, padding = inputs("apart", ours)
    call = {"attn_mask": random_mask(masks[0], two), "key_padding_mask": random_mask(masks[1], padding), **options}
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(ours, args, call)
    results = compiled(*args, **call)
    assert_same(tensors(results), tensors(expected[0]))
    ours.zero_grad(set_to_none=True)
    backward(results)
    assert_same([p.grad for p in ours.parameters()], expected[2])


def test_export():
    _, ours = make_twins(batch_first=True)
    args, *_ = inputs("self", ours)
    exported = torch.export.export(ours, tuple(args), {"need_weights": False})
    other, *_ = inputs("self", ours)
    assert any(node.target is torch.ops.fastseq.attention_forward.default for node in exported.graph.nodes)
    assert_same(tensors(exported.module()(*other, need_weights=False)), tensors(ours(*other, need_weights=False)))


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
def test_vmap_and_grad(options):
    _, ours = make_twins()
    x = leaf(2, L, B, E)
    mask = random_mask("bool", (L, L))

    def call(x, mask=mask):
        return tuple(tensors(ours(x, x, x, attn_mask=mask, **options)))

    together = torch.func.vmap(call)(x)
    assert_same(list(together), [torch.stack(ts) for ts in zip(*map(call, x), strict=True)])
    masks = torch.stack([mask, torch.zeros_like(mask)])
    of_masks = torch.func.vmap(call)(x, masks)
    assert_same(list(of_masks), [torch.stack(ts) for ts in zip(*map(call, x, masks), strict=True)])

    def loss(parameters, x):
        result = torch.func.functional_call(ours, parameters, (x, x, x), {"attn_mask": mask, **options})
        return sum(t.square().sum() for t in tensors(result))

    parameters = dict(ours.named_parameters())
    found = torch.func.grad(loss)(parameters, x[0])
    wanted = torch.autograd.grad(loss(parameters, x[0]), list(parameters.values()))
    assert_same(list(found.values()), list(wanted))


def test_double_backward():
    _, ours = make_twins()
    x = leaf(3, 1, E)
    assert torch.autograd.gradgradcheck(lambda x: ours(x, x, x), x)


# ---- In torch.nn's transformers -------------------------------------------------------------------------------------


def make_transformer(cls, batch_first, norm_first):
    options = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some encoders take no nested tensors
        if cls is nn.Transformer:
            return cls(E, N, num_encoder_layers=2, num_decoder_layers=2, **options).double()
        if cls is nn.TransformerEncoder:
            return cls(nn.TransformerEncoderLayer(E, N, **options), 2).double()
        return cls(E, N, **options).double()


ATTENTIONS = {nn.TransformerEncoderLayer: 1, nn.TransformerDecoderLayer: 2, nn.TransformerEncoder: 2, nn.Transformer: 6}


def transformer_calls(cls, batch_first):
    src, tgt = (leaf(B, n, E) if batch_first else leaf(n, B, E) for n in (S, L))
    padding = torch.arange(S) >= torch.tensor([S, 2, 3])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    if cls in (nn.TransformerEncoderLayer, nn.TransformerEncoder):
        mask = "mask" if cls is nn.TransformerEncoder else "src_mask"
        return [
            ((src,), options)
            for options in (
                {},
                {mask: causal},
                {mask: causal, "is_causal": True},
                {mask: random_mask("bool", (S, S))},
                {mask: random_mask("bool", (B * N, S, S))},
                {"src_key_padding_mask": padding},
                {"src_key_padding_mask": padding.flip(1)},
                {mask: causal.isinf(), "src_key_padding_mask": padding},
            )
        ]
    tgt_causal = {"tgt_mask": causal[:L, :L], "tgt_is_causal": True}
    args = (src, tgt) if cls is nn.Transformer else (tgt, src)
    masks = {"memory_mask": random_mask("bool", (L, S)), "tgt_key_padding_mask": random_mask("bool", (B, L))}
    both = {**masks, "memory_key_padding_mask": padding}
    return [
        (args, {}),
        (args, tgt_causal),
        (args, both),
        (args, {**tgt_causal, "memory_key_padding_mask": padding}),
    ] + (
        [(args, {"src_key_padding_mask": padding, "memory_key_padding_mask": padding})] if cls is nn.Transformer else []
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cls", ATTENTIONS, ids=lambda cls: cls.__name__)
def test_transformers(cls, batch_first, norm_first, training, never_torchs):
    theirs = make_transformer(cls, batch_first, norm_first).train(training)
    ours = fastseq.convert(copy.deepcopy(theirs))
    cases = transformer_calls(cls, batch_first)
    with torch.no_grad():
        expected = [theirs(*args, **options) for args, options in cases]
    expected_all = [outputs_and_gradients(theirs, args, options) for args, options in cases]
    never_torchs()
    for (args, options), want, want_all in zip(cases, expected, expected_all, strict=True):
        _C.reset_counters()
        with torch.no_grad():
            assert_same(ours(*args, **options), want)
        assert _C.counters() == kernels_ran(torch.float64, forward=ATTENTIONS[cls])
        _C.reset_counters()
        actual = outputs_and_gradients(ours, args, options)
        assert _C.counters() == kernels_ran(torch.float64, forward=ATTENTIONS[cls], backward=ATTENTIONS[cls])
        assert_all_same(actual, want_all)


@pytest.mark.parametrize("mask_check", [True, False])
def test_an_encoder_of_nested_tensors_swapped_before_and_after_it_is_built(mask_check, never_torchs, monkeypatch):
    options = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    layer = nn.TransformerEncoderLayer(E, N, **options)
    theirs = nn.TransformerEncoder(layer, 2, mask_check=mask_check).eval()
    after = copy.deepcopy(theirs)
    for part in after.layers:
        state = part.self_attn.state_dict()
        part.self_attn = fastseq.MultiheadAttention(E, N, batch_first=True, dtype=torch.float64).eval()
        part.self_attn.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = nn.TransformerEncoder(fastseq.convert(layer), 2, mask_check=mask_check).eval()
    before.load_state_dict(theirs.state_dict())
    x, padding = leaf(B, S, E), torch.arange(S) >= torch.tensor([4, 2, 3])[:, None]
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=padding)
        assert (expected[:, -1] == 0).all()  # its sign that it made a nested tensor
        never_torchs()
        for ours in (before, after):
            _C.reset_counters()
            assert_same(ours(x, src_key_padding_mask=padding), expected)
            assert _C.counters() == kernels_ran(torch.float64, forward=2)
    seen = ours.train()(x, src_key_padding_mask=padding)[~padding]
    assert_same(seen[: S - 1], expected[~padding][: S - 1])


def test_nested_tensors_have_gradients():
    _, ours = make_twins(batch_first=True)
    rows = [leaf(n, E) for n in (2, 5, 3)]
    x = torch.nested.as_nested_tensor(rows)
    out, weights = ours(x, x, x, need_weights=False)
    assert weights is None and out.is_nested
    expected = [ours(row, row, row)[0] for row in rows]
    assert_same(list(out.unbind()), expected)
    found = torch.autograd.grad(torch.nested.to_padded_tensor(out, 0.0).square().sum(), rows)
    assert_same(list(found), list(torch.autograd.grad(sum(e.square().sum() for e in expected), rows)))


def test_an_encoder_layer_in_training_drops_in_the_kernel():
    layer = fastseq.convert(nn.TransformerEncoderLayer(E, N, 8, dropout=0.3, dtype=torch.float64))
    x = leaf(S, B, E)
    layer.dropout.p = layer.dropout1.p = layer.dropout2.p = 0.0  # all but the attention's
    _C.reset_counters()
    torch.manual_seed(3)
    out = layer(x)
    out.square().sum().backward()
    assert _C.counters() == kernels_ran(torch.float64, forward=1, backward=1)
    assert not torch.allclose(layer(x), out)
    torch.manual_seed(3)
    assert torch.equal(layer(x), out)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_compiled_encoder_layer(training):
    layer = fastseq.convert(make_transformer(nn.TransformerEncoderLayer, True, False)).train(training)
    x = leaf(B, S, E)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        expected = layer(x)
        _C.reset_counters()
        assert_same(compiled(x), expected)
    assert _C.counters() == kernels_ran(torch.float64, forward=1)


# ---- Wrong calls ----------------------------------------------------------------------------------------------------


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


X, Y, U = zeros(L, B, E), zeros(S, B, E), zeros(L, E)
PADDING = r"Expected key_padding_mask.shape to be \(3, 5\), but got torch.Size\(\[[13], [45]\]\)"
# mistake -> (arguments, options, the error's type, what it says, or None for torch's words)
MISTAKES = {
    "4-D query": ((zeros(1, L, B, E),) * 3, {}, AssertionError, None),
    "1-D query": ((zeros(E),) * 3, {}, AssertionError, None),
    "2-D key": ((X, U, U), {}, AssertionError, None),
    "3-D key of a 2-D query": ((U, Y, Y), {}, AssertionError, None),
    "no tensor": ((None, X, X), {}, AttributeError, "'NoneType'"),
    "query's size": ((zeros(L, B, E + 1), Y, Y), {}, AssertionError, None),
    "key's size": ((X, zeros(S, B, E + 1), zeros(S, B, E + 1)), {}, RuntimeError, None),
    "key and value": ((X, Y, X), {}, AssertionError, None),
    "key and value, unbatched": ((U, zeros(S, E), U), {}, AssertionError, "key shape .*5, 6.* does not match"),
    "batch": ((X, zeros(S, 1, E), zeros(S, 1, E)), {}, RuntimeError, "same batch size; got 3 and 1 of .*batch_first=F"),
    "dtype": ((X.double(), X.double(), X.double()), {}, RuntimeError, None),
    "key's dtype": ((X, Y.double(), Y.double()), {}, RuntimeError, None),
    "integers": ((X.long(),) * 3, {}, RuntimeError, None),
    "hint without mask": ((X, X, X), {"is_causal": True}, RuntimeError, None),
    "hint without mask, padding": ((X, X, X), {"is_causal": True, "key_padding_mask": zeros(B, L)}, RuntimeError, None),
    "integer mask": ((X, X, X), {"attn_mask": zeros(L, L).int()}, AssertionError, "types of attn_mask are .*int32"),
    "integer padding": ((X, X, X), {"key_padding_mask": zeros(B, L).int()}, AssertionError, "key_padding_mask.*int32"),
    "1-D mask": ((X, X, X), {"attn_mask": zeros(L)}, AssertionError, None),
    "4-D mask": ((X, X, X), {"attn_mask": zeros(B, N, L, L)}, AssertionError, None),
    "1-D mask, unbatched": ((U, U, U), {"attn_mask": zeros(L)}, AssertionError, None),
    "3-D mask, unbatched": ((U, U, U), {"attn_mask": zeros(1, L, L)}, AssertionError, None),
    "mask's shape": ((X, Y, Y), {"attn_mask": zeros(S, L)}, RuntimeError, None),
    "mask's shape, bool": ((X, Y, Y), {"attn_mask": zeros(L, 1).bool()}, RuntimeError, None),
    "3-D mask's shape": ((X, Y, Y), {"attn_mask": zeros(B, L, S)}, RuntimeError, None),
    "3-D mask's rows": ((X, Y, Y), {"attn_mask": zeros(B * N, 1, S)}, RuntimeError, None),
    "1-D padding": ((X, X, X), {"key_padding_mask": zeros(L)}, AssertionError, None),
    "2-D padding, unbatched": ((U, U, U), {"key_padding_mask": zeros(1, L)}, AssertionError, None),
    "padding's batch": ((X, Y, Y), {"key_padding_mask": zeros(1, S).bool()}, AssertionError, PADDING),
    "padding's length": ((X, Y, Y), {"key_padding_mask": zeros(B, L)}, AssertionError, PADDING),
    "both, padding's length": (
        (X, Y, Y),
        {"key_padding_mask": zeros(B, L), "attn_mask": zeros(L, S)},
        AssertionError,
        PADDING,
    ),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_are_torchs(mistake, need_weights):
    args, options, error, message = MISTAKES[mistake]
    theirs, ours = twins("MultiheadAttention", E, N)
    with recorded_error() as expected:
        theirs(*args, **options, need_weights=need_weights)
    with pytest.raises(error, match=message) as actual:
        ours(*args, **options, need_weights=need_weights)
    assert type(expected[0]) is actual.type is error
    assert message is not None or str(actual.value) == str(expected[0])


def test_sizes_apart():
    theirs, ours = twins("MultiheadAttention", E, N, kdim=3, vdim=7)
    args = X, zeros(S, B, 3), zeros(L, B, 7)
    with recorded_error() as expected:
        theirs(*args)
    with pytest.raises(AssertionError, match=r"sequence and batch dims .* do not match value's") as actual:
        ours(*args)
    assert str(actual.value) == str(expected[0])


@pytest.mark.parametrize(("args", "options"), [
    ((E, 4), {}), ((0, 1), {}), ((E, 0), {}), ((E,), {}), ((E, N), {"unknown": 1}),
], ids=str)  # fmt: skip
def test_construction_errors_are_torchs(args, options):
    with recorded_error() as expected:
        nn.MultiheadAttention(*args, **options)
    with pytest.raises(type(expected[0])) as actual:
        fastseq.MultiheadAttention(*args, **options)
    assert str(actual.value) == str(expected[0])


def test_devices():
    with pytest.raises(RuntimeError, match="device"):
        fastseq.MultiheadAttention(E, N)(X, Y.to("meta"), Y.to("meta"))


def test_heads_of_more_than_512_are_refused():
    layer = fastseq.MultiheadAttention(513, 1)
    x = zeros(2, 1, 513)
    with pytest.raises(RuntimeError, match=r"within 1\.\.512; got 513"):
        layer(x, x, x, need_weights=False)


@pytest.mark.parametrize(
    "mistake", ["weights", "padding", "mask", "other key", "padded query", "jagged", "batch second"]
)
def test_other_calls_with_nested_tensors_are_refused(mistake):
    layer = fastseq.MultiheadAttention(E, N, batch_first=mistake != "batch second")
    rows = [torch.randn(n, E) for n in (2, 3)]
    x = torch.nested.as_nested_tensor(rows, layout=torch.jagged if mistake == "jagged" else torch.strided)
    args = {"other key": (x, x.clone(), x), "padded query": (zeros(2, 3, E), x, x)}.get(mistake, (x, x, x))
    masks = {"padding": {"key_padding_mask": zeros(2, 3).bool()}, "mask": {"attn_mask": zeros(3, 3).bool()}}
    with pytest.raises(
        RuntimeError, match=r"nested tensor must be strided, .* give padded tensors and key_padding_mask"
    ):
        layer(*args, need_weights=mistake == "weights", **masks.get(mistake, {}))
