// Threads of a kernel as fibers of one thread of the host. Under ThreadSanitizer this file alone is not instrumented:
// it is what the others' order is made of.
#include <sys/mman.h>

#include "cuda.h"

#if defined(FASTSEQ_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}
#endif

// Saves the registers that a call must keep on the stack, *from = the stack pointer, and goes on where `to` was saved.
extern "C" void fastseq_emulation_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl fastseq_emulation_switch
.type fastseq_emulation_switch, @function
fastseq_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastseq_emulation_switch, .-fastseq_emulation_switch
)");
constexpr int kSavedWords = 7, kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl fastseq_emulation_switch
.type fastseq_emulation_switch, %function
fastseq_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fastseq_emulation_switch, .-fastseq_emulation_switch
)");
constexpr int kSavedWords = 20, kReturnWord = 11;
#else
#error "emulation of CUDA has a switch of stacks for x86-64 and aarch64"
#endif

namespace fastseq::cuda::emulation {

Thread* current = nullptr;

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(FASTSEQ_THREAD_SANITIZER)
constexpr std::size_t kStack = 256 << 10;
#else
constexpr std::size_t kStack = 64 << 10;
#endif
constexpr uint64_t kCanary = 0x5afe5afe5afe5afe;

enum class State { ready, at_block_sync, at_warp, at_grid_sync, polling, done };
const char* name_of(State state) {
  static const char* const names[] = {
      "ready", "at __syncthreads", "at a meeting of its warp", "at a grid sync", "waiting for what is in memory",
      "done"};
  return names[static_cast<int>(state)];
}

struct Fiber {
  Thread thread;
  State state;
  int block;      // of those that are there at once
  void* pointer;  // of its stack, while it does not run
  char* stack;
  const char* place;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

// What ThreadSanitizer knows a meeting by. Meetings have them in turns: a thread may come to the next one before
// another has gone on from this one, which then must not take what the first has done since for done before.
using Clocks = uint64_t[2];

struct Warp {
  WarpSlot slots[2][32];
  int arrived, turn;
  Clocks clocks;
};
struct Block {
  unsigned char* shared;
  int arrived, turn;
  Clocks clocks;
};

// The host's, while a grid runs.
struct World {
  void (*body)(void*);
  void* argument;
  Fiber* fibers = nullptr;  // all that were ever needed at once
  int capacity = 0, count = 0;
  Warp* warps = nullptr;
  Block* blocks = nullptr;
  int block_count = 0, threads = 0, warps_of_block = 0;
  int at_grid_sync = 0, grid_turn = 0, done = 0;
  std::size_t shared = 0;
  int64_t polls = 0;  // since a thread has done anything else
  Clocks grid_clocks = {};
  int* ready = nullptr;  // fibers, in a ring
  int ready_first = 0, ready_count = 0;
  void* host = nullptr;
  void* tsan_host = nullptr;
  void* fake_stack = nullptr;
  const void* host_bottom = nullptr;
  std::size_t host_size = 0;
  bool running = false;
} world;

Order order = Order::first_to_last;
uint64_t random_state = 1;

// FASTSEQ_EMULATION_SCHEDULE is first-to-last, last-to-first or random:SEED.
const bool environment_read = [] {
  const char* const text = std::getenv("FASTSEQ_EMULATION_SCHEDULE");
  if (!text || !*text || !std::strcmp(text, "first-to-last")) return true;
  if (!std::strcmp(text, "last-to-first")) {
    order = Order::last_to_first;
  } else if (!std::strncmp(text, "random:", 7)) {
    order = Order::random, random_state = std::strtoull(text + 7, nullptr, 10);
  } else {
    fail("FASTSEQ_EMULATION_SCHEDULE must be first-to-last, last-to-first or random:SEED");
  }
  return true;
}();

uint64_t next_random() {  // splitmix64 (Steele et al., 2014)
  uint64_t z = random_state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

void acquire(void* what) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_acquire(what);
#else
  (void)what;
#endif
}
void release(void* what) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_release(what);
#else
  (void)what;
#endif
}

Fiber& self() { return *reinterpret_cast<Fiber*>(current); }

void make_ready(int fiber) {
  world.fibers[fiber].state = State::ready;
  world.ready[(world.ready_first + world.ready_count++) % world.capacity] = fiber;
}

int take_ready() {
  int at = 0;
  if (order == Order::last_to_first) at = world.ready_count - 1;
  if (order == Order::random) at = static_cast<int>(next_random() % world.ready_count);
  int& chosen = world.ready[(world.ready_first + at) % world.capacity];
  const int out = chosen;
  if (order == Order::first_to_last) {
    world.ready_first = (world.ready_first + 1) % world.capacity;
  } else {
    chosen = world.ready[(world.ready_first + world.ready_count - 1) % world.capacity];
  }
  --world.ready_count;
  return out;
}

void leave_to_host(Fiber& fiber, bool for_ever) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_switch_to_fiber(world.tsan_host, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber.fake_stack, world.host_bottom, world.host_size);
#endif
  (void)for_ever;
  fastseq_emulation_switch(&fiber.pointer, world.host);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &world.host_bottom, &world.host_size);
