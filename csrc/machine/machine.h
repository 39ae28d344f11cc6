// All that planning asks about the machine. Passed in, so that plans for any machine can be made on any other.
#ifndef JAX_NANO_MACHINE_MACHINE_H_
#define JAX_NANO_MACHINE_MACHINE_H_

#include "machine/caches.h"
#include "machine/profile.h"

namespace jax_nano {

struct Machine {
  Caches caches;
  Profile profile = {};
};

// The one that runs this process; detected once.
const Machine& HostMachine();

}  // namespace jax_nano

#endif  // JAX_NANO_MACHINE_MACHINE_H_
