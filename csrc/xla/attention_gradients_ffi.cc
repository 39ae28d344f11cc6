// The XLA FFI handler "jax_nano_attention_gradients"
// (q, k, v, dout, maxima, logs, delta[, bias][, mask][, q_lengths][, kv_lengths]) -> dq, dk, dv[, dbias].
//
// Attributes are those of attention_operands.h, out_dims that of dout, and
//
//   dbias              int64     1: the cotangents of bias are wanted, [batch or 1, heads or 1, queries or 1, keys]
//
// maxima, logs and delta are float32 [batch, queries, heads] (run/attention_gradients.h). Results have their operands'
// sizes and dtypes, and jax.nn's order of dimensions.
#include <memory>
#include <utility>

#include "run/attention_gradients.h"
#include "xla/attention_ffi.h"
#include "xla/attention_operands.h"
#include "xla/call.h"

namespace jax_nano {
namespace {

namespace ffi = xla::ffi;

using Int64s = ffi::Span<const int64_t>;

struct CachedGradients {
  xla_call::Shapes shapes;  // of all buffers
  GradientPlan plan;
  mutable GradientPaces paces;

  CachedGradients(const std::vector<ffi::AnyBuffer>& buffers, const GradientPlan& made)
      : shapes(buffers), plan(made), paces(made.expected, made.merging) {}
};

struct GradientState {
  static ffi::TypeId id;

  AttentionOptions options;
  bool dbias = false;

  xla_call::Plans<CachedGradients> plans;
};

ffi::TypeId GradientState::id = {};

ffi::ErrorOr<std::unique_ptr<GradientState>> Instantiate(int64_t abi, Int64s q_dims, Int64s k_dims, Int64s v_dims,
                                                         Int64s out_dims, double scale, double masked, int64_t left,
                                                         int64_t right, int64_t bias, int64_t mask, int64_t q_lengths,
                                                         int64_t kv_lengths, int64_t dbias) {
  auto state = std::make_unique<GradientState>();
  ffi::Error error = ParseOptions(abi, {q_dims, k_dims, v_dims, out_dims}, scale, masked, left, right,
                                  {bias != 0, mask != 0, q_lengths != 0, kv_lengths != 0}, state->options);
  if (error.failure()) return ffi::Unexpected(std::move(error));
  state->dbias = dbias != 0;
  return state;
}

GradientPlan NewPlan(const GradientState& state, const std::vector<ffi::AnyBuffer>& buffers) {
  const ffi::AnyBuffer &q = buffers[0], &k = buffers[1], &v = buffers[2];
  GradientShape shape = {};
  shape.attention = ShapeOfOperands(state.options, q, k, v);
  const AttentionShape& of = shape.attention;
  shape.attention.out = StridesOfResult(state.options, buffers[3], q, of);
  for (const size_t i : {4, 5, 6}) RequireStatistics(buffers[i], of);
  size_t next = 7;
  AddOthers(state.options, buffers, next, shape.attention);
  const auto require_result = [&](const ffi::AnyBuffer& operand, const Dims& sizes) {
    const auto have = buffers[next].dimensions();
    Require(buffers[next].element_type() == operand.element_type() && have.size() == sizes.size() &&
                std::equal(have.begin(), have.end(), sizes.begin()),
            "the gradients do not fit the operands");
    ++next;
  };
  require_result(q, {of.batch, of.queries, of.heads, of.depth});
  require_result(k, {of.batch, of.keys, of.kv_heads, of.depth});
  require_result(v, {of.batch, of.keys, of.kv_heads, of.width});
  shape.dbias = state.dbias;
  shape.dbias_sizes = {1, 1, 1};
  if (state.dbias) {
    Require(buffers[next].element_type() == ffi::F32, "a bias' gradient must be float32");
    BroadcastStrides(buffers[next], {of.batch, of.heads, of.queries, of.keys});  // checks its sizes
    const auto have = buffers[next].dimensions();
    std::copy(have.begin(), have.begin() + 3, shape.dbias_sizes.begin());
  }
  const AttentionInfo* kernel =
      SelectAttention(SelectedTargets(), xla_call::DTypeName(q.element_type()), xla_call::DTypeName(k.element_type()));
  return PlanGradients(kernel, shape);
}

ffi::Error Execute(GradientState* state, ffi::ThreadPool threads, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  return xla_call::Guarded([&] {
    Require(operands.size() == 7 + state->options.others(), "wrong number of operands");
    Require(results.size() == 3 + size_t{state->dbias}, "wrong number of results");
    std::vector<ffi::AnyBuffer> all;
    for (size_t i = 0; i < operands.size(); ++i) all.push_back(*operands.get<ffi::AnyBuffer>(i));
    for (size_t i = 0; i < results.size(); ++i) all.push_back(**results.get<ffi::AnyBuffer>(i));
    xla_call::Pool pool(threads);
    const CallTimer timer([&] { return "gradients of attention " + Text(all[0], all[1], all[2]); });
    const auto entry =
        state->plans.Find([&](const CachedGradients& x) { return x.shapes.Fit(all); },
                          [&] { return std::make_unique<const CachedGradients>(all, NewPlan(*state, all)); });
    size_t next = 0;
    const auto take = [&](bool given) -> void* { return given ? all[next++].untyped_data() : nullptr; };
    GradientBuffers buffers = {};
    buffers.q = take(true);
    buffers.k = take(true);
    buffers.v = take(true);
    buffers.dout = take(true);
    buffers.maxima = static_cast<const float*>(take(true));
    buffers.logs = static_cast<const float*>(take(true));
    buffers.delta = static_cast<const float*>(take(true));
    buffers.bias = static_cast<const float*>(take(state->options.bias));
    buffers.mask = static_cast<const uint8_t*>(take(state->options.mask));
    buffers.q_lengths = static_cast<const int32_t*>(take(state->options.q_lengths));
    buffers.kv_lengths = static_cast<const int32_t*>(take(state->options.kv_lengths));
    buffers.dq = take(true);
    buffers.dk = take(true);
    buffers.dv = take(true);
    buffers.dbias = static_cast<float*>(take(state->dbias));
    RunGradients(entry->plan, entry->paces, buffers, pool);
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
                           .Attr<int64_t>("dbias"));

XLA_FFI_DEFINE_HANDLER(
    kExecute, Execute,
    ffi::Ffi::Bind().Ctx<ffi::State<GradientState>>().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets());

}  // namespace

XLA_FFI_Error* GradientsInstantiate(XLA_FFI_CallFrame* frame) {
  static XLA_FFI_Error* const error = xla_call::RegisterState<GradientState>(frame, "jax_nano.attention_gradients");
  return error != nullptr ? error : (*kInstantiate)(frame);
}

XLA_FFI_Error* GradientsExecute(XLA_FFI_CallFrame* frame) { return (*kExecute)(frame); }

}  // namespace jax_nano
