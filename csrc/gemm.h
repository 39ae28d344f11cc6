// Runs a plan on memory.
#ifndef JAX_NANO_GEMM_H_
#define JAX_NANO_GEMM_H_

#include <cstdint>

#include "parallel.h"
#include "plan.h"

namespace jax_nano {

// The call's operands and result, in the caller's order: the plan knows whether roles are swapped.
struct Buffers {
  const void* lhs;
  const void* rhs;
  void* out;
  const Epilogue* epilogue = nullptr;  // of the whole result; with a bias, the plan is one whose last_is_n
};

// One work item, on this thread. Throws std::bad_alloc if there is no memory for the workspace.
void RunItem(const Plan& plan, const Buffers& buffers, int64_t item);

template <typename Pool>
void RunPlan(const Plan& plan, const Buffers& buffers, Pool& pool) {
  if (plan.empty) return;
  const int64_t items = plan.split.items();
  if (items == 1) {
    RunItem(plan, buffers, 0);
  } else {
    ParallelFor(pool, items, [&](int64_t item) { RunItem(plan, buffers, item); });
  }
}

}  // namespace jax_nano

#endif  // JAX_NANO_GEMM_H_
