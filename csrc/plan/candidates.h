// All the ways to compute a product that are worth measuring: what a planner could have chosen. For measuring the
// planner's regret, not for planning.
#ifndef JAX_NANO_PLAN_CANDIDATES_H_
#define JAX_NANO_PLAN_CANDIDATES_H_

#include <cstdint>
#include <vector>

#include "machine/machine.h"
#include "plan/contraction.h"
#include "plan/kernel_abi.h"
#include "plan/plan.h"

namespace jax_nano {

// Legal choices over a grid: every path and packing that the kernel has for the product, and for the blocked path
// depths kc from 64 on in powers of two, blocks of B in shares of L2, blocks of A from a quarter of the most a profile
// allows, whole and partial heights of register tiles; each with split-K of 1, 2, 4 ... slices where the result has few
// tiles, and with splits along rows, columns and products into 1, 2, 4 ... items a thread. The planner's own choice is
// the first. Without duplicates; empty if the result is.
std::vector<Choice> Candidates(const Contraction& contraction, const KernelInfo& kernel, int64_t threads,
                               const Machine& machine);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_CANDIDATES_H_
