"""Two models that differ in the library of their recurrent layer alone, trained on the same batches in turns."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastseq
from fastseq.demo.model import CharacterModel
from fastseq.demo.text import TextError, windows_of_step

CELLS = ("RNN", "LSTM", "GRU")  # class names, in fastseq and in torch.nn
LIBRARIES = {"fastseq": fastseq, "torch.nn": nn}
BLOCK = 5  # steps of one side before it is the other's turn
LEARNING_RATE = 2.5e-3
WARMUP = 20  # steps over which the learning rate rises
CLIP = 0.25  # the norm to which gradients are cut: beyond it, float32 rounding grows a thousandfold in the LSTM


@dataclass(frozen=True)
class Settings:
    """What one race is run with."""

    hidden: int = 256
    layers: int = 1
    steps: int = 500
    batch: int = 16
    seq: int = 64
    seed: int = 0
    dtype: torch.dtype = torch.float32


@dataclass
class Side:
    """One model in training, with what was measured."""

    model: CharacterModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # nats per character, one a step
    seconds: list[float] = field(default_factory=list)  # one a step

    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> None:
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        logits, _ = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)


class Race:
    """fastseq and torch.nn from the same initial weights, over the same batches.

    They take turns of BLOCK steps, each going first every second time, so that whatever the machine does meets both.
    Raises TextError where the text is too short for batch x seq.
    """

    def __init__(self, cell: str, text: np.ndarray, vocabulary: int, settings: Settings) -> None:
        self.cell, self.vocabulary, self.settings = cell, vocabulary, settings
        self.windows = (len(text) - 1) // settings.seq
        if self.windows < settings.batch:
            raise TextError(
                f"The training text has {len(text)} characters, and a batch of {settings.batch} sequences needs "
                f"{settings.batch * settings.seq + 1}: take a smaller --batch or --seq, or more text."
            )
        self.text = torch.from_numpy(text)

        torch.manual_seed(settings.seed)
        sizes = (vocabulary, settings.hidden, settings.layers)
        models = {name: CharacterModel(getattr(library, cell), *sizes) for name, library in LIBRARIES.items()}
        weights = copy.deepcopy(models["torch.nn"].state_dict())
        self.sides: dict[str, Side] = {}
        for name, model in models.items():
            model.load_state_dict(weights)
            model.to(settings.dtype)
            self.sides[name] = Side(model, torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True))

    def run(self) -> Iterator[int]:
        """Trains; yields the number of steps that both sides have done, block by block."""
        steps = self.settings.steps
        for begin in range(0, steps, BLOCK):
            end = min(begin + BLOCK, steps)
            order = list(self.sides.values())
            if begin // BLOCK % 2:
                order.reverse()
            for side in order:
                for step in range(begin, end):
                    self._step(side, step)
            yield end

    def _step(self, side: Side, step: int) -> None:
        rise, fall = min(1.0, (step + 1) / WARMUP), 0.5 * (1.0 + math.cos(math.pi * step / self.settings.steps))
        side.step(*self._batch(step), LEARNING_RATE * rise * fall)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (T, B) of a step.

        Windows start from a zero state. Batches that read on where the last one ended, with its state carried along,
        see less of the text; and in a state that is never reset the RNN's rounding errors grow a thousandfold.
        """
        seq = self.settings.seq
        starts = windows_of_step(self.windows, self.settings.batch, step, self.settings.seed) * seq
        windows = self.text[starts + torch.arange(seq + 1).unsqueeze(1)]
        return windows[:-1], windows[1:]

    def difference(self) -> float:
        """The largest difference between the two sides' losses at a step that both have done; NaN is infinite."""
        return _largest_difference(*(side.losses for side in self.sides.values()))

    def drift(self) -> float:
        """How far torch.nn's losses go from themselves when its initial weights are off by one rounding error.

        Training can multiply a rounding error from step to step, on one text and not on another. Then two libraries
        that are both right go as far from each other as either does from itself.
        """
        again = Race(self.cell, self.text.numpy(), self.vocabulary, self.settings).sides["torch.nn"]
        with torch.no_grad():
            for parameter in again.model.parameters():
                parameter.mul_(1 + torch.finfo(parameter.dtype).eps)
        before = self.sides["torch.nn"].losses
        for step in range(len(before)):
            self._step(again, step)
        return _largest_difference(again.losses, before)

    def characters_per_second(self, name: str) -> float:
        """From the median step; the first block warms up and is left out where there are others."""
        seconds = self.sides[name].seconds
        tokens = self.settings.batch * self.settings.seq
        return tokens / statistics.median(seconds[BLOCK:] or seconds)


def _largest_difference(a: list[float], b: list[float]) -> float:
    differences = [abs(x - y) for x, y in zip(a, b, strict=False)]  # uneven where it was interrupted
    return max((d if math.isfinite(d) else math.inf for d in differences), default=0.0)
