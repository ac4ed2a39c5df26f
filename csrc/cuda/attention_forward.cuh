// Attention, forward, on tensor cores: FlashAttention-2 (Dao, 2023).
//
// A block keeps rows of queries; keys and values go by in tiles, of which the next is on its way by cp.async while this
// one is multiplied. Scores, their exponentials and the sums of the output never leave registers.
//
// Where shared memory has room for two stages, a stage is a tile of keys and one of values. Where it has not, there is
// one of each: values are on their way while scores are multiplied, and the next keys while values are.
#pragma once

#include "attention_tiles.cuh"
#include "attention_work.cuh"

namespace fastseq::cuda {

// A warp has kTiles times 16 rows: two where registers allow, since each part of K and V that it reads from shared
// memory is then multiplied twice. Of shared memory a block has 99 KB on every GPU from sm_80 on.
template <class T, int kSize, bool kOptions, bool kFew>
struct ForwardShape {
  static constexpr int kBytes = kSize * static_cast<int>(sizeof(T));  // of a row
  static constexpr int kTiles = kFew || kSize > 128 || (kOptions && (!kHalf<T> || kSize > 64)) ? 1 : 2;
  static constexpr int kRows = kTileWarps * kTiles * 16;
  static constexpr int kKeys =
      kHalf<T> ? (kSize > 64 || kOptions || kFew ? 64 : 128)
               : (kSize > 128                 ? 16
                  : kSize > 64 || kTiles == 2 ? 32
                                              : 64);
  static constexpr int kStages = kSize > 128 || kRows* kBytes > (32 << 10) ? 1 : 2;
  // What keeps numbers in registers, found by trying; make cuda-budget tells. How far the loop over a row of queries is
  // unrolled, and whether scores are hidden before all else or row by row.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kUnroll = kSize == 128 ? 5 : kHalf<T> ? 4 : 2;
#else
  static constexpr int kUnroll = kSize == 128 ? 8 : kHalf<T> ? 4 : 2;
#endif
  static constexpr bool kHideFirst = kSize == 64;
  static constexpr std::size_t kShared = (kRows + kStages * 2 * kKeys) * kBytes;
};

template <class T, int kSize, bool kOptions, bool kFew>
__global__ void __launch_bounds__(kTileThreads, 2)
    attention_forward_tiles(const AttentionForward<T, float> all, const ForwardGrid grid,
                            const SplitStates<float> states) {
  using Shape = ForwardShape<T, kSize, kOptions, kFew>;
  constexpr int kTiles = Shape::kTiles, kRows = Shape::kRows, kKeys = Shape::kKeys, kGroups = kKeys / 8;
  constexpr int kStages = Shape::kStages;
  FASTSEQ_SHARED(memory);
  T* const queries = reinterpret_cast<T*>(memory);
  T* const tiles = queries + kRows * kSize;

  const ForwardWork<T, kRows, kFew> work(all, grid);
  if (!work.any) return;
  const auto& p = work.p;
  const Scores<T> scores(p);
  const Sight sight(p);
  const int size = static_cast<int>(p.size), value_size = static_cast<int>(p.value_size);
  const FragmentPlace place;
  const int warp_row = threadIdx.x / kWarp * kTiles * 16;

  const T *const k = p.k.at(work.kv_head, 0), *const v = p.v.at(work.kv_head, 0);
  const bool k_chunks = in_chunks(k, size, p.k.row), v_chunks = in_chunks(v, value_size, p.v.row);
  const auto load_keys = [&](T* to, int j0) {
    load_tile<kKeys, kSize>(to, k, p.k.row, j0, sight.keys - j0, size, k_chunks);
  };
  const auto load_values = [&](T* to, int j0) {
    load_tile<kKeys, kSize>(to + kKeys * kSize, v, p.v.row, j0, sight.keys - j0, value_size, v_chunks);
  };

  Fragments<kTiles, kSize / 8> sums;
  clear<kTiles, kSize / 8>(sums);
  float largest[kTiles][2], total[kTiles][2];  // total: of this thread's columns
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
    for (int h = 0; h < 2; ++h) largest[m][h] = -kInfinity<float>, total[m][h] = 0;
  // What scores are multiplied with to be in units of log 2.
  const float factor = kOptions ? 1 : scores.factor();

  const int first = work.first_key(sight) / kKeys * kKeys, end = work.end_key(sight);
  if (first < end) {
    const bool chunks = in_chunks(p.q.data, size, p.q.row, p.q.head);
    load_tile_of<kRows, kSize>(queries, [&](int r) { return work.query_at(r); }, work.here, size, chunks);
    load_keys(tiles, first);
    if (kStages == 2) load_values(tiles, first);
    cp_async_commit();
  }
  int stage = 0;
  for (int j0 = first; j0 < end; j0 += kKeys, stage ^= kStages - 1) {
    T *const keys = tiles + stage * 2 * kKeys * kSize, *const values = keys + kKeys * kSize;
    const bool last = j0 + kKeys >= end;
    cp_async_wait<0>();
    __syncthreads();
    // Everybody is through with the tiles before these.
    if (kStages == 1) {
      load_values(keys, j0);
    } else if (!last) {
      T* const next = tiles + (stage ^ 1) * 2 * kKeys * kSize;
      load_keys(next, j0 + kKeys), load_values(next, j0 + kKeys);
    }
    cp_async_commit();
    if (kFew && kStages == 2 && warp_row >= work.here) continue;  // without rows, this warp loads for those with some

    Fragments<kTiles, kGroups> s;
    multiply_rows<kSize, T, kTiles, kGroups, Shape::kUnroll>(s, queries, warp_row, keys);
    if (kStages == 1) {
      cp_async_wait<0>();
      __syncthreads();
      if (!last) load_keys(keys, j0 + kKeys);
      cp_async_commit();
    }
    const bool whole = j0 + kKeys <= sight.keys && sight.all(work.first_query(), work.end_query(), j0, j0 + kKeys);
    const auto hide = [&](int m, int h) {
      const int row = warp_row + 16 * m + 8 * h + place.row;
      const bool there = row < work.here;
      const int n = there ? work.head(row) : 0, i = there ? work.query(row) : 0;
      const Visible seen = there ? sight.keys_of(i, j0, kKeys) : Visible{0, 0};
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = s[m][g][2 * h + e];
          const int column = 8 * g + place.column + e;
          if (!seen.has(column)) score = -kInfinity<float>;
          else if (kOptions) score = scores.of(score, n, i, j0 + column).value;
        }
    };
    const bool some_hidden = kOptions || !whole;
    if (Shape::kHideFirst && some_hidden) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) hide(m, h);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 16 * m + 8 * h + place.row;
        if (!Shape::kHideFirst && some_hidden) hide(m, h);
        float most = largest[m][h];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) most = larger(most, larger(s[m][g][2 * h], s[m][g][2 * h + 1]));
        most = row_largest(most);
        const float shift = most == -kInfinity<float> ? 0 : most * factor;
        const float correction = power_of_2(fma(largest[m][h], factor, -shift));
        largest[m][h] = most;
        float sum = 0;
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& score = s[m][g][2 * h + e];
            score = power_of_2(fma(score, factor, -shift));
            sum += score;
          }
        total[m][h] = fma(total[m][h], correction, sum);
