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
// f must use the `team` it is told, and every member has as much work, or is `uneven`: else waiting for the others
// counts as a stall. Workers take over the caller's floating-point mode. libgomp's entry point is called by name, as
// GCC's own code does, since Clang's would bring a second OpenMP runtime into the process.
template <class F>
void parallel(int threads, const F& f, bool uneven = false) {
  if (threads <= 1 || omp_in_parallel() || in_forked_child() || Crowd::alone()) {
    const AmxScope scope;
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
      {
        const AmxScope scope;
        (*region.f)(member, omp_get_num_threads());
      }
      set_floating_point_mode(own);
      if (member == 0) region.done = Crowd::now();
    }
  } region{&f, floating_point_mode(), 0};
  const int64_t begin = Crowd::now();
  GOMP_parallel(&Region::enter, &region, static_cast<unsigned>(threads), 0);
  const int64_t own = region.done - begin, waited = Crowd::now() - region.done;
  if (!uneven && waited > Crowd::kStall + own) Crowd::stalled(waited);
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

// One member's part of what a team shares, and how often it has met the others at their barrier.
struct Share {
  int member, members;
  int64_t meetings = 0;
  Range of(int64_t size) const { return part(size, member, members); }
};

// Spins before a thread yields: with another busy process on the machine a pure spin waits for whole scheduler slices.
constexpr int kSpins = 2000;
inline void spin() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// For what other threads are about to do.
template <class There>
void wait_until(const There& there) {
  for (int spins = 0; spins < kSpins; ++spins) {
    if (there()) return;
    spin();
  }
  const int64_t begin = Crowd::now();
  while (!there()) sched_yield();
  const int64_t waited = Crowd::now() - begin;
  if (waited > Crowd::kStall) Crowd::stalled(waited);
}

// Meeting point of a team at every step. Everyone writes down his arrival in a place of his own and reads the others':
// where processors are far apart a cache line takes a fifth of a microsecond from one to the other, and here they all
// travel at the same time.
class alignas(64) Barrier {
 public:
  void begin() { begun_ = Crowd::now(); }

  // Returns true when a good part of the time has gone in stalls: then the rest is for member 0 alone, and the others
  // are done. All members get the same answer.
  bool wait(Share& share) {
    if (share.members <= 1) return false;
    const int64_t meeting = ++share.meetings;
    // Before his arrival, so that whoever has seen that knows.
    if (share.member == 0 && __atomic_load_n(&wanted_alone_, __ATOMIC_RELAXED) && alone_from_ == 0)
      __atomic_store_n(&alone_from_, meeting, __ATOMIC_RELAXED);
    const int own = place_of(share.member);
    if (members_at(own, share.members) == 1) {
      __atomic_store_n(&places_[own].arrivals, meeting, __ATOMIC_RELEASE);
    } else {
      __atomic_fetch_add(&places_[own].arrivals, 1, __ATOMIC_RELEASE);
    }
    int spins = 0;
    for (int i = 0; i < kPlaces && i < share.members; ++i) {
      const int64_t expected = meeting * members_at(i, share.members);
      while (arrivals(i) < expected) {
        if (++spins > kSpins) {
          wait_long(i, expected);
          break;
        }
        spin();
      }
    }
    const int64_t alone_from = __atomic_load_n(&alone_from_, __ATOMIC_RELAXED);
    return alone_from != 0 && alone_from <= meeting;
  }

 private:
  static constexpr int64_t kAllowed = 1000000;  // ns of stalls that change nothing
  static constexpr int kPlaces = 16;            // member 0 has one, the others share the rest if they are more

  static int place_of(int member) { return member < kPlaces ? member : 1 + (member - 1) % (kPlaces - 1); }
  static int members_at(int place, int members) { return place == 0 ? 1 : (members - 1 - place) / (kPlaces - 1) + 1; }
  int64_t arrivals(int place) const { return __atomic_load_n(&places_[place].arrivals, __ATOMIC_ACQUIRE); }

  void wait_long(int place, int64_t expected) {
    const int64_t begin = Crowd::now();
    bool there;
    do {
      sched_yield();
      there = arrivals(place) >= expected;
      const int64_t waited = Crowd::now() - begin;
      if (waited <= Crowd::kStall) continue;
      const int64_t all = __atomic_load_n(&stalled_, __ATOMIC_RELAXED) + waited;
      if (all > kAllowed + (begin - begun_) / 4) __atomic_store_n(&wanted_alone_, 1, __ATOMIC_RELAXED);
      if (!there) continue;
      __atomic_store_n(&stalled_, all, __ATOMIC_RELAXED);
      Crowd::stalled(waited);
    } while (!there);
  }

