// The XLA FFI handler "jax_nano_attention" (q, k, v[, bias][, mask][, q_lengths][, kv_lengths]) -> out[, lse].
//
//   abi                int64     kFfiAbi (spec.h)
//   q_dims, k_dims, v_dims, out_dims   int64[4]   which dimension of attention each dimension of the buffer is:
//                                0 batch, 1 position, 2 head, 3 element; of out, 3 comes last
//   scale              float64   of scores
//   left, right        int64     query t sees keys t - left <= s <= t + right
//   bias, mask, q_lengths, kv_lengths, residual   int64   1: the operand or the second result is there
//
// Bias (float32) and mask (pred) are [batch or 1, heads or 1, queries or 1, keys]; lengths int32 [batch]; lse is
// float32 [batch, queries, heads]. The attributes are parsed once; the plan is made at the first call and kept.
#include "xla/attention_ffi.h"

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "run/attention.h"
#include "xla/call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nano {
namespace {

namespace ffi = xla::ffi;

using Int64s = ffi::Span<const int64_t>;
using Dims = std::array<int64_t, 4>;

struct CachedAttention {
  xla_call::Shapes shapes;  // of all buffers
  AttentionPlan plan;
  mutable sharing::Pace pace;

  CachedAttention(const std::vector<ffi::AnyBuffer>& buffers, const AttentionPlan& made)
      : shapes(buffers), plan(made), pace(made.expected) {}
};

struct AttentionState {
  static ffi::TypeId id;

  Dims dims[4];  // of q, k, v, out
  double scale = 1;
  int64_t left = kUnbounded, right = kUnbounded;
  bool bias = false, mask = false, q_lengths = false, kv_lengths = false, residual = false;

  xla_call::Plans<CachedAttention> plans;
};

ffi::TypeId AttentionState::id = {};

ffi::ErrorOr<std::unique_ptr<AttentionState>> Instantiate(int64_t abi, Int64s q_dims, Int64s k_dims, Int64s v_dims,
                                                          Int64s out_dims, double scale, int64_t left, int64_t right,
                                                          int64_t bias, int64_t mask, int64_t q_lengths,
                                                          int64_t kv_lengths, int64_t residual) {
  if (ffi::Error error = xla_call::CheckAbi(abi); error.failure()) return ffi::Unexpected(std::move(error));
  auto state = std::make_unique<AttentionState>();
  const Int64s given[] = {q_dims, k_dims, v_dims, out_dims};
  for (int i = 0; i < 4; ++i) {
    Dims sorted = {};
    if (given[i].size() == 4) std::copy(given[i].begin(), given[i].end(), state->dims[i].begin());
    sorted = state->dims[i];
    std::sort(sorted.begin(), sorted.end());
    if (given[i].size() != 4 || sorted != Dims{0, 1, 2, 3}) {
      return ffi::Unexpected(ffi::Error::InvalidArgument("jax_nano attention: dimensions are no permutation of 0..3"));
    }
  }
  if (state->dims[3][3] != 3) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jax_nano attention: the elements of a result must be last"));
  }
  state->scale = scale;
  state->left = left;
  state->right = right;
  state->bias = bias != 0;
  state->mask = mask != 0;
  state->q_lengths = q_lengths != 0;
  state->kv_lengths = kv_lengths != 0;
  state->residual = residual != 0;
  return state;
}

void Require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("jax_nano attention: ") + what);
}

// Sizes and strides of a dense buffer by the dimensions of attention.
struct Layout {
  Dims sizes, strides;
};

Layout LayoutOf(const ffi::AnyBuffer& buffer, const Dims& dims) {
  const auto have = buffer.dimensions();
  Require(have.size() == 4, "operands have four dimensions");
  Layout layout;
  int64_t stride = 1;
  for (size_t i = 4; i-- > 0;) {
    layout.sizes[static_cast<size_t>(dims[i])] = have[i];
    layout.strides[static_cast<size_t>(dims[i])] = stride;
    stride *= have[i];
  }
  return layout;
}

// The strides of a bias or mask between batches, heads and queries: 0 where it is broadcast.
std::array<int64_t, 3> BroadcastStrides(const ffi::AnyBuffer& buffer, const Dims& scores) {
  const auto have = buffer.dimensions();
  Require(have.size() == 4 && have[3] == scores[3], "bias and mask have all keys");
  std::array<int64_t, 3> strides;
  int64_t stride = have[3];
  for (size_t i = 3; i-- > 0;) {
    Require(have[i] == 1 || have[i] == scores[i], "bias and mask must broadcast");
    strides[i] = have[i] == 1 ? 0 : stride;
    stride *= have[i];
  }
  return strides;
}