#pragma unroll
        for (int g = 0; g < kSize / 8; ++g) sums[m][g][2 * h] *= correction, sums[m][g][2 * h + 1] *= correction;
        if (kOptions && p.dropout.threshold && row < work.here) {
          // A counter has numbers for keys 16 apart.
          const int64_t n = p.first_head + work.head(row), i = work.query(row);
#pragma unroll
          for (int odd = 0; odd < 2; ++odd)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int key = j0 + 8 * odd + place.column + e;
              uint32_t words[4][1];
              dropout_words(n, i, key, p.dropout.seed, words);
#pragma unroll
              for (int g = odd; g < kGroups; g += 2)
                if (dropout_number(words, key + 8 * (g - odd)) < p.dropout.threshold) s[m][g][2 * h + e] = 0;
            }
        }
      }
    }
    Lefts<T, kTiles, kGroups> probabilities;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int h = 0; h < 2; ++h) keep_left<T>(probabilities[m][g], h, s[m][g][2 * h], s[m][g][2 * h + 1]);
    multiply_add<kSize, T, kTiles, kGroups, kSize / 8>(sums, probabilities, values);
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 16 * m + 8 * h + place.row;
      const float all_columns = row_sum(total[m][h]);
      if (row < work.here)
        finish_row<kFew>(work, states, row, largest[m][h] * factor, all_columns, static_cast<float>(p.dropout.kept()),
                         place.column == 0, [&](auto* to, float by) { store_row(to, value_size, 0, sums[m], h, by); });
    }
}

template <bool kFew, class T>
cudaError_t launch_forward_tiles(const AttentionForward<T, float>& p, const SplitStates<float>& states, void* stream) {
  return with_tiles(p, [&](auto padded, auto options) {
    constexpr int kSize = decltype(padded)::value;
    constexpr bool kOptions = decltype(options)::value;
    using Shape = ForwardShape<T, kSize, kOptions, kFew>;
    const ForwardGrid grid = forward_grid<kFew>(p, Shape::kRows);
    return launch_blocks(attention_forward_tiles<T, kSize, kOptions, kFew>, forward_blocks<kFew>(p, grid), 1,
                         kTileThreads, Shape::kShared, stream, p, grid, states);
  });
}

}  // namespace fastseq::cuda
