#include "plan/specialized.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "plan/arithmetic.h"
#include "plan/plan.h"

namespace jax_nano {
namespace {

constexpr int32_t kMostRows = 32, kMostVectors = 8;

bool SameProduct(const Product& x, const Product& y) {
  const auto fields = [](const Product& p) {
    return std::array{p.m, p.n, p.k, p.rsa, p.csa, p.rsb, p.csb, p.rsc, p.batch, p.bsa, p.bsb, p.bsc};
  };
  return fields(x) == fields(y);
}

// Whether both take the same sums in the same order.
bool SameOrder(const Schedule& x, const Schedule& y) {
  if (x.index() != y.index()) return false;
  const auto* blocked = std::get_if<Blocked>(&x);
  return blocked == nullptr || blocked->kc == std::get<Blocked>(y).kc;
}

}  // namespace

void SetKernel(const KernelInfo& generic, int32_t mr, int32_t nr, GemmFn fn, SpecializedKernel& out) {
  if (mr < 1 || mr > kMostRows || nr < generic.lanes || nr > kMostVectors * generic.lanes || nr % generic.lanes != 0) {
    throw std::invalid_argument("no register tile: " + std::to_string(mr) + " x " + std::to_string(nr));
  }
  if (fn == nullptr) throw std::invalid_argument("no function");
  out.generic = &generic;
  out.direct_vectors.assign(generic.direct_b ? static_cast<size_t>(mr) : 0,
                            static_cast<char>('0' + nr / generic.lanes));
  out.kernel = generic;
  out.kernel.mr = mr;
  out.kernel.nr = nr;
  out.kernel.fn = fn;
  out.kernel.direct_vectors = out.direct_vectors.c_str();
}

void SpecializedKernels::Add(std::unique_ptr<SpecializedKernel> kernel) {
  const SpecializedKernel& x = *kernel;
  Product product = x.product;
  product.epilogue = x.epilogue;
  product.rs_partial = RoundUp(product.n, x.kernel.nr);
  if (const std::string why = Validate(x.schedule, x.kernel, product); !why.empty()) throw std::invalid_argument(why);
  by_generic_[x.generic].push_back(&x);
  kernels_.push_back(std::move(kernel));
}

const SpecializedKernel* SpecializedKernels::Find(const Plan& plan, bool epilogue) const {
  if (plan.empty || plan.transposed || plan.split_k.slices != 1 || !plan.k_outer.empty()) return nullptr;
  const auto known = by_generic_.find(plan.kernel);
  if (known == by_generic_.end()) return nullptr;
  const bool whole = plan.split.m == 1 && plan.split.n == 1;
  const auto fits = [&](const SpecializedKernel* x) {
    return x->epilogue == epilogue && (whole || x->takes_parts) && SameProduct(x->product, plan.product) &&
           SameOrder(x->schedule, plan.schedule);
  };
  const auto found = std::find_if(known->second.rbegin(), known->second.rend(), fits);
  return found == known->second.rend() ? nullptr : *found;
}

}  // namespace jax_nano
