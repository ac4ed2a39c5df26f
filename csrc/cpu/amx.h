// AMX multiplies tiles of bfloat16, 16 rows of 32 terms by 32 terms of 16 columns, and adds to 16 by 16 floats: in each
// the sum of a tile's even terms and that of its odd ones, added up, are added to what is there, in float, denormals
// taken for zeros.
//
// A thread says how many rows its left sides have (configure), and `parallel` leaves the tiles as nobody's (AmxScope).
#pragma once

#if defined(__AMX_BF16__) || defined(FASTSEQ_AMX_EMULATED)
#define FASTSEQ_AMX 1
#else
#define FASTSEQ_AMX 0
#endif

// Whether AMX multiplies T.
template <class T>
constexpr bool kInAmx = FASTSEQ_AMX && sizeof(T) == 2;

constexpr int64_t kAmxRows = 16;     // of the left side and of the sums
constexpr int64_t kAmxTerms = 32;    // of the sum
constexpr int64_t kAmxColumns = 16;  // of the right side, pairs of terms side by side, and of the sums
constexpr int64_t kAmxNumbers = kAmxRows * kAmxTerms;
constexpr int64_t kAmxRowBytes = 64;

#if FASTSEQ_AMX
// The tiles: four of sums, two of the left and two of the right side.
constexpr int kAmxSums = 0, kAmxLeft = 4, kAmxRight = 6;

class Amx {
 public:
  // Of left sides and sums; sets every tile to zero where that changes.
  static void configure(int64_t rows) {
    if (state().rows == rows) return;
    state().rows = rows;
#if defined(__AMX_BF16__)
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = kAmxRowBytes, config.rows[i] = i < kAmxRight ? rows : kAmxRows;
    asm volatile("ldtilecfg %0" ::"m"(config));
#endif
  }
  static void release() {
    if (state().rows == 0) return;
    state().rows = 0;
#if defined(__AMX_BF16__)
    asm volatile("tilerelease");
#endif
  }

#if defined(__AMX_BF16__)
  template <int tile>
  FASTSEQ_INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  // Rows of 64 bytes, so many bytes apart.
  template <int tile>
  FASTSEQ_INLINE static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  FASTSEQ_INLINE static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int sums, int left, int right>
  FASTSEQ_INLINE static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right));
  }
#else
  template <int tile>
  static void zero() {
    memset(state().tiles[tile], 0, sizeof state().tiles[tile]);
  }
  template <int tile>
  static void load(const void* from, int64_t stride) {
    const int64_t rows = rows_of(tile);
    zero<tile>();
    for (int64_t i = 0; i < rows; ++i)
      memcpy(state().tiles[tile][i], static_cast<const char*>(from) + i * stride, kAmxRowBytes);
  }
  template <int tile>
  static void store(void* to, int64_t stride) {
    const int64_t rows = rows_of(tile);
    for (int64_t i = 0; i < rows; ++i)
      memcpy(static_cast<char*>(to) + i * stride, state().tiles[tile][i], kAmxRowBytes);
  }
  template <int sums, int left, int right>
  static void multiply_add() {
    const int64_t rows = rows_of(sums);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < kAmxColumns; ++j) {
        float even_odd[2] = {0, 0};
        for (int64_t k = 0; k < kAmxTerms; ++k)
          even_odd[k % 2] = __builtin_fmaf(half_of<left>(i, k), half_of<right>(k / 2, 2 * j + k % 2), even_odd[k % 2]);
        float sum;
        memcpy(&sum, state().tiles[sums][i] + 4 * j, sizeof sum);
        sum += even_odd[0] + even_odd[1];
        memcpy(state().tiles[sums][i] + 4 * j, &sum, sizeof sum);
      }
  }
#endif

 private:
  struct State {
    int64_t rows;  // 0: as others left it
#if !defined(__AMX_BF16__)
    char tiles[8][kAmxRows][kAmxRowBytes];
#endif
  };
  static State& state() {
    static thread_local State own;
    return own;
  }
#if !defined(__AMX_BF16__)
  // What a kernel has not configured does not work.
  static int64_t rows_of(int tile) {
    if (state().rows == 0) __builtin_trap();
    return tile < kAmxRight ? state().rows : kAmxRows;
  }
  template <int tile>
  static float half_of(int64_t row, int64_t i) {
    bfloat16 number;
    memcpy(&number, state().tiles[tile][row] + 2 * i, sizeof number);
    return to_compute(number);
  }
#endif
};
#endif

// In which a thread may configure the tiles.
struct AmxScope {
  AmxScope() {}
  ~AmxScope() {
#if FASTSEQ_AMX
    Amx::release();
#endif
  }
};
