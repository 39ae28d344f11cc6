#include "python/attention.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "run/attention.h"
#include "run/attention_gradients.h"
#include "run/private_pool.h"

namespace nb = nanobind;

namespace jax_nano {
namespace {

nb::list AttentionList() {
  nb::list out;
  for (const AttentionInfo& a : Attentions()) {
    nb::dict d;
    ForEachField(a, [&](const char* name, const auto& field) { d[name] = field; });
    out.append(d);
  }
  return out;
}

const AttentionInfo& AttentionNamed(std::string_view name) {
  for (const AttentionInfo& a : Attentions()) {
    if (name == a.name) return a;
  }
  throw std::invalid_argument("no such attention: " + std::string(name));
}

using Sizes = std::array<int64_t, 7>;         // batch, queries, keys, heads, kv_heads, depth, width
using Addresses = std::array<uintptr_t, 10>;  // q, k, v, out, bias, mask, q_lengths, kv_lengths, maxima, logs
using Strides = AttentionShape::Strides;
using Broadcast = std::array<int64_t, 3>;

// `strides` are those of q, k, v, and the result or its cotangents.
AttentionShape ShapeOf(const Sizes& sizes, const std::array<Strides, 4>& strides, const Broadcast& bias,
                       const Broadcast& mask, double scale, double masked, int64_t left, int64_t right) {
  AttentionShape shape = {};
  shape.batch = sizes[0];
  shape.queries = sizes[1];
  shape.keys = sizes[2];
  shape.heads = sizes[3];
  shape.kv_heads = sizes[4];
  shape.depth = sizes[5];
  shape.width = sizes[6];
  for (const int64_t size : sizes) {
    if (size < 1) throw std::invalid_argument("no size may be below 1");
  }
  if (shape.heads % shape.kv_heads) throw std::invalid_argument("kv_heads must divide heads");
  shape.q = strides[0];
  shape.k = strides[1];
  shape.v = strides[2];
  shape.out = strides[3];
  shape.bias = bias;
  shape.mask = mask;
  shape.scale = scale;
  shape.masked = static_cast<float>(masked);
  shape.left = left;
  shape.right = right;
  return shape;
}

AttentionPlan PlanFor(std::string_view name, const Sizes& sizes, const std::array<Strides, 4>& strides,
                      const Broadcast& bias, const Broadcast& mask, double scale, double masked, int64_t left,
                      int64_t right) {
  if (strides[3][3] != 1) throw std::invalid_argument("elements of results must be side by side");
  const AttentionShape shape = ShapeOf(sizes, strides, bias, mask, scale, masked, left, right);
  return PlanAttention(&AttentionNamed(name), shape, HostMachine().caches);
}

// Runs one attention `trips` times; returns the seconds, without planning. All threads take part in every call.
double RunOften(std::string_view name, const Addresses& at, const Sizes& sizes, const std::array<Strides, 4>& strides,
                const Broadcast& bias, const Broadcast& mask, double scale, double masked, int64_t left, int64_t right,
                int64_t threads, int64_t trips) {
  const AttentionPlan plan = PlanFor(name, sizes, strides, bias, mask, scale, masked, left, right);
  AttentionBuffers buffers = {};
  buffers.q = reinterpret_cast<const void*>(at[0]);
  buffers.k = reinterpret_cast<const void*>(at[1]);
  buffers.v = reinterpret_cast<const void*>(at[2]);
  buffers.out = reinterpret_cast<void*>(at[3]);
  buffers.bias = reinterpret_cast<const float*>(at[4]);
  buffers.mask = reinterpret_cast<const uint8_t*>(at[5]);
  buffers.q_lengths = reinterpret_cast<const int32_t*>(at[6]);
  buffers.kv_lengths = reinterpret_cast<const int32_t*>(at[7]);
  buffers.maxima = reinterpret_cast<float*>(at[8]);
  buffers.logs = reinterpret_cast<float*>(at[9]);
  const nb::gil_scoped_release release;
  sharing::Pace pace(sharing::Pace::kEndless);
  PrivatePool pool(threads);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t trip = 0; trip < trips; ++trip) RunAttention(plan, pace, buffers, pool);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// q, k, v, cotangents of the result, bias, mask, q_lengths, kv_lengths, maxima, logs, delta, dq, dk, dv, dbias.
using GradientAddresses = std::array<uintptr_t, 15>;

GradientPlan PlanGradientsFor(std::string_view name, const Sizes& sizes, const std::array<Strides, 4>& strides,
                              const Broadcast& bias, const Broadcast& mask,
                              const std::optional<std::array<int64_t, 3>>& dbias, double scale, double masked,
                              int64_t left, int64_t right) {
  GradientShape shape = {};
  shape.attention = ShapeOf(sizes, strides, bias, mask, scale, masked, left, right);
  shape.dbias = dbias.has_value();
  shape.dbias_sizes = dbias.value_or(std::array<int64_t, 3>{1, 1, 1});
  return PlanGradients(&AttentionNamed(name), shape);
}

// The same for gradients.
double RunGradientsOften(std::string_view name, const GradientAddresses& at, const Sizes& sizes,
                         const std::array<Strides, 4>& strides, const Broadcast& bias, const Broadcast& mask,
                         const std::optional<std::array<int64_t, 3>>& dbias, double scale, double masked, int64_t left,
                         int64_t right, int64_t threads, int64_t trips) {
  const GradientPlan plan = PlanGradientsFor(name, sizes, strides, bias, mask, dbias, scale, masked, left, right);
  GradientBuffers buffers = {};
  buffers.q = reinterpret_cast<const void*>(at[0]);
  buffers.k = reinterpret_cast<const void*>(at[1]);
  buffers.v = reinterpret_cast<const void*>(at[2]);
  buffers.dout = reinterpret_cast<const void*>(at[3]);
  buffers.bias = reinterpret_cast<const float*>(at[4]);
  buffers.mask = reinterpret_cast<const uint8_t*>(at[5]);
  buffers.q_lengths = reinterpret_cast<const int32_t*>(at[6]);
  buffers.kv_lengths = reinterpret_cast<const int32_t*>(at[7]);
  buffers.maxima = reinterpret_cast<const float*>(at[8]);
  buffers.logs = reinterpret_cast<const float*>(at[9]);
  buffers.delta = reinterpret_cast<const float*>(at[10]);
  buffers.dq = reinterpret_cast<void*>(at[11]);
  buffers.dk = reinterpret_cast<void*>(at[12]);
  buffers.dv = reinterpret_cast<void*>(at[13]);
  buffers.dbias = reinterpret_cast<float*>(at[14]);
  const nb::gil_scoped_release release;
  GradientPaces paces(sharing::Pace::kEndless, sharing::Pace::kEndless);
  PrivatePool pool(threads);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t trip = 0; trip < trips; ++trip) RunGradients(plan, paces, buffers, pool);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

nb::dict ExplainGradients(std::string_view name, const Sizes& sizes, const std::array<Strides, 4>& strides,
                          const std::optional<std::array<int64_t, 3>>& dbias) {
  const GradientPlan plan =
      PlanGradientsFor(name, sizes, strides, {}, {}, dbias, 1, kJaxMasked, kUnbounded, kUnbounded);
  nb::dict d;
  d["block"] = plan.block;
  d["chunk"] = plan.chunk;
  d["pieces"] = plan.pieces;
  d["piece"] = plan.piece;
  d["items"] = plan.items();
  d["workspace_bytes"] = plan.workspace_bytes();
  d["shared_bytes"] = plan.shared_bytes();
  return d;
}

nb::dict ExplainAttention(std::string_view name, const Sizes& sizes, const std::array<Strides, 4>& strides) {
  const AttentionPlan plan = PlanFor(name, sizes, strides, {}, {}, 1, kJaxMasked, kUnbounded, kUnbounded);
  nb::dict d;
  d["few"] = plan.few;
  d["block"] = plan.block;
  d["pieces"] = plan.pieces;
  d["piece"] = plan.piece;
  d["heads_at_once"] = plan.heads_at_once;
  d["positions"] = plan.positions;
  d["items"] = plan.items();
  d["workspace_bytes"] = plan.workspace_bytes();
  d["shared_bytes"] = plan.shared_bytes();
  return d;
}

bool SupportsAttention(std::string_view q, std::string_view kv) {
  return SelectAttention(SelectedTargets(), q, kv) != nullptr;
}

}  // namespace

void DefineAttention(nb::module_& m) {
  using namespace nb::literals;
  m.def("attentions", &AttentionList);
  m.def("supports_attention", &SupportsAttention, "q"_a, "kv"_a);
  m.def("plan_attention", &ExplainAttention, "name"_a, "sizes"_a, "strides"_a);
  m.def("attention", &RunOften, "name"_a, "addresses"_a, "sizes"_a, "strides"_a, "bias"_a, "mask"_a, "scale"_a,
        "masked"_a, "left"_a, "right"_a, "threads"_a, "trips"_a = 1);
  m.def("plan_attention_gradients", &ExplainGradients, "name"_a, "sizes"_a, "strides"_a, "dbias"_a.none());
  m.def("attention_gradients", &RunGradientsOften, "name"_a, "addresses"_a, "sizes"_a, "strides"_a, "bias"_a, "mask"_a,
        "dbias"_a.none(), "scale"_a, "masked"_a, "left"_a, "right"_a, "threads"_a, "trips"_a = 1);
}

}  // namespace jax_nano
