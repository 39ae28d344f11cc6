// The XLA FFI handler "jax_nano_attention" (q, k, v[, bias][, mask][, q_lengths][, kv_lengths]) -> out[, maxima, logs].
//
// Attributes are those of attention_operands.h, where of out the elements must come last, and
//
//   residual           int64     1: the other results are there
//
// Maxima and logs are float32 [batch, queries, heads] (run/attention.h). The attributes are parsed once; the plan is
// made at the first call and kept.
#include "xla/attention_ffi.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "run/attention.h"
#include "xla/attention_operands.h"
#include "xla/call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nano {
namespace {

namespace ffi = xla::ffi;

using Int64s = ffi::Span<const int64_t>;

struct CachedAttention {
  xla_call::Shapes shapes;  // of all buffers
  AttentionPlan plan;
  mutable sharing::Pace pace;

  CachedAttention(const std::vector<ffi::AnyBuffer>& buffers, const AttentionPlan& made)
      : shapes(buffers), plan(made), pace(made.expected) {}
};

struct AttentionState {
  static ffi::TypeId id;

  AttentionOptions options;
  bool residual = false;

  xla_call::Plans<CachedAttention> plans;
};

ffi::TypeId AttentionState::id = {};

ffi::ErrorOr<std::unique_ptr<AttentionState>> Instantiate(int64_t abi, Int64s q_dims, Int64s k_dims, Int64s v_dims,
                                                          Int64s out_dims, double scale, double masked, int64_t left,
                                                          int64_t right, int64_t bias, int64_t mask, int64_t q_lengths,
                                                          int64_t kv_lengths, int64_t residual) {
  auto state = std::make_unique<AttentionState>();
  ffi::Error error = ParseOptions(abi, {q_dims, k_dims, v_dims, out_dims}, scale, masked, left, right,
                                  {bias != 0, mask != 0, q_lengths != 0, kv_lengths != 0}, state->options);
  if (error.failure()) return ffi::Unexpected(std::move(error));
  if (state->options.dims[3][3] != 3) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jax_nano attention: the elements of a result must be last"));
  }
  state->residual = residual != 0;
  return state;
}

AttentionPlan NewPlan(const AttentionState& state, const std::vector<ffi::AnyBuffer>& buffers) {
  AttentionShape shape = ShapeOfOperands(state.options, buffers[0], buffers[1], buffers[2]);
  size_t next = 3;
  AddOthers(state.options, buffers, next, shape);
  shape.out = StridesOfResult(state.options, buffers[next], buffers[0], shape);
  if (state.residual) {
    for (const size_t i : {next + 1, next + 2}) RequireStatistics(buffers[i], shape);
  }
  const AttentionInfo* kernel = SelectAttention(SelectedTargets(), xla_call::DTypeName(buffers[0].element_type()),
                                                xla_call::DTypeName(buffers[1].element_type()));
  return PlanAttention(kernel, shape, HostMachine().caches);
}

ffi::Error Execute(AttentionState* state, ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   ffi::RemainingArgs more, ffi::RemainingRets results) {
  return xla_call::Guarded([&] {
    xla_call::Pool pool(threads);
    const CallTimer timer([&] { return "attention " + Text(q, k, v); });
    Require(more.size() == state->options.others(), "wrong number of operands");
    Require(results.size() == (state->residual ? 3 : 1), "wrong number of results");
    std::vector<ffi::AnyBuffer> all = {q, k, v};
    for (size_t i = 0; i < more.size(); ++i) all.push_back(*more.get<ffi::AnyBuffer>(i));
    for (size_t i = 0; i < results.size(); ++i) all.push_back(**results.get<ffi::AnyBuffer>(i));
    const auto entry =
        state->plans.Find([&](const CachedAttention& x) { return x.shapes.Fit(all); },
                          [&] { return std::make_unique<const CachedAttention>(all, NewPlan(*state, all)); });
    size_t next = 3;
    const auto take = [&](bool given) -> void* { return given ? all[next++].untyped_data() : nullptr; };
    AttentionBuffers buffers = {};
    buffers.q = q.untyped_data();
    buffers.k = k.untyped_data();
    buffers.v = v.untyped_data();
    buffers.bias = static_cast<const float*>(take(state->options.bias));
    buffers.mask = static_cast<const uint8_t*>(take(state->options.mask));
    buffers.q_lengths = static_cast<const int32_t*>(take(state->options.q_lengths));
    buffers.kv_lengths = static_cast<const int32_t*>(take(state->options.kv_lengths));
    buffers.out = take(true);
    buffers.maxima = static_cast<float*>(take(state->residual));
    buffers.logs = static_cast<float*>(take(state->residual));
    RunAttention(entry->plan, entry->pace, buffers, pool);
  });
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<int64_t>("abi")
                           .Attr<Int64s>("q_dims")
                           .Attr<Int64s>("k_dims")
                           .Attr<Int64s>("v_dims")
                           .Attr<Int64s>("out_dims")
                           .Attr<double>("scale")
                           .Attr<double>("masked")
                           .Attr<int64_t>("left")
                           .Attr<int64_t>("right")
                           .Attr<int64_t>("bias")
                           .Attr<int64_t>("mask")
                           .Attr<int64_t>("q_lengths")
                           .Attr<int64_t>("kv_lengths")
                           .Attr<int64_t>("residual"));

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<AttentionState>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()  // q
                           .Arg<ffi::AnyBuffer>()  // k
                           .Arg<ffi::AnyBuffer>()  // v
                           .RemainingArgs()
                           .RemainingRets());

}  // namespace

XLA_FFI_Error* AttentionInstantiate(XLA_FFI_CallFrame* frame) {
  static XLA_FFI_Error* const error = xla_call::RegisterState<AttentionState>(frame, "jax_nano.attention");
  return error != nullptr ? error : (*kInstantiate)(frame);
}

XLA_FFI_Error* AttentionExecute(XLA_FFI_CallFrame* frame) { return (*kExecute)(frame); }

}  // namespace jax_nano
