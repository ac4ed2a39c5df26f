// The memory that kernels work in, kept from call to call. A fresh page of 4 KiB costs up to a microsecond, and glibc
// takes large memory fresh from the system at every call: a fifth to a third of the time of a GRU of 512 units with a
// single row.
#pragma once

#include <cstddef>

namespace fastseq::cpu {

constexpr std::size_t kHugePage = std::size_t(2) << 20;
constexpr std::size_t kLargeBytes = std::size_t(4) << 20;

// Asks the system for huge pages where memory of kLargeBytes or more has whole ones. It may not have any: no matter.
void advise_huge_pages(void* data, std::size_t bytes);

// Memory of at least so many bytes, aligned to cache lines, its contents anything; throws std::bad_alloc. What is
// given back is kept for the next who asks, of any thread: at most kKeptBytes of it in all.
constexpr std::size_t kKeptBytes = std::size_t(256) << 20;
struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};
Block take_block(std::size_t bytes);
void give_block(Block block);

std::size_t kept_bytes();    // now
void release_kept_blocks();  // to the system

// For tests: from now on blocks come full of NaN, in every type, so that whoever reads what nobody wrote is seen.
void poison_blocks(bool poison);
bool blocks_are_poisoned();

}  // namespace fastseq::cpu
