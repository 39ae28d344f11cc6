#include "machine/costs.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "profiles.h"

namespace jax_nano {
namespace {

std::string Vendor(const CpuQueries& cpu) {
  const std::array<uint32_t, 4> r = cpu.cpuid(0, 0);
  std::array<char, 12> text;
  const uint32_t in_order[] = {r[1], r[3], r[2]};
  std::memcpy(text.data(), in_order, text.size());
  return {text.data(), text.size()};
}

}  // namespace

const CostVector* CpuProfile::Of(std::string_view kernel) const {
  const auto it =
      std::find_if(kernels.begin(), kernels.end(), [&](const KernelCosts& x) { return x.kernel == kernel; });
  return it == kernels.end() ? nullptr : &it->ns;
}

const CpuProfile* FindProfile(const CpuQueries& cpu) {
  const std::string vendor = Vendor(cpu);
  const uint32_t eax = cpu.cpuid(1, 0)[0];
  constexpr uint32_t kExtended = 15;  // family above 14: the extended field is added
  uint32_t family = (eax >> 8) & 15, model = ((eax >> 4) & 15) | ((eax >> 12) & 0xf0);
  if (family == kExtended) family += (eax >> 20) & 0xff;
  for (const CpuProfile& profile : kCpuProfiles) {
    for (const CpuModels& x : profile.cpus) {
      if (x.vendor == vendor && x.family == family && x.first_model <= model && model <= x.last_model) return &profile;
    }
  }
  return nullptr;
}

const CpuProfile* FindProfile(std::string_view name) {
  const auto it = std::find_if(std::begin(kCpuProfiles), std::end(kCpuProfiles),
                               [&](const CpuProfile& x) { return x.name == name; });
  return it == std::end(kCpuProfiles) ? nullptr : &*it;
}

std::vector<std::string_view> ProfileNames() {
  std::vector<std::string_view> names;
  for (const CpuProfile& x : kCpuProfiles) names.push_back(x.name);
  return names;
}

}  // namespace jax_nano