  struct alignas(64) Place {
    int64_t arrivals = 0;
  };
  Place places_[kPlaces];
  int64_t alone_from_ = 0;  // meeting from which member 0 goes on alone; 0 for never
  int64_t begun_ = 0, stalled_ = 0;
  int wanted_alone_ = 0;
};

// One member's part of a range that a team works off together. He takes pieces from its front, and whoever has done his
// own part takes from the back what is left of another's: processors are not equally fast, nor all there all the time.
class alignas(64) Backlog {
 public:
  void deal(Range range) { store(range); }
  Range left() const { return range_of(__atomic_load_n(&left_, __ATOMIC_RELAXED)); }

  // At most `most`, towards the end down to `least`, so that all are done at the same time; empty when nothing is left.
  Range take_first(int64_t most, int64_t least) {
    return take(most, least, [](Range left, int64_t n) { return Range{left.begin, left.begin + n}; });
  }
  Range take_last(int64_t most, int64_t least) {
    return take(most, least, [](Range left, int64_t n) { return Range{left.end - n, left.end}; });
  }

 private:
  static uint64_t bits_of(Range range) {
    return static_cast<uint64_t>(range.begin) << 32 | static_cast<uint64_t>(range.end);
  }
  static Range range_of(uint64_t bits) {
    return {static_cast<int64_t>(bits >> 32), static_cast<int64_t>(bits & 0xffffffff)};
  }
  void store(Range range) { __atomic_store_n(&left_, bits_of(range), __ATOMIC_RELAXED); }

  template <class Pick>
  Range take(int64_t most, int64_t least, const Pick& pick) {
    uint64_t bits = __atomic_load_n(&left_, __ATOMIC_RELAXED);
    for (;;) {
      const Range left = range_of(bits);
      const int64_t size = left.end - left.begin;
      const int64_t half = size / 2 > least ? size / 2 : least, n = half < most ? half : most;
      if (size <= 0) return {0, 0};
      const Range piece = pick(left, n < size ? n : size);
      const Range rest{
          piece.begin == left.begin ? piece.end : left.begin, piece.begin == left.begin ? left.end : piece.begin};
      if (__atomic_compare_exchange_n(&left_, &bits, bits_of(rest), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return piece;
    }
  }

  uint64_t left_ = 0;  // begin and end, 32 bits each
};

// The next piece for a member: of his own part, or else of the one that has most left.
inline Range take_piece(Backlog* all, Share share, int64_t most, int64_t least) {
  const Range own = all[share.member].take_first(most, least);
  if (own.end > own.begin) return own;
  for (;;) {
    int fullest = -1;
    int64_t largest = 0;
    for (int i = 0; i < share.members; ++i) {
      const Range left = all[i].left();
      if (left.end - left.begin > largest) fullest = i, largest = left.end - left.begin;
    }
    if (fullest < 0) return {0, 0};
    const Range piece = all[fullest].take_last(most, least);
    if (piece.end > piece.begin) return piece;
  }
}

// Tasks that threads take one after another, each from its own part of them first, so that neighbours, whose data often
// lie side by side, mostly are one thread's; uneven ones take any time.
template <class F>
void parallel_tasks(int threads, int64_t tasks, const F& make_worker, bool uneven = false) {
  constexpr int64_t few = 16, most = int64_t(1) << 31;
  const int team = threads < tasks ? threads : static_cast<int>(tasks);
  Backlog few_backlogs[few];
  Workspace<Backlog> memory;
  Backlog* const backlogs = team > few ? memory.allocate(team) : few_backlogs;
  for (int64_t first = 0; first < tasks; first += most) {
    const int64_t here = tasks - first < most ? tasks - first : most;
    for (int i = 0; i < team; ++i) backlogs[i].deal(part(here, i, team));
    const auto work = [&](int member, int) {
      auto worker = make_worker();
      for (;;) {
        const Range task = take_piece(backlogs, Share{member, team}, 1, 1);
        if (task.end <= task.begin) return;
        worker(first + task.begin);
      }
    };
    parallel(team, work, uneven);
  }
}
