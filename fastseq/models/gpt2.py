"""GPT-2 on fastseq's attention, with the parameters of transformers' GPT2LMHeadModel under the same names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.attention import scaled_dot_product_attention
from fastseq.kv_cache import KVCache
from fastseq.models import generation, pretrained

__all__ = ["GPT2", "GPT2Config"]

ACTIVATIONS = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
# A file may ask for any size: what is larger than every GPT-2 is refused before anything is allocated.
MOST = {"n_layer": 1024, "vocab_size": 1 << 24, "n_positions": 1 << 24, "n_embd": 1 << 20, "n_head": 1 << 20}
MOST["n_inner"] = 1 << 22


@dataclass(frozen=True)
class GPT2Config:
    """The sizes and options of a GPT-2, named as in transformers' GPT2Config, whose defaults are the 124M model.

    Attributes:
        vocab_size, n_positions, n_embd, n_layer, n_head: number of tokens, longest sequence, width, blocks, heads.
        n_inner: width inside the MLP; None means 4 · n_embd.
        activation_function: of the MLP: gelu_new, gelu_pytorch_tanh, gelu, relu, silu or tanh.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout of what a block adds, of the embeddings, of attention.
        layer_norm_epsilon, initializer_range: ε of the layer norms, standard deviation of the initial weights.
        scale_attn_weights, scale_attn_by_inverse_layer_idx: whether scores are divided by √(head size), and by the
            number of the block, from 1 on.
        reorder_and_upcast_attn: taken and without effect, as the kernels compute scores in float32 or better.
        tie_word_embeddings: whether the embedding is the output projection too.
        bos_token_id, eos_token_id: of the tokenizer; `GPT2.generate` stops a row at eos_token_id, one or several.
        self_trained: that the weights are no published ones. Of fastseq; transformers keeps it.

    Raises:
        ValueError: a value of another type or out of its range.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | Sequence[int] | None = 50256
    self_trained: bool = False

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            size = getattr(self, name)
            self._check(name, (_is_int(size) and 1 <= size <= most) or (name == "n_inner" and size is None),
                        f"an integer within 1..{most}")  # fmt: skip
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            p = getattr(self, name)
            self._check(name, _is_number(p) and 0 <= p < 1, "a number within [0, 1)")
        for name in ("layer_norm_epsilon", "initializer_range"):
            x = getattr(self, name)
            self._check(name, _is_number(x) and 0 < x < 1, "a number within (0, 1)")
        for field in fields(self):
            if field.type == "bool":
                self._check(field.name, isinstance(getattr(self, field.name), bool), "true or false")
        known = isinstance(self.activation_function, str) and self.activation_function in ACTIVATIONS
        self._check("activation_function", known, f"one of {', '.join(ACTIVATIONS)}")
        self._check("bos_token_id", self.bos_token_id is None or _is_int(self.bos_token_id), "an integer or null")
        eos = self.eos_token_id
        several = isinstance(eos, (list, tuple)) and all(map(_is_int, eos))
        self._check("eos_token_id", eos is None or _is_int(eos) or several, "an integer, several, or null")
        self._check("n_head", self.n_embd % self.n_head == 0, f"a divisor of n_embd={self.n_embd}")

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name} must be {expected}; got {getattr(self, name)!r:.80}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPT2Config:
        """From the contents of a config.json of transformers; what it has for other purposes is left out.

        Raises:
            ValueError: another model's, or a GPT-2 with cross-attention.
        """
        if values.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"model_type must be 'gpt2'; got {values['model_type']!r:.80}")
        if values.get("add_cross_attention"):
            raise ValueError("add_cross_attention must be false: this GPT-2 is a decoder alone")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


