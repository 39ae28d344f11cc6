// Which target's kernels run: the best that the CPU supports and the build contains, or a lower one that
// JAX_NANO_TARGET names.
#ifndef JAX_NANO_PLAN_SELECT_H_
#define JAX_NANO_PLAN_SELECT_H_

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "machine/features.h"
#include "plan/kernel_abi.h"

namespace jax_nano {

struct Target {
  const char* name;
  Features required;
  Features shunned = {};  // with one of these the CPU runs the target, but lower ones are faster
};

// Best first. A target that has no kernel for a signature leaves it to the next one below.
std::span<const Target> Targets();

struct TargetStatus {
  const Target* target;
  bool compiled;    // this build has at least one kernel for it
  bool supported;   // the CPU and the operating system can run it
  std::string why;  // why it is not usable; empty if it is
};

std::vector<TargetStatus> DescribeTargets(const Features& cpu);

// Targets usable on `cpu`, best first. `forced` (the value of JAX_NANO_TARGET, "" if unset) drops all
// above it. Throws std::invalid_argument if it names no target or one that is not usable.
std::vector<const Target*> SelectTargets(const Features& cpu, std::string_view forced);

// The same for this machine and environment; evaluated at the first call, errors thrown at every call.
const std::vector<const Target*>& SelectedTargets();

// The first of `targets` with a kernel for this signature, or for an integer result of the other sign, which
// has the same bits; null if none has one.
const KernelInfo* SelectKernel(std::span<const Target* const> targets, std::string_view lhs, std::string_view rhs,
                               std::string_view out, std::string_view algorithm, bool direct_b = false);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_SELECT_H_
