#include "python/product.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "plan/candidates.h"
#include "plan/registry.h"

namespace nb = nanobind;

namespace jax_nano {
namespace {

nb::list LoopList(const std::vector<Loop>& loops) {
  nb::list out;
  for (const Loop& l : loops) out.append(nb::make_tuple(l.size, l.a, l.b, l.c));
  return out;
}

}  // namespace

ForcedChoice ParseChoice(const nb::dict& given) {
  const auto item = [&](const char* name) -> nb::object {
    if (!given.contains(name)) throw std::invalid_argument("a choice needs " + std::string(name));
    return given[name];
  };
  const auto flag = [&](const char* name) { return nb::cast<bool>(item(name)); };
  const auto size = [&](const char* name) { return nb::cast<int64_t>(item(name)); };
  ForcedChoice out = {&KernelNamed(nb::cast<std::string>(item("kernel"))), {}};
  const bool inner = flag("inner"), sweep = flag("sweep"), prefetch = flag("prefetch");
  if (inner && sweep) throw std::invalid_argument("inner and sweep exclude each other");
  Choice& choice = out.choice;
  if (inner) {
    choice.schedule = InnerProduct{flag("pack_a"), flag("pack_b"), prefetch};
  } else if (sweep) {
    if (flag("pack_a") || flag("pack_b")) throw std::invalid_argument("the sweep path packs nothing");
    choice.schedule = Sweep{prefetch};
  } else {
    if (prefetch) throw std::invalid_argument("the blocked path has no prefetch to choose");
    choice.schedule = Blocked{.pack_a = flag("pack_a"),
                              .pack_b = flag("pack_b"),
                              .mc = size("mc"),
                              .kc = size("kc"),
                              .nc = size("nc"),
                              .tile_rows = size("tile_rows")};
  }
  const auto split = nb::cast<std::array<int64_t, 3>>(item("split"));
  choice.split = {split[0], split[1], split[2]};
  choice.split_k = size("split_k");
  choice.split_k_unit = SplitKUnit(choice.schedule, HostMachine().profile);
  out.transposed = given.contains("transposed") && flag("transposed");
  return out;
}

Ints CallSpec::OutShape() const {
  Ints shape;
  for (int64_t label : out_labels) shape.push_back(SizeOf(label));
  return shape;
}

Plan CallSpec::MakePlanFor(std::span<const Target* const> targets, int64_t threads, const Machine& machine,
                           const Finish& finish) const {
  const Ints out_shape = OutShape();
  return MakePlan({lhs_dtype, lhs_shape, lhs_labels}, {rhs_dtype, rhs_shape, rhs_labels},
                  {out_dtype, out_shape, out_labels}, algorithm, targets, threads, machine, finish);
}

std::vector<Scored> CallSpec::Considered(const Plan& plan, const Machine& machine) const {
  const Ints out_shape = OutShape();
  const Contraction contraction = Analyze({lhs_dtype, lhs_shape, lhs_labels}, {rhs_dtype, rhs_shape, rhs_labels},
                                          {out_dtype, out_shape, out_labels});
  std::vector<Scored> out =
      ConsideredOrders(plan.transposed ? Transposed(contraction) : contraction, *plan.kernel, machine);
  std::stable_sort(out.begin(), out.end(), [](const Scored& x, const Scored& y) { return x.ns < y.ns; });
  return out;
}

Plan CallSpec::MakePlanBy(const ForcedChoice& forced) const {
  const Ints out_shape = OutShape();
  const Contraction contraction = Analyze({lhs_dtype, lhs_shape, lhs_labels}, {rhs_dtype, rhs_shape, rhs_labels},
                                          {out_dtype, out_shape, out_labels});
  const KernelInfo& kernel = *forced.kernel;
  const std::string &a = contraction.swapped ? rhs_dtype : lhs_dtype, &b = contraction.swapped ? lhs_dtype : rhs_dtype;
  const std::vector<const Target*> target = TargetsFor(kernel.target);
  if (SelectKernel(target, a, b, out_dtype, algorithm) != &kernel) {
    throw std::invalid_argument(std::string(kernel.name) + " does not compute this product");
  }
  if (forced.transposed && !MayTranspose(contraction, kernel)) {
    throw std::invalid_argument("C cannot be transposed");
  }
  Plan plan;
  const std::string why = MakePlan(forced.transposed ? Transposed(contraction) : contraction, kernel, forced.choice,
                                   HostMachine().profile, plan);
  if (!why.empty()) throw std::invalid_argument(why);
  return plan;
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

std::vector<Plan> CallSpec::CandidatePlans(std::span<const Target* const> targets, int64_t threads,
                                           const Machine& here) const {
  Machine machine = here;
  machine.specialized = nullptr;
  std::vector<Plan> out = {MakePlanFor(targets, threads, machine)};
  if (out.front().empty) return out;
  const Ints out_shape = OutShape();
  const Contraction contraction = Analyze({lhs_dtype, lhs_shape, lhs_labels}, {rhs_dtype, rhs_shape, rhs_labels},
                                          {out_dtype, out_shape, out_labels});
  const std::string &a = contraction.swapped ? rhs_dtype : lhs_dtype, &b = contraction.swapped ? lhs_dtype : rhs_dtype;
  const Choice planned = ChoiceOf(out.front());
  const KernelInfo* const best = out.front().kernel;
  for (const Target* target : targets) {
    const KernelInfo* kernel = SelectKernel({&target, 1}, a, b, out_dtype, algorithm);
    if (kernel == nullptr) continue;
    for (const bool transposed : {false, true}) {
      if (transposed && !MayTranspose(contraction, *kernel)) continue;
      const Contraction way = transposed ? Transposed(contraction) : contraction;
      for (const Choice& choice : Candidates(way, *kernel, threads, machine)) {
        if (kernel == best && choice == planned && transposed == out.front().transposed) continue;
        Plan plan;
        if (MakePlan(way, *kernel, choice, machine.profile, plan).empty()) out.push_back(std::move(plan));
      }
    }
  }
  return out;
}

const KernelInfo& KernelNamed(std::string_view name) {
  const KernelInfo* kernel = FindKernel(name);
  if (kernel == nullptr) throw std::invalid_argument("no such kernel");
  return *kernel;
}

nb::dict ScoredDict(const Scored& scored) {
  nb::dict d;
  const auto* blocked = std::get_if<Blocked>(&scored.schedule);
  const auto* inner = std::get_if<InnerProduct>(&scored.schedule);
  const auto* sweep = std::get_if<Sweep>(&scored.schedule);
  d["inner"] = inner != nullptr;
  d["sweep"] = sweep != nullptr;
  d["prefetch"] = (inner != nullptr && inner->prefetch) || (sweep != nullptr && sweep->prefetch);
  d["pack_a"] = (inner != nullptr && inner->pack_a) || (blocked != nullptr && blocked->pack_a);
  d["pack_b"] = (inner != nullptr && inner->pack_b) || (blocked != nullptr && blocked->pack_b);
  d["mc"] = blocked != nullptr ? blocked->mc : 0;
  d["kc"] = blocked != nullptr ? blocked->kc : 0;
  d["nc"] = blocked != nullptr ? blocked->nc : 0;
  d["tile_rows"] = blocked != nullptr ? blocked->tile_rows : 0;
  d["ns"] = scored.ns;
  return d;
}

Machine MachineOf(const std::optional<std::array<int64_t, 3>>& caches, const std::optional<std::string>& cpu) {
  Machine machine = HostMachine();
  if (caches || cpu) machine.specialized = nullptr;
  if (caches) machine.caches = {(*caches)[0], (*caches)[1], (*caches)[2]};
  if (cpu) {
    machine.cpu = FindProfile(*cpu);
    if (machine.cpu == nullptr && !cpu->empty()) throw std::invalid_argument("no profile of a CPU: " + *cpu);
  }
  return machine;
}

nb::dict PlanDict(const Plan& plan) {
  const GemmArgs& x = plan.args;
  nb::dict d;
  d["kernel"] = plan.kernel->name;
  d["target"] = plan.kernel->target;
  d["pack"] = plan.specialized == nullptr ? "" : plan.specialized->pack;
  d["mr"] = plan.kernel->mr;
  d["nr"] = plan.kernel->nr;
  d["swapped"] = plan.swapped;
  d["transposed"] = plan.transposed;
  d["empty"] = plan.empty;
  d["m"] = x.m;
  d["n"] = x.n;
  d["k"] = x.k;
  d["rsa"] = x.rsa;
  d["csa"] = x.csa;
  d["rsb"] = x.rsb;
  d["csb"] = x.csb;
  d["rsc"] = x.rsc;
  d["out_rows_apart"] = plan.out_rows_apart;
  d["batch"] = x.batch;
  d["bsa"] = x.bsa;
  d["bsb"] = x.bsb;
  d["bsc"] = x.bsc;
  d["inner"] = x.inner != 0;
  d["sweep"] = x.sweep != 0;
  d["prefetch"] = x.prefetch != 0;
  d["pack_a"] = x.pack_a != 0;
  d["pack_b"] = x.pack_b != 0;
  d["mc"] = x.mc;
  d["kc"] = x.kc;
  d["nc"] = x.nc;
  d["tile_rows"] = x.tile_rows;
  d["rs_partial"] = x.rs_partial;
  d["outer"] = LoopList(plan.outer);
  d["k_outer"] = LoopList(plan.k_outer);
  d["products"] = plan.products;
  d["split"] = nb::make_tuple(plan.split.products, plan.split.m, plan.split.n);
  d["split_k"] = plan.split_k.slices;
  d["shared_bytes"] = plan.shared_bytes();
  d["workspace_bytes"] = plan.workspace_bytes();
  return d;
}

}  // namespace jax_nano
