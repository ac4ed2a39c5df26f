// From the product of a query and a key to its score, probability and gradient, one number at a time; which keys a
// query sees; and how a grid is cut. All of attention's kernels share this.
#pragma once

#include <limits>

#include "attention.h"
#include "number.h"

namespace fastseq::cuda {

#include "../random.h"
#include "../attention_entry.h"

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

__device__ inline float power_of_2(float x) { return exp2_approximate(x); }
__device__ inline double power_of_2(double x) { return ::exp2(x); }
FASTSEQ_INLINE float natural_log(float x) { return ::logf(x); }
FASTSEQ_INLINE double natural_log(double x) { return ::log(x); }
FASTSEQ_INLINE float larger(float a, float b) { return ::fmaxf(a, b); }
FASTSEQ_INLINE double larger(double a, double b) { return ::fmax(a, b); }

// Of a batch entry. Scores are in units of log 2, so that their exponentials are powers of two.
template <class T>
class Scores {
 public:
  using A = Computed<T>;

  __device__ explicit Scores(const Attention<T, A>& p)
      : p_(p),
        factor_(static_cast<A>(p.softcap != 0 ? p.scale / p.softcap : p.scale * kLog2e)),
        cap_(static_cast<A>(p.softcap * kLog2e)),
        kept_(static_cast<A>(p.dropout.kept())) {}

  // Without any options: what a product is multiplied with.
  __device__ A factor() const { return factor_; }
  // What dropout multiplies the probabilities with that it keeps.
  __device__ A kept() const { return kept_; }

  // derivative: of the score in the product that is already times the scale.
  struct Score {
    A value, derivative;
  };
  __device__ Score of(A product, int n, int i, int j) const {
    Score score{product * factor_, A(1)};
    if (p_.softcap != 0) {
      const A t = tanh(score.value);
      score = {t * cap_, 1 - t * t};
    }
    if (p_.slopes) {
      const int64_t from_diagonal = j - i - p_.diagonal;
      const A distance = static_cast<A>(from_diagonal < 0 ? -from_diagonal : from_diagonal);
      score.value = fma(-distance, p_.slopes[n * p_.slopes_head] * static_cast<A>(kLog2e), score.value);
    }
    if (p_.mask.present()) {
      const int64_t at = n * p_.mask.head + i * p_.mask.row + j * p_.mask.column;
      if (p_.mask.bias) score.value = fma(load(p_.mask.bias[at]), static_cast<A>(kLog2e), score.value);
      else if (!p_.mask.visible[at]) score.value = -kInfinity<A>;
    }
    return score;
  }

  // 0 or kept().
  __device__ A multiplier(int n, int i, int j) const {
    if (!p_.dropout.threshold) return 1;
    uint32_t words[4][1];
    dropout_words(p_.first_head + n, i, j, p_.dropout.seed, words);
    return dropout_number(words, j) < p_.dropout.threshold ? A(0) : kept_;
  }

  // What backward makes of a product and of dP = dO V^T. shift: shift_of(lse); d_score: delta's row is subtracted.
  struct Gradient {
    A probability, d_score, derivative;  // the probability after dropout
  };
  __device__ Gradient gradient(A product, A d_probability, int n, int i, int j, A shift, A delta) const {
    const Score score = of(product, n, i, j);
    const A probability = power_of_2(score.value - shift), multiplied = multiplier(n, i, j);
    return {probability * multiplied, probability * fma(multiplied, d_probability, -delta), score.derivative};
  }

