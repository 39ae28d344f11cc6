#include "machine/machine.h"

namespace jax_nano {

const Machine& HostMachine() {
  static const Machine machine = {HostCaches()};
  return machine;
}

}  // namespace jax_nano
