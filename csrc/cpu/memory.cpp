#include "memory.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace fastseq::cpu {

void advise_huge_pages(void* data, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < kLargeBytes) return;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

namespace {

// malloc is quick with less, and keeps it itself.
constexpr std::size_t kSmallBytes = std::size_t(16) << 10;
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kKept = 0;  // else a block that was given back could be read unseen
#else
constexpr std::size_t kKept = kKeptBytes;
#endif

// The blocks that nobody uses, in the order in which they came back. Nobody waits for ever: the thread that holds it
// may have been left behind by a fork.
struct IdleBlocks {
  static constexpr int kMost = 64;
  std::timed_mutex mutex;
  Block blocks[kMost];
  int count = 0;
  std::size_t bytes = 0;

  Block remove(int i) {
    const Block out = blocks[i];
    bytes -= out.bytes;
    for (--count; i < count; ++i) blocks[i] = blocks[i + 1];
    return out;
  }
} idle;

constexpr std::chrono::milliseconds kPatience(100);  // others hold it for microseconds

std::atomic<bool> poisoned(false);

Block find_block(std::size_t bytes) {
  if (bytes > PTRDIFF_MAX) throw std::bad_alloc();
  // Up to an eighth more, so that batches of about the same length find one another's blocks.
  std::size_t unit = 64;
  while (unit * 16 <= bytes) unit *= 2;
  bytes = (bytes + unit - 1) / unit * unit;
  if (bytes > kSmallBytes && bytes <= kKept && idle.mutex.try_lock()) {
    const std::lock_guard<std::timed_mutex> lock(idle.mutex, std::adopt_lock);
    int best = -1;  // the smallest that is large enough and not much too large
    for (int i = idle.count - 1; i >= 0; --i)
      if (idle.blocks[i].bytes >= bytes && idle.blocks[i].bytes <= bytes + bytes / 4 &&
          (best < 0 || idle.blocks[i].bytes < idle.blocks[best].bytes))
        best = i;
    if (best >= 0) return idle.remove(best);
  }
  void* data = std::aligned_alloc(64, bytes);
  if (!data) throw std::bad_alloc();
  advise_huge_pages(data, bytes);
  return {data, bytes};
}

}  // namespace

Block take_block(std::size_t bytes) {
  const Block block = find_block(bytes);
  if (blocks_are_poisoned()) std::memset(block.data, 0xff, block.bytes);
  return block;
}

void give_block(Block block) {
  if (block.bytes > kSmallBytes && block.bytes <= kKept && idle.mutex.try_lock()) {
    const std::lock_guard<std::timed_mutex> lock(idle.mutex, std::adopt_lock);
    while (idle.count == IdleBlocks::kMost || idle.bytes + block.bytes > kKept) std::free(idle.remove(0).data);
    idle.blocks[idle.count++] = block;
    idle.bytes += block.bytes;
    return;
  }
  std::free(block.data);
}

std::size_t kept_bytes() {
  const std::unique_lock<std::timed_mutex> lock(idle.mutex, kPatience);
  return lock ? idle.bytes : 0;
}

void release_kept_blocks() {
  const std::unique_lock<std::timed_mutex> lock(idle.mutex, kPatience);
  while (lock && idle.count > 0) std::free(idle.remove(0).data);
#if defined(__GLIBC__)
  // glibc itself keeps blocks of up to 32 MiB once one of the size has been freed.
  malloc_trim(0);
#endif
}

void poison_blocks(bool poison) { poisoned.store(poison, std::memory_order_relaxed); }
bool blocks_are_poisoned() { return poisoned.load(std::memory_order_relaxed); }

}  // namespace fastseq::cpu
