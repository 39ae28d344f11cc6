// Instruction sets that this process may use.
#ifndef JAX_NANO_MACHINE_FEATURES_H_
#define JAX_NANO_MACHINE_FEATURES_H_

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "machine/cpuid.h"
#include "spec.h"

namespace jax_nano {

std::string_view FeatureName(Feature feature);

// A set of features. A plain value, so that tests plan and select for CPUs they do not run on.
class Features {
 public:
  constexpr Features() = default;
  constexpr Features(std::initializer_list<Feature> list) : bits_(FeatureSet(list)) {}
  constexpr explicit Features(uint64_t bits) : bits_(bits) {}
  constexpr void Add(Feature f) { bits_ |= FeatureSet({f}); }
  constexpr bool Has(Feature f) const { return (bits_ >> static_cast<unsigned>(f)) & 1; }
  constexpr bool HasAll(Features other) const { return (other.bits_ & ~bits_) == 0; }
  constexpr Features operator|(Features other) const { return Features(bits_ | other.bits_); }
  constexpr Features operator-(Features other) const { return Features(bits_ & ~other.bits_); }
  constexpr bool empty() const { return bits_ == 0; }

 private:
  uint64_t bits_ = 0;
};

// The names of the features in a set, in order.
std::vector<std::string_view> NamesOf(const Features& features);

// The set of these features. Throws std::invalid_argument at a name that no feature has.
Features ParseFeatures(std::span<const std::string> names);

Features DetectFeatures(const CpuQueries& cpu);

// Those of the machine that runs this process; detected once.
const Features& HostFeatures();

}  // namespace jax_nano

#endif  // JAX_NANO_MACHINE_FEATURES_H_