class GPT2(nn.Module):
    r"""GPT-2 with its language modeling head: token ids (B, L) to logits of the next token (B, L, vocab_size).

    Radford et al., "Language models are unsupervised multitask learners", 2019: for each block

        x = x + attention(ln_1(x)),   x = x + mlp(ln_2(x))

    with causal attention by `fastseq.scaled_dot_product_attention`, and logits = ln_f(x) wteᵀ.

    Names and layouts of the parameters are those of transformers' GPT2LMHeadModel, so `load_state_dict` takes its
    `state_dict()`, and the other way. Initial weights are normal with standard deviation `initializer_range`, of the
    projections that add to x divided by √(2 n_layer); biases are zero.

    `model.generate(...)` and `model.stream(...)` generate tokens, `fastseq.models.generate_text` text.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_positions, config.n_embd),
                "h": nn.ModuleList(_Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(
                    parameter, std=config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1)
                )

    generate = generation.generate
    stream = generation.stream

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, L, vocab_size), or (logits, loss) where labels are given.

        Args:
            input_ids: (B, L) int64, L ≤ n_positions. Rows may be padded on the right: no token sees those after it.
            labels: (B, L) int64, mostly input_ids itself: the loss is the mean of -log p(labels[b, i + 1]) in nats,
                without those that are -100.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] > self.config.n_positions:
            raise RuntimeError(
                f"input_ids must be (B, L) with L at most n_positions={self.config.n_positions}; "
                f"got {tuple(input_ids.shape)}"
            )
        x = self._blocks(input_ids, torch.arange(input_ids.shape[1], device=input_ids.device))
        logits = self.lm_head(self.transformer.ln_f(x))
        if labels is None:
            return logits
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def new_caches(self, batch_size: int, capacity: int) -> list[KVCache]:
        """An empty `fastseq.KVCache` for each block, with memory for `capacity` tokens a row."""
        config, weight = self.config, self.transformer.wte.weight
        sizes = (batch_size, config.n_head, config.n_embd // config.n_head)
        options = {"capacity": capacity, "max_length": config.n_positions, "dtype": weight.dtype}
        return [KVCache(*sizes, **options, device=weight.device) for _ in range(config.n_layer)]

    def decode(self, input_ids: Tensor, caches: list[KVCache], lengths: Tensor | None = None) -> Tensor:
        """Adds L tokens to each row of the caches, and returns the logits (B, vocab_size) of the one after them.

        Args:
            input_ids: (B, L) int64: a prompt, or the last token.
            caches: of `new_caches`.
            lengths: (B,), 1..L: row b has lengths[b] tokens, and what follows is padding.
        """
        positions = caches[0].lengths[:, None] + torch.arange(input_ids.shape[1])
        x = self._blocks(input_ids, positions.to(input_ids.device), caches, lengths)
        last = x[:, -1] if lengths is None else x[torch.arange(len(x)), lengths - 1]
        return self.lm_head(self.transformer.ln_f(last))

    def _blocks(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: list[KVCache] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        x = self.transformer.wte(input_ids) + self.transformer.wpe(positions)
        x = F.dropout(x, self.config.embd_pdrop, self.training)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, caches[layer] if caches else None, lengths)
        return x

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> GPT2:
        """The model of a folder of transformers, in eval mode: config.json and weights; nothing of it is executed.

        Weights are model.safetensors, its shards by model.safetensors.index.json, or pytorch_model.bin, read with
        weights_only=True. Names and shapes are compared with the config's before memory is allocated.

        Raises:
            ValueError: files that are missing or damaged, or do not fit each other; the message says which.
            ModuleNotFoundError: safetensors is not installed.
        """
        folder = Path(folder)
        config = pretrained.read(folder / "config.json", GPT2Config.from_dict)
        with torch.device("meta"):
            model = cls(config)
        expected = {name: t.shape for name, t in model._weights().items()}
        weights = pretrained.load_weights(folder, expected, dtype)
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        model.load_state_dict(weights, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, which transformers' `from_pretrained` opens, into the folder."""
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **asdict(self.config)}
        pretrained.save(Path(folder), config, self._weights())

    def _weights(self) -> dict[str, Tensor]:
        """The state dict with each tensor once."""
        weights = self.state_dict()
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        return weights

    @classmethod
    def from_transformers(cls, model: nn.Module) -> GPT2:
        """A copy of a transformers.GPT2LMHeadModel, of its dtype, device and mode."""
        with torch.device("meta"):
            copy = cls(GPT2Config.from_dict(model.config.to_dict()))
        weight = model.transformer.wte.weight
        copy = copy.to_empty(device=weight.device).to(weight.dtype).train(model.training)
        copy.load_state_dict(model.state_dict())
        return copy

    def to_transformers(self) -> Any:
        """A copy as a transformers.GPT2LMHeadModel, of the same dtype, device and mode; needs transformers."""
        import transformers

        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**asdict(self.config)))
        model.to(self.lm_head.weight).train(self.training).load_state_dict(self.state_dict())
        return model


class _Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = _Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None, lengths: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, lengths)
        return x + self.mlp(self.ln_2(x))


class _Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.n_head, self.attn_pdrop, self.resid_pdrop = config.n_head, config.attn_pdrop, config.resid_pdrop
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = _Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = _Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None, lengths: Tensor | None) -> Tensor:
        query, key, value = self.c_attn(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if cache is None:
            dropout_p = self.attn_pdrop if self.training else 0.0
            y = scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=True, scale=self.scale)
        else:
            cache.append(key, value, lengths)
            y = cache.attend(query, scale=self.scale)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.resid_pdrop, self.training)


class _MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.activation, self.resid_pdrop = ACTIVATIONS[config.activation_function], config.resid_pdrop
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = _Conv1D(config.n_embd, inner)
        self.c_proj = _Conv1D(inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.activation(self.c_fc(x))), self.resid_pdrop, self.training)


class _Conv1D(nn.Module):
    """x W + b with W (in, out): transformers' layout of a linear layer's weight, the transpose of torch's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
