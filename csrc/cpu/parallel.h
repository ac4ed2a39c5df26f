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

// Runs f(member, team) on up to `threads` threads; serially inside another region and in a forked child, whose OpenMP
// threads did not survive the fork. Fewer members may come than were asked for: f must use the `team` it is told.
// Workers take over the caller's floating-point mode. libgomp's entry point is called by name, as GCC's own code does,
// since Clang's would bring a second OpenMP runtime into the process.
template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1 || omp_in_parallel() || in_forked_child()) {
    f(0, 1);
    return;
  }
  struct Region {
    const F* f;
    unsigned mode;
    static void enter(void* data) {
      const Region& region = *static_cast<const Region*>(data);
      const unsigned own = floating_point_mode();
      set_floating_point_mode(region.mode);
      (*region.f)(omp_get_thread_num(), omp_get_num_threads());
      set_floating_point_mode(own);
    }
  } region{&f, floating_point_mode()};
  GOMP_parallel(&Region::enter, &region, static_cast<unsigned>(threads), 0);
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
  void wait(int members) {
    if (members <= 1) return;
    const int generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation; ++spins) {
      if (spins < kSpins) {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  alignas(64) int arrived_ = 0;
  alignas(64) int generation_ = 0;
};
