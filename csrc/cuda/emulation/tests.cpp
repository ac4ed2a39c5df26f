// The emulation's own tests: of each thing that a kernel may use, what CUDA and the PTX ISA's manual say of it; of each
// mistake that is to be seen, that it is, and how it is told.
#include <alloca.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <random>

#include "../ptx.h"
#include "../tests/device_memory.h"
#include "tests/check.h"

namespace fastseq::test {
namespace {

using namespace cuda;
using emulation::Order;

template <class Body>
void run(dim3 grid, dim3 block, std::size_t shared, const Body& body) {
  must(emulation::run(false, grid, block, shared, body), "a launch");
}
template <class Body>
void run_cooperative(dim3 grid, dim3 block, std::size_t shared, const Body& body) {
  must(emulation::run(true, grid, block, shared, body), "a cooperative launch");
}

struct Schedule {
  const char* name;
  Order order;
  uint64_t seed;
};
const Schedule kSchedules[] = {
    {"first to last", Order::first_to_last, 0},
    {"last to first", Order::last_to_first, 0},
    {"random 1", Order::random, 1},
    {"random 2", Order::random, 2}};
template <class Use>
void with_each_schedule(Report& report, const char* what, const Use& use) {
  for (const Schedule& schedule : kSchedules) {
    report.where = std::string(what) + ", " + schedule.name;
    emulation::set_schedule(schedule.order, schedule.seed);
    use();
  }
  emulation::set_schedule(Order::first_to_last, 0);
}

// Numbers in plain sight of all threads, as in global memory.
template <class T>
using Global = std::vector<T>;
// What all threads may add to, in no order.
struct Count : std::atomic<int> {
  Count() : std::atomic<int>(0) {}
  void operator+=(int more) { fetch_add(more, std::memory_order_relaxed); }
};

void equal(Report& report, const char* what, double got, double expected) {
  report.check(got == expected, what, [&] {
    std::ostringstream out;
    out << "expected " << expected << ", got " << got;
    return out.str();
  });
}
template <class T>
void all_equal(Report& report, const char* what, const Global<T>& got, const Global<T>& expected) {
  report.check(got.size() == expected.size(), what, [] { return "another number of them"; });
  report.same_bits(what, got.data(), expected.data(), static_cast<int64_t>(expected.size()));
}

// ---- Threads and their order ---------------------------------------------------------------------------------------
void check_places(Report& report) {
  with_each_schedule(report, "places", [&] {
    const dim3 grid(2, 3, 2), block(5, 2, 3);
    Global<int> times(12 * 30, 0);
    Count wrong;
    run(grid, block, 0, [&] {
      wrong += blockDim.x != 5 || blockDim.y != 2 || blockDim.z != 3;
      wrong += gridDim.x != 2 || gridDim.y != 3 || gridDim.z != 2;
      const unsigned in_block = threadIdx.x + 5 * (threadIdx.y + 2 * threadIdx.z);
      ++times[30 * (blockIdx.x + 2 * (blockIdx.y + 3 * blockIdx.z)) + in_block];
      wrong += emulation::lane() != static_cast<int>(in_block % 32);
    });
    equal(report, "sizes", wrong, 0);
    all_equal(report, "every thread once", times, Global<int>(12 * 30, 1));
  });
}

Global<int> order_of_threads(Order order, uint64_t seed) {
  emulation::set_schedule(order, seed);
  Global<int> out(4 * 64);
  std::atomic<int> came{0};
  const auto come = [&] {
    out[came.fetch_add(1, std::memory_order_relaxed)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  };
  run_cooperative(2, 32, 0, [&] {
    come();
    __syncthreads();
    come();
    grid_sync();
    come();
    __syncwarp();
    come();
  });
  emulation::set_schedule(Order::first_to_last, 0);
  return out;
}

void check_schedules(Report& report) {
  report.where = "schedules";
  const Global<int> first = order_of_threads(Order::first_to_last, 0), last = order_of_threads(Order::last_to_first, 0);
  const Global<int> random = order_of_threads(Order::random, 1);
  const auto rising = [](const Global<int>& order, int begin) {
    return std::is_sorted(order.begin() + begin, order.begin() + begin + 32);
  };
  report.check(rising(first, 0), "first to last", [] { return "is in another order"; });
  report.check(!rising(last, 0) && std::is_sorted(last.rbegin() + 4 * 64 - 32, last.rend()), "last to first",
               [] { return "is in another order"; });
  report.check(last[0] == 63, "last to first", [] { return "does not begin with the last"; });
  report.check(first != random && last != random, "random", [] { return "is no other order"; });
  report.check(random == order_of_threads(Order::random, 1), "random", [] { return "does not repeat by its seed"; });
  report.check(random != order_of_threads(Order::random, 2), "random", [] { return "is the same for another seed"; });
  for (const Global<int>* order : {&first, &last, &random}) {
    Global<int> times(64, 0);
    for (int thread : *order) ++times[thread];
    all_equal(report, "every thread came four times", times, Global<int>(64, 4));
  }
  // Blocks that need not be there at once come one after another, in either order.
  for (const Order order : {Order::first_to_last, Order::last_to_first}) {
    emulation::set_schedule(order, 0);
    Global<int> blocks(3);
    std::atomic<int> came{0};
    run(3, 1, 0, [&] { blocks[came.fetch_add(1, std::memory_order_relaxed)] = static_cast<int>(blockIdx.x); });
    all_equal(report, "blocks", blocks, order == Order::first_to_last ? Global<int>{0, 1, 2} : Global<int>{2, 1, 0});
  }
  emulation::set_schedule(Order::first_to_last, 0);
}

void check_meetings(Report& report) {
  with_each_schedule(report, "__syncthreads", [&] {
    constexpr int kThreads = 96, kRounds = 5;
    Global<int> got(kThreads);
    run(1, kThreads, 2 * kThreads * sizeof(int), [&] {
      FASTSEQ_SHARED(shared);
      int* const numbers = reinterpret_cast<int*>(shared);
      const int thread = threadIdx.x;
      int mine = thread;
      for (int round = 0; round < kRounds; ++round) {  // two buffers, so that one barrier a round is enough
        int* const here = numbers + round % 2 * kThreads;
        here[thread] = mine;
        __syncthreads();
        mine = here[(thread + 7) % kThreads];
      }
      got[thread] = mine;
    });
    Global<int> expected(kThreads);
    for (int i = 0; i < kThreads; ++i) expected[i] = (i + 7 * kRounds) % kThreads;
    all_equal(report, "numbers passed on", got, expected);
  });
  with_each_schedule(report, "__syncwarp", [&] {
    constexpr int kThreads = 64;
    Global<int> got(kThreads);
    run(1, kThreads, kThreads * sizeof(int), [&] {
      FASTSEQ_SHARED(shared);
      int* const numbers = reinterpret_cast<int*>(shared) + threadIdx.x / 32 * 32;
      const int lane = threadIdx.x % 32;
      numbers[lane] = static_cast<int>(threadIdx.x);
      __syncwarp();
      got[threadIdx.x] = numbers[31 - lane];
    });
    Global<int> expected(kThreads);
    for (int i = 0; i < kThreads; ++i) expected[i] = i / 32 * 32 + 31 - i % 32;
    all_equal(report, "numbers of the warp", got, expected);
  });
  with_each_schedule(report, "grid_sync", [&] {
    constexpr int kBlocks = 5, kThreads = 32, kAll = kBlocks * kThreads, kRounds = 4;
    Global<int> numbers(2 * kAll), got(kAll);
    run_cooperative(dim3(1, kBlocks), kThreads, 0, [&] {
      const int at = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
      int mine = at;
      for (int round = 0; round < kRounds; ++round) {
        numbers[round % 2 * kAll + at] = mine;
        grid_sync();
        mine = numbers[round % 2 * kAll + (at + kThreads + 1) % kAll];
      }
      got[at] = mine;
    });
    Global<int> expected(kAll);
    for (int i = 0; i < kAll; ++i) expected[i] = (i + (kThreads + 1) * kRounds) % kAll;
    all_equal(report, "numbers of other blocks", got, expected);
  });
  with_each_schedule(report, "poll", [&] {
    constexpr int kBlocks = 3;
    std::atomic<int> turn{0};
    Global<int> order;
    run_cooperative(kBlocks, 1, 0, [&] {
      const int block = static_cast<int>(blockIdx.x);
      while (turn.load() != (block + 2) % kBlocks) emulation::poll();
      order.push_back(block);
      turn.store((block + 2) % kBlocks + 1);
    });
    all_equal(report, "blocks that wait for their turns", order, {1, 2, 0});
  });
}

// A sum whose bits depend on the order of its terms, in the order that the kernel says.
void check_same_results(Report& report) {
  Global<float> first;
  with_each_schedule(report, "a right kernel", [&] {
    constexpr int kThreads = 128, kBlocks = 3;
    Global<float> sums(kBlocks * kThreads);
    run(kBlocks, kThreads, kThreads * sizeof(float), [&] {
      FASTSEQ_SHARED(shared);
      float* const numbers = reinterpret_cast<float*>(shared);
      numbers[threadIdx.x] = std::sin(1.7f * static_cast<float>(threadIdx.x + blockIdx.x));
      __syncthreads();
      float sum = 0;
      for (int i = 0; i < kThreads; ++i) sum += numbers[(i * 5 + threadIdx.x) % kThreads];
      for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      sums[blockIdx.x * kThreads + threadIdx.x] = sum;
    });
    if (first.empty()) first = sums;
    all_equal(report, "sums", sums, first);
  });
}

// ---- Warps ---------------------------------------------------------------------------------------------------------
struct Large {
  uint32_t words[8];

  friend std::ostream& operator<<(std::ostream& out, const Large& x) { return out << x.words[0] << " and more"; }
};

template <class T, class Make>
void check_shuffles(Report& report, const char* type, const Make& make) {
  constexpr int kThreads = 64;
  with_each_schedule(report, type, [&] {
    const auto check = [&](const char* what, const auto& shuffle, const auto& from) {
      Global<T> got(kThreads), expected(kThreads);
      run(1, kThreads, 0, [&] {
        T mine = make(threadIdx.x);
        for (int i = 0; i < 3; ++i) shuffle(mine);  // slots are used in turns: nobody sees an older meeting's
        got[threadIdx.x] = shuffle(mine);
      });
      for (int i = 0; i < kThreads; ++i) expected[i] = make(i / 32 * 32 + from(i % 32));
      all_equal(report, what, got, expected);
    };
    for (int n = 0; n < 32; ++n) {
      check("__shfl_sync", [&](T x) { return __shfl_sync(~0u, x, n); }, [&](int) { return n; });
      check("__shfl_xor_sync", [&](T x) { return __shfl_xor_sync(~0u, x, n); }, [&](int i) { return i ^ n; });
      check(
          "__shfl_down_sync", [&](T x) { return __shfl_down_sync(~0u, x, n); },
          [&](int i) { return i + n < 32 ? i + n : i; });
      check(
          "__shfl_up_sync", [&](T x) { return __shfl_up_sync(~0u, x, n); }, [&](int i) { return i >= n ? i - n : i; });
    }
    check(
        "__shfl_sync of each its own", [&](T x) { return __shfl_sync(~0u, x, emulation::lane() * 7 + 3); },
        [&](int i) { return (i * 7 + 3) % 32; });
  });
}

void check_votes(Report& report) {
  with_each_schedule(report, "votes", [&] {
    for (const unsigned votes : {0u, ~0u, 1u, 0x80000000u, 0x12345678u}) {
      Global<unsigned> ballot(64), any(64), all(64);
      run(1, 64, 0, [&] {
        // The second warp votes otherwise.
        const int vote = ((threadIdx.x < 32 ? votes : ~votes) >> threadIdx.x % 32 & 1) * 5;
        ballot[threadIdx.x] = __ballot_sync(~0u, vote);
        any[threadIdx.x] = __any_sync(~0u, vote) != 0;
        all[threadIdx.x] = __all_sync(~0u, vote) != 0;
      });
      for (int i = 0; i < 64; ++i) {
        const unsigned here = i < 32 ? votes : ~votes;
        equal(report, "__ballot_sync", ballot[i], here);
        equal(report, "__any_sync", any[i], here != 0);
        equal(report, "__all_sync", all[i], here == ~0u);
      }
    }
  });
}

// ---- Tensor cores --------------------------------------------------------------------------------------------------
// Whole numbers that each type has exactly, and whose sums float has: results do not depend on the order of sums.
int small(int i) { return (i * 37 + i / 7) % 17 - 8; }

template <class T>
uint32_t bits_of(T x) {
  uint32_t out = 0;
  std::memcpy(&out, &x, sizeof x);
  return out;
}

// Fragments as in the PTX ISA's manual, "Matrix fragments for mma.m16n8k16 with floating point type" and "for
// mma.m16n8k8" of .tf32: row and column of number i of a lane.
struct At {
  int row, column;
};
template <class T>
struct FragmentsOf {
  static constexpr bool kHalves = sizeof(T) == 2;
  static constexpr int kDepth = kHalves ? 16 : 8, kA = kHalves ? 8 : 4, kB = kHalves ? 4 : 2;

  static At a(int lane, int i) {
    const int group = lane >> 2, in_group = lane % 4;
    if (!kHalves) return {i == 0 || i == 2 ? group : group + 8, i < 2 ? in_group : in_group + 4};
    return {i < 2 || (i >= 4 && i < 6) ? group : group + 8, in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
  }
  static At b(int lane, int i) {
    const int group = lane >> 2, in_group = lane % 4;
    if (!kHalves) return {i == 0 ? in_group : in_group + 4, group};
    return {in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
  }
  static At c(int lane, int i) {
    const int group = lane >> 2, in_group = lane % 4;
    return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
  }
};

template <class T>
void check_mma(Report& report, const char* type) {
  using Of = FragmentsOf<T>;
  with_each_schedule(report, (std::string("mma of ") + type).c_str(), [&] {
    constexpr int kDepth = Of::kDepth;
    const auto a_at = [](At at) { return small(at.row * kDepth + at.column); };
    const auto b_at = [](At at) { return small(1000 + at.row * 8 + at.column); };
    const auto c_at = [](At at) { return 3 * small(2000 + at.row * 8 + at.column); };
    Global<float> got(2 * 16 * 8), expected(2 * 16 * 8);
    run(1, 64, 0, [&] {  // the second warp has a times 2
      const int lane = emulation::lane(), warp = threadIdx.x / 32;
      uint32_t a[4] = {}, b[2] = {};
      float d[4];
      constexpr int kPlaces = 4 / sizeof(T);
      for (int i = 0; i < Of::kA; ++i)
        a[i / kPlaces] |= bits_of(number<T>((1 + warp) * a_at(Of::a(lane, i)))) << 16 * (i % kPlaces);
      for (int i = 0; i < Of::kB; ++i) b[i / kPlaces] |= bits_of(number<T>(b_at(Of::b(lane, i)))) << 16 * (i % kPlaces);
      for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(c_at(Of::c(lane, i)));
      mma<T>(d, a, b);
      for (int i = 0; i < 4; ++i) {
        const At at = Of::c(lane, i);
        got[(warp * 16 + at.row) * 8 + at.column] = d[i];
      }
    });
    for (int warp = 0; warp < 2; ++warp)
      for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
          int sum = c_at({row, column});
          for (int k = 0; k < kDepth; ++k) sum += (1 + warp) * a_at({row, k}) * b_at({k, column});
          expected[(warp * 16 + row) * 8 + column] = static_cast<float>(sum);
        }
    all_equal(report, "a times b", got, expected);
  });
}

void check_mma_sees_11_bits(Report& report) {
  report.where = "mma of float";
  Global<float> got(32);
  run(1, 32, 0, [&] {
    uint32_t a[4] = {}, b[2] = {as_word(1.0f), 0};
    a[0] = as_word(1 + 0x1p-10f + 0x1p-11f + 0x1p-23f);  // by all 32 lanes: every sum of row g has four of these
    float d[4] = {};
    mma<float>(d, a, b);
    got[emulation::lane()] = d[0];
  });
  all_equal(report, "lower bits are not seen", got, Global<float>(32, 4 * (1 + 0x1p-10f)));
}

void check_ldmatrix(Report& report) {
  with_each_schedule(report, "ldmatrix", [&] {
    for (const bool transposed : {false, true}) {
      Global<uint32_t> got(32 * 4), expected(32 * 4);
      const auto number_at = [](int matrix, int row, int column) {
        return static_cast<uint16_t>(1000 * matrix + 64 * row + column);
      };
      run(1, 32, 4 * 8 * 48, [&] {
        FASTSEQ_SHARED(shared);
        const int lane = emulation::lane(), matrix = lane / 8, row = lane % 8;
        // Rows need not be side by side: these are 48 bytes apart, backwards.
        uint16_t* const mine = reinterpret_cast<uint16_t*>(shared + (31 - lane) * 48);
        for (int column = 0; column < 8; ++column) mine[column] = number_at(matrix, row, column);
        __syncwarp();
        uint32_t to[4];
        if (transposed) ldmatrix_transposed(to, mine);
        else ldmatrix(to, mine);
        for (int m = 0; m < 4; ++m) got[lane * 4 + m] = to[m];
      });
      for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m) {
          const int line = lane / 4, first = 2 * (lane % 4);
          const uint32_t low = transposed ? number_at(m, first, line) : number_at(m, line, first);
          const uint32_t high = transposed ? number_at(m, first + 1, line) : number_at(m, line, first + 1);
          expected[lane * 4 + m] = low | high << 16;
        }
      all_equal(report, transposed ? "transposed" : "as they lie", got, expected);
    }
  });
}

// ---- Memory --------------------------------------------------------------------------------------------------------
bool full_of(const void* data, int byte, std::size_t bytes) {
  const auto* const at = static_cast<const unsigned char*>(data);
  return std::all_of(at, at + bytes, [&](unsigned char x) { return x == byte; });
}

void check_cp_async(Report& report) {
  report.where = "cp_async";
  alignas(16) unsigned char global[8][16];
  for (int i = 0; i < 8; ++i) std::memset(global[i], 10 + i, 16);
  const auto check = [&](bool ok, const char* what) { report.check(ok, what, [] { return "is not what is there"; }); };
  run(1, 1, 8 * 16, [&] {
    FASTSEQ_SHARED(shared);
    std::memset(shared, 0, 8 * 16);
    const auto has = [&](int place, int byte) { return full_of(shared + 16 * place, byte, 16); };
    cp_async(shared, global[0], true);
    check(has(0, 0xff), "NaN before the wait");
    cp_async_commit();
    check(has(0, 0xff), "NaN after the commit");
    cp_async_wait<0>();
    check(has(0, 10), "the numbers after the wait");

    // Three groups, of two copies, of none and of one, and a copy that nobody has committed.
    cp_async(shared + 16, global[1], true), cp_async(shared + 32, global[2], true);
    cp_async_commit();
    cp_async_commit();
    cp_async(shared + 48, global[3], true);
    cp_async_commit();
    cp_async(shared + 64, global[4], true);
    cp_async_wait<3>();
    check(has(1, 0xff) && has(2, 0xff) && has(3, 0xff) && has(4, 0xff), "three groups may be under way");
    cp_async_wait<2>();
    check(has(1, 11) && has(2, 12) && has(3, 0xff) && has(4, 0xff), "two groups may be under way");
    cp_async_wait<1>();
    check(has(3, 0xff), "one group may be under way");
    cp_async_wait<0>();
    check(has(3, 13) && has(4, 0xff), "what was not committed is not waited for");
    cp_async_commit();
    cp_async_wait<0>();
    check(has(4, 14), "what was committed is");

    cp_async(shared + 80, nullptr, false);
    check(has(5, 0xff), "NaN before zeros");
    cp_async_commit();
    cp_async_wait<0>();
    check(has(5, 0), "zeros, and nothing read");

    for (int i = 0; i < emulation::AsyncCopies::kMost; ++i) cp_async(shared + 96, global[i % 8], true);
    cp_async_commit();
    cp_async_wait<0>();
    check(has(6, 17), "as many as there may be");
  });
  // A thread's copies are its own: another's wait does nothing to them.
  run(1, 32, 32 * 16, [&] {
    FASTSEQ_SHARED(shared);
    const int thread = threadIdx.x;
    cp_async(shared + 16 * thread, global[thread % 8], true);
    cp_async_commit();
    if (thread != 3) cp_async_wait<0>();
    __syncthreads();
    if (thread == 0)
      for (int i = 0; i < 32; ++i) check(full_of(shared + 16 * i, i == 3 ? 0xff : 10 + i % 8, 16), "of each thread");
    __syncthreads();
    cp_async_wait<0>();
  });
  report.where = "load_l2";
  const Words4 words{{1, 2, 3, 4}};
  run(1, 1, 0, [&] {
    const Words4 got = load_l2(&words);
    check(std::memcmp(&got, &words, sizeof words) == 0, "four words");
  });
}

void check_shared_memory(Report& report) {
  with_each_schedule(report, "shared memory", [&] {
    for (const std::size_t bytes : {std::size_t(1), std::size_t(1000), std::size_t(227 << 10)}) {
      Count wrong;
      run(3, 2, bytes, [&] {
        FASTSEQ_SHARED(shared);
        wrong += reinterpret_cast<uintptr_t>(shared) % 128 != 0;
        if (threadIdx.x == 0) wrong += !full_of(shared, 0xff, bytes);  // also where a block before has written
        __syncthreads();
        if (threadIdx.x == 0) std::memset(shared, 1, bytes);
        __syncthreads();
        if (threadIdx.x == 1) wrong += !full_of(shared, 1, bytes);
        wrong += emulation::shared_bytes() != bytes;
      });
      equal(report, "aligned, full of NaN, and the block's own", wrong, 0);
    }
    Global<unsigned char*> places(2);
    run_cooperative(2, 1, 64, [&] {
      FASTSEQ_SHARED(shared);
      places[blockIdx.x] = shared;
      grid_sync();
    });
    report.check(places[0] != places[1], "of two blocks", [] { return "is the same"; });
  });
}

// ---- Numbers -------------------------------------------------------------------------------------------------------
// The nearest of the type's numbers, ties to even: those of one sign have the order of their bits.
template <class T>
uint16_t nearest_bits(float x) {
  constexpr int kInfinityBits = std::is_same_v<T, float16> ? 0x7c00 : 0x7f80;
  const auto size_of = [](int bits) {
    const auto finite = [](int b) { return static_cast<double>(value(T{static_cast<uint16_t>(b)})); };
    return bits < kInfinityBits ? finite(bits) : 2 * finite(kInfinityBits - 1) - finite(kInfinityBits - 2);
  };
  if (std::isnan(x)) return 0x7fff;
  const double size = std::fabs(static_cast<double>(x));
  int low = 0, high = kInfinityBits;  // size_of(low) <= size < size_of(high), or all of it is too large
  if (size >= size_of(kInfinityBits)) low = high;
  while (high - low > 1) (size_of((low + high) / 2) <= size ? low : high) = (low + high) / 2;
  const double below = size - size_of(low), above = size_of(high) - size;
  const int bits = below < above || (below == above && low % 2 == 0) ? low : high;
  return static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
}

// Of each number of 16 bits itself, what lies half-way to the next, and what lies beside that; and random bits, which
// are denormal, infinite or NaN now and then.
template <class T, class Use>
void for_many_floats(const Use& use) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const float x = value(T{static_cast<uint16_t>(bits)});
    const uint32_t half_way = as_word(x) + (std::is_same_v<T, float16> ? 0x1000 : 0x8000);
    for (const uint32_t word : {as_word(x), half_way, half_way - 1, half_way + 1}) use(as_float(word));
    if (std::fabs(x) < 0x1p-13f)  // where float16 has fewer bits
      for (const float beside : {-0x1p-26f, -0x1p-25f, 0x1p-25f, 0x1p-26f})
        for (const float much : {0.999999f, 1.0f, 1.000001f}) use(x + beside * much);
  }
  std::mt19937 random(5);
  for (int i = 0; i < 300000; ++i) use(as_float(static_cast<uint32_t>(random())));
  for (int i = 0; i < 300000; ++i) use(std::ldexp(static_cast<float>(random()), static_cast<int>(random() % 64) - 64));
  for (const float x : {65504.0f, 65519.0f, 65519.99609375f, 65520.0f, 65536.0f, 3.4028235e38f, 3.39e38f})
    use(x), use(-x);
}

template <class T>
void check_conversions(Report& report, const char* type) {
  report.where = type;
  int wrong = 0, wrong_way_back = 0;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const T x{static_cast<uint16_t>(bits)};
    const float got = to_float(x), expected = value(x);
    wrong += std::isnan(expected) ? !std::isnan(got) : as_word(got) != as_word(expected);
    wrong_way_back += from_float<T>(got).bits != (std::isnan(expected) ? 0x7fff : bits);
  }
  equal(report, "to_float of all: wrong", wrong, 0);
  equal(report, "and back: wrong", wrong_way_back, 0);
  wrong = 0;
  int wrong_pairs = 0;
  float before = 0;
  for_many_floats<T>([&](float x) {
    const uint16_t expected = nearest_bits<T>(x);
    wrong += from_float<T>(x).bits != expected;
    wrong_pairs += pack<T>(before, x) != (nearest_bits<T>(before) | static_cast<uint32_t>(expected) << 16);
    before = x;
  });
  equal(report, "from_float: wrong", wrong, 0);
  equal(report, "pack: wrong", wrong_pairs, 0);
}

