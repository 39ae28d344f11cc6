#include "run/workspace.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace jax_nano {
namespace {

constexpr int64_t kSmallUnit = 64 << 10;
constexpr int64_t kHugePage = 2 << 20;

std::atomic<int64_t> high_water = 0;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Buffer {
  std::unique_ptr<void, Free> data;
  int64_t bytes = 0;
};

void Grow(Buffer& buffer, int64_t bytes) {
  const bool huge = bytes >= kHugePage;
  const int64_t unit = huge ? kHugePage : kSmallUnit;
  const int64_t size = (bytes + unit - 1) / unit * unit;
  buffer.data.reset();  // first, so that old and new never exist together
  buffer.bytes = 0;
  buffer.data.reset(std::aligned_alloc(static_cast<size_t>(huge ? kHugePage : 4096), static_cast<size_t>(size)));
  if (buffer.data == nullptr) throw std::bad_alloc();
  // Fewer TLB misses on panels that are read over and over. A kernel without huge pages just says no.
  if (huge) (void)madvise(buffer.data.get(), static_cast<size_t>(size), MADV_HUGEPAGE);
  buffer.bytes = size;
  int64_t seen = high_water.load(std::memory_order_relaxed);
  while (seen < size && !high_water.compare_exchange_weak(seen, size)) {
  }
}

void* AtLeast(Buffer& buffer, int64_t bytes) {
  if (bytes <= 0) return nullptr;
  if (bytes > buffer.bytes) Grow(buffer, bytes);
  return buffer.data.get();
}

}  // namespace

void* Workspace(int64_t bytes) {
  thread_local Buffer buffer;
  return AtLeast(buffer, bytes);
}

void* SharedWorkspace(int64_t bytes) {
  thread_local Buffer buffer;
  return AtLeast(buffer, bytes);
}

int64_t WorkspaceHighWater() { return high_water.load(std::memory_order_relaxed); }

}  // namespace jax_nano
