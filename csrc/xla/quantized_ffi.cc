// The XLA FFI handler "jax_nano_quantized" (x, q, scale[, zero][, bias][, residual][, layer]) -> out, of dense
// row-major arrays:
//
//   x [m, k]; q [k, n] of a dtype of kWeights (spec.h), scale and zero [groups, n]; out [m, n]
//   along_k: q [n, k], scale and zero [n, groups]
//   layers: q, and scale and zero where it says so, are a stack of such matrices [layers, ...], of which the call reads
//     the one that `layer`, a number, counts from 0; beyond the ends the first or last one, as a dynamic slice does
//
//   abi         int64    kFfiAbi (spec.h)
//   along_k     int64    1: the weights lie along k
//   zero        int64    1: the operand behind the scale is the zero points
//   layers      int64    bits: what is a stack of layers: 1 q (always, if anything is), 2 scale, 4 zero
//   activation, factor, bias, residual   as activation, scale, bias, residual of "jax_nano_linear" (ffi.cc)
//
// Zero points are int8 or uint8; x, scale and out are float32, bfloat16 or float16; bias [n] and residual [m, n] have
// out's dtype; layer is int32 or int64.
#include "xla/quantized_ffi.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "machine/machine.h"
#include "plan/select.h"
#include "run/quantized.h"
#include "xla/call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nano {
namespace {

namespace ffi = xla::ffi;

// Bits of the attribute `layers`.
constexpr int64_t kOfWeights = 1, kOfScales = 2, kOfZeros = 4;

struct CachedQuantized {
  xla_call::Shapes shapes;  // of all buffers
  int64_t threads;
  QuantizedPlan plan;
  mutable sharing::Pace pace;

  CachedQuantized(const std::vector<ffi::AnyBuffer>& buffers, int64_t made_for, const QuantizedPlan& made)
      : shapes(buffers), threads(made_for), plan(made), pace(made.expected) {}
};

struct QuantizedState {
  static ffi::TypeId id;

  bool along_k = false, zero = false, bias = false;
  int64_t layers = 0;
  Epilogue epilogue = {Activation::kNone, 1, nullptr, 0, 0};
  xla_call::Plans<CachedQuantized> plans;

  bool HasEpilogue() const {
    return bias || epilogue.has_residual || epilogue.activation != Activation::kNone || epilogue.scale != 1;
  }
};

ffi::TypeId QuantizedState::id = {};

ffi::ErrorOr<std::unique_ptr<QuantizedState>> Instantiate(int64_t abi, int64_t along_k, int64_t zero, int64_t layers,
                                                          std::string_view activation, float factor, int64_t bias,
                                                          int64_t residual) {
  if (ffi::Error error = xla_call::CheckAbi(abi); error.failure()) return ffi::Unexpected(std::move(error));
  const NamedActivation* const known = xla_call::FindActivation(activation);
  if (known == nullptr) {
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("jax_nano quantized: unknown activation " + std::string(activation)));
  }
  if (layers < 0 || layers > 7 || (layers != 0 && (layers & kOfWeights) == 0)) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jax_nano quantized: unknown layers " + std::to_string(layers)));
  }
  auto state = std::make_unique<QuantizedState>();
  state->along_k = along_k != 0;
  state->zero = zero != 0;
  state->layers = layers;
  state->bias = bias != 0;
  state->epilogue = {known->activation, factor, nullptr, residual != 0, 0};
  return state;
}

std::string_view NameOf(ffi::DataType dtype) {
  for (const Weight& w : kWeights) {
    if (w.number == static_cast<int>(dtype)) return w.name;
  }
  return xla_call::DTypeName(dtype);
}

void Require(std::string_view what, const ffi::AnyBuffer& buffer, const std::vector<int64_t>& shape) {
  if (xla_call::HasShape(buffer, shape)) return;
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  throw std::invalid_argument("jax_nano quantized: " + std::string(what) + " is not [" + text + "]");
}

