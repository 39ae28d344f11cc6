#include "python/product.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>

namespace nb = nanobind;

namespace jax_nano {
namespace {

nb::list LoopList(const std::vector<Loop>& loops) {
  nb::list out;
  for (const Loop& l : loops) out.append(nb::make_tuple(l.size, l.a, l.b, l.c));
  return out;
}

}  // namespace

Plan CallSpec::MakePlanFor(std::span<const Target* const> targets, int64_t threads, const Caches& caches) const {
  Ints out_shape;
  for (int64_t label : out_labels) out_shape.push_back(SizeOf(label));
  return MakePlan({lhs_dtype, lhs_shape, lhs_labels}, {rhs_dtype, rhs_shape, rhs_labels},
                  {out_dtype, out_shape, out_labels}, algorithm, targets, threads, caches);
}

int64_t CallSpec::SizeOf(int64_t label) const {
  for (size_t i = 0; i < std::min(lhs_labels.size(), lhs_shape.size()); ++i) {
    if (lhs_labels[i] == label) return lhs_shape[i];
  }
  for (size_t i = 0; i < std::min(rhs_labels.size(), rhs_shape.size()); ++i) {
    if (rhs_labels[i] == label) return rhs_shape[i];
  }
  return 1;  // in no operand: Analyze says so
}

std::vector<const Target*> TargetsFor(const std::optional<std::string>& name) {
  if (!name) return SelectedTargets();
  for (const Target& t : Targets()) {
    if (t.name == *name) return {&t};
  }
  throw std::invalid_argument("unknown target: " + *name);
}

std::string FirstName(const std::vector<const Target*>& targets) {
  return targets.empty() ? "" : targets.front()->name;
}

nb::dict PlanDict(const Plan& plan) {
  const GemmArgs& x = plan.args;
  nb::dict d;
  d["kernel"] = plan.kernel->name;
  d["target"] = plan.kernel->target;
  d["swapped"] = plan.swapped;
  d["empty"] = plan.empty;
  d["m"] = x.m;
  d["n"] = x.n;
  d["k"] = x.k;
  d["rsa"] = x.rsa;
  d["csa"] = x.csa;
  d["rsb"] = x.rsb;
  d["csb"] = x.csb;
  d["rsc"] = x.rsc;
  d["batch"] = x.batch;
  d["bsa"] = x.bsa;
  d["bsb"] = x.bsb;
  d["bsc"] = x.bsc;
  d["inner"] = x.inner != 0;
  d["sweep"] = x.sweep != 0;
  d["ahead"] = x.ahead != 0;
  d["pack_a"] = x.pack_a != 0;
  d["pack_b"] = x.pack_b != 0;
  d["mc"] = x.mc;
  d["kc"] = x.kc;
  d["nc"] = x.nc;
  d["panel"] = x.panel;
  d["rs_partial"] = x.rs_partial;
  d["outer"] = LoopList(plan.outer);
  d["k_outer"] = LoopList(plan.k_outer);
  d["products"] = plan.products;
  d["split"] = nb::make_tuple(plan.split.products, plan.split.m, plan.split.n);
  d["k_pieces"] = plan.k_pieces;
  d["shared_bytes"] = plan.shared_bytes();
  d["workspace_bytes"] = plan.a_pack_bytes + plan.b_pack_bytes + plan.partial_bytes;
  return d;
}

}  // namespace jax_nano