#endif
}

void enter(Fiber& fiber) {
  current = &fiber.thread;
#if defined(FASTSEQ_THREAD_SANITIZER)
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&world.fake_stack, fiber.stack, kStack);
#endif
  fastseq_emulation_switch(&world.host, fiber.pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(world.fake_stack, nullptr, nullptr);
#endif
  uint64_t canary;
  std::memcpy(&canary, fiber.stack, sizeof canary);
  if (canary != kCanary) fail("a thread's stack has overflown");
}

// Waits in this state until somebody makes the thread ready.
void wait_as(State state, const char* place) {
  Fiber& fiber = self();
  world.polls = 0;
  fiber.state = state, fiber.place = place;
  leave_to_host(fiber, false);
}

void fiber_main() {
  Fiber& fiber = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &world.host_bottom, &world.host_size);
#endif
  acquire(&world.body);
  world.body(world.argument);
  release(&world.done);
  fiber.state = State::done;
  ++world.done, world.polls = 0;
  leave_to_host(fiber, true);
  std::abort();
}

void reserve(int fibers) {
  if (fibers <= world.capacity) return;
  auto* const more = static_cast<Fiber*>(std::calloc(static_cast<std::size_t>(fibers), sizeof(Fiber)));
  auto* const ready = static_cast<int*>(std::calloc(static_cast<std::size_t>(fibers), sizeof(int)));
  if (!more || !ready) fail("no memory for its threads");
  for (int i = 0; i < world.capacity; ++i) more[i].stack = world.fibers[i].stack, more[i].tsan = world.fibers[i].tsan;
  std::free(world.fibers), std::free(world.ready);
  const std::size_t bytes = static_cast<std::size_t>(fibers - world.capacity) * kStack;
  void* const stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for its threads' stacks");
  for (int i = world.capacity; i < fibers; ++i)
    more[i].stack = static_cast<char*>(stacks) + static_cast<std::size_t>(i - world.capacity) * kStack;
  world.fibers = more, world.ready = ready, world.capacity = fibers;
}

// Puts the thread at its beginning.
void prepare(Fiber& fiber) {
  std::memcpy(fiber.stack, &kCanary, sizeof kCanary);
  // A function expects its stack aligned to 16 bytes before the call, which on x86-64 leaves an address on it.
  auto* const top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
#if defined(__x86_64__)
  void** const saved = top - 1 - kSavedWords;
#else
  void** const saved = top - kSavedWords;
#endif
  std::memset(saved, 0, static_cast<std::size_t>(kSavedWords) * sizeof(void*));
  saved[kReturnWord] = reinterpret_cast<void*>(&fiber_main);
  fiber.pointer = saved;
  fiber.thread.copies.count = fiber.thread.copies.group = 0;
  fiber.place = "";
#if defined(FASTSEQ_THREAD_SANITIZER)
  if (!fiber.tsan) fiber.tsan = __tsan_create_fiber(0);  // kept, as making one takes long
#endif
}

[[noreturn]] void fail_stuck() {
  for (int i = 0; i < world.count; ++i) {
    const Fiber& fiber = world.fibers[i];
    if (i % 32 == 0 || fiber.state != world.fibers[i - 1].state || fiber.block != world.fibers[i - 1].block)
      std::fprintf(stderr, "  block (%u, %u, %u), from thread %d on: %s %s\n", fiber.thread.block.x,
                   fiber.thread.block.y, fiber.thread.block.z, i % world.threads, name_of(fiber.state), fiber.place);
  }
  fail("no thread can go on: they wait for others that will not come");
}