 private:
  const Attention<T, A>& p_;
  A factor_, cap_, kept_;
};

// What is subtracted from a row's scores, so that their exponentials are the probabilities: all 0 where none is seen.
template <class A>
__device__ A shift_of(A lse) {
  return lse == -kInfinity<A> ? kInfinity<A> : lse * static_cast<A>(kLog2e);
}

// Rows of queries and of keys are counted in 32 bits, which leaves registers for numbers; offsets have 64.
constexpr int kMostRows = 1 << 29;
template <class T, class A>
bool counts_fit(const Attention<T, A>& p) {
  return p.queries <= kMostRows && p.keys <= kMostRows && p.heads <= kMostRows;
}

// Head n of batch entry b, from the first row of all entries on. It is the same for a whole block, as the places in
// `entry` are, but no compiler sees that of those: what is read from Ragged takes registers of each thread.
template <class T>
__device__ const T* head_of(const Heads<const T>& heads, unsigned b, int n) {
  return heads.data + b * heads.batch + n * heads.head;
}
// Of batch entry b. What is needed at a kernel's end alone is found there by this: until then, a place in `entry` would
// take registers from sums.
template <class Numbers>
__device__ Numbers of_entry(Numbers numbers, unsigned b, const Ragged& rows) {
  move(numbers, b, rows.first(b));
  return numbers;
}

// A range of a block's rows or columns.
struct Visible {
  int begin, end;
  __device__ bool has(int at) const { return begin <= at && at < end; }
};

// Which queries of a batch entry see which keys, by the band alone.
struct Sight {
  int queries, keys, low, high;

  template <class T, class A>
  __device__ explicit Sight(const Attention<T, A>& p)
      : queries(static_cast<int>(p.queries)),
        keys(static_cast<int>(p.keys)),
        low(bounded(p.band.low)),
        high(bounded(p.band.high)) {}

  // The keys that query i sees, and the queries that see key j.
  __device__ int first_key(int i) const { return within(i + low, keys); }
  __device__ int end_key(int i) const { return within(i + high + 1, keys); }
  __device__ int first_query(int j) const { return within(j - high, queries); }
  __device__ int end_query(int j) const { return within(j - low + 1, queries); }
  // Of `most` keys from j0 on.
  __device__ Visible keys_of(int i, int j0, int most) const {
    const int behind = i + (high + 1 - j0), here = keys - j0;
    return {within(i + (low - j0), most), within(behind < here ? behind : here, most)};
  }
  __device__ bool sees(int i, int j) const { return i < queries && j < keys && in_band(i, j); }
  // The same of a query and a key that are there.
  __device__ bool in_band(int i, int j) const { return low <= j - i && j - i <= high; }
  // Whether queries [i0, i1) see all keys [j0, j1), were they there.
  __device__ bool all(int i0, int i1, int j0, int j1) const { return j0 - (i1 - 1) >= low && j1 - 1 - i0 <= high; }

 private:
  // Further than any row is from any other.
  static __device__ int bounded(int64_t side) {
    constexpr int64_t kFar = 2 * int64_t{kMostRows};
    return static_cast<int>(side < -kFar ? -kFar : side < kFar ? side : kFar);
  }
  static __device__ int within(int at, int most) { return at < 0 ? 0 : at < most ? at : most; }
};

FASTSEQ_INLINE int64_t blocks_of(int64_t all, int64_t each) { return (all + each - 1) / each; }

// Blocks along x, which alone has room for many, and slices of what each works on along y.
template <class... Parameters, class... Arguments>
cudaError_t launch_blocks(void (*kernel)(Parameters...), int64_t blocks, int64_t slices, int threads,
                          std::size_t shared, void* stream, const Arguments&... arguments) {
  if (blocks > std::numeric_limits<int>::max() || slices > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(slices));
  return launch(kernel, grid, dim3(threads), shared, stream, arguments...);
}

// The numbers that kernels for tensor cores take, and their largest head; CUDA cores take any.
template <class T>
constexpr bool kOnTensorCores = sizeof(T) <= sizeof(float);
constexpr int64_t kMostSize = 256;

template <class T, class A>
bool on_tensor_cores(const Attention<T, A>& p) {
  return p.size <= kMostSize && p.value_size <= kMostSize;
}

// use(padded size, options), both constants; without options scores are products times a positive number.
template <class T, class A, class Use>
cudaError_t with_tiles(const Attention<T, A>& p, const Use& use) {
  const bool plain = !p.mask.present() && !p.slopes && p.softcap == 0 && p.dropout.threshold == 0 && p.scale > 0;
  const auto with_size = [&](auto padded) {
    return plain ? use(padded, std::false_type{}) : use(padded, std::true_type{});
  };
  const int64_t size = p.size > p.value_size ? p.size : p.value_size;
  if (size <= 64) return with_size(std::integral_constant<int, 64>{});
  if (size <= 128) return with_size(std::integral_constant<int, 128>{});
  return with_size(std::integral_constant<int, kMostSize>{});
}

}  // namespace fastseq::cuda
