// A product as Python describes it, and its plan as Python sees it.
#ifndef JAX_NANO_PYTHON_PRODUCT_H_
#define JAX_NANO_PYTHON_PRODUCT_H_

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "plan/plan.h"
#include "plan/select.h"

namespace jax_nano {

using Ints = std::vector<int64_t>;

// A kernel and how it is to compute a product.
struct ForcedChoice {
  const KernelInfo* kernel;
  Choice choice;
  bool transposed = false;  // C^T is computed
};

// From a dictionary with the items of a plan that are free to choose: kernel, inner, sweep, pack_a, pack_b, mc, kc, nc,
// tile_rows, prefetch, split, split_k, and transposed, false if missing; others are ignored. Throws
// std::invalid_argument if another one is missing.
ForcedChoice ParseChoice(const nanobind::dict& given);

// A call's arrays as Python gives them; owns what Operand only views.
struct CallSpec {
  Ints lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels;
  std::string lhs_dtype, rhs_dtype, out_dtype, algorithm;

  // By the planner.
  Plan MakePlanFor(std::span<const Target* const> targets, int64_t threads, const Machine& machine,
                   const Finish& finish = {}) const;
  // What the planner compares for the kernel of `plan`, the fastest first.
  std::vector<Scored> Considered(const Plan& plan, const Machine& machine) const;
  // By the caller's choice; runs nowhere else than on the CPUs of the kernel's target. Throws std::invalid_argument,
  // with the reason, if that is illegal.
  Plan MakePlanBy(const ForcedChoice& forced) const;
  // All plans worth measuring, of the kernels of all usable targets; the planner's first. None is of a kernel for given
  // products.
  std::vector<Plan> CandidatePlans(std::span<const Target* const> targets, int64_t threads,
                                   const Machine& machine) const;

 private:
  int64_t SizeOf(int64_t label) const;
  Ints OutShape() const;
};

// Selected targets, or the one of this name whether or not the CPU can run it: planning runs nothing.
std::vector<const Target*> TargetsFor(const std::optional<std::string>& name);

// "" if there is none.
std::string FirstName(const std::vector<const Target*>& targets);

// Throws std::invalid_argument if there is none of this name.
const KernelInfo& KernelNamed(std::string_view name);

nanobind::dict PlanDict(const Plan& plan);

// A schedule with its predicted nanoseconds.
nanobind::dict ScoredDict(const Scored& scored);

// The host, or with other caches, or as if it were the CPU of this profile; "" is one that was never measured. Throws
// std::invalid_argument if there is no such profile.
Machine MachineOf(const std::optional<std::array<int64_t, 3>>& caches, const std::optional<std::string>& cpu);

}  // namespace jax_nano

#endif  // JAX_NANO_PYTHON_PRODUCT_H_
