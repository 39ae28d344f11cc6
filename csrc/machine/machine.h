// All that planning asks about the machine. Passed in, so that plans for any machine can be made on any other.
#ifndef JAX_NANO_MACHINE_MACHINE_H_
#define JAX_NANO_MACHINE_MACHINE_H_

#include "machine/caches.h"
#include "machine/costs.h"
#include "machine/profile.h"

namespace jax_nano {

class SpecializedKernels;  // of plan/specialized.h

struct Machine {
  Caches caches;
  Profile profile = {};
  const CpuProfile* cpu = nullptr;                  // NUMERIC: the built-in costs; null: nothing is known of such a CPU
  const MeasuredCosts* measured = nullptr;          // here, by `tune`, if it has run: for what only moves data
  const SpecializedKernels* specialized = nullptr;  // kernels for given products, from packs; null: none
};

// The one that runs this process; detected once.
const Machine& HostMachine();

// From now on, for plans that are still to be made. For the start of a process: no other thread may plan meanwhile.
void UseMeasuredCosts(MeasuredCosts costs);
// The same; `kernels` live as long as the process.
void UseSpecializedKernels(const SpecializedKernels* kernels);

}  // namespace jax_nano

#endif  // JAX_NANO_MACHINE_MACHINE_H_
