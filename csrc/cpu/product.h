// Products for which a GEMM library's call costs more than its arithmetic: one row, or a sum of one term. Bound by
// streaming the weights once; everything else goes to the GEMM.
#pragma once

constexpr int64_t kWeightsToShare = 65536;  // numbers to stream before a second thread pays

// c[j] (+)= a . b[j], b (n, k): four rows of b at a time, so that their sums run side by side.
template <class T>
void dot_rows(const T* a, const T* b, int64_t ldb, int64_t k, bool accumulate, Range columns, T* c) {
  using V = Vec<T>;
  constexpr int64_t kRows = 4;
  for (int64_t j = columns.begin; j < columns.end; j += kRows) {
    const int64_t rows = columns.end - j < kRows ? columns.end - j : kRows;
    V sums[kRows] = {V(0), V(0), V(0), V(0)};
    const T* row[kRows];
    for (int64_t r = 0; r < kRows; ++r) row[r] = b + (j + (r < rows ? r : 0)) * ldb;
    int64_t i = 0;
    for (; i + V::size <= k; i += V::size) {
      const V x = V::load(a + i);
      for (int64_t r = 0; r < kRows; ++r) sums[r] = fma(x, V::load(row[r] + i), sums[r]);
    }
    if (i < k) {
      const V x = V::load(a + i, k - i);
      for (int64_t r = 0; r < kRows; ++r) sums[r] = fma(x, V::load(row[r] + i, k - i), sums[r]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      T lanes[V::size], total = accumulate ? c[j + r] : T(0);
      sums[r].store(lanes);
      for (int u = 0; u < V::size; ++u) total += lanes[u];
      c[j + r] = total;
    }
  }
}

// c[j] (+)= sum_i a[i] b[i][j], b (k, n), in chains of kChain: strips of columns that stay in registers while the rows
// of b go by.
template <class T>
void sum_rows(const T* a, int64_t k, const T* b, int64_t ldb, bool accumulate, Range columns, T* c) {
  using V = Vec<T>;
  constexpr int kStrip = 8;
  for (int64_t j0 = columns.begin; j0 < columns.end; j0 += kStrip * V::size) {
    const int64_t wide = columns.end - j0;
    const int vectors = wide < kStrip * V::size ? static_cast<int>((wide + V::size - 1) / V::size) : kStrip;
    bool add = accumulate;
    int64_t i = 0;
    do {  // once for an empty sum
      const int64_t end = k - i < kChain ? k : i + kChain;
      V sums[kStrip] = {V(0), V(0), V(0), V(0), V(0), V(0), V(0), V(0)};
      if (wide >= kStrip * V::size) {
        for (; i < end; ++i) {
          const V x = V::broadcast(a[i]);
#pragma GCC unroll 8
          for (int s = 0; s < kStrip; ++s) sums[s] = fma(x, V::load(b + i * ldb + j0 + s * V::size), sums[s]);
        }
      } else {
        for (; i < end; ++i)
          for (int s = 0; s < vectors; ++s)
            sums[s] = fma(V::broadcast(a[i]), V::load(b + i * ldb + j0 + s * V::size, wide - s * V::size), sums[s]);
      }
      for (int s = 0; s < vectors; ++s) {
        T* to = c + j0 + s * V::size;
        const int64_t valid = wide - s * V::size;
        (add ? V::load(to, valid) + sums[s] : sums[s]).store(to, valid);
      }
      add = true;
    } while (i < k);
  }
}

// c[i][j] (+)= a[i] b[j].
template <class T>
void outer(const T* a, const T* b, int64_t n, bool accumulate, Range rows, T* c, int64_t ldc) {
  using V = Vec<T>;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const V x = V::broadcast(a[i]);
    for (int64_t j = 0; j < n; j += V::size) {
      const int64_t valid = n - j;
      T* to = c + i * ldc + j;
      const V product = x * V::load(b + j, valid);
      (accumulate ? V::load(to, valid) + product : product).store(to, valid);
    }
  }
}

// As Gemm, by whichever of the above fits, or by `gemm`.
template <class T>
void multiply(Gemm<T> gemm, int threads, bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k,
              const T* a, int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  const bool accumulate = beta != T(0);
  const bool one_row = m == 1 && !transpose_a, one_term = k == 1 && transpose_a && !transpose_b;
  if (!one_row && !one_term) return gemm(transpose_a, transpose_b, m, n, k, a, lda, b, ldb, beta, c, ldc);
  const int64_t weights = one_row ? n * k : m * n, outputs = one_row ? n : m;
  constexpr int64_t kGrain = 64;  // outputs a thread takes at a time: whole strips
  const int64_t grains = (outputs + kGrain - 1) / kGrain;
  parallel(weights >= kWeightsToShare ? threads : 1, [&](int member, int team) {
    Range mine = part(grains, member, team);
    mine = {mine.begin * kGrain, mine.end * kGrain < outputs ? mine.end * kGrain : outputs};
    if (mine.begin >= mine.end) return;
    if (one_term) {
      outer(a, b, n, accumulate, mine, c, ldc);
    } else if (transpose_b) {
      dot_rows(a, b, ldb, k, accumulate, mine, c);
    } else {
      sum_rows(a, k, b, ldb, accumulate, mine, c);
    }
  });
}
