// What tests and benchmarks of attention call from Python without XLA.
#ifndef JAX_NANO_PYTHON_ATTENTION_H_
#define JAX_NANO_PYTHON_ATTENTION_H_

#include <nanobind/nanobind.h>

namespace jax_nano {

void DefineAttention(nanobind::module_& m);

}  // namespace jax_nano

#endif  // JAX_NANO_PYTHON_ATTENTION_H_
