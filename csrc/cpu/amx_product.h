// Products of rows with packed panels, in AMX's tiles. Each sum takes a tile's terms at a time from the first one on,
// whatever rows are computed together, so a row's result does not depend on its company here either.
//
// The rows come gathered: [block of kAmxRows rows][terms, kAmxTerms at a time][row][kAmxTerms], zero past the last
// term; fewer than kAmxRows rows are a block of so many.
#pragma once

#if FASTSEQ_AMX
static_assert(Vec<float>::size == kAmxColumns && sizeof(Vec<float>) == kAmxRowBytes, "a vector is a row of a tile");

constexpr int64_t amx_terms(int64_t k) { return (k + kAmxTerms - 1) / kAmxTerms; }  // in whole tiles
constexpr int64_t amx_blocks(int64_t rows) { return (rows + kAmxRows - 1) / kAmxRows; }
constexpr int64_t amx_block_rows(int64_t rows) { return rows < kAmxRows ? rows : kAmxRows; }
constexpr int64_t amx_gathered_numbers(int64_t rows, int64_t terms) {
  return amx_blocks(rows) * amx_block_rows(rows) * terms * kAmxTerms;
}
inline int64_t amx_columns(const KPiece* pieces, int pieces_n) {
  int64_t k = 0;
  for (int p = 0; p < pieces_n; ++p) k += pieces[p].size;
  return k;
}

// The columns of a that some pieces name, one after another. Of rows past the last there is nothing written.
inline void amx_gather(const bfloat16* a, int64_t lda, int64_t rows, const KPiece* pieces, int pieces_n, bfloat16* to) {
  const int64_t block_rows = amx_block_rows(rows), tile = block_rows * kAmxTerms;
  const int64_t block_numbers = amx_terms(amx_columns(pieces, pieces_n)) * tile;
  for (int64_t r = 0; r < rows; ++r) {
    bfloat16* const row = to + r / kAmxRows * block_numbers + r % kAmxRows * kAmxTerms;
    int64_t done = 0;
    for (int p = 0; p < pieces_n; ++p) {
      const bfloat16* const from = a + r * lda + pieces[p].column;
      for (int64_t i = 0; i < pieces[p].size;) {
        const int64_t place = done % kAmxTerms, room = kAmxTerms - place, left = pieces[p].size - i;
        bfloat16* const at = row + done / kAmxTerms * tile + place;
        const int64_t here = left < room ? left : room;
        if (here == kAmxTerms) {
          __builtin_memcpy(at, from + i, kAmxRowBytes);
        } else {
          memcpy(at, from + i, here * sizeof(bfloat16));
        }
        i += here, done += here;
      }
    }
    if (done % kAmxTerms)
      memset(static_cast<void*>(row + done / kAmxTerms * tile + done % kAmxTerms), 0,
             (kAmxTerms - done % kAmxTerms) * sizeof(bfloat16));
  }
}

// The same of a^T, whose row r and term k are at a[k * lda + r], in blocks of so many rows: pairs of terms side by side
// first, and those transposed. Rows of a block that are not there are zero.
inline void amx_gather_columns(const bfloat16* a, int64_t lda, int64_t rows, int64_t k_size, int64_t block_rows,
                               bfloat16* to) {
  const int64_t terms = amx_terms(k_size);
  for (int64_t i = 0; i < rows; i += kAmxRows)
    for (int64_t s = 0; s < terms; ++s, to += block_rows * kAmxTerms) {
      const bfloat16* const from = a + i + s * kAmxTerms * lda;
      const int64_t here = rows - i, left = k_size - s * kAmxTerms;
      Vec<float> pairs[kAmxTerms / 2];
      if (here >= kAmxRows && left >= kAmxTerms) {
#pragma GCC unroll 16
        for (int64_t k = 0; k < kAmxTerms; k += 2)
          pairs[k / 2] = pairs_at(from + k * lda, from + (k + 1) * lda, kAmxRows, kAmxRows);
      } else {
        for (int64_t k = 0; k < kAmxTerms; k += 2)
          pairs[k / 2] = pairs_at(from + (k < left ? k : 0) * lda, from + (k + 1 < left ? k + 1 : 0) * lda,
                                  k < left ? here : 0, k + 1 < left ? here : 0);
      }
      swap_blocks<1>(pairs, typename CountLanes<kAmxRows>::type{});
#pragma GCC unroll 16
      for (int64_t r = 0; r < kAmxRows; ++r)
        if (r < block_rows) pairs[r].store(reinterpret_cast<float*>(to + r * kAmxTerms));
    }
}

// The left side of a product: where row 0 has its first kAmxTerms terms, and how many numbers further its next row, its
// next terms and the next block of rows are.
struct AmxLeft {
  const bfloat16* data;
  int64_t row, terms, block;

  static AmxLeft gathered(const bfloat16* data, int64_t block_rows, int64_t terms) {
    return {data, kAmxTerms, block_rows * kAmxTerms, terms * block_rows * kAmxTerms};
  }
  static AmxLeft in_place(const bfloat16* data, int64_t row) { return {data, row, kAmxTerms, kAmxRows * row}; }
};

