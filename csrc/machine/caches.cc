#include "machine/caches.h"

#include <array>

namespace jax_nano {
namespace {

// Assumed where CPUID says nothing (some hypervisors): the smallest caches of any AVX2 server CPU.
constexpr Caches kDefaultCaches = {32 << 10, 256 << 10, 8 << 20};

}  // namespace

Caches DetectCaches(const CpuQueries& cpu) {
  // Intel describes caches in leaf 4, AMD in 0x8000001D; the fields are the same.
  uint32_t leaf = 0;
  if (cpu.cpuid(0x80000000, 0)[0] >= 0x8000001d && (cpu.cpuid(0x8000001d, 0)[0] & 31) != 0) {
    leaf = 0x8000001d;
  } else if (cpu.cpuid(0, 0)[0] >= 4) {
    leaf = 4;
  }
  std::array<int64_t, 4> size = {0, kDefaultCaches.l1d, kDefaultCaches.l2, kDefaultCaches.l3};
  constexpr uint32_t kMaxSubleaf = 16, kTypeInstruction = 2;
  for (uint32_t sub = 0; leaf != 0 && sub < kMaxSubleaf; ++sub) {
    const std::array<uint32_t, 4> r = cpu.cpuid(leaf, sub);
    const uint32_t type = r[0] & 31, level = (r[0] >> 5) & 7;
    if (type == 0) break;
    if (type == kTypeInstruction || level < 1 || level > 3) continue;
    const int64_t ways = (r[1] >> 22) + 1, partitions = ((r[1] >> 12) & 0x3ff) + 1;
    const int64_t line = (r[1] & 0xfff) + 1, sets = int64_t{r[2]} + 1;
    size[level] = ways * partitions * line * sets;
  }
  return {size[1], size[2], size[3]};
}

const Caches& HostCaches() {
  static const Caches caches = DetectCaches(HostQueries());
  return caches;
}

}  // namespace jax_nano