void check_tf32(Report& report) {
  report.where = "round_to_tf32";
  int wrong = 0;
  const auto check = [&](float x) {
    const float got = round_to_tf32(x);
    if (!std::isfinite(x)) {
      wrong += std::isnan(x) ? !std::isnan(got) : got != x;
      return;
    }
    int exponent;
    std::frexp(static_cast<double>(x), &exponent);
    const double unit = std::ldexp(1.0, std::max(exponent, -125) - 11);  // of the last of 11 bits
    const float expected = static_cast<float>(std::round(static_cast<double>(x) / unit) * unit);  // ties from zero
    wrong += as_word(got) != as_word(expected);
  };
  for_many_floats<bfloat16>(check);
  for (const float x : {1.0f, 0x1p-130f, 0x1p-126f, 3.4e38f, 0x1.ffep+127f})
    for (const float sign : {1.0f, -1.0f})
      for (int i = -0x4000; i < 0x4000; ++i) check(sign * as_float(as_word(x) + i));
  equal(report, "wrong", wrong, 0);
  report.where = "exp2_approximate";
  equal(report, "of -infinity", exp2_approximate(-std::numeric_limits<float>::infinity()), 0);
  equal(report, "of 0", exp2_approximate(0), 1);
  equal(report, "of -3", exp2_approximate(-3), 0.125);
  report.where = "min and max";
  equal(report, "min", min(2, 3) + min(3, 2), 4);
  equal(report, "max", max(2, 3) + max(3, 2), 6);
}

