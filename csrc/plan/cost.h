// What a schedule does, counted, and from that how long it takes: the planner's model of a CPU.
//
// The counts are of one thread that finds its operands where a program that has just used them leaves them: in the
// smallest cache that holds all of them, or all of those that it has a part of. They are sums over loops; what a count
// costs is the CPU's (machine/costs.h).
#ifndef JAX_NANO_PLAN_COST_H_
#define JAX_NANO_PLAN_COST_H_

#include "machine/costs.h"
#include "plan/kernel_abi.h"
#include "plan/schedule.h"

namespace jax_nano {

// How often each cost arises when the kernel computes the product by the schedule, which is legal. With slices of
// split-K, each of them and their sum.
CostCounts CountCosts(const Schedule& schedule, const KernelInfo& kernel, const Product& product, int64_t slices,
                      const CoreModel& core);

// The same of a part of a product: one item of several, whose operands lie where those of `whole` do.
CostCounts CountCostsOfPart(const Schedule& schedule, const KernelInfo& kernel, const Product& part,
                            const Product& whole, const CoreModel& core);

// Nanoseconds.
double PredictedNs(const CostCounts& counts, const CostNs& ns);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_COST_H_
