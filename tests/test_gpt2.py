"""GPT-2: the same model as transformers', on our kernels; and folders that are not what they should be."""

import copy
import json
import pickle
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F

from fastseq import _C
from fastseq.models import GPT2, GPT2Config

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = GPT2Config(
    vocab_size=61,
    n_positions=40,
    n_embd=24,
    n_layer=3,
    n_head=3,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
)
VARIANTS = {
    "plain": {},
    "n_inner": {"n_inner": 17},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "unscaled": {"scale_attn_weights": False},
    "by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "epsilon": {"layer_norm_epsilon": 0.3},
    "untied": {"tie_word_embeddings": False},
}


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def theirs(transformers, config, dtype=torch.float64):
    """A GPT2LMHeadModel with random biases and norms too, by eager attention; its upcasting cannot take float64."""
    made = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**asdict(config) | {"reorder_and_upcast_attn": False}, attn_implementation="eager")
    )
    for parameter in made.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return made.to(dtype).eval()


@contextmanager
def on_our_kernels(monkeypatch, **calls):
    """That torch's attention is not called, and ours so often."""

    def refuse(*_, **__):
        raise AssertionError("torch's scaled_dot_product_attention was called")

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", refuse)
        _C.reset_counters()
        yield
        assert _C.counters() == calls


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_every_gradient_are_those_of_transformers(transformers, options, monkeypatch):
    config = replace(SMALL, **options)
    other = theirs(transformers, config)
    ours = GPT2(config).double().eval()
    ours.load_state_dict(other.state_dict())
    ids = torch.randint(61, (3, 29))
    labels = torch.where(torch.rand(3, 29) < 0.2, -100, ids)

    want = other(ids).logits
    F.cross_entropy(want[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    with on_our_kernels(monkeypatch, **{"attention_forward/float64": 3, "attention_backward/float64": 3}):
        got, loss = ours(ids, labels)
        loss.backward()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours(ids), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss.float(), other(ids, labels=labels).loss.float())
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    assert [name for name, _ in ours.named_parameters()] == list(gradients)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_weights_go_both_ways(transformers, options, tmp_path):
    config = replace(SMALL, eos_token_id=[3, 4], **options)
    ours, ids = GPT2(config).eval(), torch.randint(61, (2, 17))
    want = ours(ids)

    ours.save_pretrained(tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(other(ids).logits, want)
    other.save_pretrained(tmp_path / "theirs")
    for back in (GPT2.from_pretrained(tmp_path / "theirs"), GPT2.from_transformers(other), ours.to_transformers()):
        assert not back.training and {p.dtype for p in back.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in back.parameters())
        for name, tensor in ours.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor), name
    assert back.load_state_dict(other.state_dict()) and ours.load_state_dict(other.state_dict())
    assert GPT2.from_pretrained(tmp_path / "theirs").config == config
    assert GPT2.from_pretrained(tmp_path / "theirs", torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    back = GPT2.from_pretrained(tmp_path / "ours")
    assert (back.lm_head.weight is back.transformer.wte.weight) == config.tie_word_embeddings


def test_shards_old_names_and_pickled_tensors(transformers, tmp_path):
    other, ids = theirs(transformers, SMALL, torch.float32), torch.randint(61, (2, 17))
    other.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    torch.testing.assert_close(GPT2.from_pretrained(tmp_path / "shards")(ids), other(ids).logits)

    old = {name.removeprefix("transformer."): t for name, t in other.transformer.state_dict().items()}
    old["h.0.attn.bias"], old["h.0.attn.masked_bias"] = torch.ones(1, 1, 40, 40), torch.tensor(-1e4)
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text((tmp_path / "shards/config.json").read_text())
    torch.save(old, folder / "pytorch_model.bin")
    torch.testing.assert_close(GPT2.from_pretrained(folder)(ids), other(ids).logits)


def test_initial_weights_are_gpt2s():
    config = GPT2Config(vocab_size=500, n_positions=300, n_embd=256, n_layer=8, n_head=4)
    for name, parameter in GPT2(config).named_parameters():
        if parameter.dim() == 2:
            want = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(want, rel=0.03), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, "ln" in name and name.endswith("weight"))), name


