// Memory a kernel needs for the length of one call, aligned to cache lines.
#pragma once

template <class T>
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (block_.data) give_block(block_);
  }

  T* allocate(int64_t numbers) {
    if (numbers <= 0) return nullptr;
    block_ = take_block(static_cast<size_t>(numbers) * sizeof(T));
    return get();
  }
  T* zeros(int64_t numbers) {
    T* data = allocate(numbers);
    if (data) memset(static_cast<void*>(data), 0, static_cast<size_t>(numbers) * sizeof(T));
    return data;
  }
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  Block block_;
};
