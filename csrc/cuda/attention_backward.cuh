// Attention, backward, on tensor cores (the formulas: cpu/attention_backward.h).
//
// Two kernels, each with the probabilities once more from lse: a block of one owns keys and their dK and dV, and the
// queries of all heads that read them go by; a block of the other owns queries and their dQ, and keys go by. Nobody
// else adds to what a block owns, so that there are no atomics and sums have one order.
//
// The first has keys as rows of its products, S^T = K Q^T and dP^T = V dO^T: then P^T and dS^T are in registers as mma
// takes the left sides of dV = P^T dO and dK = dS^T Q.
#pragma once

#include "attention_tiles.cuh"

namespace fastseq::cuda {

// A probability after dropout takes the place of the product of query i and key j; returned is what dS is made of
// besides dP: the probability before it, times the score's derivative in the product, negative where dropout drops it.
template <bool kOptions, class T>
__device__ float probability(const Scores<T>& scores, float& product, bool seen, int n, int i, int j, float shift) {
  if (!seen) return product = 0;
  if constexpr (kOptions) {
    const auto score = scores.of(product, n, i, j);
    const float probability = power_of_2(score.value - shift), multiplier = scores.multiplier(n, i, j);
    product = probability * multiplier;
    return multiplier == 0 ? -probability * score.derivative : probability * score.derivative;
  } else {
    return product = power_of_2(fma(product, scores.factor(), -shift));
  }
}
// dS of what was told. Where a query may not see a key it is 0, whatever dP is.
template <bool kOptions, class T>
__device__ float score_gradient(const Scores<T>& scores, float told, bool all_seen, float d_probability, float delta) {
  if (!all_seen && told == 0) return 0;
  if constexpr (kOptions) {
    const float multiplier = as_word(told) >> 31 ? 0 : scores.kept();
    return fabsf(told) * fma(multiplier, d_probability, -delta);
  } else {
    return told * (d_probability - delta);
  }
}

// How far loops over rows are unrolled where registers have room (16-bit heads of 128, of which the second product of
// dQ has not); make cuda-budget tells.
template <class T>
constexpr int kUnroll = kHalf<T> ? 8 : 4;

// A warp has dK and dV of its keys. Where registers hold no more than one of them, pairs of warps have keys: the first
// has dV and hands on to the second, which has dK, what dS is made of besides dP.
template <class T, int kSize, bool kOptions>
struct KeyGradientShape {
  static constexpr bool kPairs = kSize > 128;
  static constexpr int kTiles = kSize > 64 || kOptions || !kHalf<T> ? 1 : 2;
  static constexpr int kKeys = kTileWarps / (kPairs ? 2 : 1) * kTiles * 16;
  static constexpr int kQueries =
      kHalf<T> ? (kSize > 128               ? 16
                  : kSize > 64 && !kOptions ? 64
                                            : 32)
               : (kSize > 64 ? 16
                  : kOptions ? 32
                             : 64);
  static constexpr int kStages = sizeof(T) * kSize > 512 ? 1 : 2;    // of queries: what shared memory has room for
  static constexpr int kAtOnce = kSize == 128 && !kOptions ? 2 : 4;  // of multiply_add, found as kUnroll
  static constexpr std::size_t kTileBytes = sizeof(T) * (2 * kKeys + kStages * 2 * kQueries) * kSize;
  static constexpr std::size_t kHandedOn = kPairs ? kKeys * kQueries : 0;
  static constexpr std::size_t kShared = kTileBytes + (4 * kQueries + kHandedOn) * sizeof(float);
};

template <class T, int kSize, bool kOptions>
__global__ void __launch_bounds__(kTileThreads, 2)
    attention_key_gradients(const AttentionBackward<T, float> all, const float* deltas, int64_t tiles) {
  using Shape = KeyGradientShape<T, kSize, kOptions>;
  constexpr int kTiles = Shape::kTiles, kKeys = Shape::kKeys, kQueries = Shape::kQueries, kGroups = kQueries / 8;
  constexpr bool kPairs = Shape::kPairs;
  constexpr int kStages = Shape::kStages;
  FASTSEQ_SHARED(memory);
  T *const keys = reinterpret_cast<T*>(memory), *const values = keys + kKeys * kSize;
  T* const stages = values + kKeys * kSize;
  float* const row_numbers = reinterpret_cast<float*>(memory + Shape::kTileBytes);

  // All parts of a block's number are of 32 bits, as it is itself.
  const unsigned block = blockIdx.x, key_tiles = static_cast<unsigned>(tiles);
  const unsigned kv_heads = static_cast<unsigned>(all.kv_heads);
  const int j0 = static_cast<int>(block % key_tiles) * kKeys, kv_head = static_cast<int>(block / key_tiles % kv_heads);
  const unsigned b = block / key_tiles / kv_heads;
  const auto p = entry(all, b);
  if (j0 >= p.keys) return;
  const int here = static_cast<int>(p.keys) - j0 < kKeys ? static_cast<int>(p.keys) - j0 : kKeys;
  const Scores<T> scores(p);
  const Sight sight(p);
  const int size = static_cast<int>(p.size), value_size = static_cast<int>(p.value_size);
  const FragmentPlace place;
  const int warp = threadIdx.x / kWarp, owner = kPairs ? warp / 2 : warp, warp_row = owner * kTiles * 16;
  const bool has_dv = !kPairs || warp % 2 == 0;
  // Of the pair and lane, for each fragment.
  [[maybe_unused]] Words4* const handed_on =
      reinterpret_cast<Words4*>(row_numbers + 4 * kQueries) + owner * kTiles * kGroups * kWarp + threadIdx.x % kWarp;
  const int group = static_cast<int>(p.heads / p.kv_heads), end_head = (kv_head + 1) * group;
  // The queries that see some of the keys.
  const int first = sight.first_query(j0) / kQueries * kQueries, end = sight.end_query(j0 + here - 1);

  const bool q_chunks = in_chunks(p.q.data, size, p.q.row, p.q.head);
  const bool d_out_chunks = in_chunks(p.d_out.data, value_size, p.d_out.row, p.d_out.head);
  const int64_t query_row = all.ragged_queries.first(b);
  // Of the next tile of queries, this thread's shift and delta.
  float next_shift = 0, next_delta = 0;
  const auto load_queries = [&](int n, int i0, int stage) {
    T* const to = stages + stage * 2 * kQueries * kSize;
    const int rows = sight.queries - i0 < kQueries ? sight.queries - i0 : kQueries;
    const T *const q = head_of(all.q, b, n), *const d_out = head_of(all.d_out, b, n);
    const int64_t row0 = query_row + i0;
    load_tile<kQueries, kSize>(to, q, p.q.row, row0, rows, size, q_chunks);
    load_tile<kQueries, kSize>(to + kQueries * kSize, d_out, p.d_out.row, row0, rows, value_size, d_out_chunks);
    cp_async_commit();
    const int row = threadIdx.x;
    const float* const lse = all.lse.data + b * all.lse.batch + n * all.lse.head;
    next_shift = row < rows ? shift_of(lse[row0 + row]) : kInfinity<float>;
    next_delta = row < rows ? deltas[(b * all.heads + n) * all.queries + i0 + row] : 0;
  };
  const auto keep_row_numbers = [&](int stage) {
    if (threadIdx.x >= kQueries) return;
    row_numbers[stage * 2 * kQueries + threadIdx.x] = next_shift;
    row_numbers[stage * 2 * kQueries + kQueries + threadIdx.x] = next_delta;
  };

  Fragments<kTiles, kSize / 8> sums[kPairs ? 1 : 2];  // of dV and dK; of the second of a pair, dK
#pragma unroll
  for (auto& each : sums) clear<kTiles, kSize / 8>(each);
  int n = kv_head * group, i0 = first;
  if (first < end) {
    const T *const k = p.k.at(kv_head, 0), *const v = p.v.at(kv_head, 0);
    load_tile<kKeys, kSize>(keys, k, p.k.row, j0, here, size, in_chunks(k, size, p.k.row));
    load_tile<kKeys, kSize>(values, v, p.v.row, j0, here, value_size, in_chunks(v, value_size, p.v.row));
    load_queries(n, i0, 0);
    keep_row_numbers(0);
  } else {
    n = end_head;
  }
  for (int stage = 0; n < end_head; stage ^= kStages - 1) {
    cp_async_wait<0>();
    __syncthreads();
    const bool last_of_head = i0 + kQueries >= end;
    const int next_n = last_of_head ? n + 1 : n, next_i0 = last_of_head ? first : i0 + kQueries;
    // Everybody is through with the tiles before these.
    if (kStages == 2 && next_n < end_head) load_queries(next_n, next_i0, stage ^ 1);
    const T *const queries = stages + stage * 2 * kQueries * kSize, *const d_out = queries + kQueries * kSize;
    const float *const shifts = row_numbers + stage * 2 * kQueries, *const delta = shifts + kQueries;

    // Keys that are not there get what nobody reads, and queries that are not there have a shift that hides them.
    const auto sees = [&](int i, int j) { return kOptions ? sight.sees(i, j) : sight.in_band(i, j); };
    const bool all_seen = !kOptions && sight.all(i0, i0 + kQueries, j0, j0 + kKeys);
    if constexpr (kPairs) {
      Fragments<kTiles, kGroups> x;
      multiply_rows<kSize, T, kTiles, kGroups>(x, has_dv ? keys : values, warp_row, has_dv ? queries : d_out);
      Lefts<T, kTiles, kGroups> left;
      const auto keep = [](uint32_t (&to)[sizeof(T)], const float (&from)[4]) {
        keep_left<T>(to, 0, from[0], from[1]), keep_left<T>(to, 1, from[2], from[3]);
      };
      const auto probabilities = [&](auto hidden) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            Words4 told;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int column = 8 * g + place.column + e % 2, i = i0 + column;
              const int j = j0 + warp_row + 16 * m + e / 2 * 8 + place.row;
              const bool seen = !decltype(hidden)::value || sees(i, j);
              told.word[e] = as_word(probability<kOptions>(scores, x[m][g][e], seen, n, i, j, shifts[column]));
            }
            keep(left[m][g], x[m][g]);
            handed_on[(m * kGroups + g) * kWarp] = told;
          }
      };
      const auto gradients = [&](auto hidden) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            const Words4 told = handed_on[(m * kGroups + g) * kWarp];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float less = delta[8 * g + place.column + e % 2];
              float& y = x[m][g][e];
              y = score_gradient<kOptions>(scores, as_float(told.word[e]), !decltype(hidden)::value, y, less);
            }
            keep(left[m][g], x[m][g]);
          }
      };
      if (has_dv) all_seen ? probabilities(std::false_type{}) : probabilities(std::true_type{});
      __syncthreads();
      if (!has_dv) all_seen ? gradients(std::false_type{}) : gradients(std::true_type{});
      multiply_add<kSize, T, kTiles, kGroups, kSize / 8>(sums[0], left, has_dv ? d_out : queries);
    } else {
      Fragments<kTiles, kGroups> s, d;
      multiply_rows<kSize, T, kTiles, kGroups, kUnroll<T>>(s, keys, warp_row, queries);
      multiply_rows<kSize, T, kTiles, kGroups, kUnroll<T>>(d, values, warp_row, d_out);
      Lefts<T, kTiles, kGroups> probabilities, d_scores;
      const auto gradients = [&](auto hidden) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const int column = 8 * g + place.column;
          const float shift[2] = {shifts[column], shifts[column + 1]}, less[2] = {delta[column], delta[column + 1]};
#pragma unroll
          for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int j = j0 + warp_row + 16 * m + 8 * h + place.row;
              float *const x = s[m][g] + 2 * h, *const y = d[m][g] + 2 * h;
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                constexpr bool kAllSeen = !decltype(hidden)::value;
                const int i = i0 + column + e;
                const float told = probability<kOptions>(scores, x[e], kAllSeen || sees(i, j), n, i, j, shift[e]);
                y[e] = score_gradient<kOptions>(scores, told, kAllSeen, y[e], less[e]);
              }
              keep_left<T>(probabilities[m][g], h, x[0], x[1]), keep_left<T>(d_scores[m][g], h, y[0], y[1]);
            }
        }
      };
      if (all_seen) gradients(std::false_type{});
      else gradients(std::true_type{});
      multiply_add<kSize, T, kTiles, kGroups, kSize / 8, Shape::kAtOnce>(sums[0], probabilities, d_out);
      multiply_add<kSize, T, kTiles, kGroups, kSize / 8, Shape::kAtOnce>(sums[1], d_scores, queries);
    }
    if (kStages == 1 && next_n < end_head) {
      __syncthreads();
      load_queries(next_n, next_i0, stage);
    }
    if (next_n < end_head) keep_row_numbers(stage ^ (kStages - 1));
    n = next_n, i0 = next_i0;
  }
  const int there = static_cast<int>(all.ragged_keys.count(b, all.keys)) - j0;
  const auto to_dk = of_entry(all.dk, b, all.ragged_keys), to_dv = of_entry(all.dv, b, all.ragged_keys);
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 16 * m + 8 * h + place.row;
      if (row >= there) continue;
      if (has_dv) store_row(to_dv.at(kv_head, j0 + row), value_size, 0, sums[0][m], h, 1.0f);
      if (!kPairs || !has_dv)
        store_row(to_dk.at(kv_head, j0 + row), size, 0, sums[kPairs ? 0 : 1][m], h, static_cast<float>(p.scale));
    }
}

