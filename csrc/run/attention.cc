#include "run/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "machine/glibc.h"
#include "plan/registry.h"
#include "run/attention_rows.h"

// attention.inc has one JAX_NANO_ATTENTION(...) line per generated attention, read twice as manifest.inc is.
#define JAX_NANO_ATTENTION(symbol, ...)                   \
  extern "C" void symbol(const jax_nano::AttentionArgs*); \
  extern "C" void symbol##_gradients(const jax_nano::GradientArgs*);
#include "attention.inc"
#undef JAX_NANO_ATTENTION

namespace jax_nano {
namespace {

constexpr AttentionInfo kAttentions[] = {
#define JAX_NANO_ATTENTION(symbol, ...) {__VA_ARGS__, &symbol, &symbol##_gradients},
#include "attention.inc"
#undef JAX_NANO_ATTENTION
    {},  // an array may not be empty, a build without kernels may
};

constexpr int64_t kMostRows = 512;          // of an item: packing keys costs a hundredth of their products then
constexpr int64_t kFewestRows = 48;         // that an item is cut down to, so that there are
constexpr int64_t kItems = 16;              // so many for threads to share
constexpr int64_t kBlockBytes = 128 << 10;  // of a packed block of keys and values: a share of L2
constexpr int64_t kMostKeys = 512;          // in a block, whose scores for a tile of queries stay in L1
constexpr int64_t kSplitRows = 64;          // with more of them in all, keys are not split
constexpr int64_t kSplitKeys = 512;         // the least keys in a piece
constexpr int64_t kSplitItems = 64;         // with more items without it neither
constexpr int64_t kMostPieces = 16;

int64_t SumsRow(const AttentionPlan& plan) { return RoundUp(plan.shape.width, plan.kernel->nr); }

// The sums of all rows of an item, their maxima and totals.
struct State {
  float *sums, *maxima, *totals;
};

// What was subtracted from a row's scores, in natural units, and the sum of exponentials of what was left.
struct Statistics {
  double maximum, total;
};

Statistics StatisticsOf(const AttentionPlan& plan, const State& state, int64_t row, bool general) {
  const double maximum = state.maxima[row];
  return {general ? maximum : maximum * M_LN2, state.totals[row * plan.kernel->lanes]};
}

int64_t PaddedRows(const AttentionPlan& plan) { return RoundUp(plan.rows(), plan.kernel->mr); }

State StateAt(const AttentionPlan& plan, void* memory) {
  const int64_t rows = PaddedRows(plan);
  State s;
  s.sums = static_cast<float*>(memory);
  s.maxima = s.sums + rows * SumsRow(plan);
  s.totals = s.maxima + RoundUp(rows, kLine / 4);
  return s;
}

// Which queries an item computes.
struct Output {
  int64_t batch, kv_head, first_head, heads, first_position, positions;
  int64_t rows() const { return heads * positions; }
};

Output OutputAt(const AttentionPlan& plan, int64_t index) {
  const AttentionShape& shape = plan.shape;
  const int64_t blocks = CeilDiv(shape.queries, plan.positions);
  const int64_t parts = CeilDiv(plan.group, plan.heads_at_once);
  Output o;
  o.first_position = index % blocks * plan.positions;
  o.positions = std::min(plan.positions, shape.queries - o.first_position);
  index /= blocks;
  const int64_t part = index % parts;
  index /= parts;
  o.kv_head = index % shape.kv_heads;
  o.batch = index / shape.kv_heads;
  o.first_head = o.kv_head * plan.group + part * plan.heads_at_once;
  o.heads = std::min(plan.heads_at_once, plan.group - part * plan.heads_at_once);
  return o;
}

// A thread's workspace, cut up.
struct Rooms {
  char *q_pack, *k_pack, *v_pack, *scores, *weights;
  AttentionRow* table;
  uint8_t* mask_row;
  void* state;
};

Rooms TakeRooms(const AttentionPlan& plan) {
  Parts parts(Workspace(plan.workspace_bytes()));
  Rooms r;
  r.q_pack = parts.Next(plan.q_pack);
  r.k_pack = parts.Next(plan.k_pack);
  r.v_pack = parts.Next(plan.v_pack);
  r.scores = parts.Next(plan.scores);
  r.weights = plan.kernel->converts ? parts.Next(plan.weights) : r.scores;
  r.table = parts.Next<AttentionRow>(plan.table);
  r.mask_row = parts.Next<uint8_t>(plan.mask_row);
  r.state = parts.Next(plan.state);
  return r;
}

void SetGeneral(const AttentionShape& shape, bool general, AttentionArgs& x) {
  x.general = general;
  x.scale = general ? shape.scale : shape.scale * M_LOG2E;
}

AttentionArgs ArgsFor(const AttentionPlan& plan, const AttentionBuffers& buffers, const Output& output,
                      const Rooms& rooms, const State& state) {
  const AttentionShape& shape = plan.shape;
  AttentionArgs x = {};
  x.rows = rooms.table;
  x.k = Advance(buffers.k, output.batch * shape.k[0] + output.kv_head * shape.k[2], plan.kv_bytes);
  x.v = Advance(buffers.v, output.batch * shape.v[0] + output.kv_head * shape.v[2], plan.kv_bytes);
  x.q_pack = rooms.q_pack;
  x.k_pack = rooms.k_pack;
  x.v_pack = rooms.v_pack;
  x.scores = reinterpret_cast<float*>(rooms.scores);
  x.weights = rooms.weights;
  x.sums = state.sums;
  x.maxima = state.maxima;
  x.totals = state.totals;
  SetOperands(shape, x);
  x.block = plan.block;
  x.rs_scores = ScoresRow(plan.block);
  x.rs_sums = SumsRow(plan);
  x.few = plan.few;
  x.masked = shape.masked;
  SetGeneral(shape, IsGeneral(shape, buffers.bias, buffers.mask), x);
  return x;
}

// The table of an output's queries, a position's heads side by side; returns the number of rows. Positions behind the
// length of their batch have none.
int64_t FillTable(const AttentionPlan& plan, const AttentionBuffers& buffers, const Output& output,
                  AttentionRow* table) {
  const AttentionShape& shape = plan.shape;
  const int64_t keys = Length(buffers.kv_lengths, output.batch, shape.keys);
  const int64_t queries = Length(buffers.q_lengths, output.batch, shape.queries);
  const int64_t end = std::min(output.first_position + output.positions, queries);
  AttentionRow* row = table;
  for (int64_t t = output.first_position; t < end; ++t) {
    const Window window = WindowAt(shape, t, keys);
    for (int64_t n = output.first_head; n < output.first_head + output.heads; ++n, ++row) {
      row->q = RowAt(buffers.q, shape.q, output.batch, t, n, plan.q_bytes);
      row->out = RowAt(buffers.out, shape.out, output.batch, t, n, plan.q_bytes);
      row->bias = OfScores(buffers.bias, shape.bias, output.batch, t, n);
      row->mask = OfScores(buffers.mask, shape.mask, output.batch, t, n);
      row->lo = window.lo;
      row->hi = window.hi;
    }
  }
  return row - table;
}

// The keys that rows of a table see, from the beginning of a block.
struct Keys {
  int64_t begin, end;
};

Keys KeysFor(const AttentionPlan& plan, const AttentionRow* table, int64_t rows) {
  Keys keys = {plan.shape.keys, 0};
  for (int64_t i = 0; i < rows; ++i) {
    if (table[i].lo >= table[i].hi) continue;
    keys.begin = std::min(keys.begin, table[i].lo);
    keys.end = std::max(keys.end, table[i].hi);
  }
  keys.begin = std::min(keys.begin, keys.end) / plan.block * plan.block;
  return keys;
}

void WriteStatistics(const AttentionBuffers& buffers, int64_t at, const Statistics& x) {
  if (buffers.maxima == nullptr) return;
  const float maximum = static_cast<float>(x.maximum);
  buffers.maxima[at] = maximum;
  buffers.logs[at] = static_cast<float>(x.maximum - static_cast<double>(maximum) + std::log(x.total));
}

// Queries behind the length of their batch: zeros.
void WritePadding(const AttentionPlan& plan, const AttentionBuffers& buffers, const Output& output) {
  const AttentionShape& shape = plan.shape;
  const int64_t queries = Length(buffers.q_lengths, output.batch, shape.queries);
  const int64_t begin = std::max(output.first_position, queries);
  for (int64_t t = begin; t < output.first_position + output.positions; ++t) {
    for (int64_t n = output.first_head; n < output.first_head + output.heads; ++n) {
      void* const out = RowAt(buffers.out, shape.out, output.batch, t, n, plan.q_bytes);
      std::memset(out, 0, static_cast<size_t>(shape.width * plan.q_bytes));
      WriteStatistics(buffers, StatisticAt(shape, output.batch, t, n), {shape.masked, static_cast<double>(shape.keys)});
    }
  }
}

// Every row asks, so without comparisons: an exponent of ones, and no other, carries into the sign.
bool AllFinite(const float* x, int64_t n) {
  uint32_t carried = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    carried |= (bits & 0x7fffffffu) + 0x00800000u;
  }
  return carried >> 31 == 0;
}

// Computes one row once more, by itself, with keys from `begin` on as the first ones and scores rounded as jax.nn's.
Statistics RunRowAlone(const AttentionPlan& plan, const AttentionBuffers& buffers, const Output& output,
                       const Rooms& rooms, AttentionRow row, int64_t begin) {
  // Its state goes behind that of the rows of the item, which is still to be read.
  const State state = StateAt(plan, Advance(rooms.state, plan.state / 2, 1));
  AttentionArgs x = ArgsFor(plan, buffers, output, rooms, state);
  x.k = Advance(x.k, begin * x.rsk, plan.kv_bytes);
  x.v = Advance(x.v, begin * x.rsv, plan.kv_bytes);
  if (row.bias != nullptr) row.bias += begin;
  if (row.mask != nullptr) row.mask = static_cast<const uint8_t*>(row.mask) + begin;
  row.lo -= begin;
  row.hi -= begin;
  x.rows = &row;
  x.count = 1;
  x.end = row.hi;
  SetGeneral(plan.shape, true, x);
  x.first = x.finish = 1;
  plan.kernel->fn(&x);
  return StatisticsOf(plan, state, 0, true);
}

// Behind a finished kernel call: statistics, and rows that are to be computed once more. Those are rows whose weights
// of zero have met Inf or NaN among values that they do not see; rows where no key outweighs an excluded one, which
// jax.nn weighs with all that a window and a length exclude; and rows of scores so large that weights in one step are
// wrong (IsCoarse), or were in an earlier block and have left Inf or NaN behind.
void FinishRows(const AttentionPlan& plan, const AttentionBuffers& buffers, const Output& output, const Rooms& rooms,
                const State& state, int64_t rows) {
  const AttentionShape& shape = plan.shape;
  const bool general = IsGeneral(shape, buffers.bias, buffers.mask);
  for (int64_t i = 0; i < rows; ++i) {
    Statistics found = StatisticsOf(plan, state, i, general);
    const AttentionRow row = rooms.table[i];
    const bool excluded = row.lo > 0 || row.hi < shape.keys;
    const bool outweighed = found.total == 0 || (!std::isnan(found.total) && found.maximum <= shape.masked + kNoWeight);
    if (excluded && outweighed) {
      for (int64_t s = 0; s < shape.keys; ++s) {
        const bool taken = row.mask == nullptr || static_cast<const uint8_t*>(row.mask)[s] != 0;
        rooms.mask_row[s] = taken && s >= row.lo && s < row.hi;
      }
      AttentionRow all = row;
      all.mask = rooms.mask_row;
      all.lo = 0;
      all.hi = shape.keys;
      found = RunRowAlone(plan, buffers, output, rooms, all, 0);
    } else if (!general && (IsCoarse(found.maximum) || !std::isfinite(found.total))) {
      found = RunRowAlone(plan, buffers, output, rooms, row, row.lo);
    } else if ((excluded || !general) && std::isfinite(found.total) &&
               !AllFinite(state.sums + i * SumsRow(plan), shape.width)) {
      RunRowAlone(plan, buffers, output, rooms, row, row.lo);
    }
    const int64_t t = output.first_position + i / output.heads, n = output.first_head + i % output.heads;
    WriteStatistics(buffers, StatisticAt(shape, output.batch, t, n), found);
  }
}

}  // namespace

