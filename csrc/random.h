// Counter-based random numbers, the same on every device and at every number of threads: a number is a function of the
// seed and of where it is used.
#pragma once

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) of N counters side by side, each
// of four words, which become the random ones.
template <int N>
FASTSEQ_INLINE void philox(uint32_t (&words)[4][N], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
    for (int l = 0; l < N; ++l) {
      const uint64_t a = uint64_t{0xD2511F53u} * words[0][l], b = uint64_t{0xCD9E8D57u} * words[2][l];
      words[0][l] = static_cast<uint32_t>(b >> 32) ^ words[1][l] ^ key0;
      words[1][l] = static_cast<uint32_t>(b);
      words[2][l] = static_cast<uint32_t>(a >> 32) ^ words[3][l] ^ key1;
      words[3][l] = static_cast<uint32_t>(a);
    }
}

// Attention's dropout. A key's number is of 16 bits: of 128 keys in a row, 16 lanes with a counter each hold 8. The key
// j is in lane j % 16, and of that in bits 16 h to 16 h + 15 of word w where j % 128 / 16 = 2 w + h; its counter is
// (j / 128 * 16 + lane, query, head, 0).
constexpr int kDropoutLanes = 16, kDropoutKeys = 8 * kDropoutLanes;

FASTSEQ_INLINE void dropout_counters(int64_t head, int64_t query, int64_t key, uint32_t (&words)[4][kDropoutLanes]) {
  for (int l = 0; l < kDropoutLanes; ++l) {
    words[0][l] = static_cast<uint32_t>(key / kDropoutKeys * kDropoutLanes + l);
    words[1][l] = static_cast<uint32_t>(query), words[2][l] = static_cast<uint32_t>(head), words[3][l] = 0;
  }
}

// Of one score: the words of its counter, which 8 keys share, and its number among them.
FASTSEQ_INLINE void dropout_words(int64_t head, int64_t query, int64_t key, uint64_t seed, uint32_t (&words)[4][1]) {
  words[0][0] = static_cast<uint32_t>(key / kDropoutKeys * kDropoutLanes + key % kDropoutLanes);
  words[1][0] = static_cast<uint32_t>(query), words[2][0] = static_cast<uint32_t>(head), words[3][0] = 0;
  philox(words, seed);
}
FASTSEQ_INLINE uint32_t dropout_number(const uint32_t (&words)[4][1], int64_t key) {
  const int number = static_cast<int>(key % kDropoutKeys) / kDropoutLanes, w = number / 2;
  // No index that is not a constant: registers have none.
  const uint32_t word = w < 2 ? w == 0 ? words[0][0] : words[1][0] : w == 2 ? words[2][0] : words[3][0];
  return word >> (16 * (number % 2)) & 0xffff;
}
