// What is decided once per call shape: kernel, loops, cache blocking, packing, and the split into work
// items. Pure functions; the machine comes in as arguments. Sizes and strides are in elements.
#ifndef JAX_NANO_PLAN_PLAN_H_
#define JAX_NANO_PLAN_PLAN_H_

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "machine/caches.h"
#include "plan/contraction.h"
#include "plan/kernel_abi.h"
#include "plan/select.h"

namespace jax_nano {

// What a thread needs at most, whatever the size of the product.
inline constexpr int64_t kMaxWorkspaceBytes = int64_t{8} << 20;

// How many pieces each of the three independent directions is cut into. An item is one piece of each.
struct Split {
  int64_t products = 1;  // of Plan::products
  int64_t m = 1;
  int64_t n = 1;
  int64_t items() const { return products * m * n; }
};

struct Plan {
  const KernelInfo* kernel = nullptr;
  bool swapped = false;                           // A is the call's rhs
  bool empty = false;                             // the result has no elements: nothing to do
  int64_t a_bytes = 0, b_bytes = 0, c_bytes = 0;  // of one element

  // One kernel call over the whole m, n and batch; RunItem narrows them. Pointers are null.
  GemmArgs args = {};
  // Independent loops around the kernel's own batch loop, outermost first: batch dimensions, and those
  // of M and N that could not be merged.
  std::vector<Loop> outer;
  // Contracting dimensions that could not be merged with args.k, outermost first: passes that
  // accumulate into C, in this order.
  std::vector<Loop> k_outer;

  // Pieces of k whose sums are taken apart, in workspace that all threads share, and added when all are there; each a
  // multiple of k_unit, but the last. More than one where the result is too small to be split.
  int64_t k_pieces = 1, k_unit = 1;
  int64_t rs_sums = 0, sums_bytes = 0;  // of one piece's sums of one product: elements between rows, bytes in all

  int64_t products = 1;                  // outer sizes times args.batch: independent products of m x n x k
  bool divisible = false;                // large enough to be split, if there are threads
  std::chrono::nanoseconds expected{0};  // on one thread, roughly: for as long as nobody has seen how long it takes
  Split split;
  int64_t a_pack_bytes = 0, b_pack_bytes = 0, partial_bytes = 0;  // workspace of one thread

  int64_t items() const { return split.items() * k_pieces; }
  int64_t shared_bytes() const { return k_pieces > 1 ? products * k_pieces * sums_bytes : 0; }
};

// For a given kernel and contraction every element of C is the same, bit for bit, whatever `threads` and
// `caches` are: only the cutting of k decides in which order a sum is taken, and k is cut by the product's shape,
// strides and dtypes alone.
Plan MakePlan(const Contraction& contraction, const KernelInfo& kernel, int64_t threads, const Caches& caches);

// The whole way from labelled arrays: analysis, the best of `targets` that has a kernel, plan. Throws
// std::invalid_argument if the arrays do not fit together or no kernel takes their dtypes. last_is_n: as in Analyze.
Plan MakePlan(const Operand& lhs, const Operand& rhs, const Operand& out, std::string_view algorithm,
              std::span<const Target* const> targets, int64_t threads, const Caches& caches, bool last_is_n = false);

// The parts of MakePlan, for tests and tuning.

// What decides the order in which sums are taken, so follows from the product alone, never from the split or the
// machine: fills inner, sweep, pack_b and kc of `args` (and pack_a of inner), whose sizes and strides describe the
// whole product, where `passes` kernel calls add up to one sum over k.
void ChooseSums(const KernelInfo& kernel, int64_t passes, GemmArgs& args);

// Whether the kernel can read A where it lies: element by element, or kr of a row at a time.
bool ReadsA(const KernelInfo& kernel, const GemmArgs& args);

// How many pieces k is cut into, after ChooseSums: like the order of sums, this follows from the product alone.
int64_t ChooseKPieces(const KernelInfo& kernel, int64_t products, const GemmArgs& args, int64_t passes);

// What only moves data: fills pack_a (but of inner), ahead, mc and nc of `args`, after ChooseSums, for items of item_m
// x item_n.
void ChooseBlocks(const KernelInfo& kernel, const Caches& caches, int64_t item_m, int64_t item_n, GemmArgs& args);

// Whether the work fills two items.
bool WorthSplitting(int64_t products, int64_t m, int64_t n, int64_t k);

// For `products` products that ChooseSums has seen, each with sums over `k` in all.
Split ChooseSplit(const KernelInfo& kernel, int64_t products, const GemmArgs& args, int64_t k, int64_t threads);

// Cuts m and n further until the unfinished sums of an item of a narrow kernel fit into the workspace.
Split SplitForPartialSums(const KernelInfo& kernel, int64_t m, int64_t n, Split split);

// What the kernel may write at GemmArgs::a_pack, b_pack and partial: multiples of 64, 0 for what is not used. Rows of
// packed A take an odd number of cache lines each.
int64_t PackedABytes(const KernelInfo& kernel, const GemmArgs& args);
int64_t PackedBBytes(const KernelInfo& kernel, const GemmArgs& args);
int64_t PartialBytes(const KernelInfo& kernel, int64_t m, int64_t rs_partial);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_PLAN_H_
