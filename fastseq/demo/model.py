"""The model of the demo: embedding, recurrent layer, linear; and what a trained one can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING = 64

State = Any  # h, or (h, c) for the LSTM, as the layer returns it


class CharacterModel(nn.Module):
    """Logits of the next character: ids (T, B) -> (T, B, vocabulary).

    `layer` is the class of the recurrent layer, so that fastseq.GRU and torch.nn.GRU fit the same place.
    """

    def __init__(self, layer: Callable[..., nn.Module], vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.recurrent = layer(EMBEDDING, hidden, num_layers=layers)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, ids: Tensor, state: State = None) -> tuple[Tensor, State]:
        hidden, state = self.recurrent(self.embedding(ids), state)
        return self.output(hidden), state


@torch.no_grad()
def bits_per_character(model: CharacterModel, text: np.ndarray, chunk: int = 256) -> float:
    """The mean of -log2 p over text[:, 2:], each character given all those before it; text (streams, length).

    The first two characters are not scored, as the order-3 n-gram cannot: both are measured on the same ones.
    """
    ids = torch.from_numpy(text).t().contiguous()
    inputs, targets = ids[:-1], ids[1:]
    state, nats = None, []
    for begin in range(0, len(inputs), chunk):
        logits, state = model(inputs[begin : begin + chunk], state)
        nats.append(F.cross_entropy(logits.transpose(1, 2), targets[begin : begin + chunk], reduction="none"))
    return torch.cat(nats)[1:].double().mean().item() / math.log(2.0)


@torch.no_grad()
def generate(model: CharacterModel, prompt: np.ndarray, length: int, temperature: float, seed: int) -> list[int]:
    """`length` ids sampled after the prompt's, one step at a time with the state carried along."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.from_numpy(prompt).unsqueeze(1)
    state, sample = None, []
    for _ in range(length):
        logits, state = model(ids, state)
        probabilities = torch.softmax(logits[-1, 0] / temperature, dim=0)
        sample.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        ids = torch.tensor([[sample[-1]]])
    return sample