// ---- What must fail ------------------------------------------------------------------------------------------------
void check_errors(Report& report) {
  report.where = "errors";
  const auto nothing = [] {};
  const auto expect = [&](const char* what, cudaError_t got, cudaError_t expected) {
    report.check(got == expected, what, [&] { return std::string(cudaGetErrorString(got)); });
  };
  const auto launched = [&](bool cooperative, dim3 grid, dim3 block, std::size_t shared) {
    return emulation::run(cooperative, grid, block, shared, nothing);
  };
  expect("no threads", launched(false, 1, 0, 0), cudaErrorInvalidConfiguration);
  expect("1,024 threads", launched(false, 1, dim3(16, 64), 0), cudaSuccess);
  expect("more threads", launched(false, 1, dim3(25, 41), 0), cudaErrorInvalidConfiguration);
  expect("too high a grid", launched(false, dim3(1, 65536), 1, 0), cudaErrorInvalidConfiguration);
  expect("too deep a grid", launched(false, dim3(1, 1, 65536), 1, 0), cudaErrorInvalidConfiguration);
  expect("all shared memory", launched(false, 1, 1, 227 << 10), cudaSuccess);
  expect("more of it", launched(false, 1, 1, (227 << 10) + 1), cudaErrorInvalidConfiguration);
  // 24 multiprocessors, one block each.
  expect("as many blocks at once as there can be", launched(true, 24, 32, 200 << 10), cudaSuccess);
  expect("more blocks", launched(true, 25, 32, 200 << 10), cudaErrorCooperativeLaunchTooLarge);
  expect("those without being there at once", launched(false, 25, 32, 200 << 10), cudaSuccess);
  emulation::device.multiprocessors = 3, emulation::device.threads_of_multiprocessor = 128;
  expect("two blocks of 64 threads each", launched(true, 6, 64, 0), cudaSuccess);
  expect("more threads at once", launched(true, 7, 64, 0), cudaErrorCooperativeLaunchTooLarge);
  expect("of a smaller device", launched(true, 4, 32, 200 << 10), cudaErrorCooperativeLaunchTooLarge);
  int of_device = 0;
  cudaDeviceGetAttribute(&of_device, cudaDevAttrMultiProcessorCount, 0);
  equal(report, "multiprocessors", of_device, 3);
  emulation::device = emulation::Device();
  expect("an empty grid", launch(+[](int) {}, dim3(3, 0), dim3(0), 0, nullptr, 1), cudaSuccess);
  for (const cudaError_t error :
       {cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorInvalidConfiguration,
        cudaErrorCooperativeLaunchTooLarge, cudaErrorNotSupported})
    report.check(std::strcmp(cudaGetErrorString(error), "unknown error") != 0, "cudaGetErrorString",
                 [&] { return "does not know " + std::to_string(error); });
}

