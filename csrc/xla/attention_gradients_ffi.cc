// The XLA FFI handler "jax_nano_attention_gradients"
// (q, k, v, dout, lse, delta[, bias][, mask][, q_lengths][, kv_lengths]) -> dq, dk, dv[, dbias].
//
// Attributes are those of attention_operands.h, out_dims that of dout, and
//
//   dbias              int64     1: the cotangents of bias are wanted, [batch or 1, heads or 1, queries or 1, keys]
//
// lse and delta are float32 [batch, queries, heads] (run/attention_gradients.h). Results have their operands' sizes and
// dtypes, and jax.nn's order of dimensions.
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "run/attention_gradients.h"
#include "xla/attention_ffi.h"
#include "xla/attention_operands.h"

namespace jax_nano {
namespace {

namespace ffi = xla::ffi;

using Int64s = ffi::Span<const int64_t>;

struct CachedGradients {
  std::vector<std::vector<int64_t>> shapes;  // of all buffers
  std::vector<ffi::DataType> dtypes;
  GradientPlan plan;
  mutable GradientPaces paces;

  CachedGradients(const std::vector<ffi::AnyBuffer>& buffers, const GradientPlan& made)
      : plan(made), paces(made.expected, made.merging) {
    for (const ffi::AnyBuffer& b : buffers) {
      shapes.emplace_back(b.dimensions().begin(), b.dimensions().end());
      dtypes.push_back(b.element_type());
    }
  }

  bool Fits(const std::vector<ffi::AnyBuffer>& buffers) const {
    if (buffers.size() != shapes.size()) return false;
    for (size_t i = 0; i < buffers.size(); ++i) {
      const auto have = buffers[i].dimensions();
      if (dtypes[i] != buffers[i].element_type() || have.size() != shapes[i].size() ||
          !std::equal(have.begin(), have.end(), shapes[i].begin())) {
        return false;
      }
    }
    return true;
  }
};

struct GradientState {
  static ffi::TypeId id;

  AttentionOptions options;
  bool dbias = false;

  std::atomic<const CachedGradients*> last = nullptr;
  std::mutex mutex;
  std::vector<std::unique_ptr<const CachedGradients>> plans;  // guarded by mutex; never shrinks
};

ffi::TypeId GradientState::id = {};
const XLA_FFI_TypeInfo kGradientStateInfo = ffi::MakeTypeInfo<GradientState>();

ffi::ErrorOr<std::unique_ptr<GradientState>> Instantiate(int64_t abi, Int64s q_dims, Int64s k_dims, Int64s v_dims,
                                                         Int64s out_dims, double scale, int64_t left, int64_t right,
                                                         int64_t bias, int64_t mask, int64_t q_lengths,
                                                         int64_t kv_lengths, int64_t dbias) {
  auto state = std::make_unique<GradientState>();
  ffi::Error error = ParseOptions(abi, {q_dims, k_dims, v_dims, out_dims}, scale, left, right,
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
  for (size_t i : {4, 5}) {
    Require(buffers[i].element_type() == ffi::F32 &&
                buffers[i].element_count() == static_cast<size_t>(of.batch * of.queries * of.heads),
            "logarithms and deltas do not fit the operands");
  }
  size_t next = 6;
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
  const AttentionInfo* kernel = SelectAttention(SelectedTargets(), NameOf(q.element_type()), NameOf(k.element_type()));
  return PlanGradients(kernel, shape);
}

const CachedGradients& FindPlan(GradientState& state, const std::vector<ffi::AnyBuffer>& buffers) {
  const CachedGradients* last = state.last.load(std::memory_order_acquire);
  if (last != nullptr && last->Fits(buffers)) return *last;
  const std::lock_guard lock(state.mutex);
  for (const auto& entry : state.plans) {
    if (entry->Fits(buffers)) {
      state.last.store(entry.get(), std::memory_order_release);
      return *entry;
    }
  }
  state.plans.push_back(std::make_unique<const CachedGradients>(buffers, NewPlan(state, buffers)));
  state.last.store(state.plans.back().get(), std::memory_order_release);
  return *state.plans.back();
}

ffi::Error Execute(GradientState* state, ffi::ThreadPool pool, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  try {
    Require(operands.size() == 6 + state->options.others(), "wrong number of operands");
    Require(results.size() == 3 + size_t{state->dbias}, "wrong number of results");
    std::vector<ffi::AnyBuffer> all;
    for (size_t i = 0; i < operands.size(); ++i) all.push_back(*operands.get<ffi::AnyBuffer>(i));
    for (size_t i = 0; i < results.size(); ++i) all.push_back(**results.get<ffi::AnyBuffer>(i));
    const CachedGradients& entry = FindPlan(*state, all);
    size_t next = 0;
    const auto take = [&](bool given) -> void* { return given ? all[next++].untyped_data() : nullptr; };
    GradientBuffers buffers = {};
    buffers.q = take(true);
    buffers.k = take(true);
    buffers.v = take(true);
    buffers.dout = take(true);
    buffers.lse = static_cast<const float*>(take(true));
    buffers.delta = static_cast<const float*>(take(true));
    buffers.bias = static_cast<const float*>(take(state->options.bias));
    buffers.mask = static_cast<const uint8_t*>(take(state->options.mask));
    buffers.q_lengths = static_cast<const int32_t*>(take(state->options.q_lengths));
    buffers.kv_lengths = static_cast<const int32_t*>(take(state->options.kv_lengths));
    buffers.dq = take(true);
    buffers.dk = take(true);
    buffers.dv = take(true);
    buffers.dbias = static_cast<float*>(take(state->dbias));
    RunGradients(entry.plan, entry.paces, buffers, pool);
    return ffi::Error::Success();
  } catch (const std::invalid_argument& e) {
    return ffi::Error::InvalidArgument(e.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_nano: out of memory");
  } catch (const std::logic_error& e) {
    return ffi::Error::Internal(e.what());
  }
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<int64_t>("abi")
                           .Attr<Int64s>("q_dims")
                           .Attr<Int64s>("k_dims")
                           .Attr<Int64s>("v_dims")
                           .Attr<Int64s>("out_dims")
                           .Attr<double>("scale")
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
  // As for products (ffi.cc): the state's type must be registered before its handlers are.
  static XLA_FFI_Error* const error =
      ffi::Ffi::RegisterTypeId(frame->api, "jax_nano.attention_gradients", &GradientState::id, &kGradientStateInfo);
  return error != nullptr ? error : (*kInstantiate)(frame);
}

XLA_FFI_Error* GradientsExecute(XLA_FFI_CallFrame* frame) { return (*kExecute)(frame); }

}  // namespace jax_nano
