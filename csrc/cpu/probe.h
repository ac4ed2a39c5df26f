// How fast this machine is at best: the measures that the benchmark holds everything else against.
#pragma once

inline double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Keeps the compiler from dropping the computation of v.
template <class T>
FASTSEQ_INLINE void keep(Vec<T> v) {
  T lanes[Vec<T>::size];
  v.store(lanes);
  asm volatile("" : : "r"(lanes) : "memory");
}

// FLOP/s of `iterations` rounds of independent multiply-adds in registers, on each of `threads` threads.
template <class T>
double fma_rate(int64_t iterations, int threads) {
  constexpr int chains = 12;  // two units of four cycles' latency are busy with eight
  Barrier barrier;
  double seconds = 0;
  int members = 1;
  parallel(threads, [&](int member, int team) {
    Share share{member, team};
    Vec<T> sums[chains];
    for (int i = 0; i < chains; ++i) sums[i] = Vec<T>(T(i));
    const Vec<T> factor = Vec<T>(T(0.5)), term = Vec<T>(T(1));
    barrier.wait(share);
    const double begin = seconds_now();
    for (int64_t n = 0; n < iterations; ++n)
      for (int i = 0; i < chains; ++i) sums[i] = fma(sums[i], factor, term);
    for (int i = 0; i < chains; ++i) keep(sums[i]);
    barrier.wait(share);
    if (member == 0) {
      seconds = seconds_now() - begin;
      members = team;
    }
  });
  return 2.0 * chains * Vec<T>::size * static_cast<double>(iterations) * members / seconds;
}

// Seconds in which `threads` threads meet once, each having written a line that the others then read. NaN where they do
// not, as fewer came or one was kept waiting for so long that he went on alone.
inline double meeting_seconds(int64_t times, int threads) {
  struct alignas(64) Line {
    int64_t number;
  };
  Workspace<Line> memory;
  Line* const lines = memory.zeros(threads);
  Barrier barrier;
  barrier.begin();
  double seconds = 0;
  parallel(threads, [&](int member, int team) {
    Share share{member, team};
    int64_t sum = 0;
    bool alone = barrier.wait(share);
    const double begin = seconds_now();
    for (int64_t n = 0; n < times; ++n) {
      __atomic_store_n(&lines[member].number, n + sum % 2, __ATOMIC_RELAXED);
      alone = barrier.wait(share) || alone;
      for (int other = 0; other < team; ++other) sum += __atomic_load_n(&lines[other].number, __ATOMIC_RELAXED);
    }
    asm volatile("" : : "r"(sum));
    if (member == 0) seconds = team < threads || alone ? __builtin_nan("") : seconds_now() - begin;
    barrier.wait(share);
  });
  return seconds / static_cast<double>(times);
}

// Bytes/s that `threads` threads read together, each `repeats` times over `bytes` of its own.
inline double read_rate(int64_t bytes, int64_t repeats, int threads) {
  using V = Vec<float>;
  constexpr int vectors = 8;
  constexpr int64_t block = vectors * static_cast<int64_t>(sizeof(V));
  const int64_t blocks = bytes > block ? bytes / block : 1;
  Workspace<char> memory;
  char* const buffers = memory.allocate(threads * blocks * block);
  Barrier barrier;
  double seconds = 0;
  int members = 1;
  parallel(threads, [&](int member, int team) {
    Share share{member, team};
    char* const buffer = buffers + member * blocks * block;
    memset(buffer, 0, blocks * block);
    V sums[vectors];
    for (int i = 0; i < vectors; ++i) sums[i] = V(0);
    barrier.wait(share);
    const double begin = seconds_now();
    for (int64_t n = 0; n < repeats; ++n)
      for (int64_t b = 0; b < blocks; ++b) {
        const float* const p = reinterpret_cast<const float*>(buffer + b * block);
        for (int i = 0; i < vectors; ++i) sums[i] = sums[i] + V::load(p + i * V::size);
      }
    for (int i = 0; i < vectors; ++i) keep(sums[i]);
    barrier.wait(share);
    if (member == 0) {
      seconds = seconds_now() - begin;
      members = team;
    }
  });
  return static_cast<double>(blocks * block) * static_cast<double>(repeats) * members / seconds;
}
