// Kernels that were composed for one product each, on the machine that runs it (`python -m jax_nano specialize`). They
// come from packs, which are read at the start of a process (jax_nano/_core/packs.py).
#ifndef JAX_NANO_PLAN_SPECIALIZED_H_
#define JAX_NANO_PLAN_SPECIALIZED_H_

#include <cstddef>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "plan/kernel_abi.h"
#include "plan/schedule.h"

namespace jax_nano {

struct Plan;

// A kernel that computes one product by one schedule, both of which are constants of its code.
struct SpecializedKernel {
  KernelInfo kernel;                    // with a register tile of its own; its name is that of `generic`
  const KernelInfo* generic = nullptr;  // the kernel of the build whose place it takes
  Product product;                      // what `generic` would be called with, unsplit
  Schedule schedule;
  bool takes_parts = false;  // it takes parts of m and n that begin at multiples of its tile
  bool epilogue = false;     // for calls with an epilogue; else for those without
  std::string pack;          // where it comes from, for people
  std::string direct_vectors;
};

// Those that a process uses. Plans hold pointers to them, so one that was made stays.
class SpecializedKernels {
 public:
  SpecializedKernels() = default;
  SpecializedKernels(const SpecializedKernels&) = delete;
  SpecializedKernels& operator=(const SpecializedKernels&) = delete;

  // The kernel of the build `generic` with another tile and function. A later one for the same product replaces an
  // earlier one. Throws std::invalid_argument if such a kernel could not compute the product.
  void Add(std::unique_ptr<SpecializedKernel> kernel);

  // The one for exactly what the plan's kernel would compute, in the same order of sums; null if there is none.
  const SpecializedKernel* Find(const Plan& plan, bool epilogue) const;

  size_t size() const { return kernels_.size(); }

 private:
  std::vector<std::unique_ptr<const SpecializedKernel>> kernels_;
  std::unordered_map<const KernelInfo*, std::vector<const SpecializedKernel*>> by_generic_;
};

// The kernel `generic` would be but for its tile and function; what it says of itself lives in `out`.
void SetKernel(const KernelInfo& generic, int32_t mr, int32_t nr, GemmFn fn, SpecializedKernel& out);

}  // namespace jax_nano

#endif  // JAX_NANO_PLAN_SPECIALIZED_H_