// Where shared memory has no room for rows of all warps, kShares of them have rows, each a share of the columns of dQ.
// All of them compute dS.
template <class T, int kSize, bool kOptions>
struct QueryGradientShape {
  static constexpr int kBytes = kSize * static_cast<int>(sizeof(T));  // of a row
  static constexpr int kTiles = kBytes > 256 || kOptions ? 1 : 2;
  static constexpr int kShares = kBytes > 512 ? 2 : 1;
  static constexpr int kRows = kTileWarps / kShares * kTiles * 16, kKeys = kBytes > 256 ? 16 : kTiles == 2 ? 32 : 64;
  static constexpr int kStages = kBytes > 512 ? 1 : 2;
  static constexpr std::size_t kShared = (2 * kRows + kStages * 2 * kKeys) * kBytes;
};

template <class T, int kSize, bool kOptions>
__global__ void __launch_bounds__(kTileThreads, 2)
    attention_query_gradients(const AttentionBackward<T, float> all, const float* deltas, int64_t tiles) {
  using Shape = QueryGradientShape<T, kSize, kOptions>;
  constexpr int kTiles = Shape::kTiles, kRows = Shape::kRows, kKeys = Shape::kKeys, kGroups = kKeys / 8;
  constexpr int kStages = Shape::kStages, kColumns = kSize / Shape::kShares;
  FASTSEQ_SHARED(memory);
  T *const queries = reinterpret_cast<T*>(memory), *const d_out = queries + kRows * kSize;
  T* const stages = d_out + kRows * kSize;

  const unsigned block = blockIdx.x, row_tiles = static_cast<unsigned>(tiles), heads = static_cast<unsigned>(all.heads);
  const int i0 = static_cast<int>(row_tiles - 1 - block % row_tiles) * kRows;
  const int n = static_cast<int>(block / row_tiles % heads);
  const unsigned b = block / row_tiles / heads;
  const auto p = entry(all, b);
  if (i0 >= p.queries) return;
  const int here = static_cast<int>(p.queries) - i0 < kRows ? static_cast<int>(p.queries) - i0 : kRows;
  const int kv_head = n / static_cast<int>(p.heads / p.kv_heads);
  const Scores<T> scores(p);
  const Sight sight(p);
  const int size = static_cast<int>(p.size), value_size = static_cast<int>(p.value_size);
  const FragmentPlace place;
  const int warp = threadIdx.x / kWarp, warp_row = warp / Shape::kShares * kTiles * 16;
  const int column0 = warp % Shape::kShares * kColumns;

  const T *const k = p.k.at(kv_head, 0), *const v = p.v.at(kv_head, 0);
  const bool k_chunks = in_chunks(k, size, p.k.row), v_chunks = in_chunks(v, value_size, p.v.row);
  const auto load_keys = [&](int j0, int stage) {
    T* const to = stages + stage * 2 * kKeys * kSize;
    const int rows = sight.keys - j0;
    load_tile<kKeys, kSize>(to, k, p.k.row, j0, rows, size, k_chunks);
    load_tile<kKeys, kSize>(to + kKeys * kSize, v, p.v.row, j0, rows, value_size, v_chunks);
    cp_async_commit();
  };

  Fragments<kTiles, kColumns / 8> dq;
  clear<kTiles, kColumns / 8>(dq);
  float shift[kTiles][2], delta[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 16 * m + 8 * h + place.row;
      shift[m][h] = row < here ? shift_of(p.lse.of(n)[i0 + row]) : kInfinity<float>;
      delta[m][h] = row < here ? deltas[(b * all.heads + n) * all.queries + i0 + row] : 0;
    }

  const int first = sight.first_key(i0) / kKeys * kKeys, end = sight.end_key(i0 + here - 1);
  if (first < end) {
    const T *const q = p.q.at(n, 0), *const from = p.d_out.at(n, 0);
    load_tile<kRows, kSize>(queries, q, p.q.row, i0, here, size, in_chunks(q, size, p.q.row));
    load_tile<kRows, kSize>(d_out, from, p.d_out.row, i0, here, value_size, in_chunks(from, value_size, p.d_out.row));
    load_keys(first, 0);
  }
  int stage = 0;
  for (int j0 = first; j0 < end; j0 += kKeys, stage ^= kStages - 1) {
    cp_async_wait<0>();
    __syncthreads();
    // Everybody is through with the tiles before these.
    if (kStages == 2 && j0 + kKeys < end) load_keys(j0 + kKeys, stage ^ 1);
    const T *const keys = stages + stage * 2 * kKeys * kSize, *const values = keys + kKeys * kSize;

    Fragments<kTiles, kGroups> s, d;
    multiply_rows<kSize, T, kTiles, kGroups, kUnroll<T>>(s, queries, warp_row, keys);
    multiply_rows<kSize, T, kTiles, kGroups>(d, d_out, warp_row, values);
    Lefts<T, kTiles, kGroups> d_scores;
    const auto gradients = [&](auto hidden) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            const int i = i0 + warp_row + 16 * m + 8 * h + place.row;
            float *const x = s[m][g] + 2 * h, *const y = d[m][g] + 2 * h;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              constexpr bool kAllSeen = !decltype(hidden)::value;
              const int j = j0 + 8 * g + place.column + e;
              // Queries that are not there have a shift that hides them.
              const bool seen = kAllSeen || (kOptions ? sight.sees(i, j) : j < sight.keys && sight.in_band(i, j));
              const float told = probability<kOptions>(scores, x[e], seen, n, i, j, shift[m][h]);
              y[e] = score_gradient<kOptions>(scores, told, kAllSeen, y[e], delta[m][h]);
            }
            keep_left<T>(d_scores[m][g], h, y[0], y[1]);
          }
    };
    if (!kOptions && j0 + kKeys <= sight.keys && sight.all(i0, i0 + here, j0, j0 + kKeys)) gradients(std::false_type{});
    else gradients(std::true_type{});
    multiply_add<kSize, T, kTiles, kGroups, kColumns / 8>(dq, d_scores, keys, column0);
    if (kStages == 1 && j0 + kKeys < end) {
      __syncthreads();
      load_keys(j0 + kKeys, stage);
    }
  }
  const auto to = of_entry(all.dq, b, all.ragged_queries);
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 16 * m + 8 * h + place.row;
      if (row < here) store_row(to.at(n, i0 + row), size, column0, dq[m], h, static_cast<float>(p.scale));
    }
}

template <class T>
cudaError_t launch_backward_tiles(const AttentionBackward<T, float>& p, const float* delta, void* stream) {
  return with_tiles(p, [&](auto padded, auto options) {
    constexpr int kSize = decltype(padded)::value;
    constexpr bool kOptions = decltype(options)::value;
    using Keys = KeyGradientShape<T, kSize, kOptions>;
    using Queries = QueryGradientShape<T, kSize, kOptions>;
    const int64_t key_tiles = blocks_of(p.keys, Keys::kKeys), query_tiles = blocks_of(p.queries, Queries::kRows);
    if (const cudaError_t error =
            launch_blocks(attention_key_gradients<T, kSize, kOptions>, p.batch * p.kv_heads * key_tiles, 1,
                          kTileThreads, Keys::kShared, stream, p, delta, key_tiles);
        error != cudaSuccess)
      return error;
    return launch_blocks(attention_query_gradients<T, kSize, kOptions>, p.batch * p.heads * query_tiles, 1,
                         kTileThreads, Queries::kShared, stream, p, delta, query_tiles);
  });
}

}  // namespace fastseq::cuda
