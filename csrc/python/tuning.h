// The module jax_nano._runtime.tuning: measuring candidate plans, and what they count.
#ifndef JAX_NANO_PYTHON_TUNING_H_
#define JAX_NANO_PYTHON_TUNING_H_

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "python/product.h"
#include "run/gemm.h"

namespace jax_nano {

// Runs a product on each of some sets of buffers in turn, `trips` times, by the planner's plan or by a choice, without
// XLA. With `share`, all threads take part in every call. Returns the seconds, without planning. Releases the GIL.
// Throws std::invalid_argument if the choice is illegal, or if this CPU cannot run its kernel.
//
// specialized: plan with these kernels for given products; null: with those of the process.
double RunSpec(const CallSpec& spec, int64_t threads, const std::vector<Buffers>& sets, int64_t trips, bool share,
               const std::optional<nanobind::dict>& choice, const SpecializedKernels* specialized = nullptr,
               const Finish& finish = {});

Buffers BuffersAt(uintptr_t lhs, uintptr_t rhs, uintptr_t out);

// Fills the module with what `python -m jax_nano tune`, benchmarks and tests measure plans with.
void DefineTuning(nanobind::module_ m);

}  // namespace jax_nano

#endif  // JAX_NANO_PYTHON_TUNING_H_