@pytest.mark.parametrize("where", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_works_in_training_alone(where):
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model, ids = GPT2(replace(SMALL, **none | {where: 0.5})), torch.randint(61, (2, 20))
    torch.manual_seed(1)
    first = model(ids)
    torch.manual_seed(1)
    assert torch.equal(model(ids), first) and not torch.equal(model(ids), first)
    still = GPT2(replace(SMALL, **none))
    still.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids), still(ids))


def test_copies_and_pickles():
    model, ids = GPT2(SMALL).eval(), torch.randint(61, (1, 9))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids), model(ids)) and other.lm_head.weight is other.transformer.wte.weight


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(RuntimeError, match=r"L at most n_positions=40; got \(1, 41\)"):
        GPT2(SMALL)(torch.zeros(1, 41, dtype=torch.int64))


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("safetensors")
    GPT2(SMALL).save_pretrained(tmp_path)
    return tmp_path


BAD_CONFIGS = {
    "no model": ({"model_type": "llama"}, "model_type must be 'gpt2'; got 'llama'"),
    "cross-attention": ({"add_cross_attention": True}, "add_cross_attention must be false"),
    "text": ({"n_embd": "24"}, "n_embd must be an integer within 1..1048576; got '24'"),
    "truth": ({"n_layer": True}, "n_layer must be an integer"),
    "negative": ({"n_layer": -1}, "n_layer must be an integer within 1..1024; got -1"),
    "billions of layers": ({"n_layer": 10**9}, "n_layer must be an integer within 1..1024"),
    "endless": ({"n_positions": 10**400}, "n_positions must be an integer within"),
    "wide": ({"n_embd": 3 << 18, "n_inner": 1 << 22}, "wte.weight must be .61, 786432., and is .61, 24."),
    "many layers": ({"n_layer": 1000}, "transformer.h.3.ln_1.weight is missing.*problems more"),
    "few layers": ({"n_layer": 2}, "transformer.h.2.* is not a part of the model"),
    "heads": ({"n_head": 5}, "n_head must be a divisor of n_embd=24; got 5"),
    "activation": ({"activation_function": "__import__"}, "activation_function must be one of gelu_new"),
    "activations": ({"activation_function": ["gelu"]}, "activation_function must be one of gelu_new"),
    "dropout": ({"attn_pdrop": 1.0}, "attn_pdrop must be a number within"),
    "epsilon": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be a number"),
    "eos": ({"eos_token_id": ["a"]}, "eos_token_id must be an integer"),
    "option": ({"scale_attn_weights": "no"}, "scale_attn_weights must be true or false"),
}


@pytest.mark.parametrize(("values", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_hostile_config_is_a_sentence(folder, values, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=message):
        GPT2.from_pretrained(folder)


def shards(folder, names):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


class Attack:
    def __reduce__(self):
        return (print, ("executed",))


def pickled(folder, weights):
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


BAD_FILES = {
    "no folder": (lambda f: (f / "config.json").unlink(), "cannot read .*config.json .No such file"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json does not describe a model"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json does not describe a model"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**6), "config.json does not describe a model"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object; got list"),
    "large": (lambda f: (f / "config.json").write_text(" " * (1 << 24) + "{}"), "larger than 16777216 bytes"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights: model.safetensors, .* or pytorch"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a file of safetensors, or is damaged"),
    "header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "not a file of safetensors, or is dam"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        "not a file of safetensors, or is damaged",
    ),
    "elsewhere": (lambda f: shards(f, {"wte": "../secret"}), "the name of a file in the same folder"),
    "no names": (lambda f: shards(f, {"wte": 3}), "the name of a file in the same folder"),
    "no map": (lambda f: shards(f, None), "the name of a file in the same folder"),
    "no shard": (lambda f: shards(f, {"wte": "1.safetensors"}), "cannot read the weights in .*1.safetensors"),
    "code": (lambda f: pickled(f, {"wte": Attack()}), "does not hold tensors alone"),
    "numbers": (lambda f: pickled(f, {"wte": 3}), "does not hold tensors alone"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_or_hostile_folder_is_a_sentence(folder, spoil, message, capsys):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        GPT2.from_pretrained(folder)
    assert "executed" not in capsys.readouterr().out
