#include "machine/cpuid.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace jax_nano {

CpuQueries HostQueries() {
  CpuQueries q;
  q.cpuid = [](uint32_t leaf, uint32_t subleaf) {
    std::array<uint32_t, 4> r = {0, 0, 0, 0};
    __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]);  // leaves zeros above the maximum
    return r;
  };
  q.xcr0 = [] {
    uint32_t lo = 0, hi = 0;
    __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t{hi} << 32) | lo;
  };
  q.request_amx = [] {
    constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
  };
  return q;
}

}  // namespace jax_nano
