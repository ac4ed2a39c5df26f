// Blocks of a large product in AMX's tiles (amx_product.h).
#pragma once

#if FASTSEQ_AMX
// Rows [i0, i0 + rows) of A as amx_product takes them.
inline void amx_pack_a(const Matrix<bfloat16>& a, int64_t i0, int64_t rows, int64_t k0, int64_t k_size, bfloat16* to) {
  if (a.column == 1) {
    const KPiece all[1] = {{k0, k_size}};
    amx_gather(a.data + i0 * a.row, a.row, rows, all, 1, to);
  } else {
    amx_gather_columns(a.data + i0 + k0 * a.column, a.column, rows, k_size, amx_block_rows(rows), to);
  }
}

// As gemm_block, of at least kAmxRows rows or all that A has.
template <int NV>
void amx_gemm_block(const Matrix<bfloat16>& a, Range rows, Depth k, Range next, Depth k_next, const bfloat16* panels,
                    int64_t panel_stride, Range columns, bfloat16* a_memory, bool accumulate,
                    const GemmResult<float>& c) {
  using V = Vec<float>;
  constexpr int64_t width = NV * V::size, step = width * Terms<bfloat16>::count;
  const int64_t here = rows.end - rows.begin, terms = amx_terms(k.size);
  const int64_t block_rows = amx_block_rows(here), block_numbers = terms * block_rows * kAmxTerms;
  const bool far =
      (columns.end - columns.begin) * panel_stride * static_cast<int64_t>(sizeof(bfloat16)) >= kGemmBytesFar;
  Amx::configure(block_rows);
  amx_pack_a(a, rows.begin, here, k.begin, k.size, a_memory);
  const int64_t pairs = (here + 2 * kAmxRows - 1) / (2 * kAmxRows);
  RowsAhead<bfloat16> rows_ahead(a, next, k_next.begin, k_next.size, (columns.end - columns.begin) * pairs);
  for (int64_t j = columns.begin; j < columns.end; ++j) {
    const bfloat16* const panel = panels + j * panel_stride;
    const int64_t valid = c.columns - j * width < width ? c.columns - j * width : width;
    const auto product = [&](auto part) __attribute__((always_inline)) {
      constexpr int tiles = decltype(part)::value;
      for (int64_t i = 0; i < here; i += 2 * kAmxRows) {
        rows_ahead.ask();
        const AmxLeft from = AmxLeft::gathered(a_memory + i / kAmxRows * block_numbers, block_rows, terms);
        float* const to = c.data + (rows.begin + i) * c.row + j * c.panel;
        const int64_t count = here - i < 2 * kAmxRows ? here - i : 2 * kAmxRows;
        const int64_t computed = amx_blocks(count) * block_rows;
        if (valid == tiles * kAmxColumns && count == computed) {
          if (far && i == 0 && j + 1 < columns.end) {
            amx_product<tiles, true>(from, computed, terms, panel, step, to, c.row, accumulate, panel + panel_stride);
          } else {
            amx_product<tiles, false>(from, computed, terms, panel, step, to, c.row, accumulate);
          }
          continue;
        }
        alignas(64) float sums[2 * kAmxRows * width];
        if (accumulate)
          for (int64_t r = 0; r < count; ++r)
            for (int64_t v = 0; v < valid; v += V::size)
              V::load(to + r * c.row + v, valid - v).store(sums + r * width + v);
        amx_product<tiles, false>(from, computed, terms, panel, step, sums, width, accumulate);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t v = 0; v < valid; v += V::size)
            V::load(sums + r * width + v).store(to + r * c.row + v, valid - v);
      }
    };
    for_vectors_of<NV, V>(valid, product);
  }
}
#endif
