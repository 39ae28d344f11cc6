// A product as Python describes it, and its plan as Python sees it.
#ifndef JAX_NANO_PYTHON_PRODUCT_H_
#define JAX_NANO_PYTHON_PRODUCT_H_

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "plan/plan.h"
#include "plan/select.h"

namespace jax_nano {

using Ints = std::vector<int64_t>;

// A call's arrays as Python gives them; owns what Operand only views.
struct CallSpec {
  Ints lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels;
  std::string lhs_dtype, rhs_dtype, out_dtype, algorithm;

  Plan MakePlanFor(std::span<const Target* const> targets, int64_t threads, const Caches& caches) const;

 private:
  int64_t SizeOf(int64_t label) const;
};

// Selected targets, or the one of this name whether or not the CPU can run it: planning runs nothing.
std::vector<const Target*> TargetsFor(const std::optional<std::string>& name);

// "" if there is none.
std::string FirstName(const std::vector<const Target*>& targets);

nanobind::dict PlanDict(const Plan& plan);

}  // namespace jax_nano

#endif  // JAX_NANO_PYTHON_PRODUCT_H_
