// Kernels for given products, as packs describe them.
#ifndef JAX_NANO_PYTHON_SPECIALIZED_H_
#define JAX_NANO_PYTHON_SPECIALIZED_H_

#include <nanobind/nanobind.h>

#include <memory>
#include <vector>

#include "plan/specialized.h"

namespace jax_nano {

// A table as Python has it. Plans point to its kernels, so it outlives the object: it is never freed.
struct Table {
  SpecializedKernels* const kernels = Keep();

 private:
  static SpecializedKernels* Keep() {
    static auto* const kept = new std::vector<std::unique_ptr<SpecializedKernels>>;
    return kept->emplace_back(std::make_unique<SpecializedKernels>()).get();
  }
};

void DefineSpecialized(nanobind::module_ m);

}  // namespace jax_nano

#endif  // JAX_NANO_PYTHON_SPECIALIZED_H_
