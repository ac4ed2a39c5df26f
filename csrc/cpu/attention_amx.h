// The products of attention in AMX's tiles (amx_product.h), where the driver's are of bfloat16. What a tile takes of a
// sum is kAmxTerms terms, and those that nobody sees have to read zero.
#pragma once

#if FASTSEQ_AMX
inline Range amx_whole_terms(Range terms) {
  if (terms.begin >= terms.end) return {terms.begin, terms.begin};
  return {terms.begin / kAmxTerms * kAmxTerms, padded_terms<bfloat16>(terms.end)};
}

// use(blocks of rows, 1 or 2, the first row, their range) for rows whose ranges are the same two blocks at a time.
template <class RangeOf, class Use>
FASTSEQ_INLINE void for_each_amx_rows(int64_t rows, const RangeOf& range_of, const Use& use) {
  const auto range = [&](int64_t m) { return range_of(m, m + kAmxRows < rows ? m + kAmxRows : rows); };
  for (int64_t m = 0; m < rows;) {
    const Range here = range(m);
    bool two = m + 2 * kAmxRows <= rows;
    if (two) {
      const Range next = range(m + kAmxRows);
      two = here.begin == next.begin && here.end == next.end;
    }
    if (here.begin < here.end) {
      if (two) {
        use(Part<2>{}, m, here);
      } else {
        use(Part<1>{}, m, here);
      }
    }
    m += two ? 2 * kAmxRows : kAmxRows;
  }
}

// As score_product, of gathered rows; c has whole blocks of rows, but for rows that are fewer than one.
template <class ColumnsOf>
void amx_score_product(const bfloat16* a, int64_t rows, int64_t size, const bfloat16* panels, float* c, int64_t ldc,
                       const ColumnsOf& columns_of) {
  using Shape = PanelShape<bfloat16, 1>;
  const int64_t terms = amx_terms(size), block_rows = amx_block_rows(rows);
  Amx::configure(block_rows);
  for_each_amx_rows(rows, columns_of, [&](auto blocks, int64_t m, Range needed) __attribute__((always_inline)) {
    const AmxLeft left = AmxLeft::gathered(a + m * terms * kAmxTerms, block_rows, terms);
    for (int64_t j = needed.begin / Shape::width * Shape::width; j < needed.end; j += Shape::width)
      for_vectors_of<Shape::vectors, Vec<float>>(needed.end - j, [&](auto part) __attribute__((always_inline)) {
        amx_blocks_product<decltype(blocks)::value, decltype(part)::value, false>(
            left, terms, panels + j / Shape::width * Shape::panel_numbers(size), Shape::step, c + m * ldc + j, ldc,
            false, nullptr);
      });
  });
}

// As accumulate_product, of rows where they lie and packed rows.
template <class TermsOf>
void amx_accumulate_product(const bfloat16* a, int64_t a_row, int64_t rows, int64_t terms, const bfloat16* b,
                            int64_t columns, float* c, int64_t ldc, const TermsOf& terms_of) {
  terms = padded_terms<bfloat16>(terms);
  for (int64_t k0 = 0; k0 < terms; k0 += kTermBlock) {
    const int64_t k1 = k0 + kTermBlock < terms ? k0 + kTermBlock : terms;
    for_each_column_group<float>(columns, [&](auto part, int64_t j) __attribute__((always_inline)) {
      constexpr int NV = decltype(part)::value;
      for_each_amx_rows(rows, terms_of, [&](auto blocks, int64_t m, Range needed) __attribute__((always_inline)) {
        const Range all = amx_whole_terms(needed);
        const Range k{all.begin > k0 ? all.begin : k0, all.end < k1 ? all.end : k1};
        if (k.begin >= k.end) return;
        Amx::configure(amx_block_rows(rows - m));
        amx_blocks_product<decltype(blocks)::value, NV, false>(
            AmxLeft::in_place(a + m * a_row + k.begin, a_row), (k.end - k.begin) / kAmxTerms,
            b + terms * j + k.begin * NV * kAmxColumns, NV * kAmxTerms, c + m * ldc + j, ldc, true, nullptr);
      });
    });
  }
}

// c[size][columns] += a b, a gathered in whole blocks, b pairs of rows in 32-bit lanes, `ld` lanes between two rows.
inline void amx_accumulate_pairs(const bfloat16* a, int64_t size, int64_t terms, const float* b, int64_t ld,
                                 Range columns, float* c, int64_t ldc) {
  Amx::configure(kAmxRows);
  const AmxLeft left = AmxLeft::gathered(a, kAmxRows, terms);
  constexpr int NV = kWideVectors;
  for (int64_t j = columns.begin; j < columns.end; j += NV * kAmxColumns)
    for_vectors_of<NV, Vec<float>>(columns.end - j, [&](auto part) __attribute__((always_inline)) {
      amx_product<decltype(part)::value, false>(
          left, size, terms, reinterpret_cast<const bfloat16*>(b + j), 4 * ld, c + j, ldc, true);
    });
}
#endif
