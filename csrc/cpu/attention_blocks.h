// The sizes of attention's blocks and of what a product takes of them.
#pragma once

template <class F>
constexpr int64_t kQueryBlock = kInAmx<F> ? 96 : 48;  // a whole number of tiles
constexpr int64_t kKeyBlock = 512;
constexpr int64_t kTermBlock = 256;  // terms of a sum that are added up in registers
constexpr int kTileRows = 6;
static_assert(kKeyBlock % kTermBlock == 0 && 48 % kTileRows == 0, "blocks have whole pieces and tiles");
template <class F>
constexpr int kScoreRows = kInAmx<F> ? int(kAmxRows) : kTileRows;  // rows of a tile
static_assert(96 % kAmxRows == 0 && kTermBlock % kAmxTerms == 0, "of AMX's, too");

// The columns of a matrix in groups of as many as a tile takes, the last ones in smaller groups: use(vectors, first).
template <class A, class Use>
FASTSEQ_INLINE void for_each_column_group(int64_t columns, const Use& use) {
  constexpr int64_t V = Vec<A>::size;
  int64_t j = 0;
  for (; j + kWideVectors * V <= columns; j += kWideVectors * V) use(Part<kWideVectors>{}, j);
  if (kWideVectors > 2 && j + 2 * V <= columns) use(Part<2>{}, j), j += 2 * V;
  for (; j < columns; j += V) use(Part<1>{}, j);
}