// Exactly as much as was asked for, and full of NaN. Under ThreadSanitizer no block gets what another had before the
// grid has ended: they are in no order, and would seem to race.
unsigned char* new_shared_memory(std::size_t bytes) {
  constexpr std::size_t kAligned = 128;
  void* out = nullptr;
  if (posix_memalign(&out, kAligned, bytes)) fail("no memory for its shared memory");
  std::memset(out, 0xff, bytes);
  return static_cast<unsigned char*>(out);
}

#if defined(FASTSEQ_THREAD_SANITIZER)
struct Old {
  Old* next;
  unsigned char* shared;
};
Old* old = nullptr;
#endif
void end_shared_memory(unsigned char* shared) {
#if defined(FASTSEQ_THREAD_SANITIZER)
  auto* const one = static_cast<Old*>(std::malloc(sizeof(Old)));
  if (!one) fail("no memory for its shared memory");
  *one = {old, shared}, old = one;
#else
  std::free(shared);
#endif
}
void end_grid() {
#if defined(FASTSEQ_THREAD_SANITIZER)
  while (old) {
    Old* const one = old;
    old = one->next;
    std::free(one->shared), std::free(one);
  }
#endif
}

// Blocks [first, first + count) of the grid, all at once.
void run_blocks(int first, int count, dim3 grid, dim3 block, std::size_t shared) {
  world.block_count = count, world.count = count * world.threads, world.shared = shared;
  world.ready_first = world.ready_count = world.at_grid_sync = world.done = 0, world.polls = 0;
  for (int b = 0; b < count; ++b) {
    world.blocks[b].arrived = world.blocks[b].turn = 0;
    world.blocks[b].shared = new_shared_memory(shared);
    for (int w = 0; w < world.warps_of_block; ++w)
      world.warps[b * world.warps_of_block + w].arrived = world.warps[b * world.warps_of_block + w].turn = 0;
    const unsigned n = static_cast<unsigned>(first + b);
    for (int t = 0; t < world.threads; ++t) {
      const int i = b * world.threads + t;
      Fiber& fiber = world.fibers[i];
      const unsigned at = static_cast<unsigned>(t);
      fiber.thread.in_block = {at % block.x, at / block.x % block.y, at / block.x / block.y};
      fiber.thread.block = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
      fiber.thread.block_size = block, fiber.thread.grid_size = grid;
      fiber.block = b;
      prepare(fiber);
      make_ready(i);
    }
  }
  release(&world.body);
  while (world.done < world.count) {
    if (world.ready_count == 0) fail_stuck();
    enter(world.fibers[take_ready()]);
  }
  current = nullptr;
  for (int b = 0; b < count; ++b) end_shared_memory(world.blocks[b].shared);
}

}  // namespace

const std::size_t stack_bytes = kStack;

void set_schedule(Order chosen, uint64_t seed) { order = chosen, random_state = seed; }

void fail(const char* what) {
  if (current) {
    const Thread& t = *current;
    std::fprintf(stderr, "emulation of CUDA: block (%u, %u, %u), thread (%u, %u, %u): %s\n", t.block.x, t.block.y,
                 t.block.z, t.in_block.x, t.in_block.y, t.in_block.z, what);
  } else {
    std::fprintf(stderr, "emulation of CUDA: %s\n", what);
  }
  std::abort();
}

cudaError_t run_threads(bool cooperative, dim3 grid, dim3 block, std::size_t shared, void (*body)(void*),
                        void* argument) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 ||
      shared > static_cast<std::size_t>(device.shared_of_block))
    return cudaErrorInvalidConfiguration;
  if (world.running) fail("a kernel launches a kernel, or another thread of the host has launched one");
  const uint64_t by_shared = static_cast<uint64_t>(device.shared_of_multiprocessor) / (shared + 1024);
  const uint64_t by_threads = static_cast<uint64_t>(device.threads_of_multiprocessor) / threads;
  const uint64_t at_once = (by_shared < by_threads ? by_shared : by_threads) * device.multiprocessors;
  if (cooperative && blocks > at_once) return cudaErrorCooperativeLaunchTooLarge;

  world.running = true;
  world.body = body, world.argument = argument;
  world.threads = static_cast<int>(threads), world.warps_of_block = static_cast<int>((threads + 31) / 32);
  const int together = cooperative ? static_cast<int>(blocks) : 1;
  reserve(together * world.threads);
  world.blocks = static_cast<Block*>(std::calloc(static_cast<std::size_t>(together), sizeof(Block)));
  world.warps =
      static_cast<Warp*>(std::calloc(static_cast<std::size_t>(together * world.warps_of_block), sizeof(Warp)));
  if (!world.blocks || !world.warps) fail("no memory for its blocks");
