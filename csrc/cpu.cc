#include "cpu.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <iterator>

namespace jax_nano {
namespace {

// State components that the operating system saves (XCR0): without them an instruction set that CPUID
// reports still faults.
constexpr uint64_t kXcr0Avx = 0x6;      // SSE, AVX
constexpr uint64_t kXcr0Avx512 = 0xe6;  // + opmask, ZMM_Hi256, Hi16_ZMM
constexpr uint64_t kXcr0Amx = 0x60000;  // TILECFG, TILEDATA

// Assumed where CPUID says nothing (some hypervisors): the smallest caches of any AVX2 server CPU.
constexpr Caches kDefaultCaches = {32 << 10, 256 << 10, 8 << 20};

bool Bit(uint32_t word, int bit) { return (word >> bit) & 1; }

// CPUID's answer; zeros where the CPU knows no such leaf.
std::array<uint32_t, 4> Answer(const CpuQueries& cpu, uint32_t leaf, uint32_t subleaf) {
  const bool known = leaf <= cpu.cpuid(leaf & 0x80000000, 0)[0] && (subleaf == 0 || subleaf <= cpu.cpuid(leaf, 0)[0]);
  return known ? cpu.cpuid(leaf, subleaf) : std::array<uint32_t, 4>{0, 0, 0, 0};
}

CpuQueries HostQueries() {
  CpuQueries q;
  q.cpuid = [](uint32_t leaf, uint32_t subleaf) {
    std::array<uint32_t, 4> r = {0, 0, 0, 0};
    __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]);  // leaves zeros above the maximum
    return r;
  };
  q.xcr0 = [] {
    uint32_t lo = 0, hi = 0;
    __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t{hi} << 32) | lo;
  };
  q.request_amx = [] {
    constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
  };
  return q;
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

Caches DetectCaches(const CpuQueries& cpu) {
  // Intel describes caches in leaf 4, AMD in 0x8000001D; the fields are the same.
  uint32_t leaf = 0;
  if (cpu.cpuid(0x80000000, 0)[0] >= 0x8000001d && (cpu.cpuid(0x8000001d, 0)[0] & 31) != 0) {
    leaf = 0x8000001d;
  } else if (cpu.cpuid(0, 0)[0] >= 4) {
    leaf = 4;
  }
  std::array<int64_t, 4> size = {0, kDefaultCaches.l1d, kDefaultCaches.l2, kDefaultCaches.l3};
  constexpr uint32_t kMaxSubleaf = 16, kTypeInstruction = 2;
  for (uint32_t sub = 0; leaf != 0 && sub < kMaxSubleaf; ++sub) {
    const std::array<uint32_t, 4> r = cpu.cpuid(leaf, sub);
    const uint32_t type = r[0] & 31, level = (r[0] >> 5) & 7;
    if (type == 0) break;
    if (type == kTypeInstruction || level < 1 || level > 3) continue;
    const int64_t ways = (r[1] >> 22) + 1, partitions = ((r[1] >> 12) & 0x3ff) + 1;
    const int64_t line = (r[1] & 0xfff) + 1, sets = int64_t{r[2]} + 1;
    size[level] = ways * partitions * line * sets;
  }
  return {size[1], size[2], size[3]};
}

const Features& HostFeatures() {
  static const Features features = DetectFeatures(HostQueries());
  return features;
}

const Caches& HostCaches() {
  static const Caches caches = DetectCaches(HostQueries());
  return caches;
}

}  // namespace jax_nano
