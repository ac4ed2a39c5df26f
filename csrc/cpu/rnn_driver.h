// What the forward and the backward drivers of a recurrent layer share: the order of time, and who computes what.
#pragma once

// Measured on two cores with AVX2 (docs/performance.md). None changes a bit of the recurrent products.
constexpr int64_t kStepsToPack = 8;  // packing costs a few steps: a shorter sequence reads the weights in place
constexpr int64_t kRowsToPack = 16;  // backward packs for a few steps of so many rows, too
constexpr int64_t kWorkToShareUnits = 45000;  // a step of fewer multiplications is done before a barrier is
// Rows a thread needs to be worth its own pass over the weights; in a layer of so much work, all steps together, fewer
// of few weights, and fewer still where sharing units is not worth it.
constexpr int64_t kRowsToShareRows = 6, kFewRowsToShare = 4, kFewestRowsToShare = 2;
constexpr int64_t kWorkToShareFewRows = 1 << 20;
constexpr int64_t kWeightsOfFewRows = 1 << 18, kWeightsOfFewRowsInAmx = 1 << 15;  // tiles are soon done with a row
constexpr int64_t kWorkToShareUnitsBackward = 1 << 18;  // rather than two rows each: it reads the others' dg, too
constexpr int64_t kNumbersToShare = 131072;             // numbers to add or multiply, likewise
constexpr int64_t kGradientsToShare = 1 << 22;  // multiplications of small products whose operands one thread has
// More weights than a core's own cache holds, and few rows to make up for reading them: each thread reads its share of
// them at a step, rather than all of them for its rows.
constexpr int64_t kWeightsToStream = 1 << 18;
constexpr int64_t kWeightsToStreamBackward = 1 << 20;  // a thread then reads the others' dg, too, not only their h
constexpr int64_t kRowsToShareUnits = 16;
constexpr int64_t kBytesToAskFor = 16 << 10;      // of what other members computed at a step; a third of a first cache
constexpr int64_t kWorkToMeasure = 1 << 26;       // a thread's multiplications that tell how fast it is
constexpr int64_t kWorkToMeasureInAmx = 1 << 29;  // takes about as long
constexpr int64_t kBytesToFold = 1 << 20;         // of W_ih and W_hh, of which each step then reads both
constexpr int64_t kChunkBytes = 2 << 20;          // gx that threads compute together ahead of the steps
constexpr int64_t kChunkRows = 256;               // at least: a product of a few rows reads all panels for them
constexpr int64_t kChunkBytesNear = 1 << 18;  // x and gx that a thread computes for itself: its own cache holds them
// Kept planes of so many bytes are gone from the caches when backward wants them: they go to memory at once, without
// being fetched from there before. In whole lines.
constexpr int64_t kBytesToStream = 16 << 20;
constexpr int64_t kBackwardChunkBytes = 4 << 20;  // dg kept for the weight gradients
constexpr int64_t kBackwardChunkRows = 2048;      // at least: their products pack what they multiply once a chunk

// Between types, too: the one that is stored and the one that is computed in.
template <class To, class From>
void copy_or_zero(To* to, const From* from, int64_t numbers) {
  using V = Vec<Compute<To>>;
  if (!from) {
    memset(static_cast<void*>(to), 0, numbers * sizeof(To));
  } else if (sizeof(To) == sizeof(From)) {
    memcpy(static_cast<void*>(to), from, numbers * sizeof(To));
  } else {
    for (int64_t i = 0; i < numbers; i += V::size) V::load(from + i, numbers - i).store(to + i, numbers - i);
  }
}

// Where sums grow in the type that is computed in: the caller's memory, or, where that is of another type, memory of
// its own, which is rounded once, into the caller's, at the end.
template <class T>
class Result {
 public:
  using A = Compute<T>;

  // Null, if nobody asked and it is not needed anyway.
  void open(T* to, int64_t numbers, bool needed = false) {
    to_ = to, numbers_ = numbers;
    if constexpr (sizeof(A) == sizeof(T)) data_ = to;
    if (!data_ && (to || needed)) data_ = memory_.allocate(numbers);
  }
  A* get() const { return data_; }
  void close(int threads) {
    if (sizeof(A) == sizeof(T) || !to_) return;
    constexpr int64_t kGrain = 1 << 14;
    parallel_for(numbers_ >= kNumbersToShare ? threads : 1, (numbers_ + kGrain - 1) / kGrain, [&](int64_t i) {
      const int64_t begin = i * kGrain, end = begin + kGrain < numbers_ ? begin + kGrain : numbers_;
      copy_or_zero(to_ + begin, data_ + begin, end - begin);
    });
  }

 private:
  T* to_ = nullptr;
  A* data_ = nullptr;
  int64_t numbers_ = 0;
  Workspace<A> memory_;
};

// What other threads have just written comes line by line from their caches: all lines are under way at the same time
// where a product would ask for a few at a time. Of more than some the first would be gone again.
// Inlined: GCC leaves out a call of a function that does nothing else.
template <class T>
FASTSEQ_INLINE void ask_for(const T* from, int64_t ld, int64_t rows, int64_t numbers) {
  if (rows * numbers * static_cast<int64_t>(sizeof(T)) > kBytesToAskFor) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < numbers; i += kLineNumbers<T>) __builtin_prefetch(from + r * ld + i);
}

