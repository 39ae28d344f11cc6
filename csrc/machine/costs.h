// What a CPU family needs for each thing that a kernel does, in nanoseconds: data, measured on such a CPU, from
// jax_nano/profiles. plan/cost.h counts the things.
#ifndef JAX_NANO_MACHINE_COSTS_H_
#define JAX_NANO_MACHINE_COSTS_H_

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "machine/cpuid.h"
#include "spec.h"

namespace jax_nano {

using CostVector = std::array<double, kCosts>;  // by Cost, those of a term with several costs side by side

struct KernelCosts {
  std::string_view kernel;  // by name
  CostVector ns;
};

// Some CPUs, as CPUID tells them.
struct CpuModels {
  std::string_view vendor;
  uint32_t family, first_model, last_model;
};

// How many bytes stay in a level beside what else passes through: what is larger lies in the next one. `near` and `far`
// are both L3: the part that is fast, and all that a thread finds of it for itself.
struct CacheLevels {
  int64_t l1d, l2, near, far;
};

struct CpuProfile {
  std::string_view name;
  std::span<const CpuModels> cpus;
  CacheLevels caches;
  std::span<const KernelCosts> kernels;

  // Null if this kernel was not measured.
  const CostVector* Of(std::string_view kernel) const;
};

// The built-in profile of the CPU that answers so; null if there is none.
const CpuProfile* FindProfile(const CpuQueries& cpu);

// The one by name; null if there is none.
const CpuProfile* FindProfile(std::string_view name);

// Names of all built-in ones.
std::vector<std::string_view> ProfileNames();

}  // namespace jax_nano

#endif  // JAX_NANO_MACHINE_COSTS_H_
