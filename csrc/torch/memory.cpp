#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <memory>

#include "../cpu/memory.h"

namespace fastseq {

namespace {

// torch's own allocator is as quick with less.
constexpr int64_t kKeepFrom = 1 << 20;

class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<cpu::Block>(cpu::take_block(bytes));
    void* const data = block->data;
    return {data, block.release(), &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void give_back(void* context) {
    const std::unique_ptr<cpu::Block> block(static_cast<cpu::Block*>(context));
    if (block) cpu::give_block(*block);
  }
};

KeptMemory kept_memory;

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
  const at::ScalarType type = like.scalar_type();
  if (c10::multiply_integers(sizes) * static_cast<int64_t>(like.element_size()) < kKeepFrom)
    return at::detail::empty_cpu(sizes, type);
  return at::detail::empty_generic(sizes, &kept_memory, c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt);
}

void empty_cache() { cpu::release_kept_blocks(); }

}  // namespace fastseq