std::span<const AttentionInfo> Attentions() { return {kAttentions, std::size(kAttentions) - 1}; }

const AttentionInfo* SelectAttention(std::span<const Target* const> targets, std::string_view q, std::string_view kv) {
  for (const Target* target : targets) {
    for (const AttentionInfo& a : Attentions()) {
      if (std::string_view(target->name) == a.target && q == a.q && kv == a.kv) return &a;
    }
  }
  return nullptr;
}

int64_t PackedRowBytes(const AttentionInfo& kernel, int64_t elements) {
  return (CeilDiv(RoundUp(elements, kernel.kr) * kernel.pack_bytes, kLine) | 1) * kLine;
}

AttentionPlan PlanAttention(const AttentionInfo* kernel, const AttentionShape& shape, const Caches& caches) {
  if (kernel == nullptr) throw std::invalid_argument("jax_nano attention: no kernel for these dtypes");
  AttentionPlan p = {};
  p.kernel = kernel;
  p.shape = shape;
  p.q_bytes = ElementBytes(kernel->q);
  p.kv_bytes = ElementBytes(kernel->kv);
  p.group = shape.heads / shape.kv_heads;

  // What decides bits: by the shape alone.
  const int64_t key_bytes = (RoundUp(shape.depth, kernel->kr) + RoundUp(shape.width, kernel->nr)) * kernel->pack_bytes;
  p.block = BlockOfKeys(kBlockBytes, key_bytes, kernel->unit, kMostKeys, shape.keys);
  p.pieces = 1;
  if (p.group * shape.queries <= kSplitRows && shape.batch * shape.kv_heads <= kSplitItems) {
    p.pieces = std::clamp<int64_t>(shape.keys / kSplitKeys, 1, kMostPieces);
  }
  p.piece = RoundUp(CeilDiv(shape.keys, p.pieces), p.block);
  p.pieces = CeilDiv(shape.keys, p.piece);

  // So are rows, though they decide no bits but where values are not finite: what leaks from a value that a query does
  // not see, through its weight of zero, is computed once more (FinishRows), in other blocks.
  const int64_t row_bytes = PackedRowBytes(*kernel, shape.depth) + SumsRow(p) * 4;
  const int64_t fit =
      std::clamp<int64_t>(caches.l2 * 5 / 8 / row_bytes, kFewestRows, kMostRows) / kernel->mr * kernel->mr;
  int64_t rows = std::max<int64_t>(fit, kernel->mr);
  const auto cut = [&] {
    p.heads_at_once = std::min(p.group, rows);
    p.positions = std::clamp<int64_t>(rows / p.heads_at_once, 1, shape.queries);
    p.positions = CeilDiv(shape.queries, CeilDiv(shape.queries, p.positions));
  };
  cut();
  while (rows / 2 >= kFewestRows && p.items() < kItems) {
    rows = std::max<int64_t>(rows / 2 / kernel->mr, 1) * kernel->mr;
    cut();
  }

  p.few = kernel->few && p.rows() <= kFewQueries && shape.k[3] == 1 && shape.v[3] == 1;
  const int64_t padded = PaddedRows(p), tile_rows = std::max<int64_t>(kernel->mr, kFewQueries);
  p.q_pack = WholeLines(padded * PackedRowBytes(*kernel, shape.depth)) + kPackSlackBytes;
  p.k_pack = WholeLines(RoundUp(p.block, kernel->nr) * RoundUp(shape.depth, kernel->kr) * kernel->pack_bytes) +
             kPackSlackBytes;
  p.v_pack = WholeLines(RoundUp(shape.width, kernel->nr) * RoundUp(p.block, kernel->kr) * kernel->pack_bytes) +
             kPackSlackBytes;
  p.scores = tile_rows * ScoresRow(p.block) * 4;
  p.weights = kernel->converts ? tile_rows * PackedRowBytes(*kernel, p.block) : 0;
  p.table = WholeLines(p.rows() * static_cast<int64_t>(sizeof(AttentionRow)));
  p.mask_row = WholeLines(shape.keys);
  // Twice: a query that is computed once more has a state of its own.
  p.state = 2 * WholeLines((padded * SumsRow(p) + RoundUp(padded, kLine / 4) + padded * kernel->lanes) * 4);
  const double products = static_cast<double>(shape.batch * shape.heads) * static_cast<double>(shape.queries) *
                          static_cast<double>(shape.keys) * static_cast<double>(shape.depth + shape.width);
  p.expected = std::chrono::nanoseconds(static_cast<int64_t>(products / 16) + 1000);
  return p;
}

