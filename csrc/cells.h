// The mathematics of every cell, written once. V is some vectors of units on the CPU and one unit on a CUDA
// thread; sigmoid, tanh, fma, select_* come with V. Included inside the namespace of an instruction set
// (csrc/cpu/README.md).
//
//   update           gx = W_ih x + b_ih and gh = W_hh h + b_hh, one V a gate, in PyTorch's gate order -> the new h.
//                    c is read and overwritten by the cells that have one. What backward needs goes to keep[].
//   update_backward  dh = dL/dh -> dg[] = dL/d(pre-activations), and returns the part of dL/dh_prev that does not pass
//                    through W_hh. dc comes in as dL/dc from the later step and leaves as dL/dc_prev.
//
// gates   pre-activations a unit
// kept    planes forward keeps; the first `gates` of them may overwrite gx
// grads   planes in dg: the first `gates` are dL/dgx; those that belong to gh are named by hidden_runs
// hidden_runs  {first plane of dg, first gate of W_hh, number of gates}: contiguous pieces of dL/dgh
#pragma once

struct GateRun {
  int plane, gate, count;
};

// Elman (1990): h = phi(gx + gh).
struct RnnCellTraits {
  static constexpr int gates = 1, kept = 0, grads = 1, runs = 1;
  static constexpr bool cell_state = false, reads_h_prev = false, reads_h = true;
  static constexpr GateRun hidden_runs[1] = {{0, 0, 1}};
};

struct RnnTanhCell : RnnCellTraits {
  template <class V>
  FASTSEQ_INLINE static V update(const V* gx, const V* gh, V, V&, V*) {
    return tanh(gx[0] + gh[0]);
  }
  template <class V>
  FASTSEQ_INLINE static V update_backward(const V*, V h, V, V, V dh, V&, V* dg) {
    dg[0] = dh * (V(1) - h * h);
    return V(0);
  }
};

struct RnnReluCell : RnnCellTraits {
  template <class V>
  FASTSEQ_INLINE static V update(const V* gx, const V* gh, V, V&, V*) {
    return relu(gx[0] + gh[0]);
  }
  template <class V>
  FASTSEQ_INLINE static V update_backward(const V*, V h, V, V, V dh, V&, V* dg) {
    dg[0] = relu_backward(h, dh);
    return V(0);
  }
};

// Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000):
//   i, f, o = sigmoid(.), g = tanh(.), c = f c_prev + i g, h = o tanh(c).
struct LstmCell {
  static constexpr int gates = 4, kept = 5, grads = 4, runs = 1;
  static constexpr bool cell_state = true, reads_h_prev = false, reads_h = false;
  static constexpr GateRun hidden_runs[1] = {{0, 0, 4}};

  template <class V>
  FASTSEQ_INLINE static V emit(V o, V c) {
    return o * tanh(c);
  }
  template <class V>
  FASTSEQ_INLINE static V update(const V* gx, const V* gh, V, V& c, V* keep) {
    const V i = sigmoid(gx[0] + gh[0]);
    const V f = sigmoid(gx[1] + gh[1]);
    const V g = tanh(gx[2] + gh[2]);
    const V o = sigmoid(gx[3] + gh[3]);
    c = fma(f, c, i * g);
    keep[0] = i, keep[1] = f, keep[2] = g, keep[3] = o, keep[4] = c;
    return emit(o, c);
  }
  template <class V>
  FASTSEQ_INLINE static V update_backward(const V* keep, V, V, V c_prev, V dh, V& dc, V* dg) {
    const V i = keep[0], f = keep[1], g = keep[2], o = keep[3];
    const V tanh_c = tanh(keep[4]);
    const V dc_now = fma(dh * o, V(1) - tanh_c * tanh_c, dc);
    dg[0] = dc_now * g * (i * (V(1) - i));
    dg[1] = dc_now * c_prev * (f * (V(1) - f));
    dg[2] = dc_now * i * (V(1) - g * g);
    dg[3] = dh * tanh_c * (o * (V(1) - o));
    dc = dc_now * f;
    return V(0);
  }
};

// Cho et al. (2014) in the form of cuDNN and PyTorch, the reset gate applied after the matrix product:
//   r, z = sigmoid(.), q = gh_n, n = tanh(gx_n + r q), h = (1 - z) n + z h_prev.
struct GruCell {
  static constexpr int gates = 3, kept = 4, grads = 4, runs = 2;
  static constexpr bool cell_state = false, reads_h_prev = true, reads_h = false;
  static constexpr GateRun hidden_runs[2] = {{0, 0, 2}, {3, 2, 1}};

  template <class V>
  FASTSEQ_INLINE static V update(const V* gx, const V* gh, V h_prev, V&, V* keep) {
    const V r = sigmoid(gx[0] + gh[0]);
    const V z = sigmoid(gx[1] + gh[1]);
    const V q = gh[2];
    const V n = tanh(fma(r, q, gx[2]));
    keep[0] = r, keep[1] = z, keep[2] = n, keep[3] = q;
    return fma(z, h_prev - n, n);
  }
  template <class V>
  FASTSEQ_INLINE static V update_backward(const V* keep, V, V h_prev, V, V dh, V&, V* dg) {
    const V r = keep[0], z = keep[1], n = keep[2], q = keep[3];
    const V dn = dh * (V(1) - z) * (V(1) - n * n);
    dg[0] = dn * q * (r * (V(1) - r));
    dg[1] = dh * (h_prev - n) * (z * (V(1) - z));
    dg[2] = dn;
    dg[3] = dn * r;
    return dh * z;
  }
};
