"""Recurrent layers and their backpropagation through time by hand, in NumPy's long double.

An oracle for the tests: written from the papers' equations, sharing no code with the library and using no automatic
differentiation. The chain rule is worked out in each `backward`. (`docs/math.md` has the same derivation.)

- simple recurrent network: Elman, "Finding structure in time", Cognitive Science 14, 1990
- LSTM: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9, 1997; with the forget gate of Gers,
  Schmidhuber and Cummins, "Learning to forget", Neural Computation 12, 2000
- LSTM with a projection: Sak, Senior and Beaufays, "Long short-term memory recurrent neural network architectures for
  large scale acoustic modeling", Interspeech 2014
- GRU: Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
  EMNLP 2014; the reset gate applied after the recurrent product, as in cuDNN and PyTorch

`rnn` and `rnn_backward` take the arguments of the library's operators, as arrays or torch tensors.
"""

from __future__ import annotations

import numpy as np

Real = np.longdouble


@np.errstate(over="ignore", invalid="ignore")  # inf and NaN go through as they do in the library
def rnn(cell, x, hx=None, cx=None, weights=(), **options):
    """-> output, h_n, c_n, in the shapes of the library's operator."""
    run = _Run(cell, x, hx, cx, weights, **options)
    return run.outputs()


@np.errstate(over="ignore", invalid="ignore")
def rnn_backward(d_output, d_h_n, d_c_n, cell, x, hx=None, cx=None, weights=(), **options):
    """-> [dx, dhx, dcx, *dweights]; dcx is None but for the LSTM. A gradient given as None is zero."""
    return _Run(cell, x, hx, cx, weights, **options).backward(d_output, d_h_n, d_c_n)


# ---- cells: one step of R rows ----
#
# forward(xg, hg, h, c) -> the new h and c (None without one), and what backward needs
#     xg = x W_ihᵀ + b_ih and hg = h W_hhᵀ + b_hh are (R, gates H), the gates side by side in PyTorch's order
# backward(tape, dh, dc) -> dxg, dhg, and what reaches the old h (other than by hg) and the old c


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


class RnnTanh:
    """h' = tanh(a),  a = xg + hg."""

    @staticmethod
    def forward(xg, hg, h, c):
        new_h = np.tanh(xg + hg)
        return new_h, None, new_h

    @staticmethod
    def backward(tape, dh, dc):
        new_h = tape
        da = dh * (1 - new_h**2)
        return da, da, 0, None


class RnnRelu:
    """h' = max(a, 0),  a = xg + hg; the slope at 0 is 0."""

    @staticmethod
    def forward(xg, hg, h, c):
        new_h = np.maximum(xg + hg, 0)
        return new_h, None, new_h

    @staticmethod
    def backward(tape, dh, dc):
        new_h = tape
        da = np.where(new_h > 0, dh, 0)
        return da, da, 0, None


class Lstm:
    """i, f, o = sigmoid, g = tanh of their pre-activations;  c' = f c + i g,  h' = o tanh(c')."""

    @staticmethod
    def forward(xg, hg, h, c):
        a_i, a_f, a_g, a_o = np.split(xg + hg, 4, axis=1)
        i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
        new_c = f * c + i * g
        new_h = o * np.tanh(new_c)
        return new_h, new_c, (i, f, g, o, c, new_c)

    @staticmethod
    def backward(tape, dh, dc):
        i, f, g, o, c, new_c = tape
        # h' = o tanh(c'): to o, and a second road into c'
        do = dh * np.tanh(new_c)
        dc = dc + dh * o * (1 - np.tanh(new_c) ** 2)
        # c' = f c + i g
        df, dc_old, di, dg = dc * c, dc * f, dc * g, dc * i
        # sigmoid' = s (1 - s), tanh' = 1 - t²
        da = np.concatenate([di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o)], axis=1)
        return da, da, 0, dc_old


