#include "cpu.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace jax_nano {
namespace {

constexpr std::array<std::string_view, static_cast<size_t>(Feature::kCount)> kFeatureNames = {
    "avx",
    "avx2",
    "bmi1",
    "bmi2",
    "f16c",
    "fma",
    "lzcnt",
    "movbe",
    "avx512f",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_permission",
    "microcoded_vdpbf16ps",
};

// State components that the operating system saves (XCR0): without them an instruction set that CPUID
// reports still faults.
constexpr uint64_t kXcr0Avx = 0x6;      // SSE, AVX
constexpr uint64_t kXcr0Avx512 = 0xe6;  // + opmask, ZMM_Hi256, Hi16_ZMM
constexpr uint64_t kXcr0Amx = 0x60000;  // TILECFG, TILEDATA

// Assumed where CPUID says nothing (some hypervisors): the smallest caches of any AVX2 server CPU.
constexpr Caches kDefaultCaches = {32 << 10, 256 << 10, 8 << 20};

bool Bit(uint32_t word, int bit) { return (word >> bit) & 1; }

// A bit in CPUID's answer, and the feature that it announces.
struct FeatureBit {
  int reg;  // 0 eax, 1 ebx, 2 ecx, 3 edx
  int bit;
  Feature feature;
};

void AddFrom(const std::array<uint32_t, 4>& regs, std::initializer_list<FeatureBit> bits, Features& out) {
  for (const FeatureBit& b : bits) {
    if (Bit(regs[static_cast<size_t>(b.reg)], b.bit)) out.Add(b.feature);
  }
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
  for (size_t i = 0; i < kFeatureNames.size(); ++i) {
    if (features.Has(static_cast<Feature>(i))) names.push_back(kFeatureNames[i]);
  }
  return names;
}

Features DetectFeatures(const CpuQueries& cpu) {
  using F = Feature;
  Features out;
  const uint32_t max_leaf = cpu.cpuid(0, 0)[0];
  const std::array<uint32_t, 4> one = cpu.cpuid(1, 0);
  constexpr int kOsxsave = 27;
  if (max_leaf < 7 || !Bit(one[2], kOsxsave)) return out;
  const uint64_t xcr0 = cpu.xcr0();
  if ((xcr0 & kXcr0Avx) != kXcr0Avx) return out;

  const std::array<uint32_t, 4> seven = cpu.cpuid(7, 0);
  const std::array<uint32_t, 4> seven_one = seven[0] >= 1 ? cpu.cpuid(7, 1) : std::array<uint32_t, 4>{0, 0, 0, 0};
  AddFrom(one, {{2, 28, F::kAvx}, {2, 12, F::kFma}, {2, 29, F::kF16c}, {2, 22, F::kMovbe}}, out);
  AddFrom(seven, {{1, 5, F::kAvx2}, {1, 3, F::kBmi1}, {1, 8, F::kBmi2}}, out);
  AddFrom(seven_one, {{0, 4, F::kAvxVnni}}, out);
  if (cpu.cpuid(0x80000000, 0)[0] >= 0x80000001) {
    AddFrom(cpu.cpuid(0x80000001, 0), {{2, 5, F::kLzcnt}}, out);
  }

  if ((xcr0 & kXcr0Avx512) == kXcr0Avx512) {
    AddFrom(seven,
            {{1, 16, F::kAvx512f},
             {1, 30, F::kAvx512bw},
             {1, 28, F::kAvx512cd},
             {1, 17, F::kAvx512dq},
             {1, 31, F::kAvx512vl},
             {2, 11, F::kAvx512Vnni},
             {3, 23, F::kAvx512Fp16}},
            out);
    AddFrom(seven_one, {{0, 5, F::kAvx512Bf16}}, out);
    constexpr uint32_t kGenu = 0x756e6547;  // "GenuineIntel" begins so
    if (out.Has(F::kAvx512Bf16) && cpu.cpuid(0, 0)[1] == kGenu) out.Add(F::kMicrocodedBf16Dot);
  }

  // CPUID and XCR0 may offer tiles that have no palette (seen under a hypervisor: oneDNN issue 5801),
  // where the first tile instruction faults. And Linux hands them out on request only.
  if ((xcr0 & kXcr0Amx) == kXcr0Amx && max_leaf >= 0x1d && cpu.cpuid(0x1d, 0)[0] >= 1) {
    AddFrom(seven, {{3, 24, F::kAmxTile}, {3, 22, F::kAmxBf16}, {3, 25, F::kAmxInt8}}, out);
    if (out.Has(F::kAmxTile) && cpu.request_amx()) out.Add(F::kAmxPermission);
  }
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
