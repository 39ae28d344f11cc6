// The XLA FFI handlers. Attributes are parsed once, when an executable is loaded; shapes are only known when it runs
// (symbolic export), so the plan is made at the first call and kept.
//
// "jax_nano_dot_general" (lhs, rhs) -> out: a product of two dense row-major arrays.
//
//   abi         int64     kFfiAbi (spec.h)
//   lhs_labels, rhs_labels, out_labels   int64[]   one label for each dimension (contraction.h)
//   algorithm   string    a DotAlgorithm preset, or "default"
//
// "jax_nano_linear" (lhs, rhs[, bias][, residual]) -> out: activation(scale * product + bias) + residual, computed in
// float32 and rounded to out's dtype once. out's dtype is float32, bfloat16 or float16. The same attributes, and
//
//   activation  string    one of kActivations (spec.h)
//   scale       float32
//   bias        int64     1: the third operand is the bias, of out's dtype and one dimension, out's last one, which
//                         must not be a batch dimension
//   residual    int64     1: the last operand is the residual, of out's dtype and shape
#include "xla/ffi.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "machine/machine.h"
#include "plan/contraction.h"
#include "plan/plan.h"
#include "plan/select.h"
#include "run/gemm.h"
#include "xla/call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nano {
namespace {

namespace ffi = xla::ffi;

std::string DTypeName(ffi::DataType dtype) {
  const std::string_view name = xla_call::DTypeName(dtype);
  return name.empty() ? "dtype#" + std::to_string(static_cast<int>(dtype)) : std::string(name);
}

// What a plan was made for: the three buffers' dtypes and dimensions, and the number of threads.
struct Shape {
  ffi::DataType dtype[3];
  std::vector<int64_t> dims[3];
  int64_t threads = 0;

  bool Matches(int i, const ffi::AnyBuffer& buffer) const {
    return dtype[i] == buffer.element_type() && xla_call::HasShape(buffer, dims[i]);
  }
};

struct CachedPlan {
  const Shape shape;
  const Plans plans;

  CachedPlan(Shape made_for, Plan shared, Plan alone)
      : shape(std::move(made_for)), plans(std::move(shared), std::move(alone)) {}

  bool Fits(const ffi::AnyBuffer& lhs, const ffi::AnyBuffer& rhs, const ffi::AnyBuffer& out,
            const xla_call::Pool& pool) const {
    return shape.Matches(0, lhs) && shape.Matches(1, rhs) && shape.Matches(2, out) &&
           (!plans.shared.divisible || shape.threads == pool.num_threads());
  }
};

// One call site of one executable; shared by all its concurrent runs.
struct DotState {
  static ffi::TypeId id;

  std::vector<int64_t> labels[3];  // lhs, rhs, out
  std::string algorithm;           // a DotAlgorithm preset, or "default"
  Epilogue epilogue = {Activation::kNone, 1, nullptr, 0, 0};
  bool bias = false;

  bool HasEpilogue() const {
    return bias || epilogue.has_residual || epilogue.activation != Activation::kNone || epilogue.scale != 1;
  }

  xla_call::Plans<CachedPlan> plans;
};

ffi::TypeId DotState::id = {};

using Int64s = ffi::Span<const int64_t>;

ffi::ErrorOr<std::unique_ptr<DotState>> Instantiate(int64_t abi, Int64s lhs_labels, Int64s rhs_labels,
                                                    Int64s out_labels, std::string_view algorithm) {
  if (ffi::Error error = xla_call::CheckAbi(abi); error.failure()) return ffi::Unexpected(std::move(error));
  auto state = std::make_unique<DotState>();
  state->algorithm = algorithm;
  state->labels[0].assign(lhs_labels.begin(), lhs_labels.end());
  state->labels[1].assign(rhs_labels.begin(), rhs_labels.end());
  state->labels[2].assign(out_labels.begin(), out_labels.end());
  return state;
}

ffi::ErrorOr<std::unique_ptr<DotState>> InstantiateLinear(int64_t abi, Int64s lhs_labels, Int64s rhs_labels,
                                                          Int64s out_labels, std::string_view algorithm,
                                                          std::string_view activation, float scale, int64_t bias,
                                                          int64_t residual) {
  const NamedActivation* const known = xla_call::FindActivation(activation);
  if (known == nullptr) {
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("jax_nano linear: unknown activation " + std::string(activation)));
  }
  auto state = Instantiate(abi, lhs_labels, rhs_labels, out_labels, algorithm);
  if (!state.has_value()) return state;
  (*state)->bias = bias != 0;
  (*state)->epilogue = {known->activation, scale, nullptr, residual != 0, 0};
  return state;
}

std::unique_ptr<const CachedPlan> NewPlan(const DotState& state, const ffi::AnyBuffer* const (&buffers)[3],
                                          const xla_call::Pool& pool) {
  Shape shape;
  std::string names[3];
  Operand operands[3];
  for (int i = 0; i < 3; ++i) {
    const auto dims = buffers[i]->dimensions();
    shape.dtype[i] = buffers[i]->element_type();
    shape.dims[i].assign(dims.begin(), dims.end());
    names[i] = DTypeName(shape.dtype[i]);
    operands[i] = {names[i], shape.dims[i], state.labels[i]};
  }
  shape.threads = pool.num_threads();
  const auto plan_for = [&](int64_t threads) {
    return MakePlan(operands[0], operands[1], operands[2], state.algorithm, SelectedTargets(), threads, HostMachine(),
                    {state.HasEpilogue(), state.bias});
  };
  Plan shared = plan_for(shape.threads);
  if (state.HasEpilogue() && !shared.kernel->epilogue) {
    throw std::invalid_argument("jax_nano linear: " + names[2] + " results have no epilogue");
  }
  return std::make_unique<const CachedPlan>(std::move(shape), std::move(shared), plan_for(1));
}

