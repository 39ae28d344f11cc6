// Runs a plan on memory.
#ifndef JAX_NANO_GEMM_H_
#define JAX_NANO_GEMM_H_

#include <cstdint>

#include "parallel.h"
#include "plan.h"
#include "workspace.h"

namespace jax_nano {

// The call's operands and result, in the caller's order: the plan knows whether roles are swapped.
struct Buffers {
  const void* lhs;
  const void* rhs;
  void* out;
  const Epilogue* epilogue = nullptr;  // of the whole result; with a bias, the plan is one whose last_is_n
};

// One work item, on this thread; `sums` are Plan::shared_bytes() of memory. Throws std::bad_alloc if there is no memory
// for the workspace.
void RunItem(const Plan& plan, const Buffers& buffers, void* sums, int64_t item);

// Adds the sums of the pieces of k, in an order of their own, and finishes the result.
void AddPieces(const Plan& plan, const Buffers& buffers, void* sums);

template <typename Pool>
void RunPlan(const Plan& plan, const Buffers& buffers, Pool& pool) {
  if (plan.empty) return;
  void* const sums = SharedWorkspace(plan.shared_bytes());
  const int64_t items = plan.items();
  if (items == 1) {
    RunItem(plan, buffers, sums, 0);
  } else {
    ParallelFor(pool, items, [&](int64_t item) { RunItem(plan, buffers, sums, item); });
  }
  if (plan.k_pieces > 1) AddPieces(plan, buffers, sums);
}

}  // namespace jax_nano

#endif  // JAX_NANO_GEMM_H_
