// Memory a kernel needs for the length of one call, aligned to cache lines.
#pragma once

template <class T>
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(data_); }

  T* allocate(int64_t numbers) {
    if (numbers <= 0) return nullptr;
    const size_t bytes = (static_cast<size_t>(numbers) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    if (bytes >= kLargeBytes) advise_huge_pages(data_, bytes);
    return data_;
  }
  T* zeros(int64_t numbers) {
    T* data = allocate(numbers);
    if (data) memset(static_cast<void*>(data), 0, static_cast<size_t>(numbers) * sizeof(T));
    return data;
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};
