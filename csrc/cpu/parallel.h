// A team of threads that stays in one region for a whole time loop, on the process's one OpenMP runtime (torch's).
#pragma once

// The floating-point mode (rounding, torch.set_flush_denormal) of the calling thread.
inline unsigned floating_point_mode() {
#if defined(__x86_64__)
  return _mm_getcsr();
#else
  return 0;
#endif
}
inline void set_floating_point_mode(unsigned mode) {
#if defined(__x86_64__)
  _mm_setcsr(mode);
#else
  (void)mode;
#endif
}

// A machine that is busy with something else keeps a thread from its processor for whole slices of the scheduler, tens
// of milliseconds, and whoever shares work with it waits. So after a stall this process computes on one thread for
// eight times as long: what waiting costs stays small against that, and a moment's noise costs next to nothing. Bits do
// not depend on the threads.
class Crowd {
 public:
  static constexpr int64_t kStall = 300000;  // ns to wait for another thread's share: no imbalance is so large

  static int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
  }
  static bool alone() {
    const int64_t until = __atomic_load_n(&until_, __ATOMIC_RELAXED);
    return until != 0 && now() < until;
  }
  static void stalled(int64_t nanoseconds) {
    constexpr int64_t kLongest = 1000000000;
    const int64_t pause = 8 * nanoseconds;
    __atomic_store_n(&until_, now() + (pause < kLongest ? pause : kLongest), __ATOMIC_RELAXED);
  }

 private:
  static int64_t until_;
};
int64_t Crowd::until_ = 0;

// Runs f(member, team) on up to `threads` threads; serially inside another region, in a forked child, whose OpenMP
// threads did not survive the fork, and where others keep the machine busy. Fewer members may come than were asked for:
// f must use the `team` it is told, and every member has work, or waiting for the others counts as a stall. Workers
// take over the caller's floating-point mode. libgomp's entry point is called by name, as GCC's own code does, since
// Clang's would bring a second OpenMP runtime into the process.
template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1 || omp_in_parallel() || in_forked_child() || Crowd::alone()) {
    f(0, 1);
    return;
  }
  struct Region {
    const F* f;
    unsigned mode;
    int64_t done;  // when the calling thread was
    static void enter(void* data) {
      Region& region = *static_cast<Region*>(data);
      const int member = omp_get_thread_num();
      const unsigned own = floating_point_mode();
      set_floating_point_mode(region.mode);
      (*region.f)(member, omp_get_num_threads());
      set_floating_point_mode(own);
      if (member == 0) region.done = Crowd::now();
    }
  } region{&f, floating_point_mode(), 0};
  const int64_t begin = Crowd::now();
  GOMP_parallel(&Region::enter, &region, static_cast<unsigned>(threads), 0);
  const int64_t own = region.done - begin, waited = Crowd::now() - region.done;
  if (waited > Crowd::kStall + own) Crowd::stalled(waited);
}

struct Range {
  int64_t begin, end;
};

// Part i of n near-equal parts of [0, size).
inline Range part(int64_t size, int64_t i, int64_t n) { return {size * i / n, size * (i + 1) / n}; }

// for (i in [0, size)) f(i), split evenly.
template <class F>
void parallel_for(int threads, int64_t size, const F& f) {
  parallel(threads < size ? threads : static_cast<int>(size), [&](int member, int team) {
    const Range mine = part(size, member, team);
    for (int64_t i = mine.begin; i < mine.end; ++i) f(i);
  });
}

// Meeting point of a few threads at every step. Spins for a moment, then yields: with another busy process on the
// machine a pure spin waits for whole scheduler slices.
class alignas(64) Barrier {
 public:
  void begin() { begun_ = Crowd::now(); }

  // Returns true when a good part of the time has gone in stalls: then the rest is for member 0 alone, and the others
  // are done. All members get the same answer.
  bool wait(int members) {
    if (members <= 1) return false;
    const int state = __atomic_load_n(&state_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members) {
      const int alone = __atomic_load_n(&alone_, __ATOMIC_RELAXED);
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&state_, (state + 2) | alone, __ATOMIC_RELEASE);
      return alone;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      const int now = __atomic_load_n(&state_, __ATOMIC_ACQUIRE);
      if (now != state) return now & 1;
#if defined(__x86_64__)
      _mm_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    return wait_long(state);
  }

 private:
  static constexpr int kSpins = 2000;

  bool wait_long(int state) {
    const int64_t begin = Crowd::now();
    int now;
    do {
      sched_yield();
      now = __atomic_load_n(&state_, __ATOMIC_ACQUIRE);
      const int64_t waited = Crowd::now() - begin;
      if (waited <= Crowd::kStall) continue;
      const int64_t all = __atomic_load_n(&stalled_, __ATOMIC_RELAXED) + waited;
      if (all > kAllowed + (begin - begun_) / 4) __atomic_store_n(&alone_, 1, __ATOMIC_RELAXED);
      if (now == state) continue;
      __atomic_store_n(&stalled_, all, __ATOMIC_RELAXED);
      Crowd::stalled(waited);
    } while (now == state);
    return now & 1;
  }

  static constexpr int64_t kAllowed = 1000000;  // ns of stalls that change nothing
  alignas(64) int arrived_ = 0;
  alignas(64) int state_ = 0;  // a count in steps of 2; odd from when member 0 is alone
  int alone_ = 0;
  int64_t begun_ = 0, stalled_ = 0;
};
