// The generated kernels that this build contains.
#ifndef JAX_NANO_PLAN_REGISTRY_H_
#define JAX_NANO_PLAN_REGISTRY_H_

#include <cstdint>
#include <span>
#include <string_view>

#include "plan/kernel_abi.h"

namespace jax_nano {

// In the order of the manifest.
std::span<const KernelInfo> Kernels();

// The kernel of exactly this target and signature, or null.
const KernelInfo* FindKernel(std::string_view target, std::string_view lhs, std::string_view rhs, std::string_view out,
                             std::string_view algorithm);

// The kernel of this name, or null.
const KernelInfo* FindKernel(std::string_view name);

// Bytes of one element of a dtype that kernels may use, by its NumPy / ml_dtypes name; 0 if unknown.
int64_t ElementBytes(std::string_view dtype);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_REGISTRY_H_