// x, q, scale, and what else the state says there is; `all` has the result last.
struct Operands {
  const ffi::AnyBuffer *zero = nullptr, *bias = nullptr, *residual = nullptr, *layer = nullptr;

  Operands(const QuantizedState& state, const std::vector<ffi::AnyBuffer>& all) {
    size_t next = 3;
    const size_t more = size_t{state.zero} + size_t{state.bias} + size_t{state.epilogue.has_residual != 0};
    if (all.size() != 4 + more + size_t{state.layers != 0}) {
      throw std::invalid_argument("jax_nano quantized: wrong number of operands");
    }
    if (state.zero) zero = &all[next++];
    if (state.bias) bias = &all[next++];
    if (state.epilogue.has_residual) residual = &all[next++];
    if (state.layers != 0) layer = &all[next++];
  }
};

// The layer that a number counts, of those there are.
int64_t LayerOf(const ffi::AnyBuffer& number, int64_t layers) {
  const void* const data = number.untyped_data();
  const int64_t layer = number.element_type() == ffi::S32 ? int64_t{*static_cast<const int32_t*>(data)}
                                                          : *static_cast<const int64_t*>(data);
  return std::clamp<int64_t>(layer, 0, layers - 1);
}

std::unique_ptr<const CachedQuantized> NewPlan(const QuantizedState& state, const std::vector<ffi::AnyBuffer>& all,
                                               int64_t threads) {
  const Operands given(state, all);
  const ffi::AnyBuffer &x = all[0], &q = all[1], &scale = all[2], &out = all.back();
  const auto dims = x.dimensions(), result = out.dimensions(), groups_of = scale.dimensions(), stack = q.dimensions();
  const size_t rank_of_scale = (state.layers & kOfScales) != 0 ? 3 : 2;
  if (dims.size() != 2 || result.size() != 2 || groups_of.size() != rank_of_scale || stack.size() < 2) {
    throw std::invalid_argument("jax_nano quantized: operands are not matrices");
  }
  const int64_t m = dims[0], k = dims[1], n = result[1];
  const int64_t groups = state.along_k ? groups_of.back() : groups_of[rank_of_scale - 2];
  if (groups < 1 || k % groups != 0) throw std::invalid_argument("jax_nano quantized: groups do not divide k");
  const auto matrix = [&](int64_t rows, int64_t of) {
    std::vector<int64_t> shape = {rows, n};
    if (state.along_k) std::swap(shape[0], shape[1]);
    if ((state.layers & of) != 0) shape.insert(shape.begin(), stack.front());
    return shape;
  };
  Require("out", out, {m, n});
  Require("q", q, matrix(k, kOfWeights));
  Require("scale", scale, matrix(groups, kOfScales));
  if (given.zero != nullptr) Require("zero", *given.zero, matrix(groups, kOfZeros));
  if (given.layer != nullptr) {
    Require("layer", *given.layer, {});
    if (given.layer->element_type() != ffi::S32 && given.layer->element_type() != ffi::S64) {
      throw std::invalid_argument("jax_nano quantized: layer is neither int32 nor int64");
    }
    if (stack.front() < 1) throw std::invalid_argument("jax_nano quantized: there are no layers");
  }
  if (given.bias != nullptr) Require("bias", *given.bias, {n});
  if (given.residual != nullptr) Require("residual", *given.residual, {m, n});
  for (const ffi::AnyBuffer* more : {given.bias, given.residual}) {
    if (more != nullptr && more->element_type() != out.element_type()) {
      throw std::invalid_argument("jax_nano quantized: bias and residual must have the result's dtype");
    }
  }
  QuantizedPlan plan;
  if (m > 0 && n > 0) {
    const QuantizedShape shape = {m,
                                  n,
                                  k,
                                  k / groups,
                                  state.along_k,
                                  NameOf(x.element_type()),
                                  NameOf(q.element_type()),
                                  NameOf(scale.element_type()),
                                  given.zero != nullptr ? NameOf(given.zero->element_type()) : "",
                                  NameOf(out.element_type())};
    plan = PlanQuantized(shape, SelectedTargets(), threads, HostMachine());
  }
  return std::make_unique<const CachedQuantized>(all, threads, plan);
}

