// What the calls of attention and of its gradients have in common: attributes, and the shape that their operands make.
//
//   abi                int64     kFfiAbi (spec.h)
//   q_dims, k_dims, v_dims, out_dims   int64[4]   which dimension of attention each dimension of the buffer is:
//                                0 batch, 1 position, 2 head, 3 element
//   scale              float64   of scores
//   masked             float64   of scores that a mask, the window or a length excludes
//   left, right        int64     query t sees keys t - left <= s <= t + right
//   bias, mask, q_lengths, kv_lengths   int64   1: the operand is there
//
// Bias (float32) and mask (pred) are [batch or 1, heads or 1, queries or 1, keys]; lengths int32 [batch].
#ifndef JAX_NANO_XLA_ATTENTION_OPERANDS_H_
#define JAX_NANO_XLA_ATTENTION_OPERANDS_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "run/attention.h"
#include "xla/call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nano {

using Dims = std::array<int64_t, 4>;

struct AttentionOptions {
  Dims dims[4];  // of q, k, v, out
  double scale = 1, masked = 0;
  int64_t left = kUnbounded, right = kUnbounded;
  bool bias = false, mask = false, q_lengths = false, kv_lengths = false;

  size_t others() const { return size_t{bias} + size_t{mask} + size_t{q_lengths} + size_t{kv_lengths}; }
};

inline void Require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("jax_nano attention: ") + what);
}

// Queries, keys and values as programs print them.
inline std::string Text(const xla::ffi::AnyBuffer& q, const xla::ffi::AnyBuffer& k, const xla::ffi::AnyBuffer& v) {
  return xla_call::Text(q) + " x " + xla_call::Text(k) + " x " + xla_call::Text(v);
}

// `others`: whether bias, mask, q_lengths and kv_lengths are there.
inline xla::ffi::Error ParseOptions(int64_t abi, const std::array<xla::ffi::Span<const int64_t>, 4>& dims, double scale,
                                    double masked, int64_t left, int64_t right, const std::array<bool, 4>& others,
                                    AttentionOptions& options) {
  using xla::ffi::Error;
  if (Error error = xla_call::CheckAbi(abi); error.failure()) return error;
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i].size() == 4) std::copy(dims[i].begin(), dims[i].end(), options.dims[i].begin());
    Dims sorted = options.dims[i];
    std::sort(sorted.begin(), sorted.end());
    if (dims[i].size() != 4 || sorted != Dims{0, 1, 2, 3}) {
      return Error::InvalidArgument("jax_nano attention: dimensions are no permutation of 0..3");
    }
  }
  // Blocks of excluded keys are left out, which is no sum over NaNs.
  if (std::isnan(masked)) return Error::InvalidArgument("jax_nano attention: the score of excluded keys is NaN");
  options.scale = scale;
  options.masked = masked;
  options.left = std::clamp(left, -kUnbounded, kUnbounded);
  options.right = std::clamp(right, -kUnbounded, kUnbounded);
  options.bias = others[0];
  options.mask = others[1];
  options.q_lengths = others[2];
  options.kv_lengths = others[3];
  return Error::Success();
}

// Sizes and strides of a dense buffer by the dimensions of attention.
struct Layout {
  Dims sizes, strides;
};

inline Layout LayoutOf(const xla::ffi::AnyBuffer& buffer, const Dims& dims) {
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
inline std::array<int64_t, 3> BroadcastStrides(const xla::ffi::AnyBuffer& buffer, const Dims& scores) {
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

// The shape without what AddOthers and the result add.
inline AttentionShape ShapeOfOperands(const AttentionOptions& options, const xla::ffi::AnyBuffer& q,
                                      const xla::ffi::AnyBuffer& k, const xla::ffi::AnyBuffer& v) {
  const Layout of_q = LayoutOf(q, options.dims[0]), of_k = LayoutOf(k, options.dims[1]);
  const Layout of_v = LayoutOf(v, options.dims[2]);
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
  shape.q = of_q.strides;
  shape.k = of_k.strides;
  shape.v = of_v.strides;
  shape.scale = options.scale;
  shape.masked = static_cast<float>(options.masked);
  shape.left = options.left;
  shape.right = options.right;
  return shape;
}

// Adds bias and mask, and checks them and the lengths, which begin at buffers[next]; moves `next` behind them.
inline void AddOthers(const AttentionOptions& options, const std::vector<xla::ffi::AnyBuffer>& buffers, size_t& next,
                      AttentionShape& shape) {
  const Dims scores = {shape.batch, shape.heads, shape.queries, shape.keys};
  if (options.bias) {
    Require(buffers[next].element_type() == xla::ffi::F32, "bias must be float32");
    shape.bias = BroadcastStrides(buffers[next++], scores);
  }
  if (options.mask) {
    Require(buffers[next].element_type() == xla::ffi::PRED, "mask must be bool");
    shape.mask = BroadcastStrides(buffers[next++], scores);
  }
  for (const bool given : {options.q_lengths, options.kv_lengths}) {
    if (!given) continue;
    Require(buffers[next].element_type() == xla::ffi::S32 &&
                buffers[next].element_count() == static_cast<size_t>(shape.batch),
            "lengths must be int32, one a batch");
    ++next;
  }
}

// That a buffer has a float32 for each query.
inline void RequireStatistics(const xla::ffi::AnyBuffer& buffer, const AttentionShape& shape) {
  Require(buffer.element_type() == xla::ffi::F32 &&
              buffer.element_count() == static_cast<size_t>(shape.batch * shape.queries * shape.heads),
          "maxima, logarithms or deltas do not fit the operands");
}

// The strides of a result or of its cotangents.
inline Dims StridesOfResult(const AttentionOptions& options, const xla::ffi::AnyBuffer& result,
                            const xla::ffi::AnyBuffer& q, const AttentionShape& shape) {
  const Layout layout = LayoutOf(result, options.dims[3]);
  Require(layout.sizes == Dims{shape.batch, shape.queries, shape.heads, shape.width} &&
              result.element_type() == q.element_type(),
          "the result does not fit the operands");
  return layout.strides;
}

}  // namespace jax_nano

#endif  // JAX_NANO_XLA_ATTENTION_OPERANDS_H_
