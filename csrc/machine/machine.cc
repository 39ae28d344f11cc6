#include "machine/machine.h"

#include <memory>
#include <utility>

namespace jax_nano {
namespace {

Machine& Host() {
  static Machine machine = {HostCaches(), {}, FindProfile(HostQueries())};
  return machine;
}

}  // namespace

const Machine& HostMachine() { return Host(); }

void UseMeasuredCosts(MeasuredCosts costs) {
  static std::unique_ptr<MeasuredCosts> kept;
  kept = std::make_unique<MeasuredCosts>(std::move(costs));
  Host().measured = kept.get();
}

void UseSpecializedKernels(const SpecializedKernels* kernels) { Host().specialized = kernels; }

}  // namespace jax_nano