AttentionPlan NewPlan(const AttentionState& state, const std::vector<ffi::AnyBuffer>& buffers) {
  const ffi::AnyBuffer &q = buffers[0], &k = buffers[1], &v = buffers[2];
  size_t next = 3;
  const Layout of_q = LayoutOf(q, state.dims[0]), of_k = LayoutOf(k, state.dims[1]), of_v = LayoutOf(v, state.dims[2]);
  AttentionShape shape = {};
  shape.batch = of_q.sizes[0];
  shape.queries = of_q.sizes[1];
  shape.heads = of_q.sizes[2];
  shape.depth = of_q.sizes[3];
  shape.keys = of_k.sizes[1];
  shape.kv_heads = of_k.sizes[2];
  shape.width = of_v.sizes[3];
  Require(std::min({shape.batch, shape.queries, shape.heads, shape.depth, shape.keys, shape.kv_heads, shape.width}) > 0,
          "no size may be 0");
  Require(of_k.sizes == Dims{shape.batch, shape.keys, shape.kv_heads, shape.depth} &&
              of_v.sizes == Dims{shape.batch, shape.keys, shape.kv_heads, shape.width} &&
              shape.heads % shape.kv_heads == 0,
          "sizes of queries, keys and values do not fit together");
  Require(k.element_type() == v.element_type(), "keys and values must have one dtype");
  const Dims scores = {shape.batch, shape.heads, shape.queries, shape.keys};
  if (state.bias) {
    Require(buffers[next].element_type() == ffi::F32, "bias must be float32");
    shape.bias = BroadcastStrides(buffers[next++], scores);
  }
  if (state.mask) {
    Require(buffers[next].element_type() == ffi::PRED, "mask must be bool");
    shape.mask = BroadcastStrides(buffers[next++], scores);
  }
  for (const bool given : {state.q_lengths, state.kv_lengths}) {
    if (!given) continue;
    Require(
        buffers[next].element_type() == ffi::S32 && buffers[next].element_count() == static_cast<size_t>(shape.batch),
        "lengths must be int32, one a batch");
    ++next;
  }
  const Layout of_out = LayoutOf(buffers[next], state.dims[3]);
  Require(of_out.sizes == Dims{shape.batch, shape.queries, shape.heads, shape.width} &&
              buffers[next].element_type() == q.element_type(),
          "the result does not fit the operands");
  if (state.residual) {
    Require(buffers[next + 1].element_type() == ffi::F32 &&
                buffers[next + 1].element_count() == static_cast<size_t>(shape.batch * shape.queries * shape.heads),
            "the logarithms do not fit the operands");
  }
  shape.q = of_q.strides;
  shape.k = of_k.strides;
  shape.v = of_v.strides;
  shape.out = of_out.strides;
  shape.scale = state.scale;
  shape.left = std::clamp(state.left, -kUnbounded, kUnbounded);
  shape.right = std::clamp(state.right, -kUnbounded, kUnbounded);
  const AttentionInfo* kernel =
      SelectAttention(SelectedTargets(), xla_call::DTypeName(q.element_type()), xla_call::DTypeName(k.element_type()));
  return PlanAttention(kernel, shape, HostMachine().caches);
}

ffi::Error Execute(AttentionState* state, ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                   ffi::RemainingArgs more, ffi::RemainingRets results) {
  return xla_call::Guarded([&] {
    const size_t operands =
        size_t{state->bias} + size_t{state->mask} + size_t{state->q_lengths} + size_t{state->kv_lengths};
    Require(more.size() == operands, "wrong number of operands");
    Require(results.size() == 1 + size_t{state->residual}, "wrong number of results");
    std::vector<ffi::AnyBuffer> all = {q, k, v};
    for (size_t i = 0; i < more.size(); ++i) all.push_back(*more.get<ffi::AnyBuffer>(i));
    for (size_t i = 0; i < results.size(); ++i) all.push_back(**results.get<ffi::AnyBuffer>(i));
    const CachedAttention& entry =
        state->plans.Find([&](const CachedAttention& known) { return known.shapes.Fit(all); },
                          [&] { return std::make_unique<const CachedAttention>(all, NewPlan(*state, all)); });
    size_t next = 3;
    const auto take = [&](bool given) -> void* { return given ? all[next++].untyped_data() : nullptr; };
    AttentionBuffers buffers = {};
    buffers.q = q.untyped_data();
    buffers.k = k.untyped_data();
    buffers.v = v.untyped_data();
    buffers.bias = static_cast<const float*>(take(state->bias));
    buffers.mask = static_cast<const uint8_t*>(take(state->mask));
    buffers.q_lengths = static_cast<const int32_t*>(take(state->q_lengths));
    buffers.kv_lengths = static_cast<const int32_t*>(take(state->kv_lengths));
    buffers.out = take(true);
    buffers.lse = static_cast<float*>(take(state->residual));
    RunAttention(entry.plan, entry.pace, buffers, pool);
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
  XLA_FFI_Error* const error = xla_call::RegisterState<AttentionState>(frame, "jax_nano.attention");
  return error != nullptr ? error : (*kInstantiate)(frame);
}

XLA_FFI_Error* AttentionExecute(XLA_FFI_CallFrame* frame) { return (*kExecute)(frame); }

}  // namespace jax_nano
