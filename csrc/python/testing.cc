#include "python/testing.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <type_traits>

#include "machine/features.h"
#include "machine/machine.h"
#include "plan/arithmetic.h"
#include "plan/plan.h"
#include "plan/policy.h"
#include "plan/registry.h"
#include "plan/schedule.h"
#include "plan/select.h"
#include "python/product.h"
#include "python/specialized.h"
#include "python/tuning.h"
#include "run/crew.h"
#include "run/sharing.h"
#include "run/standby.h"
#include "run/workspace.h"
#include "xla/plans.h"

namespace nb = nanobind;

namespace jax_nano {
namespace {

using Names = std::vector<std::string>;

// The plans of a call site as the FFI handlers keep them, with a number in the place of a shape and of a plan.
struct PlanTable {
  struct Entry {
    const int64_t shape;
    std::atomic<int64_t>& alive;

    Entry(int64_t made_for, std::atomic<int64_t>& count) : shape(made_for), alive(count) { ++alive; }
    ~Entry() { --alive; }
  };

  std::atomic<int64_t> made = 0, alive = 0;
  xla_call::Plans<Entry> plans;

  int64_t Find(int64_t shape) {
    const auto found = plans.Find([&](const Entry& entry) { return entry.shape == shape; },
                                  [&] {
                                    ++made;
                                    return std::make_unique<const Entry>(shape, alive);
                                  });
    return found->shape;
  }
};

std::string SelectTarget(const Names& features, std::string_view forced) {
  return FirstName(SelectTargets(ParseFeatures(features), forced));
}

// What detection would find on a machine that answers CPUID like this; unlisted leaves are zero.
std::vector<std::string_view> DecodeFeatures(
    const std::map<std::pair<uint32_t, uint32_t>, std::array<uint32_t, 4>>& cpuid, uint64_t xcr0, bool amx_permission) {
  CpuQueries q;
  q.cpuid = [&](uint32_t leaf, uint32_t subleaf) {
    const auto it = cpuid.find({leaf, subleaf});
    return it == cpuid.end() ? std::array<uint32_t, 4>{0, 0, 0, 0} : it->second;
  };
  q.xcr0 = [&] { return xcr0; };
  q.request_amx = [&] { return amx_permission; };
  return NamesOf(DetectFeatures(q));
}

// The plan of a choice, which runs nothing.
nb::dict ForcedPlan(Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels, Ints out_labels,
                    std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, const nb::dict& choice,
                    std::string algorithm) {
  const CallSpec spec = {lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels,
                         lhs_dtype, rhs_dtype, out_dtype,  algorithm};
  return PlanDict(spec.MakePlanBy(ParseChoice(choice)));
}

void Dot(uintptr_t lhs, uintptr_t rhs, uintptr_t out, Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels,
         Ints out_labels, std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, int64_t threads,
         std::string algorithm, const std::optional<nb::dict>& choice, const Table* specialized) {
  RunSpec({lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels, lhs_dtype, rhs_dtype, out_dtype, algorithm},
          threads, {BuffersAt(lhs, rhs, out)}, 1, true, choice,
          specialized == nullptr ? nullptr : specialized->kernels);
}

sharing::Duration Ns(int64_t ns) { return sharing::Duration(ns); }
sharing::Time At(int64_t ns) { return sharing::Time(Ns(ns)); }

// The product and the schedule that the fields of GemmArgs stand for.
struct Call {
  Product product;
  Schedule schedule;
};

Product ProductOf(const GemmArgs& x) {
  return {.m = x.m,
          .n = x.n,
          .k = x.k,
          .rsa = x.rsa,
          .csa = x.csa,
          .rsb = x.rsb,
          .csb = x.csb,
          .rsc = x.rsc,
          .batch = x.batch,
          .bsa = x.bsa,
          .bsb = x.bsb,
          .bsc = x.bsc,
          .accumulates = x.accumulate != 0,
          .unfinished = x.more != 0,
          .epilogue = x.epilogue != nullptr,
          .rs_partial = x.rs_partial};
}

// Blocks that the caller left open, which are 0, are the planner's.
Blocked BlocksOf(const KernelInfo& kernel, const GemmArgs& x, const Product& product) {
  Blocked blocks = {
      .pack_a = x.pack_a != 0, .pack_b = x.pack_b != 0, .mc = x.mc, .kc = x.kc, .nc = x.nc, .tile_rows = x.tile_rows};
  if (blocks.tile_rows == 0 && (x.mc != 0 || blocks.pack_a)) blocks.tile_rows = kernel.mr;
  if (blocks.mc != 0 && blocks.kc != 0 && blocks.nc != 0 && blocks.tile_rows != 0) return blocks;
  const Schedule depth = ChooseDepth(kernel, product, HostMachine().profile);
  const auto planned = std::get<Blocked>(ChooseBlocks(depth, kernel, product, product.m, product.n, HostMachine()));
  if (blocks.tile_rows == 0) blocks.tile_rows = planned.tile_rows;
  if (blocks.mc == 0) blocks.mc = RoundUp(planned.mc, std::max<int64_t>(blocks.tile_rows, 1));
  if (blocks.kc == 0) blocks.kc = planned.kc;
  if (blocks.nc == 0) blocks.nc = planned.nc;
  return blocks;
}

// Why the kernel cannot do what the arguments say; "" and the call if it can.
std::string ReadCall(const KernelInfo& kernel, const GemmArgs& x, Call& call) {
  call.product = ProductOf(x);
  if (x.rs_partial == 0) call.product.rs_partial = RoundUp(x.n, kernel.nr);
  if (x.inner && x.sweep) return "inner and sweep exclude each other";
  if (x.inner) {
    call.schedule = InnerProduct{x.pack_a != 0, x.pack_b != 0, x.prefetch != 0};
  } else if (x.sweep) {
    if (x.pack_a || x.pack_b) return "the sweep path packs nothing";
    call.schedule = Sweep{x.prefetch != 0};
  } else {
    call.schedule = BlocksOf(kernel, x, call.product);
  }
  return Validate(call.schedule, kernel, call.product);
}

// With memory, until this call returns, for the workspace that the caller left open.
void RunOne(const KernelInfo& kernel, const GemmArgs& given) {
  Call call;
  if (const std::string why = ReadCall(kernel, given, call); !why.empty()) throw std::invalid_argument(why);
  const auto& [product, schedule] = call;
  GemmArgs x = Arguments(schedule, product);
  x.a = given.a;
  x.b = given.b;
  x.c = given.c;
  x.accumulate = given.accumulate;
  x.more = given.more;
  x.epilogue = given.epilogue;
  const int64_t a_pack_bytes = given.a_pack ? 0 : PackedABytes(schedule, kernel, product);
  const int64_t b_pack_bytes = given.b_pack ? 0 : PackedBBytes(schedule, kernel, product);
  const int64_t partial_bytes =
      kernel.narrow_out && !given.partial ? PartialBytes(kernel, product.m, product.rs_partial) : 0;
  char* workspace = static_cast<char*>(Workspace(a_pack_bytes + b_pack_bytes + partial_bytes));
  x.a_pack = given.a_pack ? given.a_pack : workspace;
  x.b_pack = given.b_pack ? given.b_pack : workspace + a_pack_bytes;
  x.partial = given.partial ? given.partial : workspace + a_pack_bytes + b_pack_bytes;
  kernel.fn(&x);
}

GemmArgs ParseArguments(const KernelInfo& kernel, const nb::dict& fields) {
  size_t used = 0;
  GemmArgs x = {};
  x.csa = x.csb = x.batch = 1;
  ForEachField(x, [&]<typename T>(const char* name, T& field) {
    if (!fields.contains(name)) return;
    ++used;
    const auto given = nb::cast<int64_t>(fields[name]);
    if constexpr (std::is_pointer_v<T>) {
      field = reinterpret_cast<T>(given);
    } else {
      field = given;
    }
  });
  if (!fields.contains("rsa")) x.rsa = x.k;
  if (!fields.contains("rsb")) x.rsb = x.n;
  if (!fields.contains("rsc")) x.rsc = x.n;
  const bool blocked = !x.inner && !x.sweep;
  if (!fields.contains("pack_a")) x.pack_a = blocked && !ReadsA(kernel, ProductOf(x));
  if (!fields.contains("pack_b")) x.pack_b = blocked && !kernel.direct_b;
  if (used != fields.size()) throw std::invalid_argument("unknown field among the arguments");
  return x;
}

std::string WhyIllegal(std::string_view kernel_name, const nb::dict& fields) {
  const KernelInfo& kernel = KernelNamed(kernel_name);
  Call call;
  return ReadCall(kernel, ParseArguments(kernel, fields), call);
}

void CallKernel(std::string_view kernel_name, const nb::dict& fields) {
  const KernelInfo& kernel = KernelNamed(kernel_name);
  const GemmArgs x = ParseArguments(kernel, fields);
  const nb::gil_scoped_release release;
  RunOne(kernel, x);
}

// A row is a GemmArgs: its fields are all 8 bytes and stand in the header's order.
using GemmArgsRows = nb::ndarray<const int64_t, nb::shape<-1, sizeof(GemmArgs) / 8>, nb::c_contig, nb::device::cpu>;

void CallKernelOften(std::string_view kernel_name, const GemmArgsRows& rows) {
  const KernelInfo& kernel = KernelNamed(kernel_name);
  const nb::gil_scoped_release release;
  for (size_t i = 0; i < rows.shape(0); ++i) {
    GemmArgs x;
    std::memcpy(&x, rows.data() + i * rows.shape(1), sizeof(x));
    RunOne(kernel, x);
  }
}

// The CPU of the caller, and that on which a helper of this library ran; -1 if none could be woken.
std::pair<int, int> WakeCrew() {
  const auto helper = std::make_shared<std::atomic<int>>(-1);  // the helper may notify after the caller has returned
  const int caller = sched_getcpu();
  const bool woken = crew::Wake([helper] {
    helper->store(sched_getcpu(), std::memory_order_release);
    helper->notify_one();
  });
  if (woken) helper->wait(-1, std::memory_order_acquire);
  return {caller, helper->load()};
}

}  // namespace

void DefineTesting(nb::module_ m) {
  using namespace nb::literals;
  m.def("decode_features", &DecodeFeatures, "cpuid"_a, "xcr0"_a, "amx_permission"_a);
  m.def("select_target", &SelectTarget, "features"_a, "forced"_a = "");
  m.def("dot", &Dot, "lhs"_a, "rhs"_a, "out"_a, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a, "rhs_labels"_a,
        "out_labels"_a, "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "threads"_a, "algorithm"_a = "default",
        "choice"_a = nb::none(), "specialized"_a = nb::none());
  m.def("plan_by", &ForcedPlan, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a, "rhs_labels"_a, "out_labels"_a,
        "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "choice"_a, "algorithm"_a = "default");
  m.def("why_illegal", &WhyIllegal, "kernel_name"_a, "args"_a);
  m.def("call", &CallKernel, "kernel_name"_a, "args"_a);
  m.def("call_many", &CallKernelOften, "kernel_name"_a, "rows"_a.noconvert());
  m.def("workspace_bytes", &WorkspaceHighWater);
  nb::class_<PlanTable>(m, "PlanTable")
      .def(nb::init<>())
      .def("find", &PlanTable::Find, "shape"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("made", [](const PlanTable& table) { return table.made.load(); })
      .def_prop_ro("alive", [](const PlanTable& table) { return table.alive.load(); });
  m.def("handed_jobs", &standby::HandedJobs);
  m.def("wake_crew", &WakeCrew, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<sharing::Pace>(m, "Pace")
      .def(
          "__init__", [](sharing::Pace* self, int64_t guess) { new (self) sharing::Pace(Ns(guess)); }, "guess"_a)
      .def_prop_ro("alone", [](const sharing::Pace& self) { return self.alone().count(); })
      .def("saw", [](sharing::Pace& self, int64_t alone) { self.Saw(Ns(alone)); }, "alone"_a);
  nb::class_<sharing::Ledger>(m, "Ledger")
      .def(nb::init<>())
      .def(
          "may_wake",
          [](sharing::Ledger& self, int64_t wanted, int64_t alone, int64_t now) {
            return self.MayWake(wanted, Ns(alone), At(now));
          },
          "wanted"_a, "alone"_a, "now"_a)
      .def(
          "is_open", [](const sharing::Ledger& self, int64_t now) { return self.Open(At(now)); }, "now"_a)
      .def("paid", &sharing::Ledger::Paid)
      .def(
          "saved", [](sharing::Ledger& self, int64_t time) { self.Saved(Ns(time)); }, "time"_a)
      .def(
          "lost", [](sharing::Ledger& self, int64_t now, int64_t cost) { self.Lost(At(now), Ns(cost)); }, "now"_a,
          "cost"_a = std::chrono::nanoseconds(sharing::kUsualLoss).count())
      .def_prop_ro("losses", &sharing::Ledger::losses);
  m.def("share_every_call", &sharing::ShareEveryCall, "on"_a);
}

}  // namespace jax_nano
