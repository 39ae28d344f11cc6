// What this CPU can do: instruction sets usable from this process, and cache sizes.
#ifndef JAX_NANO_CPU_H_
#define JAX_NANO_CPU_H_

#include <array>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

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

// Data cache sizes of one core, in bytes. L3 is the whole of the shared cache.
struct Caches {
  int64_t l1d;
  int64_t l2;
  int64_t l3;
};

// The questions that detection asks of the hardware and of the operating system. Tests answer them
// with recorded or invented values.
struct CpuQueries {
  std::function<std::array<uint32_t, 4>(uint32_t leaf, uint32_t subleaf)> cpuid;  // eax ebx ecx edx
  std::function<uint64_t()> xcr0;
  std::function<bool()> request_amx;  // asked only when the CPU and XCR0 offer tiles
};

Features DetectFeatures(const CpuQueries& cpu);
Caches DetectCaches(const CpuQueries& cpu);

// The machine that runs this process; detected once.
const Features& HostFeatures();
const Caches& HostCaches();

}  // namespace jax_nano

#endif  // JAX_NANO_CPU_H_