// A direction walks the steps s = 0..T-1 in its own order: t = s, or t = T-1-s for the reverse one.
struct Walk {
  const Schedule* schedule;
  bool reverse;

  int64_t time(int64_t s) const { return reverse ? schedule->steps - 1 - s : s; }

  // At t, the rows below `carried` continue from time `from`; the rows above start here, from the initial state.
  struct Previous {
    int64_t carried, from;
  };
  Previous previous(int64_t t) const {
    const int64_t from = reverse ? t + 1 : t - 1;
    if (from < 0 || from >= schedule->steps) return {0, 0};
    const int64_t there = schedule->rows(from), here = schedule->rows(t);
    return {there < here ? there : here, from};
  }
  // The rows of `mine` that are alive at t.
  Range alive(int64_t t, Range mine) const {
    const int64_t rows = schedule->rows(t), end = mine.end < rows ? mine.end : rows;
    return {mine.begin, end > mine.begin ? end : mine.begin};
  }
  // The packed rows that steps [s0, s1) read and write.
  Range packed_rows(int64_t s0, int64_t s1) const {
    const int64_t a = time(s0), b = time(s1 - 1);
    return reverse ? Range{schedule->offset(b), schedule->offset(a + 1)}
                   : Range{schedule->offset(a), schedule->offset(b + 1)};
  }
};

// A piece of the rows of a step, all of them with a predecessor or all of them without.
struct Segment {
  Range rows;
  bool initial;
};
// The rows of `mine` that are alive at t, in at most two segments; returns how many.
inline int segments(const Walk& walk, int64_t t, Range mine, Segment out[2]) {
  const int64_t end = walk.alive(t, mine).end;
  const int64_t carried = walk.previous(t).carried;
  const int64_t split = carried < mine.begin ? mine.begin : carried < end ? carried : end;
  int n = 0;
  if (mine.begin < split) out[n++] = {{mine.begin, split}, false};
  if (split < end) out[n++] = {{split, end}, true};
  return n;
}

// Who computes what. Rows are independent, so groups of rows need no barrier in the time loop; the members of one group
// share its rows' units and meet at every step. Directions are independent too.
struct Plan {
  int directions, row_groups, members;
  int tasks() const { return directions * row_groups; }
};

// What a step is made of.
struct Work {
  int64_t weights;      // numbers that one row is multiplied with
  int64_t rows;         // of all steps
  int64_t parts;        // that members can share
  bool in_place;        // the weights are not packed: each is best read by one thread
  int64_t to_stream;    // so many weights, too, of few rows
  int64_t few;          // of fewer weights a few rows are worth a pass over them
  int64_t worth_units;  // multiplications of a step from which sharing units is better than two rows each
};

inline Plan make_plan(int team, int directions, int64_t batch, const Work& work) {
  Plan plan{directions, 1, 1};
  const int share = team / directions;  // threads a direction can have
  if (share <= 1) return plan;
  const bool streams = work.in_place || (work.weights >= work.to_stream && batch <= kRowsToShareUnits);
  const int64_t of_a_step = batch * work.weights;
  int64_t least = kRowsToShareRows;
  if (work.weights < work.few && work.weights * work.rows >= kWorkToShareFewRows)
    least = of_a_step >= work.worth_units ? kFewRowsToShare : kFewestRowsToShare;
  if (batch >= share * least && !streams) {
    plan.row_groups = share;
  } else if (of_a_step >= kWorkToShareUnits) {
    plan.members = static_cast<int>(share < work.parts ? share : work.parts);
  }
  return plan;
}

// How groups share the rows of a direction: by what each has got done in the steps before, as processors are not
// equally fast, and others may want them, too.
class RowShares {
 public:
  static constexpr int kMost = 512;

  void begin(int groups) {
    groups_ = groups;
    for (int i = 0; i <= groups; ++i) cuts_[i] = kAll * i / groups;
  }
  int groups() const { return groups_; }

  struct Group {
    Range rows;
    int64_t row_steps;
  };
  // Consecutive rows, which have group i's part of what is to be done at some times.
  Group group(const Schedule& schedule, Range times, int i) const {
    if (!schedule.batch_sizes) {
      const Range rows{schedule.batch * cuts_[i] / kAll, schedule.batch * cuts_[i + 1] / kAll};
      return {rows, (rows.end - rows.begin) * (times.end - times.begin)};
    }
    const int64_t total = schedule.offset(times.end) - schedule.offset(times.begin);
    const int64_t from = total * cuts_[i] / kAll, to = total * cuts_[i + 1] / kAll;
    Group out{{schedule.batch, schedule.batch}, 0};
    int64_t end = times.end, done = 0;  // of row r, and of all rows before it
    for (int64_t r = 0; r < schedule.batch; ++r) {
      if (out.rows.begin == schedule.batch && done >= from) out.rows.begin = r;
      if (i + 1 < groups_ && done >= to) {
        out.rows.end = r;
        break;
      }
      while (end > times.begin && schedule.rows(end - 1) <= r) --end;
      done += end - times.begin;
      if (out.rows.begin <= r) out.row_steps += end - times.begin;
    }
    return out;
  }

