// Products with quantised weights: plans, and runs them on memory.
//
//     y[m, n] = sum over k of x[m, k] * (q[k, n] - zero[g, n]) * scale[g, n]        g: the group of k
//
// in float32, and activation(scale * y + bias) + residual of it where there is an epilogue, rounded to the result's
// dtype once. Few rows: the generated kernels (jax_nano/codegen/quantized) read the weights where they lie. More: they
// make float32 of a block of weights in workspace, and the plain kernels multiply it; or bfloat16 of q - zero, where x
// is bfloat16 too, the CPU multiplies such numbers, and they are exact: then sums over a group are scaled afterwards.
// Which, and the order of every sum, follows from the shape, the dtypes and the target alone, so results are the same
// bits for any number of threads.
#ifndef JAX_NANO_RUN_QUANTIZED_H_
#define JAX_NANO_RUN_QUANTIZED_H_

#include <chrono>
#include <cstdint>
#include <span>
#include <string_view>

#include "machine/machine.h"
#include "plan/kernel_abi.h"
#include "plan/select.h"
#include "run/parallel.h"
#include "run/sharing.h"
#include "run/workspace.h"

namespace jax_nano {

// The generated kernels of this build.
std::span<const QuantizedInfo> QuantizedKernels();

// A product's shape and dtypes, by their names. All arrays are dense and row-major.
struct QuantizedShape {
  int64_t m, n, k;
  int64_t group;                            // values of k that share a scale; divides k
  bool along_k;                             // q is [n, k], scale and zero are [n, groups]; else [k, n] and [groups, n]
  std::string_view x, q, scale, zero, out;  // no zero points: ""
};

struct QuantizedBuffers {
  const void *x, *q, *scale, *zero;
  void* out;
  const Epilogue* epilogue = nullptr;  // bias and residual are of out's dtype
};

struct QuantizedPlan {
  const QuantizedInfo *kernel = nullptr, *finish = nullptr;
  QuantizedArgs args = {};  // of the whole product; pointers are null
  bool few = false;         // the weights are read where they lie
  int64_t x_bytes = 0, scale_bytes = 0, zero_bytes = 0, out_bytes = 0, bits = 0;

  // Items are parts of rows and of columns, and for few rows of k, each summed separately in shared workspace.
  int64_t m_parts = 1, n_parts = 1, k_parts = 1, n_unit = 1, k_unit = 1;
  std::chrono::nanoseconds expected{0};  // on one thread, roughly

  // Few rows: how many columns and values of k one kernel call takes.
  int64_t call_n = 0, call_k = 0;

  // More rows: the kernel for float32 weights, its arguments for one block of them, and the block's size.
  const KernelInfo* gemm = nullptr;
  bool scales_sums = false;  // the weights are bfloat16 and not scaled
  GemmArgs block = {};
  int64_t block_k = 0, block_n = 0, ld = 0;  // elements between the block's rows
  int64_t a_pack_bytes = 0, b_pack_bytes = 0, partial_bytes = 0;

  int64_t items() const { return m_parts * n_parts * k_parts; }
  int64_t slice_bytes() const;  // of the sums of a part of k
  int64_t shared_bytes() const { return k_parts > 1 ? k_parts * slice_bytes() : 0; }
};

// Throws std::invalid_argument if sizes or dtypes are none that kernels take.
QuantizedPlan PlanQuantized(const QuantizedShape& shape, std::span<const Target* const> targets, int64_t threads,
                            const Machine& machine);

// One work item, on this thread; with parts of k its sums go to `shared`, QuantizedPlan::shared_bytes() of memory.
// Throws std::bad_alloc if there is no memory for the workspace.
void RunQuantizedItem(const QuantizedPlan& plan, const QuantizedBuffers& buffers, void* shared, int64_t item);

// Adds the sums of the parts of k in pairs and writes the results.
void ReduceQuantized(const QuantizedPlan& plan, const QuantizedBuffers& buffers, void* shared);

template <typename Pool>
void RunQuantized(const QuantizedPlan& plan, sharing::Pace& pace, const QuantizedBuffers& buffers, Pool& pool) {
  void* const shared = SharedWorkspace(plan.shared_bytes());
  const auto run = [&](int64_t item) { RunQuantizedItem(plan, buffers, shared, item); };
  const auto alone = [&] {
    for (int64_t item = 0; item < plan.items(); ++item) run(item);
  };
  if (plan.items() == 1) {
    alone();
  } else {
    ParallelFor(pool, plan.items(), pace, alone, run);
  }
  if (plan.k_parts > 1) ReduceQuantized(plan, buffers, shared);
}

}  // namespace jax_nano

#endif  // JAX_NANO_RUN_QUANTIZED_H_
