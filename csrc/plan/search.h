// The schedule of least predicted time, for kernels whose costs on this CPU are known (machine/costs.h). For the others
// policy.h has thresholds.
//
// Numeric decisions look at the costs and at the caches that these are for; those that only move data look at the
// caches of the machine at hand.
#ifndef JAX_NANO_PLAN_SEARCH_H_
#define JAX_NANO_PLAN_SEARCH_H_

#include <optional>
#include <vector>

#include "machine/machine.h"
#include "plan/kernel_abi.h"
#include "plan/policy.h"
#include "plan/schedule.h"

namespace jax_nano {

struct Scored {
  Schedule schedule;
  double ns;  // predicted, on one thread
};

// Each order of sums that is worth considering, with the blocks that make it fastest. The product is whole, its batch
// loop included. In the order of preference among equals; empty if nothing is known of what the kernel costs. Costs
// that were not measured, but follow from what is published of a CPU, tell what to expect and decide nothing.
std::vector<Scored> OrdersOfSums(const KernelInfo& kernel, const Product& product, const Machine& machine);

// The fastest of these: the numeric choice. None if the costs of the kernel were not measured on such a CPU.
std::optional<Schedule> FastestOrderOfSums(const KernelInfo& kernel, const Product& product, const Machine& machine);

// Fills in what only moves data, for items of at most item_m x item_n. None if the costs of the kernel were measured
// neither on such a CPU nor here.
std::optional<Schedule> FastestBlocks(const Schedule& schedule, const KernelInfo& kernel, const Product& product,
                                      int64_t item_m, int64_t item_n, const Machine& machine);

// How the product, whose batch are all products of the call, is cut into at most `most` work items for so many threads,
// after FastestOrderOfSums. None where FastestBlocks has none.
std::optional<Split> FastestSplit(const Schedule& schedule, const KernelInfo& kernel, const Product& product,
                                  int64_t most, int64_t threads, const Machine& machine);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_SEARCH_H_
