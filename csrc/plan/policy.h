// Which of the legal schedules (schedule.h) a product gets, and how it is split into work items. Pure functions of the
// product, the kernel and the machine, whose constants are all in machine/profile.h.
//
// Two kinds of decisions:
//
//   * numeric ones fix the order in which a sum is taken: the path, kc, split-K. They follow from kernel, product and
//     profile, never from the number of threads or the sizes of caches, so that results are the same bit for bit;
//   * the others only move data: mc, nc, packing A, prefetching, the split over threads.
#ifndef JAX_NANO_PLAN_POLICY_H_
#define JAX_NANO_PLAN_POLICY_H_

#include <cstdint>

#include "machine/machine.h"
#include "plan/kernel_abi.h"
#include "plan/schedule.h"

namespace jax_nano {

// Into how many parts each of the three independent directions is cut. A work item is one part of each.
struct Split {
  int64_t products = 1;
  int64_t m = 1;
  int64_t n = 1;
  int64_t items() const { return products * m * n; }

  bool operator==(const Split&) const = default;
};

// Numeric: the path, and of a blocked one pack_b and kc; of inner products what is copied along k. The rest is left
// open. The product is whole: not split, but one of several calls (`accumulates`) where k has more than one dimension.
Schedule ChooseOrderOfSums(const KernelInfo& kernel, const Product& product, const Profile& profile);

// The same, of a blocked path.
Blocked ChooseDepth(const KernelInfo& kernel, const Product& product, const Profile& profile);

// Numeric: into how many slices k is cut, each summed separately in shared workspace; 1: none. `passes` calls add up
// to one sum.
int64_t ChooseSplitK(const Schedule& schedule, const KernelInfo& kernel, const Product& product, int64_t products,
                     int64_t passes, const Profile& profile);

// What the slices of k are multiples of, but for the last one.
int64_t SplitKUnit(const Schedule& schedule, const Profile& profile);

// Fills in what ChooseOrderOfSums left open, for items of at most item_m x item_n of the product.
Schedule ChooseBlocks(const Schedule& schedule, const KernelInfo& kernel, const Product& product, int64_t item_m,
                      int64_t item_n, const Machine& machine);

// Whether few rows of A meet a B of 16-bit elements that is expected in memory, whatever caches could hold it.
bool MeetsWeights(const KernelInfo& kernel, const Product& product, const Profile& profile);

// Whether a sweep fetches the next rows of such a B.
bool PrefetchesWeights(const KernelInfo& kernel, const Product& product, const Profile& profile);

// Whether the work fills two items, if there are threads.
bool WorthSplitting(const Product& product, int64_t products, int64_t all_k, const Profile& profile);

// How long the work takes one thread, roughly, in ns.
int64_t ExpectedNs(const Product& product, int64_t products, int64_t all_k, const Profile& profile);

// Into how many work items so many threads may cut `products` products after ChooseOrderOfSums, each with sums over
// `all_k` in all their calls.
int64_t MostItems(const Schedule& schedule, const KernelInfo& kernel, const Product& product, int64_t products,
                  int64_t all_k, int64_t threads, const Profile& profile);

// Cuts them into at most `most` items.
Split ChooseSplit(const Schedule& schedule, const KernelInfo& kernel, const Product& product, int64_t products,
                  int64_t all_k, int64_t threads, int64_t most, const Profile& profile);

// The largest item's rows and columns, in whole register tiles.
int64_t ItemRows(const KernelInfo& kernel, const Product& product, const Split& split);
int64_t ItemColumns(const KernelInfo& kernel, const Product& product, const Split& split);

// When so many threads are done with all items, of which one takes `item` in the mean and the largest `largest`, each
// with its claim, in any unit.
double TimeOfItems(double item, double largest, int64_t items, int64_t threads, const Profile& profile);

// What a work item costs beside what it computes, in ns: to claim it, and in caches that know nothing of it.
double ClaimNs(const Profile& profile);

// What it costs that two cores write parts of a row of C, in ns.
double SharedRowNs(const Profile& profile);

// Cuts m and n further until the partial sums of an item fit into `max_bytes` of workspace.
Split SplitForPartialSums(const KernelInfo& kernel, const Product& product, Split split, int64_t max_bytes);

// Numeric: whether C^T = B^T A^T, in workspace, is computed instead of C, which is then written from it.
bool PrefersTransposed(const Product& product, const Profile& profile);

// Numeric: whether the kernel's loops for small products (codegen/small.py), which take pairs of B's rows as they lie,
// pay where other kernels or paths would need no copy of B either.
bool PairsPay(const KernelInfo& kernel, const Product& product);

// Whether the product, planned for the best kernel by `schedule`, should rather go to one that reads B where it lies.
bool PrefersDirectKernel(const Schedule& schedule, const KernelInfo& kernel, const Product& product,
                         const Profile& profile);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_POLICY_H_