ffi::Error Run(DotState& state, const Epilogue* epilogue, ffi::ThreadPool& all, const ffi::AnyBuffer& lhs,
               const ffi::AnyBuffer& rhs, const ffi::AnyBuffer& out) {
  return xla_call::Guarded([&] {
    xla_call::Pool pool(all);
    const CallTimer timer([&] {
      return "dot_general " + xla_call::Text(lhs) + " x " + xla_call::Text(rhs) + " -> " + xla_call::Text(out);
    });
    const auto entry = state.plans.Find([&](const CachedPlan& plan) { return plan.Fits(lhs, rhs, out, pool); },
                                        [&] { return NewPlan(state, {&lhs, &rhs, &out}, pool); });
    RunPlans(entry->plans, {lhs.untyped_data(), rhs.untyped_data(), out.untyped_data(), epilogue}, pool);
  });
}

ffi::Error Execute(DotState* state, ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
                   ffi::Result<ffi::AnyBuffer> out) {
  return Run(*state, nullptr, pool, lhs, rhs, *out);
}

ffi::Error ExecuteLinear(DotState* state, ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer rhs,
                         ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> out) {
  const bool has_residual = state->epilogue.has_residual != 0;
  const size_t expected = size_t{state->bias} + size_t{has_residual};
  if (more.size() != expected) {
    return ffi::Error::InvalidArgument("jax_nano linear: " + std::to_string(2 + more.size()) + " operands instead of " +
                                       std::to_string(2 + expected));
  }
  const auto dims = out->dimensions();
  Epilogue epilogue = state->epilogue;
  if (state->bias) {
    const auto bias = *more.get<ffi::AnyBuffer>(0);
    const auto have = bias.dimensions();
    if (bias.element_type() != out->element_type() || have.size() != 1 || dims.size() == 0 ||
        have.front() != dims.back()) {
      return ffi::Error::InvalidArgument("jax_nano linear: bias " + xla_call::Text(bias) + " for a result " +
                                         xla_call::Text(*out));
    }
    epilogue.bias = bias.untyped_data();
  }
  if (has_residual) {
    const auto residual = *more.get<ffi::AnyBuffer>(expected - 1);
    const auto have = residual.dimensions();
    if (residual.element_type() != out->element_type() || have.size() != dims.size() ||
        !std::equal(have.begin(), have.end(), dims.begin())) {
      return ffi::Error::InvalidArgument("jax_nano linear: residual " + xla_call::Text(residual) + " for a result " +
                                         xla_call::Text(*out));
    }
    epilogue.residual_offset =
        static_cast<const char*>(residual.untyped_data()) - static_cast<const char*>(out->untyped_data());
  }
  return Run(*state, state->HasEpilogue() ? &epilogue : nullptr, pool, lhs, rhs, *out);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<int64_t>("abi")
                           .Attr<Int64s>("lhs_labels")
                           .Attr<Int64s>("rhs_labels")
                           .Attr<Int64s>("out_labels")
                           .Attr<std::string_view>("algorithm"));

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<DotState>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // lhs
                           .Arg<ffi::AnyBuffer>()    // rhs
                           .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER(kInstantiateLinear, InstantiateLinear,
                       ffi::Ffi::BindInstantiate()
                           .Attr<int64_t>("abi")
                           .Attr<Int64s>("lhs_labels")
                           .Attr<Int64s>("rhs_labels")
                           .Attr<Int64s>("out_labels")
                           .Attr<std::string_view>("algorithm")
                           .Attr<std::string_view>("activation")
                           .Attr<float>("scale")
                           .Attr<int64_t>("bias")
                           .Attr<int64_t>("residual"));

XLA_FFI_DEFINE_HANDLER(kExecuteLinear, ExecuteLinear,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<DotState>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // lhs
                           .Arg<ffi::AnyBuffer>()    // rhs
                           .RemainingArgs()          // bias, residual
                           .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_Error* RegisterState(const XLA_FFI_CallFrame* frame) {
  return xla_call::RegisterState<DotState>(frame, "jax_nano.dot_general");
}

}  // namespace

XLA_FFI_Error* DotInstantiate(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Error* const error = RegisterState(frame);
  return error != nullptr ? error : (*kInstantiate)(frame);
}

XLA_FFI_Error* DotExecute(XLA_FFI_CallFrame* frame) { return (*kExecute)(frame); }

XLA_FFI_Error* LinearInstantiate(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Error* const error = RegisterState(frame);
  return error != nullptr ? error : (*kInstantiateLinear)(frame);
}

XLA_FFI_Error* LinearExecute(XLA_FFI_CallFrame* frame) { return (*kExecuteLinear)(frame); }

std::pair<int, int> FfiApiVersion() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

}  // namespace jax_nano
