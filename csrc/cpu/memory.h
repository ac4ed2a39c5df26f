// Large memory in large pages: a fresh page of 4 KiB costs up to a microsecond, and glibc takes what is larger than
// 32 MiB, and at times less, fresh from the system at every call.
#pragma once

#include <cstddef>

namespace fastseq::cpu {

constexpr std::size_t kHugePage = std::size_t(2) << 20;
constexpr std::size_t kLargeBytes = std::size_t(4) << 20;

// Asks the system for huge pages where memory of kLargeBytes or more has whole ones. It may not have any: no matter.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace fastseq::cpu