  void took(int i, int64_t row_steps, int64_t nanoseconds) { done_[i] = row_steps, took_[i] = nanoseconds; }
  // After all groups have said what they have done.
  void adjust() {
    double speeds[kMost], all = 0;
    int64_t longest = 0, sum = 0;
    for (int i = 0; i < groups_; ++i) {
      if (done_[i] <= 0 || took_[i] <= 0) return;
      speeds[i] = static_cast<double>(done_[i]) / static_cast<double>(took_[i]);
      all += speeds[i];
      sum += took_[i];
      if (took_[i] > longest) longest = took_[i];
    }
    if (longest * groups_ <= sum + sum / kWorthwhile) return;
    // Nobody is left without rows: he could not be seen to be fast again.
    const double least = all / (4 * groups_);
    double sum_of_parts = 0, so_far = 0;
    for (int i = 0; i < groups_; ++i) {
      if (speeds[i] < least) speeds[i] = least;
      sum_of_parts += speeds[i];
    }
    for (int i = 0; i + 1 < groups_; ++i) {
      so_far += speeds[i];
      cuts_[i + 1] = static_cast<int64_t>(kAll * (so_far / sum_of_parts));
    }
  }

 private:
  static constexpr int64_t kAll = 1 << 20;
  static constexpr int64_t kWorthwhile = 24;  // the part of the time that is to be gained
  int groups_ = 0;
  int64_t cuts_[kMost + 1], done_[kMost], took_[kMost];
};

// Runs loop(direction, rows, share, barrier) for every part of the plan of some steps. `shares`, one a direction, are
// from the steps before.
template <class Loop>
void run_plan(int threads, const Schedule& schedule, Range steps, int directions, const Work& work, RowShares* shares,
              const Loop& loop) {
  if (threads > RowShares::kMost) threads = RowShares::kMost;
  Workspace<Barrier> memory;
  const int groups = threads > directions ? threads : directions;
  Barrier* barriers = memory.zeros(groups);
  for (int i = 0; i < groups; ++i) barriers[i].begin();
  const Plan expected = make_plan(threads, directions, schedule.batch, work);
  if (shares->groups() != expected.row_groups)
    for (int d = 0; d < directions; ++d) shares[d].begin(expected.row_groups);
  const int all = expected.tasks() * expected.members;
  bool as_expected = false;
  parallel(threads < all ? threads : all, [&](int member, int team) {
    // From the team that came, which may be smaller than the one asked for.
    const Plan plan = make_plan(team, directions, schedule.batch, work);
    const bool same = plan.row_groups == expected.row_groups;
    if (member == 0) as_expected = same && plan.tasks() <= team;
    if (plan.members > 1) {
      const int task = member / plan.members;
      if (task < plan.tasks())
        loop(task, Range{0, schedule.batch}, Share{member % plan.members, plan.members}, barriers[task]);
      return;
    }
    RowShares others;
    if (!same) others.begin(plan.row_groups);
    for (int task = member; task < plan.tasks(); task += team) {
      const int d = task / plan.row_groups, group = task % plan.row_groups;
      const Range times = d == 0 ? steps : Range{schedule.steps - steps.end, schedule.steps - steps.begin};
      const RowShares::Group mine = (same ? shares[d] : others).group(schedule, times, group);
      const int64_t begin = Crowd::now();
      loop(d, mine.rows, Share{0, 1}, barriers[task]);
      if (same) shares[d].took(group, mine.row_steps, Crowd::now() - begin);
    }
  });
  if (as_expected && expected.row_groups > 1)
    for (int d = 0; d < directions; ++d) shares[d].adjust();
}

// Steps after which it pays to look at how the rows are shared; all, where they are not.
template <class T>
int64_t steps_to_measure(const Plan& plan, const Schedule& schedule, const Work& work) {
  const int64_t of_a_step = work.weights * schedule.batch / plan.row_groups;
  if (plan.row_groups == 1 || of_a_step <= 0) return schedule.steps > 0 ? schedule.steps : 1;
  const int64_t enough = kInAmx<T> ? kWorkToMeasureInAmx : kWorkToMeasure;
  return (enough + of_a_step - 1) / of_a_step;
}

// Steps whose GEMM runs together, of so many rows each: enough rows for it to run at speed, few enough for the memory
// it may take.
inline int64_t steps_per_chunk(int64_t step_rows, int64_t bytes_per_row, int64_t target_bytes, int64_t least_rows) {
  int64_t rows = target_bytes / (bytes_per_row > 0 ? bytes_per_row : 1);
  if (rows < least_rows) rows = least_rows;
  const int64_t steps = rows / (step_rows > 0 ? step_rows : 1);
  return steps < 1 ? 1 : steps;
}
