"""jax.lax.scan, jitted, as one writes a recurrent layer in jax."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fastseq.bench.grid import WINDOW, AnyPoint, AttentionPoint, Point
from fastseq.bench.peers.base import Peer, Prepared
from fastseq.bench.problem import AttentionNumbers, Numbers, names_of


class Jax(Peer):
    """The input projection of all steps as one product before the scan; storage in the point's dtype, sums and gates
    in float32."""

    name = "jax"
    distributions = ("jax", "jaxlib")
    threads_at_start = True

    def unsupported(self, point: AnyPoint) -> str | None:
        """Layers over full rows, and attention."""
        if isinstance(point, AttentionPoint):
            return "measured with keys in cache" if point.rotating else None
        return "measured for whole layers and full rows" if point.form != "layer" else None

    def start(self, threads: int) -> None:
        """XLA takes as many threads as the process may use processors."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["JAX_PLATFORMS"] = "cpu"

    def prepare(self, point: AnyPoint, threads: int) -> Prepared:
        """Compiles the layer, or its value and gradient."""
        if isinstance(point, AttentionPoint):
            return _attention(point)
        import jax
        import jax.numpy as jnp

        numbers, dtype = Numbers.of(point), jnp.dtype(point.dtype)
        weights = {name: jnp.asarray(w, dtype) for name, w in numbers.weights.items()}
        x, d_output = jnp.asarray(numbers.x, dtype), jnp.asarray(numbers.d_output, dtype)
        run = _layer(point)

        if point.mode == "inference":
            compiled = jax.jit(run)

            def inference() -> Any:
                return compiled(weights, x).block_until_ready()

            return Prepared(inference, {"output": _array(inference())}, "jit, projection hoisted")

        def loss(weights: dict[str, Any], x: Any) -> tuple[Any, Any]:
            output = run(weights, x)
            return (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(), output

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

        def training() -> Any:
            return jax.block_until_ready(step(weights, x))

        (_, output), (d_weights, d_x) = training()
        results = {"output": _array(output), "d_x": _array(d_x)}
        results |= {f"d_{name}": _array(gradient) for name, gradient in d_weights.items()}
        return Prepared(training, results, "jit(value_and_grad), projection hoisted")


def _attention(point: AttentionPoint) -> Prepared:
    """jax.nn.dot_product_attention, which has heads after rows: (B, L, N, D)."""
    import jax
    import jax.numpy as jnp

    numbers, dtype = AttentionNumbers.of(point), jnp.dtype(point.dtype)
    q, k, v, d_output = (
        jnp.asarray(t.swapaxes(1, 2), dtype) for t in (numbers.q, numbers.k, numbers.v, numbers.d_output)
    )
    options: dict[str, Any] = {"is_causal": point.form in ("causal", "window")}
    if point.form == "window":
        options["local_window_size"] = (WINDOW, 0)
    if numbers.mask is not None:
        mask = jnp.asarray(numbers.mask)
        options |= {"mask": mask} if mask.dtype == bool else {"bias": mask[None].astype(dtype)}

    def run(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, **options)

    def loss(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        output = run(q, k, v)
        return (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(), output

    if point.mode == "inference":
        compiled = jax.jit(run)

        def inference() -> Any:
            return compiled(q, k, v).block_until_ready()

        return Prepared(inference, {"output": _array(inference()).swapaxes(1, 2)}, "jit")
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    def training() -> Any:
        return jax.block_until_ready(step(q, k, v))

    (_, output), gradients = training()
    results = {"output": _array(output)} | {f"d_{n}": _array(g) for n, g in zip("qkv", gradients, strict=True)}
    return Prepared(training, {n: a.swapaxes(1, 2) for n, a in results.items()}, "jit(value_and_grad)")


def _array(x: Any) -> np.ndarray:
    return np.array(x).astype(np.float32)


def _layer(point: Point) -> Callable[[dict[str, Any], Any], Any]:
    """(weights, x) -> output (T, B, D*H)."""
    import jax
    import jax.numpy as jnp

    def product(a: Any, w: Any) -> Any:
        return jnp.matmul(a, w.T, preferred_element_type=jnp.float32)

    def rnn(gx: Any, gh: Any, state: Any) -> Any:
        return (jnp.tanh(gx + gh),)

    def gru(gx: Any, gh: Any, state: Any) -> Any:
        (xr, xz, xn), (hr, hz, hn) = jnp.split(gx, 3, -1), jnp.split(gh, 3, -1)
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        n = jnp.tanh(xn + r * hn)
        return (n + z * (state[0] - n),)

    def lstm(gx: Any, gh: Any, state: Any) -> Any:
        i, f, g, o = jnp.split(gx + gh, 4, -1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    cell = {"RNN": rnn, "GRU": gru, "LSTM": lstm}[point.cell]

    def direction(parameters: list[Any], x: Any, reverse: bool) -> Any:
        w_ih, w_hh, b_ih, b_hh = parameters
        gx = product(x, w_ih) + b_ih.astype(jnp.float32)

        def step(state: Any, gx_t: Any) -> Any:
            gh = product(state[0].astype(x.dtype), w_hh) + b_hh.astype(jnp.float32)
            state = cell(gx_t, gh, state)
            return state, state[0].astype(x.dtype)

        zeros = jnp.zeros((point.B, point.H), jnp.float32)
        states = (zeros, zeros) if point.cell == "LSTM" else (zeros,)
        return jax.lax.scan(step, states, gx, reverse=reverse)[1]

    def run(weights: dict[str, Any], x: Any) -> Any:
        for layer in range(point.layers):
            outputs = [
                direction([weights[name] for name in names_of(layer, d)], x, reverse=d == 1)
                for d in range(point.directions)
            ]
            x = jnp.concatenate(outputs, -1)
        return x

    return run