void RunAttentionItem(const AttentionPlan& plan, const AttentionBuffers& buffers, void* shared, int64_t item) {
  // Heads inside pieces: where the heads of a position lie side by side, they share pages, and with few queries to
  // compute it is the pages that take the time.
  const int64_t index = item % plan.outputs(), piece = item / plan.outputs();
  const Output output = OutputAt(plan, index);
  const Rooms rooms = TakeRooms(plan);
  const bool split = plan.pieces > 1;
  const State state = StateAt(plan, split ? Advance(shared, index * plan.pieces + piece, plan.state) : rooms.state);
  const int64_t rows = FillTable(plan, buffers, output, rooms.table);
  if (rows > 0) {
    AttentionArgs x = ArgsFor(plan, buffers, output, rooms, state);
    const Keys keys = KeysFor(plan, rooms.table, rows);
    x.count = rows;
    x.begin = std::max(keys.begin, piece * plan.piece);
    // No less than the beginning where the rows see nothing of the piece: kernels count keys without a sign.
    x.end = std::max(x.begin, std::min(keys.end, (piece + 1) * plan.piece));
    x.first = 1;
    x.finish = !split;
    plan.kernel->fn(&x);
    if (!split) FinishRows(plan, buffers, output, rooms, state, rows);
  }
  if (!split) WritePadding(plan, buffers, output);
}

