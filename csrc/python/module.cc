// The module jax_nano._runtime: what JAX registers, and introspection for explain, benchmarks and tests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <bit>

#include "generator.h"
#include "machine/caches.h"
#include "machine/features.h"
#include "machine/machine.h"
#include "plan/registry.h"
#include "plan/select.h"
#include "python/attention.h"
#include "python/product.h"
#include "python/quantized.h"
#include "python/specialized.h"
#include "python/testing.h"
#include "python/tuning.h"
#include "xla/attention_ffi.h"
#include "xla/ffi.h"
#include "xla/quantized_ffi.h"
#include "xla/settings.h"
#include "xla/untyped.h"

namespace nb = nanobind;

namespace jax_nano {
namespace {

using Names = std::vector<std::string>;

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
  out[kAttentionCall] = stages(&AttentionInstantiate, &AttentionExecute);
  out[kAttentionGradientsCall] = stages(&GradientsInstantiate, &GradientsExecute);
  out[kQuantizedCall] = stages(&QuantizedInstantiate, &QuantizedExecute);
  return out;
}

nb::dict UntypedRegistrations() {
  const auto function = [](auto* f) { return nb::capsule(reinterpret_cast<void*>(f), "xla._CUSTOM_CALL_TARGET"); };
  nb::dict out;
  out[kDotGeneralCall] = function(&DotUntyped);
  out[kLinearCall] = function(&LinearUntyped);
  return out;
}

std::optional<std::string> UntypedCall(Ints lhs_shape, Ints rhs_shape, Ints out_shape, Ints lhs_labels, Ints rhs_labels,
                                       Ints out_labels, std::string lhs_dtype, std::string rhs_dtype,
                                       std::string out_dtype, std::string algorithm,
                                       std::optional<std::string> activation, uint32_t scale, bool bias,
                                       bool residual) {
  CallDescription call = {std::move(algorithm),
                          {CallArray{std::move(lhs_dtype), std::move(lhs_shape), std::move(lhs_labels)},
                           CallArray{std::move(rhs_dtype), std::move(rhs_shape), std::move(rhs_labels)},
                           CallArray{std::move(out_dtype), std::move(out_shape), std::move(out_labels)}},
                          std::nullopt};
  if (activation) call.epilogue = {std::move(*activation), std::bit_cast<float>(scale), bias, residual};
  return DescribeCall(call);
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

std::string SelectedTarget() { return FirstName(SelectedTargets()); }

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

nb::dict ExplainPlan(Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels, Ints out_labels,
                     std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, int64_t threads,
                     std::string algorithm, std::optional<std::string> target,
                     std::optional<std::array<int64_t, 3>> caches, std::optional<std::string> cpu, bool epilogue,
                     bool bias, bool specialized) {
  const CallSpec spec = {lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels,
                         lhs_dtype, rhs_dtype, out_dtype,  algorithm};
  Machine machine = MachineOf(caches, cpu);
  if (!specialized) machine.specialized = nullptr;
  return PlanDict(spec.MakePlanFor(TargetsFor(target), threads, machine, {epilogue, bias}));
}

nb::list ConsideredList(Ints lhs_shape, Ints rhs_shape, Ints lhs_labels, Ints rhs_labels, Ints out_labels,
                        std::string lhs_dtype, std::string rhs_dtype, std::string out_dtype, std::string algorithm,
                        std::optional<std::string> target, std::optional<std::string> cpu) {
  const CallSpec spec = {lhs_shape, rhs_shape, lhs_labels, rhs_labels, out_labels,
                         lhs_dtype, rhs_dtype, out_dtype,  algorithm};
  Machine machine = MachineOf(std::nullopt, cpu);
  machine.specialized = nullptr;
  nb::list out;
  for (const Scored& x : spec.Considered(spec.MakePlanFor(TargetsFor(target), 1, machine), machine)) {
    out.append(ScoredDict(x));
  }
  return out;
}

void LimitThreads(std::optional<int64_t> most) {
  if (most && *most < 1) throw std::invalid_argument("a call has at least one thread");
  settings::thread_limit = most.value_or(kNoThreadLimit);
}

std::optional<int64_t> ThreadLimit() {
  const int64_t most = settings::thread_limit;
  return most == kNoThreadLimit ? std::nullopt : std::optional(most);
}

bool ProfileIsMeasured(std::string_view name) {
  const CpuProfile* profile = FindProfile(name);
  return profile != nullptr && profile->measured;
}

}  // namespace

NB_MODULE(_runtime, m) {
  using namespace nb::literals;
  m.attr("ABI_VERSION") = kFfiAbi;
  m.attr("FFI_API_VERSION") = FfiApiVersion();
  m.def("registrations", &Registrations);
  m.def("untyped_registrations", &UntypedRegistrations);
  m.def("untyped_call", &UntypedCall, "lhs_shape"_a, "rhs_shape"_a, "out_shape"_a, "lhs_labels"_a, "rhs_labels"_a,
        "out_labels"_a, "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "algorithm"_a = "default",
        "activation"_a = nb::none(), "scale"_a = 0x3f800000, "bias"_a = false, "residual"_a = false);
  m.def("targets", &TargetList, "features"_a = nb::none());
  m.def("selected_target", &SelectedTarget);
  m.def("supports", &Supports, "lhs"_a, "rhs"_a, "out"_a, "algorithm"_a = "default");
  m.def("kernels", &KernelList);
  m.def("features", &HostFeatureNames);
  m.def("caches", &CacheDict);
  m.def("plan", &ExplainPlan, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a, "rhs_labels"_a, "out_labels"_a,
        "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "threads"_a, "algorithm"_a = "default", "target"_a = nb::none(),
        "caches"_a = nb::none(), "cpu"_a = nb::none(), "epilogue"_a = false, "bias"_a = false, "specialized"_a = true);
  m.def("generator", [] { return kGenerator; });
  m.def("considered", &ConsideredList, "lhs_shape"_a, "rhs_shape"_a, "lhs_labels"_a, "rhs_labels"_a, "out_labels"_a,
        "lhs_dtype"_a, "rhs_dtype"_a, "out_dtype"_a, "algorithm"_a = "default", "target"_a = nb::none(),
        "cpu"_a = nb::none());
  m.def("limit_threads", &LimitThreads, "most"_a.none());
  m.def("thread_limit", &ThreadLimit);
  m.def("log_calls", [](bool on) { settings::logs_calls = on; }, "on"_a);
  m.def("cpu_signature", [] { return CpuSignature(HostQueries()); });
  m.def("profiles", &ProfileNames);
  m.def("profile_is_measured", &ProfileIsMeasured, "name"_a);
  m.def("profile", [] { return HostMachine().cpu == nullptr ? std::string_view() : HostMachine().cpu->name; });
  DefineAttention(m);
  nb::module_ testing = m.def_submodule("testing");
  DefineQuantized(m, testing);
  DefineTesting(testing);
  DefineSpecialized(m.def_submodule("specialized"));
  DefineTuning(m.def_submodule("tuning"));
}

}  // namespace jax_nano