// c[MB blocks of rows][NV vectors] (+)= a . the first NV vectors of a panel. `ahead` is what comes after them, in the
// same places of another panel: it is asked for meanwhile.
template <int MB, int NV, bool fetches>
FASTSEQ_INLINE void amx_tile(const AmxLeft& a, int64_t terms, const bfloat16* panel, int64_t step, float* c,
                             int64_t ldc, bool accumulate, const bfloat16* ahead) {
  static_assert(MB * NV <= 4 && (MB == 1 || NV <= 2), "four tiles of sums");
  constexpr int L = kAmxLeft, R = kAmxRight;
  const int64_t ldc_bytes = ldc * sizeof(float), step_bytes = step * sizeof(bfloat16);
  const int64_t row_bytes = a.row * sizeof(bfloat16);
  const auto each_sum = [&](const auto& use) __attribute__((always_inline)) {
    use(Part<0>{}, c);
    if constexpr (NV > 1) use(Part<1>{}, c + kAmxColumns);
    if constexpr (MB > 1) use(Part<2>{}, c + kAmxRows * ldc);
    if constexpr (MB > 1 && NV > 1) use(Part<3>{}, c + kAmxRows * ldc + kAmxColumns);
    if constexpr (MB == 1 && NV > 2) use(Part<2>{}, c + 2 * kAmxColumns);
    if constexpr (MB == 1 && NV > 3) use(Part<3>{}, c + 3 * kAmxColumns);
  };
  each_sum([&](auto part, float* at) __attribute__((always_inline)) {
    constexpr int sum = decltype(part)::value;
    if (accumulate) {
      Amx::load<sum>(at, ldc_bytes);
    } else {
      Amx::zero<sum>();
    }
  });
  for (int64_t s = 0; s < terms; ++s) {
    const bfloat16* const b = panel + s * (kAmxTerms / 2) * step;
    if constexpr (fetches)
      for (int64_t k = 0; k < kAmxTerms / 2; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) __builtin_prefetch(ahead + (s * (kAmxTerms / 2) + k) * step + v * kAmxTerms, 0, 2);
    Amx::load<L>(a.data + s * a.terms, row_bytes);
    Amx::load<R>(b, step_bytes);
    Amx::multiply_add<0, L, R>();
    if constexpr (MB > 1) {
      Amx::load<L + 1>(a.data + a.block + s * a.terms, row_bytes);
      Amx::multiply_add<2, L + 1, R>();
    }
    if constexpr (NV > 1) {
      Amx::load<R + 1>(b + kAmxTerms, step_bytes);
      Amx::multiply_add<1, L, R + 1>();
      if constexpr (MB > 1) Amx::multiply_add<3, L + 1, R + 1>();
    }
    if constexpr (MB == 1 && NV > 2) {
      Amx::load<R>(b + 2 * kAmxTerms, step_bytes);
      Amx::multiply_add<2, L, R>();
    }
    if constexpr (MB == 1 && NV > 3) {
      Amx::load<R + 1>(b + 3 * kAmxTerms, step_bytes);
      Amx::multiply_add<3, L, R + 1>();
    }
  }
  each_sum([&](auto part, float* at)
               __attribute__((always_inline)) { Amx::store<decltype(part)::value>(at, ldc_bytes); });
}

// The same for as many vectors as a panel may have.
template <int MB, int NV, bool fetches>
FASTSEQ_INLINE void amx_blocks_product(const AmxLeft& a, int64_t terms, const bfloat16* panel, int64_t step, float* c,
                                       int64_t ldc, bool accumulate, const bfloat16* ahead) {
  constexpr int first = MB == 1 || NV < 2 ? NV : 2;
  amx_tile<MB, first, fetches>(a, terms, panel, step, c, ldc, accumulate, ahead);
  if constexpr (NV > first)
    amx_tile<MB, NV - first, fetches>(a, terms, panel + first * kAmxTerms, step, c + first * kAmxColumns, ldc,
                                      accumulate, fetches ? ahead + first * kAmxTerms : nullptr);
}

// c[rows][NV vectors] (+)= a . the first NV vectors of a panel. c has whole blocks of rows, but for rows that are fewer
// than one. ahead: another panel that is asked for meanwhile.
template <int NV, bool fetches>
FASTSEQ_INLINE void amx_product(AmxLeft a, int64_t rows, int64_t terms, const bfloat16* panel, int64_t step, float* c,
                                int64_t ldc, bool accumulate, const bfloat16* ahead = nullptr) {
  int64_t r = 0;
  for (; r + kAmxRows < rows; r += 2 * kAmxRows, a.data += 2 * a.block) {
    float* const to = c + r * ldc;
    if (fetches && r == 0) {
      amx_blocks_product<2, NV, fetches>(a, terms, panel, step, to, ldc, accumulate, ahead);
    } else {
      amx_blocks_product<2, NV, false>(a, terms, panel, step, to, ldc, accumulate, ahead);
    }
  }
  if (r < rows) amx_blocks_product<1, NV, fetches>(a, terms, panel, step, c + r * ldc, ldc, accumulate, ahead);
}
#endif
