// What a CPU family needs for each thing that a kernel does, in nanoseconds: data, measured on such a CPU, from
// jax_nano/profiles. plan/cost.h counts the things.
#ifndef JAX_NANO_MACHINE_COSTS_H_
#define JAX_NANO_MACHINE_COSTS_H_

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "machine/cpuid.h"
#include "spec.h"

namespace jax_nano {

// By Cost, those of a term with several costs side by side: how often each arises, and how long it takes.
using CostCounts = std::array<double, kCosts>;
using CostNs = std::array<float, kCosts>;

struct KernelCosts {
  std::string_view kernel;  // by name
  const CostNs& ns;
};

// Some CPUs, as CPUID tells them.
struct CpuModels {
  std::string_view vendor;
  uint32_t family, first_model, last_model;
};

// What the counts depend on. How many bytes stay in a level of cache beside what else passes through: what is larger
// lies in the next one. `near` and `far` are both L3: the part that is fast, and all that a thread finds of it for
// itself. With `halves_512`, instructions of 512 bits execute in two halves.
struct CoreModel {
  int64_t l1d, l2, near, far;
  bool halves_512;
};

struct CpuProfile {
  std::string_view name;
  bool measured;  // or its costs are another CPU's, multiplied by what is published of this one
  std::span<const CpuModels> cpus;
  CoreModel core;
  std::span<const KernelCosts> kernels;

  // Null if this kernel was not measured.
  const CostNs* Of(std::string_view kernel) const;
};

// The built-in profile of the CPU that answers so; null if there is none.
const CpuProfile* FindProfile(const CpuQueries& cpu);

// Vendor, family, model and stepping, such as AuthenticAMD-25-1-1.
std::string CpuSignature(const CpuQueries& cpu);

// The one by name; null if there is none.
const CpuProfile* FindProfile(std::string_view name);

// Costs that were measured on the machine at hand (python -m jax_nano tune). A measurement may not decide about the
// order of sums, so these serve what only moves data.
struct MeasuredCosts {
  CoreModel core;
  std::map<std::string, CostNs, std::less<>> kernels;  // by name

  // Null if this kernel was not measured.
  const CostNs* Of(std::string_view kernel) const;
};

// Names of all built-in ones.
std::vector<std::string_view> ProfileNames();

}  // namespace jax_nano

#endif  // JAX_NANO_MACHINE_COSTS_H_
