#include "plan/registry.h"

#include <iterator>

// manifest.inc has one JAX_NANO_KERNEL(...) line per generated kernel. It is read twice: once to declare
// the symbols, once to fill the table.
#define JAX_NANO_KERNEL(symbol, ...) extern "C" void symbol(const jax_nano::GemmArgs*);
#include "manifest.inc"
#undef JAX_NANO_KERNEL

namespace jax_nano {
namespace {

constexpr KernelInfo kKernels[] = {
#define JAX_NANO_KERNEL(symbol, ...) {__VA_ARGS__, &symbol},
#include "manifest.inc"
#undef JAX_NANO_KERNEL
    {},  // an array may not be empty, a build without kernels (another architecture) may
};

}  // namespace

std::span<const KernelInfo> Kernels() { return {kKernels, std::size(kKernels) - 1}; }

const KernelInfo* FindKernel(std::string_view target, std::string_view lhs, std::string_view rhs, std::string_view out,
                             std::string_view algorithm) {
  for (const KernelInfo& k : Kernels()) {
    if (target == k.target && lhs == k.lhs && rhs == k.rhs && out == k.out && algorithm == k.algorithm) return &k;
  }
  return nullptr;
}

const KernelInfo* FindKernel(std::string_view name) {
  for (const KernelInfo& k : Kernels()) {
    if (name == k.name) return &k;
  }
  return nullptr;
}

int64_t ElementBytes(std::string_view dtype) {
  for (const DType& x : kDTypes) {
    if (x.name == dtype) return x.bytes;
  }
  return 0;
}

}  // namespace jax_nano