#if defined(FASTSEQ_THREAD_SANITIZER)
  world.tsan_host = __tsan_get_current_fiber();
#endif
  for (uint64_t first = 0; first < blocks; first += static_cast<uint64_t>(together)) {
    uint64_t chosen = first;
    if (order == Order::last_to_first) chosen = blocks - first - static_cast<uint64_t>(together);
    run_blocks(static_cast<int>(chosen), together, grid, block, shared);
  }
  acquire(&world.done);  // blocks are in no order among themselves
  end_grid();
  std::free(world.blocks), std::free(world.warps);
  world.running = false;
  return cudaSuccess;
}

unsigned char* shared_memory() { return world.blocks[self().block].shared; }

std::size_t shared_bytes() { return world.shared; }

void poll() {
  Fiber& fiber = self();
  const int number = static_cast<int>(&fiber - world.fibers);
  make_ready(number);
  if (order == Order::last_to_first) {  // else it would be next once more
    --world.ready_count;
    world.ready_first = (world.ready_first + world.capacity - 1) % world.capacity;
    world.ready[world.ready_first] = number, ++world.ready_count;
  }
  fiber.state = State::polling;
  if (++world.polls > int64_t(100) * world.count) fail_stuck();  // in any order, all the others have had their turns
  leave_to_host(fiber, false);
  fiber.state = State::ready;
}

void block_sync() {
  const int b = self().block;
  Block& block = world.blocks[b];
  uint64_t* const clock = &block.clocks[block.turn];
  release(clock);
  if (++block.arrived == world.threads) {
    block.arrived = 0, block.turn = 1 - block.turn;
    for (int t = 0; t < world.threads; ++t) make_ready(b * world.threads + t);
    leave_to_host(self(), false);  // the last to come, too, waits for its turn
  } else {
    wait_as(State::at_block_sync, "");
  }
  acquire(clock);
}

void grid_sync() {
  uint64_t* const clock = &world.grid_clocks[world.grid_turn];
  release(clock);
  if (++world.at_grid_sync == world.count) {
    world.at_grid_sync = 0, world.grid_turn = 1 - world.grid_turn;
    for (int i = 0; i < world.count; ++i) make_ready(i);
    leave_to_host(self(), false);
  } else {
    wait_as(State::at_grid_sync, "");
  }
  acquire(clock);
}

const WarpSlot* warp_exchange(const WarpSlot& own, const char* place) {
  Fiber& fiber = self();
  const int number = static_cast<int>(&fiber - world.fibers), in_block = number % world.threads;
  if (world.threads % 32 != 0) fail("its block is not of whole warps, and such alone are emulated");
  Warp& warp = world.warps[fiber.block * world.warps_of_block + in_block / 32];
  const int first = number - in_block % 32, turn = warp.turn;
  warp.slots[turn][in_block % 32] = own;
  if (++warp.arrived == 32) {
    for (int i = first; i < first + 32; ++i)
      if (i != number && std::strcmp(world.fibers[i].place, place) != 0)
        fail("lanes of a warp meet at different places");
    warp.arrived = 0, warp.turn = 1 - turn;
    for (int i = first; i < first + 32; ++i) make_ready(i);
    leave_to_host(fiber, false);
  } else {
    wait_as(State::at_warp, place);
  }
  return warp.slots[turn];
}

void warp_sync() {
  Warp& warp = world.warps[self().block * world.warps_of_block + (&self() - world.fibers) % world.threads / 32];
  uint64_t* const clock = &warp.clocks[warp.turn];
  release(clock);
  warp_exchange({}, "__syncwarp");
  acquire(clock);
}

}  // namespace fastseq::cuda::emulation