void MergePieces(const AttentionPlan& plan, const AttentionBuffers& buffers, void* shared, int64_t index) {
  const Output output = OutputAt(plan, index);
  const Rooms rooms = TakeRooms(plan);
  const auto piece = [&](int64_t i) { return StateAt(plan, Advance(shared, index * plan.pieces + i, plan.state)); };
  const int64_t rows = FillTable(plan, buffers, output, rooms.table);
  const int64_t lanes = plan.kernel->lanes, sums = SumsRow(plan);
  const float unit = IsGeneral(plan.shape, buffers.bias, buffers.mask) ? static_cast<float>(M_LOG2E) : 1.0f;
  // Neighbours first, so that errors grow with the logarithm of the number of pieces.
  for (int64_t step = 1; step < plan.pieces; step *= 2) {
    for (int64_t i = 0; i + step < plan.pieces; i += 2 * step) {
      const State a = piece(i), b = piece(i + step);
      for (int64_t r = 0; r < rows; ++r) {
        const float top = std::max(a.maxima[r], b.maxima[r]);
        const float by_a = std::exp2((a.maxima[r] - top) * unit), by_b = std::exp2((b.maxima[r] - top) * unit);
        a.maxima[r] = top;
        const auto merge = [&](float* x, const float* y, int64_t n) {
          for (int64_t j = 0; j < n; ++j) x[j] = x[j] * by_a + y[j] * by_b;
        };
        merge(a.totals + r * lanes, b.totals + r * lanes, lanes);
        merge(a.sums + r * sums, b.sums + r * sums, plan.shape.width);
      }
    }
  }
  if (rows > 0) {
    AttentionArgs x = ArgsFor(plan, buffers, output, rooms, piece(0));
    x.count = rows;
    x.finish = 1;
    plan.kernel->fn(&x);
    FinishRows(plan, buffers, output, rooms, piece(0), rows);
  }
  WritePadding(plan, buffers, output);
}

}  // namespace jax_nano
