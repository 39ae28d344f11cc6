// Kernels for given products, as packs describe them.
#ifndef JAX_NANO_PYTHON_SPECIALIZED_H_
#define JAX_NANO_PYTHON_SPECIALIZED_H_

#include <nanobind/nanobind.h>

namespace jax_nano {

void DefineSpecialized(nanobind::module_ m);

}  // namespace jax_nano

#endif  // JAX_NANO_PYTHON_SPECIALIZED_H_
