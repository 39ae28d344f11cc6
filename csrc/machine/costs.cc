#include "machine/costs.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "profiles.h"

namespace jax_nano {
namespace {

struct CpuModel {
  std::string vendor;
  uint32_t family, model, stepping;
};

CpuModel ModelOf(const CpuQueries& cpu) {
  const std::array<uint32_t, 4> r = cpu.cpuid(0, 0);
  const uint32_t in_order[] = {r[1], r[3], r[2]};
  std::array<char, sizeof(in_order)> vendor;
  std::memcpy(vendor.data(), in_order, vendor.size());

  const uint32_t eax = cpu.cpuid(1, 0)[0];
  constexpr uint32_t kExtended = 15;  // family above 14: the extended field is added
  uint32_t family = (eax >> 8) & 15;
  if (family == kExtended) family += (eax >> 20) & 0xff;
  return {{vendor.data(), vendor.size()}, family, ((eax >> 4) & 15) | ((eax >> 12) & 0xf0), eax & 15};
}

}  // namespace

const CostNs* CpuProfile::Of(std::string_view kernel) const {
  const auto it =
      std::find_if(kernels.begin(), kernels.end(), [&](const KernelCosts& x) { return x.kernel == kernel; });
  return it == kernels.end() ? nullptr : &it->ns;
}

const CostNs* MeasuredCosts::Of(std::string_view kernel) const {
  const auto it = kernels.find(kernel);
  return it == kernels.end() ? nullptr : &it->second;
}

const CpuProfile* FindProfile(const CpuQueries& cpu) {
  const CpuModel model = ModelOf(cpu);
  for (const CpuProfile& profile : kCpuProfiles) {
    for (const CpuModels& x : profile.cpus) {
      const bool listed = x.first_model <= model.model && model.model <= x.last_model;
      if (x.vendor == model.vendor && x.family == model.family && listed) return &profile;
    }
  }
  return nullptr;
}

std::string CpuSignature(const CpuQueries& cpu) {
  const CpuModel x = ModelOf(cpu);
  std::string out = x.vendor;
  for (const uint32_t number : {x.family, x.model, x.stepping}) out.append("-").append(std::to_string(number));
  return out;
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
