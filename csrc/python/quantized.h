// Products with quantised weights from Python: plans, and for tests and benchmarks runs without XLA.
#ifndef JAX_NANO_PYTHON_QUANTIZED_H_
#define JAX_NANO_PYTHON_QUANTIZED_H_

#include <nanobind/nanobind.h>

namespace jax_nano {

// `testing` is the submodule for tests.
void DefineQuantized(nanobind::module_& m, nanobind::module_& testing);

}  // namespace jax_nano

#endif  // JAX_NANO_PYTHON_QUANTIZED_H_
