// Gradients of attention in one pass over its scores: plans, and runs them on memory.
//
// From the cotangents of the results, the statistics that RunAttention left and, of each query, delta = the sum of its
// results times their cotangents (less the logarithm's cotangent):
//
//     weights = exp((scores - maximum) - log)             dscores = weights * (dout v^T - delta)
//     dq = scale * dscores k           dk = scale * dscores^T q           dv = weights^T dout          dbias = dscores
//
// An item is a piece of the keys of one head of keys and values, with all the queries that share it. It goes through
// blocks of keys and, for each, through chunks of queries, whose scores are computed once more by a generated kernel
// (jax_nano/codegen/attention/gradients.py): sums of dk and dv live for a block, those of dq for the item. Where keys
// are cut into pieces, dq is summed over them in a fixed tree. Where several heads or batches share a bias whose
// gradient is wanted, an item does all of them, one after the other: so each number has one thread that sums it.
//
// Sizes and strides are in elements. Pieces, blocks and chunks depend on the shape alone, so results do not depend on
// who computes an item.
#ifndef JAX_NANO_RUN_ATTENTION_GRADIENTS_H_
#define JAX_NANO_RUN_ATTENTION_GRADIENTS_H_

#include <array>
#include <chrono>
#include <cstdint>

#include "run/attention.h"

namespace jax_nano {

struct GradientShape {
  AttentionShape attention;            // `out` holds the strides of its cotangents
  bool dbias;                          // wanted
  std::array<int64_t, 3> dbias_sizes;  // batches, heads, queries: 1 where the bias is broadcast
};

// Results are dense and in jax.nn's order: dq [batch, queries, heads, depth], dk and dv [batch, keys, kv_heads, ...],
// dbias [.., .., .., keys].
struct GradientBuffers {
  const void *q, *k, *v, *dout;
  const float* bias;  // these four as in AttentionBuffers
  const uint8_t* mask;
  const int32_t* q_lengths;
  const int32_t* kv_lengths;
  const float *maxima, *logs;  // [batch, queries, heads], as RunAttention wrote them
  const float* delta;          // likewise
  void *dq, *dk, *dv;
  float* dbias;  // null unless wanted
};

struct GradientPlan {
  const AttentionInfo* kernel;
  GradientShape shape;
  int64_t q_bytes, kv_bytes;  // of one element
  int64_t group;              // query heads that share keys
  int64_t block;              // keys that are packed at once
  int64_t chunk;              // rows (a position's heads side by side) whose scores exist at once
  bool packs_once;            // all rows of an item stay packed; else a chunk's are packed for each block of keys
  int64_t pieces, piece;      // of the keys, and how many keys one has
  int64_t rs_scores, rs_dq, rs_dv;
  // Workspace of a thread in bytes, in this order.
  int64_t q_pack, dout_pack, q_panels, dout_panels;  // of a chunk
  int64_t kt_pack, vt_pack, k_pack, scores, dscores, turned, table, mask_rows, dk, dv;
  int64_t dq;                                  // one item's
  std::chrono::nanoseconds expected, merging;  // on one thread, roughly

  int64_t rows() const { return shape.attention.queries * group; }
  int64_t heads() const { return shape.attention.batch * shape.attention.kv_heads; }
  bool shares_batches() const { return shape.dbias && shape.dbias_sizes[0] == 1; }
  bool shares_heads() const { return shape.dbias && shape.dbias_sizes[1] == 1; }
  int64_t item_batches() const { return shares_batches() ? 1 : shape.attention.batch; }
  int64_t item_heads() const { return shares_heads() ? 1 : shape.attention.kv_heads; }
  int64_t items() const { return item_batches() * item_heads() * pieces; }
  int64_t merges() const { return pieces > 1 ? heads() * ((rows() + kMergedRows - 1) / kMergedRows) : 0; }
  int64_t chunk_bytes() const { return q_pack + dout_pack + q_panels + dout_panels; }
  // The last one is that of rows that are computed by themselves.
  int64_t chunks() const { return (packs_once ? (rows() + chunk - 1) / chunk : 1) + 1; }
  int64_t workspace_bytes() const {
    return chunks() * chunk_bytes() + kt_pack + vt_pack + k_pack + scores + dscores + turned + table + mask_rows + dk +
           dv + (pieces > 1 ? 0 : dq);
  }
  int64_t shared_bytes() const { return pieces > 1 ? heads() * pieces * dq : 0; }

  static constexpr int64_t kMergedRows = 256;
};

// Throws std::invalid_argument if the kernel is null.
GradientPlan PlanGradients(const AttentionInfo* kernel, const GradientShape& shape);

// One item on this thread; with pieces its part of dq goes to `shared`, GradientPlan::shared_bytes() of memory.
void RunGradientItem(const GradientPlan& plan, const GradientBuffers& buffers, void* shared, int64_t item);

// Sums the pieces of some rows of dq, and writes them.
void MergeGradients(const GradientPlan& plan, const GradientBuffers& buffers, void* shared, int64_t merge);

// How long the two halves of a call take.
struct GradientPaces {
  GradientPaces(sharing::Duration of_items, sharing::Duration of_merges) : items(of_items), merges(of_merges) {}
  sharing::Pace items, merges;
};

template <typename Pool>
void RunGradients(const GradientPlan& plan, GradientPaces& paces, const GradientBuffers& buffers, Pool& pool) {
  void* const shared = SharedWorkspace(plan.shared_bytes());
  const auto run_all = [&](int64_t count, sharing::Pace& pace, auto run) {
    const auto alone = [&] {
      for (int64_t i = 0; i < count; ++i) run(i);
    };
    if (count <= 1) {
      alone();
    } else {
      ParallelFor(pool, count, pace, alone, run);
    }
  };
  run_all(plan.items(), paces.items, [&](int64_t item) { RunGradientItem(plan, buffers, shared, item); });
  run_all(plan.merges(), paces.merges, [&](int64_t merge) { MergeGradients(plan, buffers, shared, merge); });
}

}  // namespace jax_nano

#endif  // JAX_NANO_RUN_ATTENTION_GRADIENTS_H_