ffi::Error Execute(QuantizedState* state, ffi::ThreadPool available, ffi::AnyBuffer x, ffi::AnyBuffer q,
                   ffi::AnyBuffer scale, ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> out) {
  return xla_call::Guarded([&] {
    std::vector<ffi::AnyBuffer> all = {x, q, scale};
    for (size_t i = 0; i < more.size(); ++i) all.push_back(*more.get<ffi::AnyBuffer>(i));
    all.push_back(*out);
    xla_call::Pool pool(available);
    const CallTimer timer([&] {
      const std::string weights = xla_call::Text(q, NameOf(q.element_type()));
      return "quantized product " + xla_call::Text(x) + " x " + weights + " -> " + xla_call::Text(*out);
    });
    const int64_t threads = pool.num_threads();
    const auto entry = state->plans.Find(
        [&](const CachedQuantized& known) { return known.threads == threads && known.shapes.Fit(all); },
        [&] { return NewPlan(*state, all, threads); });
    if (entry->plan.kernel == nullptr) return;  // the result has no elements
    const Operands given(*state, all);
    const auto data = [](const ffi::AnyBuffer* b) { return b == nullptr ? nullptr : b->untyped_data(); };
    const int64_t layer = given.layer == nullptr ? 0 : LayerOf(*given.layer, q.dimensions().front());
    const QuantizedArgs& args = entry->plan.args;
    const int64_t rows = state->along_k ? args.n : args.k, scale_rows = state->along_k ? args.n : args.k / args.group;
    // Where a matrix begins in a stack, if it lies in one.
    const auto begin = [&](const ffi::AnyBuffer* b, int64_t of, int64_t bytes) -> const void* {
      return (state->layers & of) == 0 ? data(b) : static_cast<const char*>(data(b)) + layer * bytes;
    };
    Epilogue epilogue = state->epilogue;
    epilogue.bias = data(given.bias);
    if (given.residual != nullptr) {
      epilogue.residual_offset =
          static_cast<const char*>(data(given.residual)) - static_cast<const char*>(out->untyped_data());
    }
    RunQuantized(entry->plan, entry->pace,
                 {x.untyped_data(), begin(&q, kOfWeights, rows * args.rsq),
                  begin(&scale, kOfScales, scale_rows * args.rs_scale * entry->plan.scale_bytes),
                  begin(given.zero, kOfZeros, scale_rows * args.rs_zero * entry->plan.zero_bytes), out->untyped_data(),
                  state->HasEpilogue() ? &epilogue : nullptr},
                 pool);
  });
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<int64_t>("abi")
                           .Attr<int64_t>("along_k")
                           .Attr<int64_t>("zero")
                           .Attr<int64_t>("layers")
                           .Attr<std::string_view>("activation")
                           .Attr<float>("factor")
                           .Attr<int64_t>("bias")
                           .Attr<int64_t>("residual"));

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<QuantizedState>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // q
                           .Arg<ffi::AnyBuffer>()    // scale
                           .RemainingArgs()          // zero, bias, residual, layer
                           .Ret<ffi::AnyBuffer>());  // out

}  // namespace

XLA_FFI_Error* QuantizedInstantiate(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Error* const error = xla_call::RegisterState<QuantizedState>(frame, "jax_nano.quantized");
  return error != nullptr ? error : (*kInstantiate)(frame);
}

XLA_FFI_Error* QuantizedExecute(XLA_FFI_CallFrame* frame) { return (*kExecute)(frame); }

}  // namespace jax_nano