// What a program of its own does, which is this one with the name as its argument: what it must say as it is stopped,
// or what of a sanitizer; nothing of one if that is empty.
enum class By { emulation, sanitizer };
struct Mistake {
  const char* name;
  By by;
  std::vector<const char*> told;
  std::function<void()> make;
};

// Threads write, and then, if they have met, read what others have written.
template <class Meet>
void write_and_read(bool cooperative, dim3 grid, int* numbers, const Meet& meet) {
  must(emulation::run(cooperative, grid, 32, 32 * sizeof(int),
                      [&] {
                        FASTSEQ_SHARED(shared);
                        int* const all = numbers ? numbers : reinterpret_cast<int*>(shared);
                        const unsigned count = 32 * gridDim.x, mine = 32 * blockIdx.x + threadIdx.x;
                        all[mine] = 1;
                        meet();
                        if (all[count - 1 - mine] == 2) __syncthreads();  // nobody has written that
                      }),
       "a launch");
}

std::vector<Mistake> mistakes() {
  const char* const stuck = "no thread can go on";
  const char* const unaligned_copy = "cp.async of an address that is not aligned";
  std::vector<Mistake> out{
      {"a barrier that some threads do not reach",
       By::emulation,
       {stuck, "at __syncthreads", "done", "block (1, 0, 0)"},
       [] {
         run(2, 64, 0, [] {
           if (blockIdx.x == 0 || threadIdx.x < 40) __syncthreads();
         });
       }},
      {"a grid sync that a block does not reach",
       By::emulation,
       {stuck, "at a grid sync", "block (0, 1, 0)"},
       [] {
         run_cooperative(dim3(1, 2), 32, 0, [] {
           if (blockIdx.y == 0) grid_sync();
         });
       }},
      {"a thread that waits for what nobody writes",
       By::emulation,
       {stuck, "waiting for what is in memory", "block (0, 0, 0)", "at __syncthreads"},
       [] {
         std::atomic<int> never{0};
         run(1, 64, 0, [&] {
           while (threadIdx.x == 7 && never.load() == 0) emulation::poll();
           __syncthreads();
         });
       }},
      {"a shuffle without a lane",
       By::emulation,
       {stuck, "at a meeting of its warp __shfl_xor_sync"},
       [] {
         run(1, 32, 0, [] {
           if (threadIdx.x != 5) __shfl_xor_sync(~0u, 1.0f, 1);
         });
       }},
      {"lanes at different places",
       By::emulation,
       {"lanes of a warp meet at different places"},
       [] {
         run(1, 32, 0, [] {
           if (threadIdx.x == 5) __syncwarp();
           else __shfl_sync(~0u, 1.0f, 1);
         });
       }},
      {"a warp that is not whole", By::emulation, {"not of whole warps"}, [] { run(1, 40, 0, [] { __syncwarp(); }); }},
      {"__syncwarp of some lanes",
       By::emulation,
       {"whole warps alone are emulated", "thread (0, 0, 0)"},
       [] { run(1, 32, 0, [] { __syncwarp(0xffff); }); }},
      {"cp_async to where it is not aligned",
       By::emulation,
       {unaligned_copy},
       [] {
         run(1, 1, 64, [] {
           FASTSEQ_SHARED(shared);
           cp_async(shared + 8, nullptr, false);
         });
       }},
      {"cp_async from where it is not aligned",
       By::emulation,
       {unaligned_copy},
       [] {
         const Words4 words[2] = {};
         run(1, 1, 64, [&] {
           FASTSEQ_SHARED(shared);
           cp_async(shared, reinterpret_cast<const char*>(words) + 4, true);
         });
       }},
      {"more cp_async than are emulated",
       By::emulation,
       {"more cp.async under way"},
       [] {
         run(1, 1, 64, [] {
           FASTSEQ_SHARED(shared);
           for (int i = 0; i <= emulation::AsyncCopies::kMost; ++i) cp_async(shared, nullptr, false);
         });
       }},
      {"ldmatrix of a row that is not aligned",
       By::emulation,
       {"ldmatrix of a row that is not aligned"},
       [] {
         run(1, 32, 1024, [] {
           FASTSEQ_SHARED(shared);
           uint32_t to[4];
           ldmatrix(to, shared + 16 * threadIdx.x + 8);
         });
       }},
      {"ldmatrix_transposed of a row that is not aligned",
       By::emulation,
       {"ldmatrix of a row that is not aligned"},
       [] {
         run(1, 32, 1024, [] {
           FASTSEQ_SHARED(shared);
           uint32_t to[4];
           ldmatrix_transposed(to, shared + 16 * threadIdx.x + 8);
         });
       }},
      {"a kernel that launches one",
       By::emulation,
       {"a kernel launches a kernel"},
       [] { run(1, 1, 0, [] { run(1, 1, 0, [] {}); }); }},
      {"a stack that overflows",
       By::emulation,
       {"stack has overflown", "thread (31, 0, 0)"},
       [] {
         run(1, 32, 0, [] {
           if (threadIdx.x < 31) return;  // below its stack is that of another, who is through
           auto* const bytes = static_cast<volatile unsigned char*>(alloca(emulation::stack_bytes));
           for (std::size_t i = 0; i < emulation::stack_bytes; ++i) bytes[i] = 1;
         });
       }},
  };
#if defined(__SANITIZE_ADDRESS__)
  out.push_back({"one byte past shared memory", By::sanitizer, {"heap-buffer-overflow"}, [] {
                   run(1, 2, 100, [] {
                     FASTSEQ_SHARED(shared);
                     shared[100] = 1;
                   });
                 }});
  out.push_back({"the last byte of shared memory", By::sanitizer, {}, [] {
                   run(1, 2, 100, [] {
                     FASTSEQ_SHARED(shared);
                     shared[99] = 1;
                   });
                 }});
#endif
#if defined(__SANITIZE_THREAD__)
  const std::vector<const char*> race{"ThreadSanitizer: data race"};
  const auto add = [&](const char* name, const std::vector<const char*>& told, const std::function<void()>& make) {
    out.push_back({name, By::sanitizer, told, make});
  };
  add("threads that do not meet", race, [] { write_and_read(false, 1, nullptr, [] {}); });
  add("lanes that shuffle", race, [] { write_and_read(false, 1, nullptr, [] { __shfl_xor_sync(~0u, 1, 1); }); });
  add("lanes that meet", {}, [] { write_and_read(false, 1, nullptr, [] { __syncwarp(); }); });
  add("threads that meet", {}, [] { write_and_read(false, 1, nullptr, [] { __syncthreads(); }); });
  add("threads that write before others have read", race, [] {
    run(1, 32, 32 * sizeof(int), [] {
      FASTSEQ_SHARED(shared);
      int* const numbers = reinterpret_cast<int*>(shared);
      for (int round = 0; round < 3; ++round) {
        numbers[threadIdx.x] = round;
        __syncthreads();
        if (numbers[31 - threadIdx.x] == 5) __syncthreads();
      }
    });
  });
  add("blocks that meet each for itself", race, [] {
    Global<int> numbers(64);
    write_and_read(true, 2, numbers.data(), [] { __syncthreads(); });
  });
  add("blocks that meet", {}, [] {
    Global<int> numbers(64);
    for (int i = 0; i < 3; ++i) {
      write_and_read(true, 2, numbers.data(), [] { grid_sync(); });
      ++numbers[40];  // the host's, between launches
    }
  });
  add("blocks that write to one place", race, [] {
    int number = 0;
    run(2, 32, 0, [&] {
      if (threadIdx.x == blockIdx.x) number = static_cast<int>(blockIdx.x);
    });
  });
#endif
  return out;
}

