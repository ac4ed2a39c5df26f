"""Asks launches.cpp what the library launches, at named sizes and at all those that some kernel is launched at."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compilation import Stopped, plain_names, run
from .devices import Device


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cooperative: bool
    product: tuple[int, int, int]  # m, n, k of what it computes; zeros where it is no product
    times: int

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Case:
    """A call of the library. `sizes`: as launches.cpp has them; all that is left out is 0, or what is usual."""

    operation: str
    type: str
    sizes: dict[str, Any]

    def request(self, device: Device) -> str:
        facts = {"type": self.type, **self.sizes}
        facts |= {"multiprocessors": device.multiprocessors, "shared": device.shared_of_block}
        return f"{self.operation} " + " ".join(f"{key}={value}" for key, value in facts.items())

    def __str__(self) -> str:
        return f"{self.operation} {self.type} " + " ".join(f"{key}={value}" for key, value in self.sizes.items())


def ask(program: Path, cases: list[Case], device: Device) -> list[list[Launch]]:
    lines = run([program], input="\n".join(case.request(device) for case in cases)).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    for case, answer in zip(cases, answers, strict=True):
        if answer["status"]:
            raise Stopped(f"{case} on an {device.name} fails with error {answer['status']} of CUDA's runtime.")
    mangled = sorted({launch["kernel"] for answer in answers for launch in answer["launches"]})
    plain = dict(zip(mangled, plain_names(mangled), strict=True))
    return [
        [
            Launch(
                plain[launch["kernel"]],
                tuple(launch["grid"]),
                launch["threads"],
                launch["shared"],
                launch["cooperative"],
                tuple(launch["product"]),
                launch["times"],
            )
            for launch in answer["launches"]
        ]
        for answer in answers
    ]


CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
TYPES = ("float32", "float64", "bfloat16", "float16")
# On some device of the budget, the planner takes each tile that it ever takes at one of these.
BATCHES = (1, 16, 32, 48, 64, 96, 128, 256, 512)
HIDDEN = (*range(64, 1217, 64), 1536, 2048)


def all_cases() -> list[Case]:
    """So many that each kernel which the library launches at all is launched by one, if not on each device."""
    cases = []
    for type, cell, backward in itertools.product(TYPES, CELLS, (0, 1)):
        layer = {"cell": cell, "backward": backward, "steps": 2, "input": 64}
        cases.append(Case("rnn", type, {**layer, "batch": 4, "hidden": 64, "projected": 32, "directions": 2}))
        for batch, hidden, directions, tf32 in itertools.product(BATCHES, HIDDEN, (1, 2), (0, 1)):
            if type != "float64" and tf32 <= (type == "float32"):
                sizes = {"batch": batch, "hidden": hidden, "directions": directions, "tf32": tf32}
                cases.append(Case("rnn", type, {**layer, **sizes}))
    heads = [{"size": size} for size in (64, 128, 256, 320)] + [{"size": 320, "value_size": 64}]
    for type, head, options, queries, (backward, mask) in itertools.product(
        TYPES, heads, (0, 1), (1, 512), ((0, 0), (1, 0), (1, 1))
    ):
        sizes = {"batch": 2, "heads": 4, "queries": queries, "keys": 512, **head, "options": options}
        cases.append(Case("attention", type, {**sizes, "backward": backward, "mask": mask}))
    return cases
