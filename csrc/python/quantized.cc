#include "python/quantized.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "run/private_pool.h"
#include "run/quantized.h"

namespace nb = nanobind;

namespace jax_nano {
namespace {

using Sizes = std::array<int64_t, 4>;       // m, n, k, group
using DTypes = std::array<std::string, 5>;  // of x, q, scale, zero ("": none), out

QuantizedPlan PlanFor(const Sizes& sizes, bool along_k, const DTypes& dtypes, int64_t threads) {
  const auto& [x, q, scale, zero, out] = dtypes;
  return PlanQuantized({sizes[0], sizes[1], sizes[2], sizes[3], along_k, x, q, scale, zero, out}, SelectedTargets(),
                       threads, HostMachine());
}

nb::dict Explain(const Sizes& sizes, bool along_k, const DTypes& dtypes, int64_t threads) {
  const QuantizedPlan plan = PlanFor(sizes, along_k, dtypes, threads);
  nb::dict d;
  d["kernel"] = plan.kernel->name;
  d["gemm"] = plan.gemm == nullptr ? "" : plan.gemm->name;
  d["few"] = plan.few;
  d["m_parts"] = plan.m_parts;
  d["n_parts"] = plan.n_parts;
  d["k_parts"] = plan.k_parts;
  return d;
}

// Addresses of x, q, scale, zero points, out, and of bias and residual, which are 0 where there are none.
using Addresses = std::array<uintptr_t, 7>;

// Runs one product `trips` times; returns the seconds, without planning. All threads take part in every call.
double RunOften(const Addresses& at, const Sizes& sizes, bool along_k, const DTypes& dtypes, int64_t threads,
                std::string_view activation, double factor, int64_t trips) {
  const QuantizedPlan plan = PlanFor(sizes, along_k, dtypes, threads);
  const auto* known = std::find_if(std::begin(kActivations), std::end(kActivations),
                                   [&](const NamedActivation& x) { return x.name == activation; });
  if (known == std::end(kActivations)) throw std::invalid_argument("no such activation: " + std::string(activation));
  const auto pointer = [&](size_t i) { return reinterpret_cast<void*>(at[i]); };
  const bool residual = at[6] != 0;
  const Epilogue epilogue = {known->activation, factor, pointer(5), residual,
                             residual ? static_cast<int64_t>(at[6] - at[4]) : 0};
  const bool finishes = at[5] != 0 || residual || known->activation != Activation::kNone || factor != 1;
  const QuantizedBuffers buffers = {pointer(0), pointer(1), pointer(2),
                                    pointer(3), pointer(4), finishes ? &epilogue : nullptr};
  const nb::gil_scoped_release release;
  PrivatePool pool(threads);
  sharing::Pace pace(sharing::Pace::kEndless);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t trip = 0; trip < trips; ++trip) RunQuantized(plan, pace, buffers, pool);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
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
  throw std::invalid_argument("no such kernel: " + std::string(name));
}

}  // namespace

void DefineQuantized(nb::module_& m, nb::module_& testing) {
  using namespace nb::literals;
  m.def("plan_quantized", &Explain, "sizes"_a, "along_k"_a, "dtypes"_a, "threads"_a);
  testing.def("quantized", &RunOften, "addresses"_a, "sizes"_a, "along_k"_a, "dtypes"_a, "threads"_a,
              "activation"_a = "none", "factor"_a = 1.0, "trips"_a = 1);
  testing.def("call_quantized", &CallQuantized, "kernel_name"_a, "args"_a);
}

}  // namespace jax_nano
