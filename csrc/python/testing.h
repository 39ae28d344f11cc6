// The module jax_nano._runtime.testing.
#ifndef JAX_NANO_PYTHON_TESTING_H_
#define JAX_NANO_PYTHON_TESTING_H_

#include <nanobind/nanobind.h>

namespace jax_nano {

// Fills the module with what only tests and benchmarks call: products and single kernels run without XLA, detection
// and selection for CPUs of their choice, and the parts of what decides whether threads share a call.
void DefineTesting(nanobind::module_ m);

}  // namespace jax_nano

#endif  // JAX_NANO_PYTHON_TESTING_H_
