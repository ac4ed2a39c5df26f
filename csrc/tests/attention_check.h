// Attention of one instruction set against the formula in long double, one number at a time.
#pragma once

#include "cpu/dispatch.h"
#include "layer.h"

namespace fastseq::test {

struct AttentionShape {
  int64_t B, N, Nkv, L, S, D, Dv, low, high;
  int mask;  // 0 none, 1 bool, 2 added, 3 added, the same for all heads and queries, 4 added, the same for all keys
  int options = 0;
};
enum { kSoftcap = 1, kSlopes = 2, kDropout = 4, kLengths = 8, kFromEnd = 16 };

constexpr int64_t kOpen = Band::kOpen;
// Around the widths of vectors, tiles (6), panels (up to 64), the pieces of a sum (256), blocks of queries (48) and of
// keys (256, 512), and the keys from which a head is shared (a lone one 256, in multiples of 128).
const AttentionShape kAttentionShapes[] = {
    {1, 1, 1, 1, 1, 1, 1, -kOpen, kOpen, 0},
    {2, 2, 1, 7, 5, 3, 9, -kOpen, kOpen, 2},
    {1, 2, 2, 49, 65, 17, 33, -kOpen, 0, 1},
    {1, 2, 1, 50, 70, 64, 16, -3, 5, 3},
    {2, 1, 1, 13, 130, 8, 20, 40, kOpen, 4},
    {1, 1, 1, 55, 1040, 5, 3, -kOpen, kOpen, 0},
    {1, 1, 1, 101, 515, 33, 64, -100, 400, 2},
    {1, 2, 1, 6, 600, 130, 65, -kOpen, kOpen, 1},
    {1, 1, 1, 5, 0, 3, 2, -kOpen, kOpen, 0},
    {1, 1, 1, 0, 5, 3, 2, -kOpen, kOpen, 2},
    {1, 2, 1, 20, 600, 130, 65, -kOpen, 500, 4},
    {1, 1, 1, 30, 40, 3, 2, 100, kOpen, 0},  // nobody sees anything
    {1, 1, 1, 30, 41, 3, 2, 100, kOpen, 0},  // nor here, where the last of the keys has no neighbour
    {1, 1, 1, 61, 77, 8, 5, -20, -11, 2},    // the first and the last queries see nothing
    {1, 1, 1, 50, 260, 9, 7, -kOpen, 30, 1, kDropout},
    {2, 2, 1, 19, 140, 5, 9, -kOpen, kOpen, 2, kSoftcap},
    {2, 2, 2, 7, 530, 16, 3, -9, 0, 0, kSlopes | kFromEnd},
    {3, 2, 1, 40, 300, 8, 12, -kOpen, 0, 0, kDropout | kLengths | kFromEnd},
    {2, 4, 2, 16, 700, 8, 12, -kOpen, kOpen, 4, kDropout | kLengths},
    {2, 2, 1, 50, 600, 3, 20, -200, kOpen, 2, kSoftcap | kSlopes | kDropout | kLengths | kFromEnd},
};
constexpr int kQuickAttentionShapes = 5, kQuickOptionShapes = 3;  // of the beginning and of the end

// A number of 16 bits for each score: Philox4x32-10 once more, from the paper.
inline uint32_t dropout_number(uint64_t seed, uint32_t head, uint32_t query, uint32_t key) {
  uint32_t c[4] = {key / 128 * 16 + key % 16, query, head, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {
        uint32_t(b >> 32) ^ c[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k[1], uint32_t(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  const uint32_t number = key % 128 / 16;
  return c[number / 2] >> 16 * (number % 2) & 0xffff;
}

// The tensors of one problem: numbers for the oracle, the same in T, rounded. Rows of q, k, v and their gradients
// have a few numbers between them that nobody may read or write, NaN as the fences.
template <class T>
class AttentionProblem {
 public:
  using A = cpu::Computed<T>;
  static constexpr int64_t kGap = 3;

  AttentionProblem(const AttentionShape& shape, uint64_t seed) : s(shape), random_(seed) {
    q = rows(s.N, s.L, s.D), k = rows(s.Nkv, s.S, s.D), v = rows(s.Nkv, s.S, s.Dv), d_out = rows(s.N, s.L, s.Dv);
    d_lse = Guarded<A>(s.B * s.N * s.L);
    for (int64_t i = 0; i < d_lse.size(); ++i) d_lse[i] = static_cast<A>(random_.uniform(1));
    slopes = Guarded<A>(s.options & kSlopes ? s.B * s.N : 0);
    for (int64_t i = 0; i < slopes.size(); ++i) slopes[i] = static_cast<A>(random_.uniform(0.2));
    for (int64_t b = 0; b < s.B; ++b) {
      const auto length = [&](int64_t all) {
        return s.options & kLengths ? static_cast<int64_t>((random_.uniform(0.5) + 0.5) * (all + 1)) : all;
      };
      query_lengths.push_back(std::min(length(s.L), s.L)), key_lengths.push_back(std::min(length(s.S), s.S));
    }
    mask_rows = s.mask == 3 ? 1 : s.L, mask_columns = s.mask == 4 ? 1 : s.S, mask_heads = s.mask == 3 ? 1 : s.N;
    const int64_t numbers = s.mask ? s.B * mask_heads * mask_rows * mask_columns : 0;
    bias = Guarded<T>(s.mask > 1 ? numbers : 0);
    visible.assign(s.mask == 1 ? numbers : 0, 1);
    for (int64_t i = 0; i < numbers; ++i) {
      const double x = random_.uniform(1);
      if (s.mask == 1) {
        visible[i] = x > -0.5 && i / mask_columns % 3 != 1;
      } else {
        bias[i] = number<T>(x);
      }
    }
  }

  Guarded<T> rows(int64_t heads, int64_t count, int64_t size) {
    Guarded<T> out(count ? s.B * heads * count * (size + kGap) : 0);
    for (int64_t i = 0; i < out.size(); ++i)
      out[i] = i % (size + kGap) < size ? number<T>(random_.uniform(1)) : quiet_nan<T>();
    return out;
  }
  template <class To>
  static Heads<To> heads(To* data, int64_t heads, int64_t count, int64_t size) {
    return {data, heads * count * (size + kGap), count * (size + kGap), size + kGap};
  }
  static int64_t row(int64_t size) { return size + kGap; }

  void fill(Attention<T, A>& p, int threads) const {
    p.batch = s.B, p.heads = s.N, p.kv_heads = s.Nkv, p.queries = s.L, p.keys = s.S, p.size = s.D, p.value_size = s.Dv;
    p.q = heads(q.data(), s.N, s.L, s.D), p.k = heads(k.data(), s.Nkv, s.S, s.D);
    p.v = heads(v.data(), s.Nkv, s.S, s.Dv);
    p.band = {s.low, s.high};
    p.scale = kScale;
    p.threads = threads;
    if (s.options & kSoftcap) p.softcap = kCap;
    if (s.options & kSlopes) p.slopes = slopes.data(), p.slopes_batch = s.N, p.slopes_head = 1;
    if (s.options & kDropout) p.dropout = {kThreshold, kSeed};
    if (s.options & kLengths)
      p.ragged_queries.lengths = query_lengths.data(), p.ragged_keys.lengths = key_lengths.data();
    p.from_end = s.options & kFromEnd;
    if (!s.mask) return;
    if (s.mask == 1) p.mask.visible = visible.data();
    else p.mask.bias = bias.data();
    p.mask.column = mask_columns == 1 ? 0 : 1, p.mask.row = mask_rows == 1 ? 0 : mask_columns;
    p.mask.head = mask_heads == 1 ? 0 : mask_rows * mask_columns, p.mask.batch = mask_heads * mask_rows * mask_columns;
  }
  int64_t mask_at(int64_t b, int64_t n, int64_t i, int64_t j) const {
    return ((b * mask_heads + (mask_heads == 1 ? 0 : n)) * mask_rows + (mask_rows == 1 ? 0 : i)) * mask_columns +
           (mask_columns == 1 ? 0 : j);
  }

  static constexpr double kScale = 0.4, kCap = 1.5;
  static constexpr uint32_t kThreshold = 20000;
  static constexpr uint64_t kSeed = 0x8765432112345678;
  const AttentionShape s;
  Guarded<T> q, k, v, d_out, bias;
  Guarded<A> d_lse, slopes;
  std::vector<int64_t, Allocator<int64_t>> query_lengths, key_lengths;
  std::vector<uint8_t, Allocator<uint8_t>> visible;
  int64_t mask_rows = 0, mask_columns = 0, mask_heads = 0;

 private:
  Random random_;
};

// What a call gives: out, lse, dq, dk, dv, d_mask.
template <class T>
struct AttentionResults {
  using A = cpu::Computed<T>;
  Guarded<T> out, dq, dk, dv;
  Guarded<A> lse, d_mask;
};

template <class T>
AttentionResults<T> run_attention(const cpu::TypedKernels<T>& kernels, const AttentionProblem<T>& problem,
                                  int threads) {
  using A = cpu::Computed<T>;
  using P = AttentionProblem<T>;
  const AttentionShape& s = problem.s;
  AttentionResults<T> out;
  out.out = Guarded<T>(s.B * s.N * s.L * P::row(s.Dv)), out.lse = Guarded<A>(s.B * s.N * s.L);
  AttentionForward<T, A> f;
  problem.fill(f, threads);
  f.out = P::heads(out.out.data(), s.N, s.L, s.Dv), f.lse = {out.lse.data(), s.N * s.L, s.L};
  kernels.attention_forward(f);

  out.dq = Guarded<T>(s.B * s.N * s.L * P::row(s.D)), out.dk = Guarded<T>(s.B * s.Nkv * s.S * P::row(s.D));
  out.dv = Guarded<T>(s.B * s.Nkv * s.S * P::row(s.Dv));
  AttentionMaskBackward<T, A> b;
  problem.fill(b, threads);
  const Guarded<T>& result = out.out;
  const Guarded<A>& result_lse = out.lse;
  b.out = P::heads(result.data(), s.N, s.L, s.Dv), b.d_out = P::heads(problem.d_out.data(), s.N, s.L, s.Dv);
  b.lse = {result_lse.data(), s.N * s.L, s.L}, b.d_lse = {problem.d_lse.data(), s.N * s.L, s.L};
  b.dq = P::heads(out.dq.data(), s.N, s.L, s.D), b.dk = P::heads(out.dk.data(), s.Nkv, s.S, s.D);
  b.dv = P::heads(out.dv.data(), s.Nkv, s.S, s.Dv);
  kernels.attention_backward(b);
  if (s.mask > 1) {
    out.d_mask = Guarded<A>(problem.bias.size());
    b.mask_batch = s.B, b.mask_heads = problem.mask_heads, b.mask_rows = problem.mask_rows;
    b.mask_columns = problem.mask_columns, b.d_mask = out.d_mask.data();
    if (out.d_mask.size()) kernels.attention_mask_backward(b);
  }
  return out;
}

// The same by the formula; gaps are zero.
template <class T>
struct AttentionOracle {
  std::vector<long double> out, lse, dq, dk, dv, d_mask;
  std::vector<bool> seen;           // a row of lse
  std::vector<bool> queries, keys;  // the rows that are there

  explicit AttentionOracle(const AttentionProblem<T>& p) {
    using P = AttentionProblem<T>;
    const AttentionShape& s = p.s;
    const int64_t rd = P::row(s.D), rv = P::row(s.Dv), group = s.N / s.Nkv;
    out.resize(s.B * s.N * s.L * rv), lse.resize(s.B * s.N * s.L), seen.resize(lse.size());
    dq.resize(s.B * s.N * s.L * rd), dk.resize(s.B * s.Nkv * s.S * rd), dv.resize(s.B * s.Nkv * s.S * rv);
    d_mask.resize(p.bias.size());
    queries.resize(seen.size()), keys.resize(s.B * s.Nkv * s.S);
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t n = 0; n < s.Nkv; ++n)
        for (int64_t j = 0; j < p.key_lengths[b]; ++j) keys[(b * s.Nkv + n) * s.S + j] = true;
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t n = 0; n < s.N; ++n)
        for (int64_t i = 0; i < p.query_lengths[b]; ++i) {
          const int64_t diagonal = s.options & kFromEnd ? p.key_lengths[b] - p.query_lengths[b] : 0;
          const int64_t at = (b * s.N + n) * s.L + i, first_key = (b * s.Nkv + n / group) * s.S;
          queries[at] = true;
          std::vector<long double> e(s.S, -1), cap_derivative(s.S, 1), kept(s.S, 1);
          long double sum = 0;
          for (int64_t j = 0; j < p.key_lengths[b]; ++j) {
            const int64_t distance = j - i - diagonal;
            if (distance < s.low || distance > s.high) continue;
            if (s.mask == 1 && !p.visible[p.mask_at(b, n, i, j)]) continue;
            long double score = 0;
            for (int64_t d = 0; d < s.D; ++d)
              score += static_cast<long double>(value(p.q[at * rd + d])) * value(p.k[(first_key + j) * rd + d]);
            score *= P::kScale;
            if (s.options & kSoftcap) {
              const long double t = std::tanh(score / P::kCap);
              score = P::kCap * t, cap_derivative[j] = 1 - t * t;
            }
            if (s.options & kSlopes) score -= static_cast<long double>(p.slopes[b * s.N + n]) * std::abs(distance);
            if (s.options & kDropout)
              kept[j] =
                  dropout_number(P::kSeed, b * s.N + n, i, j) < P::kThreshold ? 0 : 65536.0L / (65536 - P::kThreshold);
            if (s.mask > 1) score += value(p.bias[p.mask_at(b, n, i, j)]);
            sum += e[j] = std::exp(score);
          }
          seen[at] = sum > 0;
          if (!seen[at]) continue;
          lse[at] = std::log(sum);
          long double delta = -static_cast<long double>(p.d_lse[at]);
          for (int64_t d = 0; d < s.Dv; ++d) {
            for (int64_t j = 0; j < s.S; ++j)
              if (e[j] >= 0) out[at * rv + d] += kept[j] * e[j] / sum * value(p.v[(first_key + j) * rv + d]);
            delta += out[at * rv + d] * value(p.d_out[at * rv + d]);
          }
          for (int64_t j = 0; j < s.S; ++j) {
            if (e[j] < 0) continue;
            const long double probability = e[j] / sum;
            long double dp = 0;
            for (int64_t d = 0; d < s.Dv; ++d) {
              dp += static_cast<long double>(value(p.d_out[at * rv + d])) * value(p.v[(first_key + j) * rv + d]);
              dv[(first_key + j) * rv + d] += kept[j] * probability * value(p.d_out[at * rv + d]);
            }
            long double ds = probability * (kept[j] * dp - delta);
            if (s.mask > 1) d_mask[p.mask_at(b, n, i, j)] += ds;
            ds *= cap_derivative[j];
            for (int64_t d = 0; d < s.D; ++d) {
              dq[at * rd + d] += P::kScale * ds * value(p.k[(first_key + j) * rd + d]);
              dk[(first_key + j) * rd + d] += P::kScale * ds * value(p.q[at * rd + d]);
            }
          }
        }
  }
};

// `other_threads`: with how many more threads the same bits are asked for.
template <class T>
void check_attention_shape(Report& report, const cpu::TypedKernels<T>& kernels, double epsilon, double bound,
                           const AttentionShape& s, uint64_t seed, const std::vector<int>& other_threads) {
  using P = AttentionProblem<T>;
  const P problem(s, seed);
  const AttentionResults<T> got = run_attention(kernels, problem, 1);
  const AttentionOracle<T> want(problem);
  // Rows: what lies between them, and rows that are not there, are as they were, the rest near.
  const auto rows = [&](const char* what, const Guarded<T>& y, const std::vector<long double>& expected, int64_t size,
                        const std::vector<bool>& there) {
    double largest = 1;
    for (long double x : expected) largest = std::max(largest, static_cast<double>(std::fabs(x)));
    report.check(y.intact(), what, [] { return "written outside its bounds"; });
    int64_t wrong = 0;
    for (int64_t j = 0; j < y.size(); ++j) {
      const double x = value(y[j]);
      const bool gap = j % P::row(size) >= size || !there[j / P::row(size)];
      wrong += gap ? !std::isnan(x) : !(std::fabs(x - static_cast<double>(expected[j])) <= bound * epsilon * largest);
    }
    report.check(wrong == 0, what, [&] {
      return "expected within " + std::to_string(bound) + " epsilon, and nothing between the rows; got " +
             std::to_string(wrong) + " wrong of " + std::to_string(y.size());
    });
  };
  rows("out", got.out, want.out, s.Dv, want.queries);
  rows("dq", got.dq, want.dq, s.D, want.queries);
  rows("dk", got.dk, want.dk, s.D, want.keys);
  rows("dv", got.dv, want.dv, s.Dv, want.keys);
  const double epsilon_of_sums = std::max(epsilon * (sizeof(T) == 2 ? 0x1p-16 : 1), 0x1p-52);
  for (int64_t j = 0; j < got.lse.size(); ++j)
    report.check(!want.queries[j] ? std::isnan(got.lse[j])
                 : want.seen[j]   ? std::fabs(got.lse[j] - static_cast<double>(want.lse[j])) <= 64 * epsilon_of_sums
                                  : std::isinf(got.lse[j]) && got.lse[j] < 0,
                 "lse", [&] { return "element " + std::to_string(j) + " got " + std::to_string(got.lse[j]); });
  if (got.d_mask.size()) {
    report.written("d_mask", got.d_mask);
    report.near("d_mask", got.d_mask, want.d_mask, bound * epsilon * std::max<int64_t>(s.L, 8));
  }
  for (int threads : other_threads) {
    const AttentionResults<T> other = run_attention(kernels, problem, threads);
    const std::string with = " with " + std::to_string(threads) + " threads";
    report.same_bits("out" + with, other.out, got.out);
    report.same_bits("lse" + with, other.lse, got.lse);
    report.same_bits("dq" + with, other.dq, got.dq);
    report.same_bits("dk" + with, other.dk, got.dk);
    report.same_bits("dv" + with, other.dv, got.dv);
    report.same_bits("d_mask" + with, other.d_mask, got.d_mask);
  }
}

template <class T>
void check_attention(Report& report, const cpu::TypedKernels<T>& kernels, double epsilon, double bound, bool quick) {
  const std::string of = report.where;
  const int all = sizeof(kAttentionShapes) / sizeof(kAttentionShapes[0]);
  for (int i = 0; i < all; ++i) {
    if (quick && i >= kQuickAttentionShapes && i < all - kQuickOptionShapes) continue;
    report.where = of + ", attention shape " + std::to_string(i);
    check_attention_shape(report, kernels, epsilon, bound, kAttentionShapes[i], 1000 + i, {2, 3});
  }
}

}  // namespace fastseq::test
