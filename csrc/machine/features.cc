#include "machine/features.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>

namespace jax_nano {
namespace {

// State components that the operating system saves (XCR0): without them an instruction set that CPUID
// reports still faults.
constexpr uint64_t kXcr0Avx = 0x6;      // SSE, AVX
constexpr uint64_t kXcr0Avx512 = 0xe6;  // + opmask, ZMM_Hi256, Hi16_ZMM
constexpr uint64_t kXcr0Amx = 0x60000;  // TILECFG, TILEDATA

bool Bit(uint32_t word, int bit) { return (word >> bit) & 1; }

// CPUID's answer; zeros where the CPU knows no such leaf.
std::array<uint32_t, 4> Answer(const CpuQueries& cpu, uint32_t leaf, uint32_t subleaf) {
  const bool known = leaf <= cpu.cpuid(leaf & 0x80000000, 0)[0] && (subleaf == 0 || subleaf <= cpu.cpuid(leaf, 0)[0]);
  return known ? cpu.cpuid(leaf, subleaf) : std::array<uint32_t, 4>{0, 0, 0, 0};
}

}  // namespace

std::string_view FeatureName(Feature feature) { return kFeatureNames[static_cast<size_t>(feature)]; }

std::vector<std::string_view> NamesOf(const Features& features) {
  std::vector<std::string_view> names;
  for (size_t i = 0; i < std::size(kFeatureNames); ++i) {
    if (features.Has(static_cast<Feature>(i))) names.push_back(kFeatureNames[i]);
  }
  return names;
}

Features ParseFeatures(std::span<const std::string> names) {
  Features out;
  for (const std::string& name : names) {
    const auto known = std::find(std::begin(kFeatureNames), std::end(kFeatureNames), name);
    if (known == std::end(kFeatureNames)) throw std::invalid_argument("unknown CPU feature: " + name);
    out.Add(static_cast<Feature>(known - std::begin(kFeatureNames)));
  }
  return out;
}

Features DetectFeatures(const CpuQueries& cpu) {
  using F = Feature;
  Features out;
  const uint32_t max_leaf = cpu.cpuid(0, 0)[0];
  constexpr int kOsxsave = 27;
  if (max_leaf < 7 || !Bit(cpu.cpuid(1, 0)[2], kOsxsave)) return out;
  const uint64_t xcr0 = cpu.xcr0();
  if ((xcr0 & kXcr0Avx) != kXcr0Avx) return out;

  const auto is_saved = [&](SavedState state) {
    switch (state) {
      case SavedState::kAvx:
        return true;
      case SavedState::kAvx512:
        return (xcr0 & kXcr0Avx512) == kXcr0Avx512;
      case SavedState::kAmx:
        // CPUID and XCR0 may offer tiles that have no palette (seen under a hypervisor: oneDNN issue 5801), where the
        // first tile instruction faults.
        return (xcr0 & kXcr0Amx) == kXcr0Amx && Answer(cpu, 0x1d, 0)[0] >= 1;
    }
    return false;
  };
  for (const FeatureBit& b : kFeatureBits) {
    if (is_saved(b.state) && Bit(Answer(cpu, b.leaf, b.subleaf)[b.reg], b.bit)) out.Add(b.feature);
  }

  constexpr uint32_t kGenu = 0x756e6547;  // "GenuineIntel" begins so
  if (out.Has(F::kAvx512Bf16) && cpu.cpuid(0, 0)[1] == kGenu) out.Add(F::kMicrocodedVdpbf16ps);
  // Linux hands tiles out on request only.
  if (out.Has(F::kAmxTile) && cpu.request_amx()) out.Add(F::kAmxPermission);
  return out;
}

const Features& HostFeatures() {
  static const Features features = DetectFeatures(HostQueries());
  return features;
}

}  // namespace jax_nano
