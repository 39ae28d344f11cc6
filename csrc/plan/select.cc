#include "plan/select.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <utility>

#include "plan/registry.h"

namespace jax_nano {
namespace {

using F = Feature;

// Best first.
constexpr auto kSelectable = [] {
  std::array<Target, std::size(kTargets)> out;
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = {kTargets[i].name, Features(kTargets[i].required), Features(kTargets[i].shunned)};
  }
  return out;
}();

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

// The integer dtype of the same size and the other sign, in which a result has the same bits; "" for any other dtype.
std::string_view OtherSign(std::string_view dtype) {
  for (const DType& x : kDTypes) {
    if (x.name == dtype) return x.other_sign;
  }
  return "";
}

bool Compiled(const Target& target) {
  return std::any_of(Kernels().begin(), Kernels().end(),
                     [&](const KernelInfo& k) { return target.name == std::string_view(k.target); });
}

}  // namespace

std::span<const Target> Targets() { return kSelectable; }

std::vector<TargetStatus> DescribeTargets(const Features& cpu) {
  std::vector<TargetStatus> out;
  for (const Target& t : kSelectable) {
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
