// Attention in one pass: plans, and runs them on memory.
//
//     out[b, t, n] = sum over s of softmax(scale * q[b, t, n] . k[b, s, n / G] + bias[b, n, t, s]) v[b, s, n / G]
//
// for N query heads that share N / G key and value heads, over the keys that lengths and a window leave to a query;
// what is excluded has a score of its own, for jax.nn a large negative one. A generated kernel
// (jax_nano/codegen/attention) computes the rows of an item: some positions, and at each of them all heads that share
// keys. Here they are laid out, shared among threads and, where few queries meet many keys, split over the keys and
// merged.
//
// Sizes and strides are in elements. Who computes an item, and what else is in it, makes no difference to its bits:
// keys are cut into blocks and pieces by the shape alone.
#ifndef JAX_NANO_RUN_ATTENTION_H_
#define JAX_NANO_RUN_ATTENTION_H_

#include <array>
#include <cfloat>
#include <chrono>
#include <cstdint>
#include <span>
#include <string_view>

#include "machine/machine.h"
#include "plan/kernel_abi.h"
#include "plan/select.h"
#include "run/parallel.h"
#include "run/sharing.h"
#include "run/workspace.h"

namespace jax_nano {

// The generated attentions of this build.
std::span<const AttentionInfo> Attentions();

// The first of `targets` with an attention for these dtypes; null if none has one.
const AttentionInfo* SelectAttention(std::span<const Target* const> targets, std::string_view q, std::string_view kv);

// Bytes of a packed row of so many elements along K: Packing::a_row of the generator.
int64_t PackedRowBytes(const AttentionInfo& kernel, int64_t elements);

// No bound of a window; bounds may be negative.
inline constexpr int64_t kUnbounded = int64_t{1} << 40;

inline constexpr float kJaxMasked = -0.7f * FLT_MAX;  // jax.nn's score of a masked key

// A key whose score is as much lower than another one has no weight in float32.
inline constexpr double kNoWeight = 104;

struct AttentionShape {
  int64_t batch, queries, keys;
  int64_t heads, kv_heads;  // the latter divide the former
  int64_t depth, width;     // elements of a query and key, and of a value; all sizes are above 0
  using Strides = std::array<int64_t, 4>;
  Strides q, k, v, out;               // between batches, positions, heads, elements; the last of `out` is 1
  std::array<int64_t, 3> bias, mask;  // between batches, heads, queries; keys are side by side
  double scale;
  float masked;  // the score of a key that a mask, the window or a length excludes: kJaxMasked, or less than others
  int64_t left, right;  // query t sees keys t - left <= s <= t + right
};

struct AttentionBuffers {
  const void *q, *k, *v;
  void* out;
  const float* bias;          // null: none
  const uint8_t* mask;        // one byte a score, 0: excluded; null: none
  const int32_t* q_lengths;   // one a batch; beyond them results are zero; null: all of `queries`
  const int32_t* kv_lengths;  // one a batch; null: all of `keys`
  // [batch, queries, heads]: what was subtracted from a query's scores, and the logarithm of the sum of exponentials of
  // what was left. Apart, as beside a score of -1e9 nothing is left of a logarithm in float32. Null: not wanted.
  float *maxima, *logs;
};

struct AttentionPlan {
  const AttentionInfo* kernel;
  AttentionShape shape;
  int64_t q_bytes, kv_bytes;  // of one element
  int64_t group;              // query heads that share keys
  int64_t heads_at_once;      // of a group in one item
  int64_t positions;          // in one item
  int64_t block;              // keys that are packed at once
  bool few;                   // keys and values are read where they lie
  int64_t pieces, piece;      // of the keys, and how many keys one has
  // Workspace of a thread in bytes, in this order.
  int64_t q_pack, k_pack, v_pack, scores, weights, table, mask_row, state;
  std::chrono::nanoseconds expected;  // on one thread, roughly

  int64_t rows() const { return heads_at_once * positions; }
  int64_t head_groups() const { return shape.kv_heads * ((group + heads_at_once - 1) / heads_at_once); }
  int64_t outputs() const { return shape.batch * head_groups() * ((shape.queries + positions - 1) / positions); }
  int64_t items() const { return outputs() * pieces; }
  int64_t workspace_bytes() const { return q_pack + k_pack + v_pack + scores + weights + table + mask_row + state; }
  int64_t shared_bytes() const { return pieces > 1 ? items() * state : 0; }
};

// Throws std::invalid_argument if the kernel is null.
AttentionPlan PlanAttention(const AttentionInfo* kernel, const AttentionShape& shape, const Caches& caches);

// One item on this thread; with pieces its sums go to `shared`, AttentionPlan::shared_bytes() of memory.
void RunAttentionItem(const AttentionPlan& plan, const AttentionBuffers& buffers, void* shared, int64_t item);

// Merges the pieces of one of `outputs()` and writes its results.
void MergePieces(const AttentionPlan& plan, const AttentionBuffers& buffers, void* shared, int64_t output);

template <typename Pool>
void RunAttention(const AttentionPlan& plan, sharing::Pace& pace, const AttentionBuffers& buffers, Pool& pool) {
  void* const shared = SharedWorkspace(plan.shared_bytes());
  const auto run = [&](int64_t item) { RunAttentionItem(plan, buffers, shared, item); };
  const auto alone = [&] {
    for (int64_t item = 0; item < plan.items(); ++item) run(item);
  };
  if (plan.items() == 1) {
    alone();
  } else {
    ParallelFor(pool, plan.items(), pace, alone, run);
  }
  if (plan.pieces > 1) {
    for (int64_t output = 0; output < plan.outputs(); ++output) MergePieces(plan, buffers, shared, output);
  }
}

}  // namespace jax_nano

#endif  // JAX_NANO_RUN_ATTENTION_H_