class Gru:
    """r = sigmoid(xr + hr),  z = sigmoid(xz + hz),  n = tanh(xn + r hn),  h' = (1 - z) n + z h."""

    @staticmethod
    def forward(xg, hg, h, c):
        xr, xz, xn = np.split(xg, 3, axis=1)
        hr, hz, hn = np.split(hg, 3, axis=1)
        r, z = sigmoid(xr + hr), sigmoid(xz + hz)
        n = np.tanh(xn + r * hn)
        return (1 - z) * n + z * h, None, (r, z, n, hn, h)

    @staticmethod
    def backward(tape, dh, dc):
        r, z, n, hn, h = tape
        # h' = (1 - z) n + z h
        dn, dz, dh_old = dh * (1 - z), dh * (h - n), dh * z
        # n = tanh(a_n),  a_n = xn + r hn
        da_n = dn * (1 - n**2)
        dr, dhn = da_n * hn, da_n * r
        da_r, da_z = dr * r * (1 - r), dz * z * (1 - z)
        return np.concatenate([da_r, da_z, da_n], axis=1), np.concatenate([da_r, da_z, dhn], axis=1), dh_old, None


CELLS = {"rnn_tanh": RnnTanh, "rnn_relu": RnnRelu, "lstm": Lstm, "gru": Gru}


# ---- one direction of one layer over R rows of one common length ----


class _Scan:
    """x (T, R, I) in the order of reading, h (R, P), c (R, H) -> y (T, R, P), the last h and c; keeps its tape."""

    def __init__(self, cell, w, x, h, c):
        self.cell, self.w, self.x = cell, w, x
        self.steps = []
        outputs = []
        for x_t in x:
            xg = x_t @ w["w_ih"].T + w["b_ih"]
            hg = h @ w["w_hh"].T + w["b_hh"]
            m, c, tape = cell.forward(xg, hg, h, c)
            self.steps.append((x_t, h, m, tape))
            h = m if w["w_hr"] is None else m @ w["w_hr"].T
            outputs.append(h)
        self.y = np.array(outputs, dtype=Real).reshape(len(x), *h.shape)
        self.h, self.c = h, c

    def backward(self, dy, dh, dc, dw):
        """-> dx, and the gradients of the first h and c; the parameters' are added to dw."""
        w = self.w
        dx = np.zeros_like(self.x)
        for t in reversed(range(len(self.steps))):
            x_t, h, m, tape = self.steps[t]
            dh = dh + dy[t]
            if w["w_hr"] is not None:
                dw["w_hr"] += dh.T @ m
                dh = dh @ w["w_hr"]
            dxg, dhg, dh_old, dc = self.cell.backward(tape, dh, dc)
            dw["w_ih"] += dxg.T @ x_t
            dw["b_ih"] += dxg.sum(axis=0)
            dw["w_hh"] += dhg.T @ h
            dw["b_hh"] += dhg.sum(axis=0)
            dx[t] = dxg @ w["w_ih"]
            dh = dhg @ w["w_hh"] + dh_old
        return dx, dh, dc


# ---- the stack: layers, directions, rows of different lengths, the forms of x ----


