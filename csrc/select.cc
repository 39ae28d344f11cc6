#include "select.h"

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <utility>

#include "registry.h"

namespace jax_nano {
namespace {

using F = Feature;

// The levels as the psABI defines them: LLVM may use every instruction of the level, so all are required.
constexpr Features kV3 = {F::kAvx, F::kAvx2, F::kBmi1, F::kBmi2, F::kF16c, F::kFma, F::kLzcnt, F::kMovbe};
constexpr Features kV4 = kV3 | Features{F::kAvx512f, F::kAvx512bw, F::kAvx512cd, F::kAvx512dq, F::kAvx512vl};

constexpr Target kTargets[] = {
    {"amx", kV4 | Features{F::kAmxTile, F::kAmxBf16, F::kAmxInt8, F::kAmxPermission}},
    {"avx512_bf16", kV4 | Features{F::kAvx512Bf16}, {F::kMicrocodedBf16Dot}},
    {"avx512_vnni", kV4 | Features{F::kAvx512Vnni}},
    {"x86-64-v4", kV4},
    {"avx_vnni", kV3 | Features{F::kAvxVnni}},
    {"x86-64-v3", kV3},
};

std::string Join(const std::vector<std::string_view>& words) {
  std::string out;
  for (std::string_view w : words) {
    if (!out.empty()) out += ", ";
    out += w;
  }
  return out;
}

std::string WhyUnsupported(const Features& cpu, const Target& target) {
  Features missing = target.required - cpu;
  if (missing.Has(F::kAmxTile)) missing = missing - Features{F::kAmxPermission};  // follows from it
  if (missing.Has(F::kAmxPermission)) return "the operating system does not permit AMX";
  return "this CPU lacks " + Join(NamesOf(missing));
}

// Integers wrap around, so a result has the same bits whichever of the two its dtype is.
constexpr std::pair<std::string_view, std::string_view> kSameBits[] = {
    {"int8", "uint8"}, {"int16", "uint16"}, {"int32", "uint32"}};

// The integer dtype of the same size and the other sign; "" for any other dtype.
std::string_view OtherSign(std::string_view dtype) {
  for (const auto& [with_sign, without] : kSameBits) {
    if (dtype == with_sign) return without;
    if (dtype == without) return with_sign;
  }
  return "";
}

bool Compiled(const Target& target) {
  return std::any_of(Kernels().begin(), Kernels().end(),
                     [&](const KernelInfo& k) { return target.name == std::string_view(k.target); });
}

}  // namespace

std::span<const Target> Targets() { return kTargets; }

std::vector<TargetStatus> DescribeTargets(const Features& cpu) {
  std::vector<TargetStatus> out;
  for (const Target& t : kTargets) {
    TargetStatus s = {&t, Compiled(t), cpu.HasAll(t.required), ""};
    if (!s.supported) {
      s.why = WhyUnsupported(cpu, t);
    } else if (!s.compiled) {
      s.why = "this build has no kernels for it";
    } else if (!(cpu - t.shunned).HasAll(cpu)) {
      s.why = "slower than a lower target on this CPU: " + Join(NamesOf(cpu - (cpu - t.shunned)));
    }
    out.push_back(std::move(s));
  }
  return out;
}

std::vector<const Target*> SelectTargets(const Features& cpu, std::string_view forced) {
  std::vector<const Target*> usable;
  std::vector<std::string_view> known;
  bool found = forced.empty();
  for (const TargetStatus& s : DescribeTargets(cpu)) {
    known.push_back(s.target->name);
    if (forced == s.target->name) {
      found = true;
      if (!s.why.empty()) {
        throw std::invalid_argument("JAX_NANO_TARGET=" + std::string(forced) + ": " + s.why);
      }
    }
    if (found && s.why.empty()) usable.push_back(s.target);
  }
  if (!found) {
    throw std::invalid_argument("JAX_NANO_TARGET=" + std::string(forced) + ": unknown target; known: " + Join(known));
  }
  return usable;
}

const std::vector<const Target*>& SelectedTargets() {
  // Thrown, not cached: C++ runs the initialiser again at the next call, which finds the same fault.
  static const std::vector<const Target*> targets = [] {
    const char* forced = std::getenv("JAX_NANO_TARGET");
    return SelectTargets(HostFeatures(), forced == nullptr ? "" : forced);
  }();
  return targets;
}

const KernelInfo* SelectKernel(std::span<const Target* const> targets, std::string_view lhs, std::string_view rhs,
                               std::string_view out, std::string_view algorithm, bool direct_b) {
  for (const Target* t : targets) {
    for (const std::string_view dtype : {out, OtherSign(out)}) {
      const KernelInfo* k = FindKernel(t->name, lhs, rhs, dtype, algorithm);
      if (k != nullptr && (k->direct_b || !direct_b)) return k;
    }
  }
  return nullptr;
}

}  // namespace jax_nano
