// The Python surface: what JAX registers, and introspection for tests, benchmarks and `python -m jax_nano`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cpu.h"
#include "ffi.h"
#include "gemm.h"
#include "plan.h"
#include "private_pool.h"
#include "quantized.h"
#include "quantized_ffi.h"
#include "registry.h"
#include "select.h"
#include "sharing.h"
#include "standby.h"
#include "workspace.h"

namespace nb = nanobind;

namespace jax_nano {
namespace {

using Ints = std::vector<int64_t>;
using Names = std::vector<std::string>;

int64_t RoundUp(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

nb::dict Registrations() {
  const auto stages = [](auto* instantiate, auto* execute) {
    nb::dict d;
    d["instantiate"] = nb::capsule(reinterpret_cast<void*>(instantiate));
    d["execute"] = nb::capsule(reinterpret_cast<void*>(execute));
    return d;
  };
  nb::dict out;
  out[kDotGeneralCall] = stages(&DotInstantiate, &DotExecute);
  out[kLinearCall] = stages(&LinearInstantiate, &LinearExecute);
  out[kQuantizedCall] = stages(&QuantizedInstantiate, &QuantizedExecute);
  return out;
}

Features ParseFeatures(const Names& names) {
  Features out;
  for (const std::string& name : names) {
    unsigned i = 0;
    while (i < static_cast<unsigned>(Feature::kCount) && FeatureName(static_cast<Feature>(i)) != name) {
      ++i;
    }
    if (i == static_cast<unsigned>(Feature::kCount)) {
      throw std::invalid_argument("unknown CPU feature: " + name);
    }
    out.Add(static_cast<Feature>(i));
  }
  return out;
}

Features HostOr(const std::optional<Names>& features) { return features ? ParseFeatures(*features) : HostFeatures(); }

nb::list TargetList(const std::optional<Names>& features) {
  nb::list out;
  for (const TargetStatus& s : DescribeTargets(HostOr(features))) {
    nb::dict d;
    d["name"] = s.target->name;
    d["compiled"] = s.compiled;
    d["supported"] = s.supported;
    d["why"] = s.why;
    out.append(d);
  }
  return out;
}

std::string FirstName(const std::vector<const Target*>& targets) {
  return targets.empty() ? "" : targets.front()->name;
}

std::string SelectedTarget() { return FirstName(SelectedTargets()); }

std::string SelectTarget(const Names& features, std::string_view forced) {
  return FirstName(SelectTargets(ParseFeatures(features), forced));
}

// Either order of the operands, as roles may be swapped.
bool Supports(std::string_view lhs, std::string_view rhs, std::string_view out, std::string_view algorithm) {
  return SelectKernel(SelectedTargets(), lhs, rhs, out, algorithm) != nullptr &&
         SelectKernel(SelectedTargets(), rhs, lhs, out, algorithm) != nullptr;
}

nb::dict KernelDict(const KernelInfo& k) {
  nb::dict d;
  ForEachField(k, [&](const char* name, const auto& field) { d[name] = field; });
  return d;
}

nb::list KernelList() {
  nb::list out;
  for (const KernelInfo& k : Kernels()) out.append(KernelDict(k));
  return out;
}

std::vector<std::string_view> HostFeatureNames() { return NamesOf(HostFeatures()); }

nb::dict CacheDict() {
  const Caches& c = HostCaches();
  nb::dict d;
  d["l1d"] = c.l1d;
  d["l2"] = c.l2;
  d["l3"] = c.l3;
  return d;
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

nb::list LoopList(const std::vector<Loop>& loops) {
  nb::list out;
  for (const Loop& l : loops) out.append(nb::make_tuple(l.size, l.a, l.b, l.c));
  return out;
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

// A call's arrays as Python gives them; owns what Operand only views.
struct CallSpec {
  Ints lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels;
  std::string lhs_dtype, rhs_dtype, out_dtype, algorithm;

  Plan MakePlanFor(std::span<const Target* const> targets, int64_t threads, const Caches& caches) const {
    Ints out_shape;
    for (int64_t label : out_labels) out_shape.push_back(SizeOf(label));
    return MakePlan({lhs_dtype, lhs_shape, lhs_labels}, {rhs_dtype, rhs_shape, rhs_labels},
                    {out_dtype, out_shape, out_labels}, algorithm, targets, threads, caches);
  }

 private:
  int64_t SizeOf(int64_t label) const {
    for (size_t i = 0; i < std::min(lhs_labels.size(), lhs_shape.size()); ++i) {
      if (lhs_labels[i] == label) return lhs_shape[i];
    }
    for (size_t i = 0; i < std::min(rhs_labels.size(), rhs_shape.size()); ++i) {
      if (rhs_labels[i] == label) return rhs_shape[i];
    }
    return 1;  // in no operand: Analyze says so
  }
};

// Selected targets, or the one of this name whether or not the CPU can run it: planning runs nothing.
std::vector<const Target*> TargetsFor(const std::optional<std::string>& name) {
  if (!name) return SelectedTargets();
  for (const Target& t : Targets()) {
    if (t.name == *name) return {&t};
  }
  throw std::invalid_argument("unknown target: " + *name);
}

nb::dict ExplainPlan(Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels, Ints out_labels,
                     std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, int64_t threads,
                     std::string algorithm, std::optional<std::string> target,
                     std::optional<std::array<int64_t, 3>> caches) {
  const CallSpec spec = {lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels,
                         lhs_dtype, rhs_dtype, out_dtype,  algorithm};
  const Caches sizes = caches ? Caches{(*caches)[0], (*caches)[1], (*caches)[2]} : HostCaches();
  return PlanDict(spec.MakePlanFor(TargetsFor(target), threads, sizes));
}

// Runs one plan on all sets of buffers in turn, `trips` times; returns the seconds, without planning. With `share`, all
// threads take part in every call.
double RunOften(const CallSpec& spec, int64_t threads, const std::vector<Buffers>& sets, int64_t trips, bool share) {
  const nb::gil_scoped_release release;
  const auto plan_for = [&](int64_t n) { return spec.MakePlanFor(SelectedTargets(), n, HostCaches()); };
  const Plan shared = plan_for(threads), alone = plan_for(1);
  const Plans plans(shared, alone, share ? sharing::Pace::kEndless : alone.expected);
  PrivatePool pool(threads);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t trip = 0; trip < trips; ++trip) {
    for (const Buffers& set : sets) RunPlans(plans, set, pool);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Buffers BuffersAt(uintptr_t lhs, uintptr_t rhs, uintptr_t out) {
  return {reinterpret_cast<const void*>(lhs), reinterpret_cast<const void*>(rhs), reinterpret_cast<void*>(out)};
}

void Dot(uintptr_t lhs, uintptr_t rhs, uintptr_t out, Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels,
         Ints out_labels, std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, int64_t threads,
         std::string algorithm) {
  RunOften({lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels, lhs_dtype, rhs_dtype, out_dtype, algorithm},
           threads, {BuffersAt(lhs, rhs, out)}, 1, true);
}

// A set of buffers: addresses of the operands and of the result.
using BufferRows = nb::ndarray<const uintptr_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

sharing::Duration Ns(int64_t ns) { return sharing::Duration(ns); }
sharing::Time At(int64_t ns) { return sharing::Time(Ns(ns)); }

// For benchmarks of the kernels alone.
double TimeDot(const BufferRows& rows, int64_t trips, Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels,
               Ints out_labels, std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, int64_t threads,
               std::string algorithm) {
  std::vector<Buffers> sets;
  for (size_t i = 0; i < rows.shape(0); ++i) sets.push_back(BuffersAt(rows(i, 0), rows(i, 1), rows(i, 2)));
  return RunOften(
      {lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels, lhs_dtype, rhs_dtype, out_dtype, algorithm}, threads,
      sets, trips, false);
}

const KernelInfo& KernelNamed(std::string_view name) {
  const KernelInfo* kernel = FindKernel(name);
  if (kernel == nullptr) throw std::invalid_argument("no such kernel");
  return *kernel;
}

// Fills in what the caller left open, which is 0: cache blocking, and workspace, for which there is memory
// until this call returns.
void RunOne(const KernelInfo& kernel, GemmArgs x) {
  if (x.epilogue != nullptr && !kernel.epilogue) throw std::invalid_argument("this kernel has no epilogue");
  const bool blocked = !x.inner && !x.sweep;
  if (blocked && x.panel == 0 && (x.mc != 0 || x.pack_a)) x.panel = kernel.mr;
  if (blocked && (x.mc == 0 || x.kc == 0 || x.nc == 0 || x.panel == 0)) {
    GemmArgs planned = x;
    KernelInfo plain = kernel;
    plain.inner = plain.sweep = false;
    ChooseSums(plain, 1, planned);
    ChooseBlocks(plain, HostCaches(), x.m, x.n, planned);
    if (x.panel == 0) x.panel = planned.panel;
    if (x.mc == 0) x.mc = RoundUp(planned.mc, x.panel);
    if (x.kc == 0) x.kc = planned.kc;
    if (x.nc == 0) x.nc = planned.nc;
  }
  if (x.rs_partial == 0) x.rs_partial = RoundUp(x.n, kernel.nr);
  if (x.inner) {
    if (!kernel.inner) throw std::invalid_argument("this kernel has no inner-product path");
    if ((x.csa != 1 && !x.pack_a) || (x.rsb != 1 && !x.pack_b)) {
      throw std::invalid_argument("csa and rsb must be 1 for the inner-product path, unless pack_a and pack_b");
    }
    if (x.accumulate || x.more) throw std::invalid_argument("the inner-product path takes the whole of k");
  } else if (x.sweep) {
    if (!kernel.sweep) throw std::invalid_argument("this kernel has no sweep path");
    if (x.csb != 1) throw std::invalid_argument("csb must be 1 for the sweep path");
    if (x.pack_a || x.pack_b) throw std::invalid_argument("the sweep path packs nothing");
  } else {
    if (!x.pack_a && !ReadsA(kernel, x)) throw std::invalid_argument("this kernel needs pack_a");
    if (!x.pack_b && !kernel.direct_b) throw std::invalid_argument("this kernel needs pack_b");
    if (x.csb != 1 && !x.pack_b) throw std::invalid_argument("csb must be 1 unless pack_b");
    if (x.panel > kernel.mr || (x.panel < kernel.mr && x.pack_a && x.csa != 1)) {
      throw std::invalid_argument("panel must not be above mr, nor below it with pack_a unless csa is 1");
    }
    if ((x.mc > x.panel && x.mc % x.panel) || x.kc % kernel.kr || x.nc % kernel.nr) {
      throw std::invalid_argument("mc, kc, nc must be multiples of panel, kr, nr, or mc below panel");
    }
  }
  if (kernel.narrow && x.rs_partial < RoundUp(x.n, kernel.nr)) {
    throw std::invalid_argument("rs_partial must be at least n rounded up to nr");
  }
  const int64_t a_pack_bytes = x.a_pack ? 0 : PackedABytes(kernel, x);
  const int64_t b_pack_bytes = x.b_pack ? 0 : PackedBBytes(kernel, x);
  const int64_t partial_bytes = kernel.narrow && !x.partial ? PartialBytes(kernel, x.m, x.rs_partial) : 0;
  char* workspace = static_cast<char*>(Workspace(a_pack_bytes + b_pack_bytes + partial_bytes));
  if (x.a_pack == nullptr) x.a_pack = workspace;
  if (x.b_pack == nullptr) x.b_pack = workspace + a_pack_bytes;
  if (x.partial == nullptr) x.partial = workspace + a_pack_bytes + b_pack_bytes;
  kernel.fn(&x);
}

void CallKernel(std::string_view kernel_name, const nb::dict& fields) {
  const KernelInfo& kernel = KernelNamed(kernel_name);
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
  if (!fields.contains("pack_a")) x.pack_a = blocked && !ReadsA(kernel, x);
  if (!fields.contains("pack_b")) x.pack_b = blocked && !kernel.direct_b;
  if (used != fields.size()) throw std::invalid_argument("unknown field among the arguments");
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

// The addresses of an array that may be absent are 0.
void Quantized(std::array<uintptr_t, 5> addresses, int64_t m, int64_t n, int64_t k, int64_t group, bool along_k,
               std::string x, std::string q, std::string scale, std::string zero, std::string out, int64_t threads) {
  const nb::gil_scoped_release release;
  const QuantizedPlan plan =
      PlanQuantized({m, n, k, group, along_k, x, q, scale, zero, out}, SelectedTargets(), threads, HostCaches());
  const auto at = [&](size_t i) { return reinterpret_cast<void*>(addresses[i]); };
  PrivatePool pool(threads);
  sharing::Pace pace(sharing::Pace::kEndless);
  RunQuantized(plan, {at(0), at(1), at(2), at(3), at(4)}, pace, pool);
}

// How a product would be computed, by the selected targets.
nb::dict PlanOfQuantized(int64_t m, int64_t n, int64_t k, int64_t group, bool along_k, std::string x, std::string q,
                         std::string scale, std::string zero, std::string out, int64_t threads) {
  const QuantizedPlan plan =
      PlanQuantized({m, n, k, group, along_k, x, q, scale, zero, out}, SelectedTargets(), threads, HostCaches());
  nb::dict d;
  d["kernel"] = plan.kernel->name;
  d["gemm"] = plan.gemm == nullptr ? "" : plan.gemm->name;
  d["few"] = plan.few;
  d["m_pieces"] = plan.m_pieces;
  d["n_pieces"] = plan.n_pieces;
  return d;
}

// One call of a kernel; the fields of QuantizedArgs by name, pointers as addresses.
void CallQuantized(std::string_view name, const nb::dict& fields) {
  for (const QuantizedInfo& kernel : QuantizedKernels()) {
    if (name != kernel.name) continue;
    size_t used = 0;
    QuantizedArgs x = {};
    ForEachField(x, [&]<typename T>(const char* field_name, T& field) {
      if (!fields.contains(field_name)) return;
      ++used;
      const auto given = nb::cast<int64_t>(fields[field_name]);
      if constexpr (std::is_pointer_v<T>) {
        field = reinterpret_cast<T>(given);
      } else {
        field = given;
      }
    });
    if (used != fields.size()) throw std::invalid_argument("unknown field among the arguments");
    const nb::gil_scoped_release release;
    kernel.fn(&x);
    return;
  }
  throw std::invalid_argument("no such kernel");
}

}  // namespace

NB_MODULE(_runtime, m) {
  using namespace nb::literals;
  m.attr("ABI_VERSION") = kFfiAbi;
  m.attr("FFI_API_VERSION") = FfiApiVersion();
  m.def("registrations", &Registrations);
  m.def("targets", &TargetList, "features"_a = nb::none());
  m.def("selected_target", &SelectedTarget);
  m.def("select_target", &SelectTarget, "features"_a, "forced"_a = "");
  m.def("supports", &Supports, "lhs"_a, "rhs"_a, "out"_a, "algorithm"_a = "default");
  m.def("kernels", &KernelList);
  m.def("features", &HostFeatureNames);
  m.def("caches", &CacheDict);
  m.def("decode_features", &DecodeFeatures, "cpuid"_a, "xcr0"_a, "amx_permission"_a);
  m.def("plan", &ExplainPlan, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a, "rhs_labels"_a, "out_labels"_a,
        "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "threads"_a, "algorithm"_a = "default", "target"_a = nb::none(),
        "caches"_a = nb::none());
  m.def("dot", &Dot, "lhs"_a, "rhs"_a, "out"_a, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a, "rhs_labels"_a,
        "out_labels"_a, "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "threads"_a, "algorithm"_a = "default");
  m.def("time_dot", &TimeDot, "buffers"_a.noconvert(), "trips"_a, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a,
        "rhs_labels"_a, "out_labels"_a, "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "threads"_a,
        "algorithm"_a = "default");
  m.def("call", &CallKernel, "kernel_name"_a, "args"_a);
  m.def("call_many", &CallKernelOften, "kernel_name"_a, "rows"_a.noconvert());
  m.def("quantized", &Quantized, "addresses"_a, "m"_a, "n"_a, "k"_a, "group"_a, "along_k"_a, "x"_a, "q"_a, "scale"_a,
        "zero"_a, "out"_a, "threads"_a);
  m.def("quantized_plan", &PlanOfQuantized, "m"_a, "n"_a, "k"_a, "group"_a, "along_k"_a, "x"_a, "q"_a, "scale"_a,
        "zero"_a, "out"_a, "threads"_a);
  m.def("call_quantized", &CallQuantized, "kernel_name"_a, "args"_a);
  m.def("workspace_bytes", &WorkspaceHighWater);
  m.def("handed_jobs", &standby::HandedJobs);
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
          "lost", [](sharing::Ledger& self, int64_t now) { self.Lost(At(now)); }, "now"_a)
      .def_prop_ro("losses", &sharing::Ledger::losses);
  m.def("share_every_call", &sharing::ShareEveryCall, "on"_a);
}

}  // namespace jax_nano
