#include "python/tuning.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <stdexcept>
#include <utility>

#include "machine/features.h"
#include "machine/machine.h"
#include "plan/cost.h"
#include "plan/registry.h"
#include "plan/select.h"
#include "plan/specialized.h"
#include "python/specialized.h"
#include "run/private_pool.h"
#include "run/sharing.h"

namespace nb = nanobind;

namespace jax_nano {
namespace {

using Core = std::array<int64_t, 5>;  // the fields of CoreModel

CoreModel ModelOf(const Core& x) { return {x[0], x[1], x[2], x[3], x[4] != 0}; }

// Kept from call to call, for each calling thread: helpers that have just begun take part in no short call. A forked
// process has none of its threads, and one of them may have held its mutex, so there it is neither used nor destroyed.
PrivatePool& PoolOf(int64_t threads) {
  thread_local PrivatePool* pool = nullptr;
  thread_local pid_t owner = 0;
  const pid_t here = getpid();
  if (pool == nullptr || owner != here || pool->num_threads() != threads) {
    PrivatePool* const old = std::exchange(pool, nullptr);
    if (owner == here) delete old;
    pool = new PrivatePool(threads);
    owner = here;
  }
  return *pool;
}

// Runs one plan on all sets of buffers in turn, `trips` times; returns the seconds, without planning. With `share`, all
// threads take part in every call.
double RunOften(const Plans& plans, int64_t threads, const std::vector<Buffers>& sets, int64_t trips) {
  PrivatePool& pool = PoolOf(threads);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t trip = 0; trip < trips; ++trip) {
    for (const Buffers& set : sets) RunPlans(plans, set, pool);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

nb::list CandidateList(Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels, Ints out_labels,
                       std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, int64_t threads,
                       std::string algorithm, std::optional<std::string> target) {
  const CallSpec spec = {lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels,
                         lhs_dtype, rhs_dtype, out_dtype,  algorithm};
  nb::list out;
  for (const Plan& plan : spec.CandidatePlans(TargetsFor(target), threads, HostMachine())) out.append(PlanDict(plan));
  return out;
}

// How often a choice has each cost, by name.
nb::dict CountsOf(Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels, Ints out_labels,
                  std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, const nb::dict& choice,
                  const Core& core, std::string algorithm) {
  const CallSpec spec = {lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels,
                         lhs_dtype, rhs_dtype, out_dtype,  algorithm};
  const Plan plan = spec.MakePlanBy(ParseChoice(choice));
  const CostCounts counts = CountCosts(plan.schedule, *plan.kernel, plan.product, plan.split_k.slices, ModelOf(core));
  nb::dict out;
  for (size_t i = 0; i < kCosts; ++i) {
    if (counts[i] != 0) out[nb::str(kCostNames[i].data(), kCostNames[i].size())] = counts[i];
  }
  return out;
}

// A set of buffers: addresses of the operands and of the result.
using BufferRows = nb::ndarray<const uintptr_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

double TimeDot(const BufferRows& rows, int64_t trips, Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels,
               Ints out_labels, std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, int64_t threads,
               std::string algorithm, const std::optional<nb::dict>& choice, const Table* specialized,
               const std::optional<std::string>& activation, double scale, uintptr_t bias, uintptr_t residual) {
  std::vector<Buffers> sets;
  for (size_t i = 0; i < rows.shape(0); ++i) sets.push_back(BuffersAt(rows(i, 0), rows(i, 1), rows(i, 2)));
  Epilogue epilogue = {Activation::kNone, scale, reinterpret_cast<const void*>(bias), residual != 0, 0};
  if (activation) {
    const auto* known = std::find_if(std::begin(kActivations), std::end(kActivations),
                                     [&](const NamedActivation& x) { return x.name == *activation; });
    if (known == std::end(kActivations)) throw std::invalid_argument("unknown activation: " + *activation);
    if (choice) throw std::invalid_argument("a choice has no epilogue");
    if (sets.size() != 1) throw std::invalid_argument("an epilogue is that of one set of buffers");
    epilogue.activation = known->activation;
    if (residual != 0) epilogue.residual_offset = static_cast<int64_t>(residual - rows(0, 2));
    sets[0].epilogue = &epilogue;
  }
  return RunSpec({lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels, lhs_dtype, rhs_dtype, out_dtype, algorithm},
                 threads, sets, trips, false, choice, specialized == nullptr ? nullptr : specialized->kernels,
                 {activation.has_value(), bias != 0});
}

std::optional<Core> ProfileCore(const std::string& cpu) {
  const CpuProfile* profile = FindProfile(cpu);
  if (profile == nullptr) return std::nullopt;
  const CoreModel& x = profile->core;
  return Core{x.l1d, x.l2, x.near, x.far, x.halves_512};
}

// Nanoseconds of each cost, by kernel.
std::map<std::string, std::vector<double>> ProfileCosts(const std::string& cpu) {
  std::map<std::string, std::vector<double>> out;
  const CpuProfile* profile = FindProfile(cpu);
  if (profile == nullptr) return out;
  for (const KernelCosts& x : profile->kernels) out[std::string(x.kernel)].assign(x.ns.begin(), x.ns.end());
  return out;
}

void UseCosts(const Core& core, const std::map<std::string, std::vector<double>>& kernels) {
  MeasuredCosts costs = {ModelOf(core), {}};
  for (const auto& [name, ns] : kernels) {
    if (ns.size() != kCosts) throw std::invalid_argument("not as many costs as the model has: " + name);
    std::transform(ns.begin(), ns.end(), costs.kernels[name].begin(), [](double x) { return static_cast<float>(x); });
  }
  UseMeasuredCosts(std::move(costs));
}

}  // namespace

double RunSpec(const CallSpec& spec, int64_t threads, const std::vector<Buffers>& sets, int64_t trips, bool share,
               const std::optional<nb::dict>& choice, const SpecializedKernels* specialized, const Finish& finish) {
  std::optional<ForcedChoice> forced;
  if (choice) {
    forced = ParseChoice(*choice);
    const std::vector<TargetStatus> targets = DescribeTargets(HostFeatures());
    const auto runs = [&](const TargetStatus& x) { return x.supported && x.target->name == forced->kernel->target; };
    if (std::none_of(targets.begin(), targets.end(), runs)) {
      throw std::invalid_argument("this CPU cannot run " + std::string(forced->kernel->name));
    }
  }
  const nb::gil_scoped_release release;
  Machine machine = HostMachine();
  if (specialized != nullptr) machine.specialized = specialized;
  const auto plan_for = [&](int64_t n) {
    return forced ? spec.MakePlanBy(*forced) : spec.MakePlanFor(SelectedTargets(), n, machine, finish);
  };
  Plan shared = plan_for(threads), alone = plan_for(1);
  const sharing::Duration pace = share ? sharing::Pace::kEndless : alone.expected;
  return RunOften(Plans(std::move(shared), std::move(alone), pace), threads, sets, trips);
}

Buffers BuffersAt(uintptr_t lhs, uintptr_t rhs, uintptr_t out) {
  return {reinterpret_cast<const void*>(lhs), reinterpret_cast<const void*>(rhs), reinterpret_cast<void*>(out)};
}

void DefineTuning(nb::module_ m) {
  using namespace nb::literals;
  m.def("candidates", &CandidateList, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a, "rhs_labels"_a, "out_labels"_a,
        "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "threads"_a, "algorithm"_a = "default", "target"_a = nb::none());
  m.def("counts", &CountsOf, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a, "rhs_labels"_a, "out_labels"_a,
        "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "choice"_a, "core"_a, "algorithm"_a = "default");
  m.def("time_dot", &TimeDot, "buffers"_a.noconvert(), "trips"_a, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a,
        "rhs_labels"_a, "out_labels"_a, "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "threads"_a,
        "algorithm"_a = "default", "choice"_a = nb::none(), "specialized"_a = nb::none(), "activation"_a = nb::none(),
        "scale"_a = 1.0, "bias"_a = 0, "residual"_a = 0);
  m.def("profile_core", &ProfileCore, "cpu"_a);
  m.def("profile_costs", &ProfileCosts, "cpu"_a);
  m.def("use_costs", &UseCosts, "core"_a, "kernels"_a);
}

}  // namespace jax_nano