struct Ended {
  int status;
  std::string said;
};
Ended run_again(const char* argument, const char* schedule) {
  int ends[2];
  std::fflush(stdout);
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    dup2(ends[1], 2), close(ends[0]), close(ends[1]);
    setenv("FASTSEQ_EMULATION_SCHEDULE", schedule, 1);
    setenv("TSAN_OPTIONS", "atexit_sleep_ms=0", 1);
    execl("/proc/self/exe", "tests", argument, nullptr);
    _exit(127);
  }
  close(ends[1]);
  Ended out{};
  char some[4096];
  for (ssize_t got; (got = read(ends[0], some, sizeof some)) > 0;) out.said.append(some, static_cast<size_t>(got));
  close(ends[0]);
  waitpid(child, &out.status, 0);
  return out;
}

void check_mistakes(Report& report) {
  const auto check = [&](const char* name, By by, const std::vector<const char*>& told, const Ended& end) {
    report.where = std::string("a program with ") + name;
    const bool aborted = WIFSIGNALED(end.status) && WTERMSIG(end.status) == SIGABRT;
    if (by == By::emulation) {
      report.check(aborted, "the end", [&] { return "it was not stopped: " + end.said; });
    } else {
      const bool well = WIFEXITED(end.status) && WEXITSTATUS(end.status) == 0 && end.said.empty();
      report.check(well == told.empty(), "the end", [&] { return "got " + end.said; });
    }
    for (const char* const some : told)
      report.check(end.said.find(some) != std::string::npos, "what it says",
                   [&] { return std::string("expected \"") + some + "\", got \"" + end.said + "\""; });
  };
  for (const Mistake& mistake : mistakes())
    check(mistake.name, mistake.by, mistake.told, run_again(mistake.name, "first-to-last"));
  check("a schedule that is none", By::emulation, {"must be first-to-last, last-to-first or random:SEED"},
        run_again("", "sideways"));
}

