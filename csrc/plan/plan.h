// What is decided once per call shape: the kernel, its schedule, the loops around it, and the split into work items.
// Pure functions; the machine comes in as an argument. Sizes and strides are in elements.
#ifndef JAX_NANO_PLAN_PLAN_H_
#define JAX_NANO_PLAN_PLAN_H_

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "machine/machine.h"
#include "plan/contraction.h"
#include "plan/kernel_abi.h"
#include "plan/policy.h"
#include "plan/schedule.h"
#include "plan/search.h"
#include "plan/select.h"
#include "plan/specialized.h"

namespace jax_nano {

// What a thread needs at most, whatever the size of the product.
inline constexpr int64_t kMaxWorkspaceBytes = int64_t{8} << 20;
// Of it, the partial sums of one item: 1.5 MiB, which with packed blocks of A and B stays below the maximum.
inline constexpr int64_t kMaxPartialBytes = int64_t{3} << 19;

// Split-K: k is cut into slices, each summed separately in workspace that all threads share; when all are there, they
// are added in pairs. For results too small to be split otherwise, on one thread as on many, so that bits are the same.
struct SplitK {
  int64_t slices = 1;
  int64_t unit = 1;         // what slices are multiples of, but for the last
  int64_t row_stride = 0;   // of one slice's sums of one product: elements between rows,
  int64_t slice_bytes = 0;  // and bytes in all
};

// All that is free to decide for a product and a kernel.
struct Choice {
  Schedule schedule;
  Split split;
  int64_t split_k = 1;       // slices
  int64_t split_k_unit = 1;  // a multiple of the kernel's kr

  bool operator==(const Choice&) const = default;
};

struct Plan {
  const KernelInfo* kernel = nullptr;
  bool swapped = false;                            // A is the call's rhs
  bool transposed = false;                         // items compute C^T in workspace, from which C is written
  bool empty = false;                              // the result has no elements: nothing to do
  const SpecializedKernel* specialized = nullptr;  // what `kernel` is of, if it was composed for this product
  int64_t a_bytes = 0, b_bytes = 0, c_bytes = 0;   // of one element

  int64_t out_rows_apart = 0;  // of a transposed plan: elements of the result between columns of C^T

  Product product;     // one kernel call over the whole m, n, k and batch; a work item is a part of it
  Schedule schedule;   // of each kernel call
  GemmArgs args = {};  // of both, pointers null: what RunItem copies

  // Independent loops around the kernel's own batch loop, outermost first: batch dimensions, and those
  // of M and N that could not be merged.
  std::vector<Loop> outer;
  // Contracting dimensions that could not be merged with k, outermost first: passes, kernel calls that accumulate into
  // C in this order.
  std::vector<Loop> k_outer;

  int64_t products = 1;                  // outer sizes times batch: independent products of m x n x k
  bool divisible = false;                // large enough to be split, if there are threads
  std::chrono::nanoseconds expected{0};  // on one thread, roughly: until its calls have been timed
  Split split;
  SplitK split_k;
  bool one_call = false;  // one item, which is one call of the kernel with `args` as they are
  int64_t a_pack_bytes = 0, b_pack_bytes = 0, partial_bytes = 0;  // workspace of one thread

  int64_t items() const { return split.items() * split_k.slices; }
  int64_t workspace_bytes() const { return a_pack_bytes + b_pack_bytes + partial_bytes; }
  int64_t shared_bytes() const { return split_k.slices > 1 ? products * split_k.slices * split_k.slice_bytes : 0; }
};

// For a given kernel and contraction every element of C is the same, bit for bit, whatever `threads` and the machine's
// caches are: only the cutting of k decides in which order a sum is taken, and k is cut by the product's shape, strides
// and dtypes alone.
Plan MakePlan(const Contraction& contraction, const KernelInfo& kernel, int64_t threads, const Machine& machine);

// What the planner compares to fix the order of sums, each with its predicted time on one thread; empty where
// thresholds decide.
std::vector<Scored> ConsideredOrders(const Contraction& contraction, const KernelInfo& kernel, const Machine& machine);

// Whether plans of the kernel may compute C^T and store it transposed: one loop of m and one of n, and a kernel that
// takes either operand for either role and whose C holds sums as they are.
bool MayTranspose(const Contraction& contraction, const KernelInfo& kernel);

// What plans depend on of what a call does with finished sums.
struct Finish {
  bool epilogue = false;  // anything at all
  bool bias = false;      // it adds a bias: last_is_n of Analyze
};

// The whole way from labelled arrays: analysis, the best of `targets` that has a kernel, plan; and in the place of that
// kernel the one that the machine has for exactly this product, if it has one. Throws std::invalid_argument if the
// arrays do not fit together or no kernel takes their dtypes.
Plan MakePlan(const Operand& lhs, const Operand& rhs, const Operand& out, std::string_view algorithm,
              std::span<const Target* const> targets, int64_t threads, const Machine& machine,
              const Finish& finish = {});

// Makes the plan of another's choice, for tests and measurements. Returns why there is none, "" if it made one: the
// kernel cannot compute the contraction so, or needs more workspace than a plan may.
std::string MakePlan(const Contraction& contraction, const KernelInfo& kernel, const Choice& choice,
                     const Profile& profile, Plan& plan);

// The planner's own.
Choice ChoiceOf(const Plan& plan);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_PLAN_H_
