// A schedule says how a kernel computes one call: by which of its paths, what it packs, and its cache blocks. This file
// holds what is *legal*, that is, what a kernel computes correctly and within its workspace. What is *fast* is policy:
// policy.h. Sizes and strides are in elements.
#ifndef JAX_NANO_PLAN_SCHEDULE_H_
#define JAX_NANO_PLAN_SCHEDULE_H_

#include <cstdint>
#include <string>
#include <variant>

#include "plan/kernel_abi.h"

namespace jax_nano {

// What one kernel call computes: C[m, n] (+)= A[m, k] B[k, n], `batch` times.
struct Product {
  int64_t m = 0, n = 0, k = 0;
  int64_t rsa = 0, csa = 1, rsb = 0, csb = 1, rsc = 0;  // strides between rows and between columns
  int64_t batch = 1, bsa = 0, bsb = 0, bsc = 0;         // strides between products
  bool accumulates = false;                             // some call adds to the sums of an earlier one
  bool unfinished = false;                              // some call leaves sums to be continued by a later one
  bool epilogue = false;                                // finished sums get an epilogue
  // Partial sums of a kernel whose C is too narrow for them: elements between their rows. 0 if there are none.
  int64_t rs_partial = 0;
};

// Register tiles inside of cache blocks:
//
//     for ic in m by mc
//       for pc in k by kc                      sums of the blocks of k are added to C (or `partial`) in this order
//         for jc in n by nc                    [pack B: kc x nc]
//           for ir in mc by tile_rows          [pack A: tile_rows x kc, the first time]
//             for jr in nc by nr               a register tile: all of kc
//
// The only path that every kernel has.
struct Blocked {
  bool pack_a = false, pack_b = false;
  int64_t mc = 0, kc = 0, nc = 0;
  int64_t tile_rows = 0;  // rows of a register tile that are used, at most mr

  bool operator==(const Blocked&) const = default;
};

// Inner products: each element of C is the sum over the lanes of an accumulator that runs along k. For few rows or few
// columns, with both operands contiguous along k; a packed operand is copied so, whole.
struct InnerProduct {
  bool pack_a = false, pack_b = false;
  bool prefetch = false;  // the longer operand lies in memory, not in a cache: fetch what is read next

  bool operator==(const InnerProduct&) const = default;
};

// Sweeps over the columns of a few rows of B where it lies, which add to sums in memory. For few rows of A against a
// large row-major B, which is read once.
struct Sweep {
  bool prefetch = false;  // B lies in memory, not in a cache: fetch the rows that are read next

  bool operator==(const Sweep&) const = default;
};

using Schedule = std::variant<Blocked, InnerProduct, Sweep>;

// Why the kernel cannot compute the product by this schedule; "" if it can. All rules are here: the planner, forced
// schedules and single kernel calls (python/testing.cc) ask it before anything runs.
std::string Validate(const Schedule& schedule, const KernelInfo& kernel, const Product& product);

// Whether it copies B, by blocks or whole.
bool PacksB(const Schedule& schedule);

// Whether the kernel can read A where it lies: element by element, or kr of a row at a time.
bool ReadsA(const KernelInfo& kernel, const Product& product);

// Whether sums are partial at some time in a place of their own: C cannot hold them, and they are not finished in
// registers.
bool NeedsPartialSums(const Schedule& schedule, const KernelInfo& kernel, const Product& product);

// What the kernel may write at GemmArgs::a_pack, b_pack and partial, in bytes: multiples of 64, 0 for what is not used.
// Rows of packed A take an odd number of cache lines each, so that no two share their sets in L1.
int64_t PackedABytes(const Schedule& schedule, const KernelInfo& kernel, const Product& product);
int64_t PackedBBytes(const Schedule& schedule, const KernelInfo& kernel, const Product& product);
int64_t PartialBytes(const KernelInfo& kernel, int64_t m, int64_t rs_partial);

// The kernel's arguments, pointers null.
GemmArgs Arguments(const Schedule& schedule, const Product& product);

// Bytes of a row of packed A.
int64_t PackedARow(const KernelInfo& kernel, int64_t kc);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_SCHEDULE_H_
