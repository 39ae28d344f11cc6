// Sizes of this CPU's caches.
#ifndef JAX_NANO_MACHINE_CACHES_H_
#define JAX_NANO_MACHINE_CACHES_H_

#include <cstdint>

#include "machine/cpuid.h"

namespace jax_nano {

// Data cache sizes of one core, in bytes. L3 is the whole of the shared cache.
struct Caches {
  int64_t l1d;
  int64_t l2;
  int64_t l3;
};

Caches DetectCaches(const CpuQueries& cpu);

// Those of the machine that runs this process; detected once.
const Caches& HostCaches();

}  // namespace jax_nano

#endif  // JAX_NANO_MACHINE_CACHES_H_
