// Runs plans on memory: the work items of one, and whole calls on a pool of threads.
#ifndef JAX_NANO_RUN_GEMM_H_
#define JAX_NANO_RUN_GEMM_H_

#include <cstdint>
#include <utility>

#include "plan/plan.h"
#include "run/parallel.h"
#include "run/sharing.h"
#include "run/workspace.h"

namespace jax_nano {

// The call's operands and result, in the caller's order: the plan knows whether roles are swapped.
struct Buffers {
  const void* lhs;
  const void* rhs;
  void* out;
  const Epilogue* epilogue = nullptr;  // of the whole result; with a bias, the plan is one whose last_is_n
};

// One work item, on this thread. `slices` are Plan::shared_bytes() of memory for split-K, null without. Throws
// std::bad_alloc if there is no memory for the workspace.
void RunItem(const Plan& plan, const Buffers& buffers, void* slices, int64_t item);

// The same for a plan that is one_call, without RunItem's divisions, which take longer than a tiny product. `args` are
// the plan's; only their pointers are set, so that a caller can use them again.
void RunOneCall(const Plan& plan, GemmArgs& args, const Buffers& buffers);

// The whole product, on this thread.
void RunAlone(const Plan& plan, const Buffers& buffers);

// The end of split-K: adds the slices' sums in pairs and finishes the result.
void ReduceSlices(const Plan& plan, const Buffers& buffers, void* slices);

// A plan for all threads of a pool and one for the caller alone, as a split adds some percent to a short call. Both
// give the same bits.
struct Plans {
  Plans(Plan for_pool, Plan for_caller) : shared(std::move(for_pool)), alone(std::move(for_caller)) {}
  Plans(Plan for_pool, Plan for_caller, sharing::Duration expected)
      : shared(std::move(for_pool)), alone(std::move(for_caller)), pace(expected) {}

  const Plan shared, alone;
  mutable sharing::Pace pace{alone.expected};  // of `alone`
};

template <typename Pool>
void RunPlans(const Plans& plans, const Buffers& buffers, Pool& pool) {
  const Plan &shared = plans.shared, &alone = plans.alone;
  if (shared.empty || shared.items() == 1) return RunAlone(alone, buffers);
  void* const slices = SharedWorkspace(shared.shared_bytes());
  const auto run_alone = [&] {
    for (int64_t item = 0; item < alone.items(); ++item) RunItem(alone, buffers, slices, item);
  };
  ParallelFor(pool, shared.items(), plans.pace, run_alone,
              [&](int64_t item) { RunItem(shared, buffers, slices, item); });
  if (shared.split_k.slices > 1) ReduceSlices(shared, buffers, slices);
}

}  // namespace jax_nano

#endif  // JAX_NANO_RUN_GEMM_H_