class _Run:
    def __init__(
        self,
        cell,
        x,
        hx=None,
        cx=None,
        weights=(),
        *,
        num_layers=1,
        bidirectional=False,
        bias=True,
        dropout_masks=(),
        lengths=None,
        batch_sizes=None,
    ):
        self.lstm = cell == "lstm"
        self.layers, self.directions = num_layers, 2 if bidirectional else 1
        self.names, self.weights = _name_weights([_array(w) for w in weights], num_layers * self.directions, bias)
        self.batch_sizes = None if batch_sizes is None else [int(n) for n in batch_sizes]
        self.is_step = np.ndim(x) == 2 and batch_sizes is None
        x = self._padded(x)
        T, B = x.shape[:2]
        if batch_sizes is not None:
            lengths = [sum(n > b for n in self.batch_sizes) for b in range(B)]
        lengths = np.array([T] * B if lengths is None else [int(n) for n in lengths], dtype=int)
        # Rows of one length are computed together, as dense sequences of that length: no masks, no dead rows.
        self.groups = [(n, np.flatnonzero(lengths == n)) for n in np.unique(lengths)]
        self.masks = [self._padded(m) for m in dropout_masks]

        P = self.weights[0]["w_hh"].shape[1]
        H = P if self.weights[0]["w_hr"] is None else self.weights[0]["w_hr"].shape[1]
        h_0 = self._initial(hx, (len(self.weights), B, P))
        c_0 = self._initial(cx, (len(self.weights), B, H)) if self.lstm else None
        self.h_n, self.c_n = np.zeros_like(h_0), np.zeros_like(c_0) if self.lstm else None
        self.x, self.scans = x, {}
        for layer in range(num_layers):
            y = np.zeros((T, B, self.directions * P), dtype=Real)
            for d in range(self.directions):
                k = layer * self.directions + d
                for n, rows in self.groups:
                    c = c_0[k, rows] if self.lstm else None
                    scan = _Scan(CELLS[cell], self.weights[k], _turn(x[:n, rows], d), h_0[k, rows], c)
                    y[:n, rows, d * P : (d + 1) * P] = _turn(scan.y, d)
                    self.h_n[k, rows] = scan.h
                    if self.lstm:
                        self.c_n[k, rows] = scan.c
                    self.scans[k, n] = scan
            x = y * self.masks[layer] if self.masks and layer < num_layers - 1 else y
        self.y = x

    def outputs(self):
        none = np.zeros(0, dtype=Real)
        if self.is_step:
            return self.y[0], none, self.c_n[0] if self.lstm else none
        return self._packed(self.y), self.h_n, self.c_n if self.lstm else none

    def backward(self, d_output, d_h_n, d_c_n):
        P = self.h_n.shape[2]
        dx = np.zeros_like(self.y) if d_output is None else self._padded(d_output)
        dh_0 = self._initial(None if self.is_step else d_h_n, self.h_n.shape)
        dc_0 = self._initial(d_c_n, self.c_n.shape) if self.lstm else None
        dws = [{name: np.zeros_like(w) for name, w in group.items() if w is not None} for group in self.weights]
        for layer in reversed(range(self.layers)):
            dy = dx * self.masks[layer] if self.masks and layer < self.layers - 1 else dx
            below = self.x.shape if layer == 0 else self.y.shape
            dx = np.zeros(below, dtype=Real)
            for d in range(self.directions):
                k = layer * self.directions + d
                for n, rows in self.groups:
                    dy_k = _turn(dy[:n, rows, d * P : (d + 1) * P], d)
                    dc = dc_0[k, rows] if self.lstm else None
                    dx_k, dh, dc = self.scans[k, n].backward(dy_k, dh_0[k, rows], dc, dws[k])
                    dx[:n, rows] += _turn(dx_k, d)
                    dh_0[k, rows] = dh
                    if self.lstm:
                        dc_0[k, rows] = dc
        if self.is_step:
            dx, dh_0, dc_0 = dx[0], dh_0[0], dc_0[0] if self.lstm else None
        return [self._packed(dx), dh_0, dc_0, *(dw[name] for dw in dws for name in self.names)]

    def _initial(self, given, shape):
        return np.zeros(shape, dtype=Real) if given is None else _array(given).reshape(shape)

    def _padded(self, a):
        """(T, B, ...) from any form of x; a copy."""
        a = _array(a)
        if self.is_step:
            return a[None]
        if self.batch_sizes is None:
            return a
        padded = np.zeros((len(self.batch_sizes), max(self.batch_sizes, default=0), a.shape[1]), dtype=Real)
        start = 0
        for t, n in enumerate(self.batch_sizes):
            padded[t, :n] = a[start : start + n]
            start += n
        return padded

    def _packed(self, a):
        if self.batch_sizes is None:
            return a
        nothing = np.zeros((0, a.shape[2]), dtype=Real)
        return np.concatenate([nothing, *(a[t, :n] for t, n in enumerate(self.batch_sizes))])


def _turn(a, direction):
    """In the order of reading of that direction, or back."""
    return a[::-1] if direction else a


def _array(a):
    """A long double copy of an array or a torch tensor."""
    if hasattr(a, "detach"):
        a = a.detach().cpu().double().numpy()
    return np.array(a, dtype=Real)


def _name_weights(weights, count, bias):
    """The names in the flat order, and a dict of each layer and direction's weights; absent: zero b, w_hr None."""
    size = len(weights) // count
    names = ["w_ih", "w_hh", "b_ih", "b_hh"] if bias else ["w_ih", "w_hh"]
    names += ["w_hr"] * (size - len(names))
    groups = []
    for k in range(count):
        group = dict(zip(names, weights[k * size : (k + 1) * size], strict=True))
        zero = np.zeros(len(group["w_ih"]), dtype=Real)
        groups.append({"b_ih": zero, "b_hh": zero, "w_hr": None, **group})
    return names, groups
