#include "memory.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/COW.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "../cpu/memory.h"

namespace fastseq {

namespace {

// torch's own allocator is as quick with less.
constexpr int64_t kKeepFrom = 1 << 20;

// A block begins with its size: torch knows its memory by one address alone, which lets tensors share it until one is
// written to.
constexpr std::size_t kHeader = 64;

class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes > PTRDIFF_MAX - kHeader) throw std::bad_alloc();
    const cpu::Block block = cpu::take_block(bytes + kHeader);
    *static_cast<std::size_t*>(block.data) = block.bytes;
    void* const data = static_cast<char*>(block.data) + kHeader;
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static void give_back(void* data) {
    if (!data) return;
    void* const begin = static_cast<char*>(data) - kHeader;
    cpu::give_block({begin, *static_cast<std::size_t*>(begin)});
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

// On another device a clone: torch's copy on write knows nothing of streams there.
at::Tensor copy_on_write(const at::Tensor& t) {
  if (!t.key_set().has(c10::DispatchKey::CPU) || t.key_set().has(c10::DispatchKey::Python) || !t.is_contiguous())
    return t.clone();
  if (static_cast<int64_t>(t.nbytes()) >= kKeepFrom &&
      c10::impl::cow::has_simple_data_ptr(*t.storage().unsafeGetStorageImpl()))
    return at::_lazy_clone(t);
  at::Tensor out = empty(t.sizes(), t);
  if (t.numel()) memcpy(out.mutable_data_ptr(), t.const_data_ptr(), t.nbytes());
  return out;
}

void empty_cache() { cpu::release_kept_blocks(); }
void poison_memory(bool poison) { cpu::poison_blocks(poison); }

}  // namespace fastseq
