"""Bare oneDNN: the program in bench/peers/onednn_rnn.cpp, built on first use and driven over a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fastseq.bench.grid import AnyPoint, AttentionPoint, Point
from fastseq.bench.peers.base import Peer, Prepared, Unsupported
from fastseq.bench.problem import Array, Numbers, names_of

_ROOT = Path(__file__).resolve().parents[3]
SOURCE = _ROOT / "bench" / "peers" / "onednn_rnn.cpp"
PROGRAM = _ROOT / "build" / "bench" / "onednn_rnn"

_GATE_ORDER = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 1, 2, 3)}
"""oneDNN's gates by their place in PyTorch's order: u r o of r z n; its own inverse."""


class OneDnn(Peer):
    """Recurrent primitives with packed weights, called from C++: no Python, no autograd, gradients not zeroed."""

    name = "onednn"
    distributions = ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")

    def __init__(self) -> None:
        self._programs: dict[int, _Program] = {}

    def missing(self) -> str | None:
        """Needs the repository, for the program's source, and a compiler."""
        return super().missing() or (None if SOURCE.is_file() else "its program is in the repository alone")

    def unsupported(self, point: AnyPoint) -> str | None:
        """Layers over full rows; bfloat16 in inference."""
        if isinstance(point, AttentionPoint):
            return "measured for recurrent layers"
        if point.form != "layer":
            return "measured for whole layers and full rows"
        if point.dtype == "bfloat16" and point.mode == "training":
            return "measured in bfloat16 for inference alone"
        return None

    def prepare(self, point: Point, threads: int) -> Prepared:
        """Hands the numbers over in a file, and reads the results of the first call from another."""
        program = self.program(threads)
        numbers = Numbers.of(point)
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder, "numbers"), "wb") as file:
                for layer in range(point.layers):
                    for array in _to_onednn(point, [numbers.place(layer, d) for d in range(point.directions)]):
                        file.write(np.ascontiguousarray(array, dtype=np.float32).data)
                file.write(numbers.x.data)
                file.write(numbers.d_output.data)
            words = (point.T, point.B, point.I, point.H, point.layers, point.directions, folder)
            implementation = program.ask("prepare", point.cell.lower(), point.mode, point.dtype, *words)
            results = _results(point, np.fromfile(Path(folder, "results"), dtype=np.float32))

        def burst(calls: int) -> float:
            return float(program.ask("burst", calls))

        return Prepared(
            lambda: burst(1), results, f"packed weights, {implementation}", [os.getpid(), program.pid], burst
        )

    def program(self, threads: int) -> _Program:
        """The running program with so many threads, started if need be."""
        if threads not in self._programs:
            self._programs[threads] = _Program(_built(), threads)
        return self._programs[threads]

    def gemm_rate(self, dtype: str, size: int, threads: int) -> float:
        """The second matrix packed."""
        calls = 3
        return 2.0 * size**3 * calls / float(self.program(threads).ask("gemm", dtype, size, size, size, calls))


class _Program:
    def __init__(self, path: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        self.pid = self._process.pid

    def ask(self, *words: object) -> str:
        """Sends a command and returns the answer after its "ok"."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        status, _, answer = self._process.stdout.readline().strip().partition(" ")
        if status == "ok":
            return answer
        if "primitive descriptor" in answer:
            raise Unsupported(f"it has no such primitive for this processor ({answer})")
        raise RuntimeError(answer or f"the program ended with code {self._process.wait()}")


def _built() -> Path:
    """The program, compiled again when its source is newer."""
    if PROGRAM.is_file() and PROGRAM.stat().st_mtime >= SOURCE.stat().st_mtime:
        return PROGRAM
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    prefix = Path(sys.prefix)
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", f"-I{prefix / 'include'}", str(SOURCE)]
    command += ["-o", str(PROGRAM), str(prefix / "lib" / "libdnnl.so"), f"-Wl,-rpath,{prefix / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{SOURCE.name} did not compile: {done.stderr.strip().splitlines()[0]}")
    return PROGRAM


def _gates(point: Point, w: Array) -> Array:
    """(G*H, ·) as (G, H, ·), from one library's order of gates to the other's."""
    return w.reshape(point.gates, point.H, *w.shape[1:])[list(_GATE_ORDER[point.cell])]


def _to_onednn(point: Point, directions: list[list[Array]]) -> list[Array]:
    """W_ih, W_hh and the bias of one layer in oneDNN's order, directions first."""
    biases = []
    for _, _, b_ih, b_hh in directions:
        bias = _gates(point, b_ih + b_hh)
        if point.cell == "GRU":  # b_hn is inside the product with r
            bias[2] = _gates(point, b_ih)[2]
            bias = np.concatenate((bias, _gates(point, b_hh)[2:]))
        biases.append(bias)
    w_ih, w_hh = ([_gates(point, arrays[i]) for arrays in directions] for i in (0, 1))
    return [np.stack(w_ih), np.stack(w_hh), np.stack(biases)]


def _results(point: Point, numbers: Array) -> dict[str, Array]:
    """The program's file of results by their names."""
    G, H, D = point.gates, point.H, point.directions

    def take(*shape: int) -> Array:
        nonlocal numbers
        size = int(np.prod(shape))
        taken, numbers = numbers[:size], numbers[size:]
        return taken.reshape(shape)

    results = {"output": take(point.T, point.B, D * H)}
    if point.mode == "inference":
        return results
    results["d_x"] = take(point.T, point.B, point.I)
    for layer in range(point.layers):
        d_ih, d_hh = take(D, G, H, point.I if layer == 0 else D * H), take(D, G, H, H)
        d_bias = take(D, 4 if point.cell == "GRU" else G, H)
        for d in range(D):
            w_ih, w_hh, b_ih, b_hh = names_of(layer, d)
            results[f"d_{w_ih}"] = _gates(point, d_ih[d].reshape(G * H, -1)).reshape(G * H, -1)
            results[f"d_{w_hh}"] = _gates(point, d_hh[d].reshape(G * H, -1)).reshape(G * H, -1)
            own = d_bias[d][:G].reshape(-1)
            results[f"d_{b_ih}"] = results[f"d_{b_hh}"] = _gates(point, own).reshape(-1)
            if point.cell == "GRU":
                hidden = np.concatenate((d_bias[d][:2], d_bias[d][3:])).reshape(-1)
                results[f"d_{b_hh}"] = _gates(point, hidden).reshape(-1)
    return results
