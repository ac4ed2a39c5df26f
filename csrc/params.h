// Plain parameter blocks: what a caller hands to a kernel. Pointers, sizes, nullable extras; no torch, no ownership.
//
// Letters (docs/architecture.md): T steps, B batch, I input size, H hidden size, P projected size, G gates,
// D directions, N rows of all steps together (T*B, or fewer when the batch is ragged). "Hout" is P with a
// projection and H without.
#pragma once

#include <cstdint>

namespace fastseq {

// The upper half of a float. Kernels of it store bfloat16 and compute in float.
struct bfloat16 {
  uint16_t bits;
};
// IEEE 754 binary16; of it there are kernels on CUDA alone.
struct float16 {
  uint16_t bits;
};

// What kernels compute in, and give sums in, for numbers that are stored as T.
template <class T>
struct ComputedIn {
  using type = T;
};
template <>
struct ComputedIn<bfloat16> {
  using type = float;
};
template <>
struct ComputedIn<float16> {
  using type = float;
};
template <class T>
using Computed = typename ComputedIn<T>::type;

// Which rows are alive at a step. Rows are sorted by length, longest first, so the rows alive at step t are the first
// rows(t) ones, and the data of all steps lie one after another without padding (torch's PackedSequence). This is the
// one ragged mechanism: a dense batch is the case where every step has B rows and the tables are absent.
struct Schedule {
  int64_t steps = 0;                     // T
  int64_t batch = 0;                     // B
  const int64_t* batch_sizes = nullptr;  // (T,) non-increasing; null when dense
  const int64_t* offsets = nullptr;      // (T+1,) running sum of batch_sizes; null when dense
  int64_t padded_steps = 0;              // T of the caller's padded batch, where no row may be that long

  constexpr int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
  constexpr int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * batch; }
  constexpr int64_t total_rows() const { return offset(steps); }
  // What the order of sums may depend on: not on how long the other rows are.
  int64_t nominal_steps() const { return padded_steps > steps ? padded_steps : steps; }
};

template <class T>
struct DirectionWeights {
  const T* w_ih = nullptr;  // (G*H, I)
  const T* w_hh = nullptr;  // (G*H, Hout)
  const T* b_ih = nullptr;  // (G*H,) or null
  const T* b_hh = nullptr;  // (G*H,) or null
  const T* w_hr = nullptr;  // (P, H) or null
};

template <class T>
struct DirectionGrads {  // each as its weight, overwritten; null where nobody asked
  T* w_ih = nullptr;
  T* w_hh = nullptr;
  T* b_ih = nullptr;
  T* b_hh = nullptr;
  T* w_hr = nullptr;
};

// One layer, all its directions.
template <class T>
struct RnnLayer {
  Schedule schedule;
  int64_t input_size = 0;   // I
  int64_t hidden_size = 0;  // H
  int64_t proj_size = 0;    // P, 0 without a projection
  int directions = 1;       // D
  DirectionWeights<T> weights[2];
  const T* x = nullptr;   // (N, I)
  const T* h0 = nullptr;  // (D, B, Hout) or null for zeros
  const T* c0 = nullptr;  // (D, B, H) or null for zeros
  int threads = 1;

  constexpr int64_t out_size() const { return proj_size ? proj_size : hidden_size; }
};

template <class T>
struct RnnForward : RnnLayer<T> {
  const T* packed[2] = {nullptr, nullptr};  // the weights once more, from the kernel that packs them; or null
  T* output = nullptr;                      // (N, D*Hout)
  T* h_n = nullptr;                         // (D, B, Hout) or null
  T* c_n = nullptr;                         // (D, B, H) or null
  T* kept[2] = {nullptr, nullptr};          // (N, Cell::kept*H) activations for backward; null: keep nothing
  T* emitted[2] = {nullptr, nullptr};       // (N, H) h before the projection, for backward; null: keep nothing
};

template <class T>
struct RnnBackward : RnnLayer<T> {
  const T* output = nullptr;  // (N, D*Hout) as forward wrote it
  const T* kept[2] = {nullptr, nullptr};
  const T* emitted[2] = {nullptr, nullptr};
  const T* d_output = nullptr;  // (N, D*Hout) or null for zeros
  const T* d_h_n = nullptr;     // (D, B, Hout) or null for zeros
  const T* d_c_n = nullptr;     // (D, B, H) or null for zeros
  T* dx = nullptr;              // (N, I) or null
  T* d_h0 = nullptr;            // (D, B, Hout) or null
  T* d_c0 = nullptr;            // (D, B, H) or null
  DirectionGrads<T> grads[2];
};

}  // namespace fastseq
