// Products with quantised weights: y[m, n] = sum over k of x[m, k] * (q[k, n] - zero[g, n]) * scale[g, n], where g is
// the group of k, in float32, rounded to y's dtype once.
//
// Few rows: the generated kernels read the weights where they lie. More: they make float32 of a block of weights in
// workspace, and the plain kernels multiply it. Which, and the order of every sum, follows from the shape and the dtypes
// alone, so results are the same bits for any number of threads.
#ifndef JAX_NANO_QUANTIZED_H_
#define JAX_NANO_QUANTIZED_H_

#include <chrono>
#include <cstdint>
#include <span>
#include <string_view>

#include "cpu.h"
#include "kernel_abi.h"
#include "parallel.h"
#include "select.h"

namespace jax_nano {

// A product's shape and dtypes, by their names. All arrays are dense and row-major.
struct QuantizedShape {
  int64_t m, n, k;
  int64_t group;  // values of k that share a scale; divides k
  bool along_k;   // q is [n, k], scale and zero are [n, groups]; else [k, n] and [groups, n]
  std::string_view x, q, scale, zero, out;  // no zero points: ""
};

struct QuantizedBuffers {
  const void *x, *q, *scale, *zero;
  void* out;
};

struct QuantizedPlan {
  const QuantizedInfo* kernel = nullptr;
  QuantizedArgs args = {};  // of the whole product; pointers are null
  bool few = false;         // the weights are read where they lie
  int64_t x_bytes = 0, scale_bytes = 0, zero_bytes = 0, out_bytes = 0, bits = 0;

  // Items are pieces of rows and of columns.
  int64_t m_pieces = 1, n_pieces = 1, n_unit = 1;
  std::chrono::nanoseconds expected{0};

  // More rows: the kernel for float32 weights, its arguments for one block of them, and the block's size.
  const KernelInfo* gemm = nullptr;
  GemmArgs block = {};
  int64_t block_k = 0, block_n = 0, ld = 0;  // elements between the block's rows
  int64_t a_pack_bytes = 0, b_pack_bytes = 0;

  int64_t items() const { return m_pieces * n_pieces; }
};

// The kernels of this build.
std::span<const QuantizedInfo> QuantizedKernels();

// Throws std::invalid_argument if sizes or dtypes are none that kernels take.
QuantizedPlan PlanQuantized(const QuantizedShape& shape, std::span<const Target* const> targets, int64_t threads,
                            const Caches& caches);

// One work item, on this thread. Throws std::bad_alloc if there is no memory for the workspace.
void RunQuantizedItem(const QuantizedPlan& plan, const QuantizedBuffers& buffers, int64_t item);

template <typename Pool>
void RunQuantized(const QuantizedPlan& plan, const QuantizedBuffers& buffers, sharing::Pace& pace, Pool& pool) {
  const auto run = [&](int64_t item) { RunQuantizedItem(plan, buffers, item); };
  const auto alone = [&] {
    for (int64_t item = 0; item < plan.items(); ++item) run(item);
  };
  if (plan.items() == 1) {
    alone();
  } else {
    ParallelFor(pool, plan.items(), pace, alone, run);
  }
}

}  // namespace jax_nano

#endif  // JAX_NANO_QUANTIZED_H_