int make_mistake(const char* name) {
  for (const Mistake& mistake : mistakes()) {
    if (std::strcmp(mistake.name, name) != 0) continue;
    mistake.make();
    return 0;
  }
  return 2;
}

int run_all() {
  Report report;
  check_places(report);
  check_schedules(report);
  check_meetings(report);
  check_same_results(report);
  check_shuffles<float>(report, "shuffles of float", [](int i) { return static_cast<float>(i) + 0.5f; });
  check_shuffles<double>(report, "shuffles of double", [](int i) { return i + 0.1; });
  check_shuffles<Large>(report, "shuffles of 32 bytes", [](int i) {
    Large out;
    for (int w = 0; w < 8; ++w) out.words[w] = static_cast<uint32_t>(8 * i + w);
    return out;
  });
  check_votes(report);
  check_mma<bfloat16>(report, "bfloat16");
  check_mma<float16>(report, "float16");
  check_mma<float>(report, "float");
  check_mma_sees_11_bits(report);
  check_ldmatrix(report);
  check_cp_async(report);
  check_shared_memory(report);
  check_conversions<bfloat16>(report, "bfloat16");
  check_conversions<float16>(report, "float16");
  check_tf32(report);
  check_errors(report);
  check_mistakes(report);
  std::printf(
      "%lld passed, %lld failed\n", static_cast<long long>(report.passed), static_cast<long long>(report.failed));
  return report.failed ? 1 : 0;
}

}  // namespace
}  // namespace fastseq::test

int main(int argc, char** argv) { return argc > 1 ? fastseq::test::make_mistake(argv[1]) : fastseq::test::run_all(); }
