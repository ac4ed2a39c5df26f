// Large memory in large pages: a fresh page of 4 KiB costs up to a microsecond. glibc takes memory from 32 MiB on fresh
// from the system at every call; smaller pieces it keeps and gives again, and there the advice would only cost time.
#pragma once

#include <cstddef>

namespace fastseq::cpu {

constexpr std::size_t kHugePage = std::size_t(2) << 20;
constexpr std::size_t kLargeBytes = std::size_t(32) << 20;

// Asks the system for huge pages where memory of kLargeBytes or more has whole ones. It may not have any: no matter.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace fastseq::cpu
