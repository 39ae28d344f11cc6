#include "run/attention_gradients.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include "plan/registry.h"
#include "run/attention_rows.h"

namespace jax_nano {
namespace {

constexpr int64_t kBlockBytes = 340 << 10;  // of all that a block of keys keeps in L2: packed three times, and sums
constexpr int64_t kMostKeys = 256;          // in a block
constexpr int64_t kChunkRows = 96;          // about so many, in which sums of dk and dv are loaded and stored once
constexpr int64_t kPackedRows = 4 << 20;    // bytes of all rows of an item, if they are to stay packed
constexpr int64_t kItems = 16;              // so many for threads to share, with
constexpr int64_t kPieceKeys = 512;         // no fewer keys in each; but
constexpr int64_t kFewestItems = 8;         // so many in any case, with
constexpr int64_t kFewestPieceKeys = 128;   // no fewer keys than these

enum Step : int64_t { kKeys, kPack, kRows, kWriteQueries, kWriteKeys };

// What is known of a packed chunk of rows.
enum class Chunk : uint8_t { kUnpacked, kPacked, kFinite, kNotFinite };

// One head of keys and values with the queries that share it, and the part of the keys that an item does.
struct Head {
  int64_t batch, kv_head, first_head;
  int64_t queries, keys;  // that the batch's lengths leave
  int64_t begin, end;     // keys of the piece; those beyond `keys` have a part in rows that weigh all keys alone
  bool weighs_all;        // some row does
  float* dq;
  std::vector<Chunk> chunks;  // those of all rows, or one
};

// A thread's workspace, cut up.
struct Rooms {
  char *rows, *kt_pack, *vt_pack, *k_pack, *turned;
  float *scores, *dscores, *dk, *dv, *dq;
  GradientRow* table;
  uint8_t* mask_rows;
};

Rooms TakeRooms(const GradientPlan& plan) {
  Parts parts(Workspace(plan.workspace_bytes()));
  Rooms r;
  r.rows = parts.Next(plan.chunks() * plan.chunk_bytes());
  r.kt_pack = parts.Next(plan.kt_pack);
  r.vt_pack = parts.Next(plan.vt_pack);
  r.k_pack = parts.Next(plan.k_pack);
  r.scores = parts.Next<float>(plan.scores);
  r.dscores = parts.Next<float>(plan.dscores);
  r.turned = parts.Next(plan.turned);
  r.table = parts.Next<GradientRow>(plan.table);
  r.mask_rows = parts.Next<uint8_t>(plan.mask_rows);
  r.dk = parts.Next<float>(plan.dk);
  r.dv = parts.Next<float>(plan.dv);
  r.dq = plan.pieces > 1 ? nullptr : parts.Next<float>(plan.dq);
  return r;
}

// Whether a query weighs the keys that its window or its batch's length excludes: no other one outweighs them
// (FinishRows of attention.cc).
bool WeighsAll(const GradientPlan& plan, float maximum) { return maximum <= plan.shape.attention.masked + kNoWeight; }

// Bytes of a row of a mask for a block of keys, and for the tile behind its last key.
int64_t MaskRowBytes(const GradientPlan& plan) { return WholeLines(plan.block + plan.kernel->nr); }

// Where a chunk's packed rows are.
void SetChunk(const GradientPlan& plan, const Rooms& rooms, int64_t chunk, GradientArgs& x) {
  char* const at = rooms.rows + chunk * plan.chunk_bytes();
  x.q_pack = at;
  x.dout_pack = at + plan.q_pack;
  x.q_panels = at + plan.q_pack + plan.dout_pack;
  x.dout_panels = at + plan.q_pack + plan.dout_pack + plan.q_panels;
}

GradientArgs ArgsFor(const GradientPlan& plan, const Rooms& rooms) {
  const AttentionShape& shape = plan.shape.attention;
  GradientArgs x = {};
  x.rows = rooms.table;
  x.kt_pack = rooms.kt_pack;
  x.vt_pack = rooms.vt_pack;
  x.k_pack = rooms.k_pack;
  x.weights = rooms.scores;
  x.dscores = rooms.dscores;
  x.turned = rooms.turned;
  SetOperands(shape, x);
  x.scale = shape.scale;
  x.scale2 = shape.scale * M_LOG2E;
  x.masked = shape.masked;
  x.cso = shape.out[3];
  x.rs_scores = plan.rs_scores;
  x.rs_dq = plan.rs_dq;
  x.rs_dk = plan.rs_dq;
  x.rs_dv = plan.rs_dv;
  return x;
}

// Writes `rows` rows of sums, times `scale`.
void Write(const GradientPlan& plan, Step step, const float* sums, int64_t rs_sums, void* out, int64_t rs_out,
           int64_t rows, int64_t elements, double scale) {
  GradientArgs x = {};
  x.step = step;
  x.dq = const_cast<float*>(sums);
  x.rs_dq = rs_sums;
  x.out = out;
  x.rs_out = rs_out;
  x.count = rows;
  x.depth = elements;
  x.scale = scale;
  plan.kernel->gradients(&x);
}

// Rows first <= r < end of dq from their sums; those of positions behind the length of the batch are zero.
void WriteQueries(const GradientPlan& plan, const GradientBuffers& buffers, int64_t batch, int64_t kv_head,
                  const float* dq, int64_t first, int64_t end) {
  const AttentionShape& shape = plan.shape.attention;
  const int64_t length = Length(buffers.q_lengths, batch, shape.queries) * plan.group;
  for (int64_t r = first; r < end;) {
    const int64_t t = r / plan.group, g = r % plan.group;
    // Rows that lie equally far apart: a position's, or one of each position, or all.
    const bool regular = plan.group == 1 || shape.kv_heads == 1;
    const int64_t pitch = plan.group == 1 ? shape.heads * shape.depth : shape.depth;
    const bool present = r < length;
    const int64_t stop = std::min(present ? std::min(length, end) : end, regular ? end : (t + 1) * plan.group);
    const int64_t n = kv_head * plan.group + g;
    void* const out = Advance(buffers.dq, StatisticAt(shape, batch, t, n) * shape.depth, plan.q_bytes);
    if (present) {
      Write(plan, kWriteQueries, dq + r * plan.rs_dq, plan.rs_dq, out, pitch, stop - r, shape.depth, shape.scale);
    } else {
      for (int64_t i = 0; i < stop - r; ++i) {
        std::memset(Advance(out, i * pitch, plan.q_bytes), 0, static_cast<size_t>(shape.depth * plan.q_bytes));
      }
    }
    r = stop;
  }
}

// What rows of a table see of a block of keys.
struct Seen {
  bool any = false, all = true;
};

// A mask of a row for a block of keys, in `memory`, that excludes what the window and the length exclude too; its
// address is that of key 0.
const void* MaskOfAll(const GradientRow& row, const Window& window, int64_t block_begin, int64_t block_end,
                      uint8_t* memory) {
  for (int64_t s = block_begin; s < block_end; ++s) {
    const bool taken = row.mask == nullptr || static_cast<const uint8_t*>(row.mask)[s] != 0;
    memory[s - block_begin] = taken && s >= window.lo && s < window.hi;
  }
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(memory) - static_cast<uintptr_t>(block_begin));
}

// The table of rows first <= r < first + count.
Seen FillTable(const GradientPlan& plan, const GradientBuffers& buffers, const Head& head, int64_t first, int64_t count,
               int64_t block_begin, int64_t block_end, const Rooms& rooms) {
  const bool general = IsGeneral(plan.shape.attention, buffers.bias, buffers.mask);
  const AttentionShape& shape = plan.shape.attention;
  Seen seen;
  int64_t t = first / plan.group, g = first % plan.group;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = head.first_head + g, statistic = StatisticAt(shape, head.batch, t, n);
    GradientRow& row = rooms.table[i];
    row.q = RowAt(buffers.q, shape.q, head.batch, t, n, plan.q_bytes);
    row.dout = RowAt(buffers.dout, shape.out, head.batch, t, n, plan.q_bytes);
    row.bias = OfScores(buffers.bias, shape.bias, head.batch, t, n);
    row.mask = OfScores(buffers.mask, shape.mask, head.batch, t, n);
    row.dbias = nullptr;
    if (buffers.dbias != nullptr) {
      const auto& sizes = plan.shape.dbias_sizes;
      const int64_t b = sizes[0] > 1 ? head.batch : 0, h = sizes[1] > 1 ? n : 0, q = sizes[2] > 1 ? t : 0;
      row.dbias = buffers.dbias + ((b * sizes[1] + h) * sizes[2] + q) * shape.keys;
    }
    const Window window = WindowAt(shape, t, head.keys);
    row.lo = window.lo;
    row.hi = window.hi;
    const double maximum = buffers.maxima[statistic], log = buffers.logs[statistic];
    const bool excluded = window.lo > 0 || window.hi < shape.keys;
    if (excluded && WeighsAll(plan, buffers.maxima[statistic])) {
      row.mask = MaskOfAll(row, window, block_begin, block_end, rooms.mask_rows + i * MaskRowBytes(plan));
      row.lo = 0;
      row.hi = shape.keys;
    } else if (!general && IsCoarse(maximum)) {
      // A mask of what the row sees has its scores rounded as in the forward half, which computed it so.
      row.mask = MaskOfAll(row, window, block_begin, block_end, rooms.mask_rows + i * MaskRowBytes(plan));
    }
    row.maximum = maximum;
    row.log = log * M_LOG2E;
    if (!general && row.mask == nullptr) {
      const double in_base_2 = maximum * M_LOG2E;
      row.maximum = static_cast<float>(in_base_2);
      row.log += in_base_2 - row.maximum;
    }
    row.delta = buffers.delta[statistic];
    const int64_t lo = std::max(row.lo, block_begin), hi = std::min(row.hi, block_end);
    seen.any |= lo < hi;
    seen.all &= lo == block_begin && hi == block_end;
    if (++g == plan.group) {
      g = 0;
      ++t;
    }
  }
  return seen;
}

// Whether elements of 2 or 4 bytes hold no Inf and no NaN.
template <typename Bits>
bool AllFinite(const void* x, int64_t count, int64_t stride, Bits exponent) {
  const Bits* const p = static_cast<const Bits*>(x);
  Bits found = 0;
  const auto is_other = [exponent](Bits bits) {
    return static_cast<Bits>((bits & exponent) == exponent ? ~Bits{0} : 0);
  };
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) found |= is_other(p[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) found |= is_other(p[i * stride]);
  }
  return found == 0;
}

bool AllFinite(const char* dtype, const void* x, int64_t count, int64_t stride) {
  const std::string_view name = dtype;
  if (name == "float32") return AllFinite<uint32_t>(x, count, stride, 0x7f800000u);
  return AllFinite<uint16_t>(x, count, stride, name == "bfloat16" ? 0x7f80 : 0x7c00);
}

// Whether all that meets in the products of some rows and a block of keys is finite. If not, a row's zeros for keys
// that it does not see would become NaN.
bool RowsAreFinite(const GradientPlan& plan, const GradientArgs& x) {
  const AttentionShape& shape = plan.shape.attention;
  for (int64_t i = 0; i < x.count; ++i) {
    if (!AllFinite(plan.kernel->q, x.rows[i].q, shape.depth, shape.q[3]) ||
        !AllFinite(plan.kernel->q, x.rows[i].dout, shape.width, shape.out[3])) {
      return false;
    }
  }
  return true;
}

bool KeysAreFinite(const GradientPlan& plan, const GradientArgs& x) {
  const AttentionShape& shape = plan.shape.attention;
  for (int64_t s = 0; s < x.cols; ++s) {
    if (!AllFinite(plan.kernel->kv, Advance(x.k, s * x.rsk, plan.kv_bytes), shape.depth, x.csk) ||
        !AllFinite(plan.kernel->kv, Advance(x.v, s * x.rsv, plan.kv_bytes), shape.width, x.csv)) {
      return false;
    }
  }
  return true;
}

// A block of keys s0 <= s < s0 + cols, whose sums of dk and dv begin at row `first` of a larger block's.
GradientArgs BlockArgs(const GradientPlan& plan, const GradientBuffers& buffers, const Head& head, const Rooms& rooms,
                       int64_t s0, int64_t cols, int64_t first) {
  const AttentionShape& shape = plan.shape.attention;
  GradientArgs x = ArgsFor(plan, rooms);
  x.k = Advance(buffers.k, head.batch * shape.k[0] + s0 * shape.k[1] + head.kv_head * shape.k[2], plan.kv_bytes);
  x.v = Advance(buffers.v, head.batch * shape.v[0] + s0 * shape.v[1] + head.kv_head * shape.v[2], plan.kv_bytes);
  x.s0 = s0;
  x.cols = cols;
  x.dk = rooms.dk + first * x.rs_dk;
  x.dv = rooms.dv + first * x.rs_dv;
  return x;
}

void Run(const GradientPlan& plan, GradientArgs& x, Step step) {
  x.step = step;
  plan.kernel->gradients(&x);
}

// The rows of a chunk one by one, each with the keys that it sees and no others. Zeros for those behind the last one,
// which fill up a tile, would leave NaN in sums of keys that others see: these are kept aside.
void RunRowsAlone(const GradientPlan& plan, const GradientBuffers& buffers, const Head& head, const Rooms& rooms,
                  const GradientArgs& chunk) {
  for (int64_t i = 0; i < chunk.count; ++i) {
    const GradientRow& row = rooms.table[i];
    const int64_t begin = std::max(row.lo, chunk.s0), end = std::min(row.hi, chunk.s0 + chunk.cols);
    if (begin >= end) continue;
    GradientArgs x = BlockArgs(plan, buffers, head, rooms, begin, end - begin, begin - chunk.s0);
    x.rows = &row;
    x.count = 1;
    x.dq = chunk.dq + i * x.rs_dq;
    x.general = chunk.general;
    float *const dk = x.dk + x.cols * x.rs_dk, *const dv = x.dv + x.cols * x.rs_dv;
    const std::vector<float> kept_dk(dk, dk + plan.kernel->mr * x.rs_dk), kept_dv(dv, dv + plan.kernel->mr * x.rs_dv);
    SetChunk(plan, rooms, plan.chunks() - 1, x);
    Run(plan, x, kKeys);
    Run(plan, x, kPack);
    Run(plan, x, kRows);
    std::copy(kept_dk.begin(), kept_dk.end(), dk);
    std::copy(kept_dv.begin(), kept_dv.end(), dv);
  }
}

// dk and dv of a block of keys, and its part of dq.
void RunBlock(const GradientPlan& plan, const GradientBuffers& buffers, Head& head, const Rooms& rooms, int64_t s0,
              int64_t cols) {
  const AttentionShape& shape = plan.shape.attention;
  GradientArgs x = BlockArgs(plan, buffers, head, rooms, s0, cols, 0);
  std::memset(rooms.dk, 0, static_cast<size_t>(cols * x.rs_dk) * sizeof(float));
  std::memset(rooms.dv, 0, static_cast<size_t>(cols * x.rs_dv) * sizeof(float));
  // Positions that may see one of the keys.
  int64_t first = std::max<int64_t>(0, s0 - shape.right), last = std::min(head.queries, s0 + cols + shape.left);
  if (s0 >= head.keys) last = first;
  if (head.weighs_all) {
    first = 0;
    last = head.queries;
  }
  bool packed = false;
  std::optional<bool> keys_are_finite;
  const int64_t rows = head.queries * plan.group;
  for (int64_t r = first * plan.group / plan.chunk * plan.chunk; r < last * plan.group; r += plan.chunk) {
    x.count = std::min(plan.chunk, rows - r);
    x.dq = head.dq + r * x.rs_dq;
    const Seen seen = FillTable(plan, buffers, head, r, x.count, s0, s0 + cols, rooms);
    if (!seen.any) continue;
    x.general = IsGeneral(shape, buffers.bias, buffers.mask);
    const int64_t index = plan.packs_once ? r / plan.chunk : 0;
    Chunk& chunk = head.chunks[static_cast<size_t>(index)];
    SetChunk(plan, rooms, index, x);
    if (!plan.packs_once || chunk == Chunk::kUnpacked) {
      Run(plan, x, kPack);
      chunk = Chunk::kPacked;
    }
    if (!packed) Run(plan, x, kKeys);
    packed = true;
    if (!seen.all) {
      // Right behind their packing, while they are in a cache.
      if (!keys_are_finite) keys_are_finite = KeysAreFinite(plan, x);
      if (chunk == Chunk::kPacked) chunk = RowsAreFinite(plan, x) ? Chunk::kFinite : Chunk::kNotFinite;
      if (!*keys_are_finite || chunk == Chunk::kNotFinite) {
        RunRowsAlone(plan, buffers, head, rooms, x);
        packed = false;
        continue;
      }
    }
    Run(plan, x, kRows);
  }
  const int64_t key = (head.batch * shape.keys + s0) * shape.kv_heads + head.kv_head;
  Write(plan, kWriteKeys, rooms.dk, x.rs_dk, Advance(buffers.dk, key * shape.depth, plan.kv_bytes),
        shape.kv_heads * shape.depth, cols, shape.depth, shape.scale);
  Write(plan, kWriteKeys, rooms.dv, x.rs_dv, Advance(buffers.dv, key * shape.width, plan.kv_bytes),
        shape.kv_heads * shape.width, cols, shape.width, 1);
}

bool AnyWeighsAll(const GradientPlan& plan, const GradientBuffers& buffers, const Head& head) {
  const auto weighs_all = [&](float maximum) { return WeighsAll(plan, maximum); };
  for (int64_t t = 0; t < head.queries; ++t) {
    const float* const maxima = buffers.maxima + StatisticAt(plan.shape.attention, head.batch, t, head.first_head);
    if (std::any_of(maxima, maxima + plan.group, weighs_all)) return true;
  }
  return false;
}

float* PieceOf(const GradientPlan& plan, void* shared, int64_t batch, int64_t kv_head, int64_t piece) {
  const int64_t index = (batch * plan.shape.attention.kv_heads + kv_head) * plan.pieces + piece;
  return static_cast<float*>(Advance(shared, index * plan.dq, 1));
}

// Zeros in the piece's keys of all rows of a bias' gradient that an item adds to.
void ClearBias(const GradientPlan& plan, const GradientBuffers& buffers, int64_t batch, int64_t kv_head, int64_t begin,
               int64_t end) {
  const auto& sizes = plan.shape.dbias_sizes;
  const int64_t heads = sizes[1] > 1 ? plan.group : 1, first = sizes[1] > 1 ? kv_head * plan.group : 0;
  for (int64_t r = 0; r < heads * sizes[2]; ++r) {
    float* const row = buffers.dbias + ((batch * sizes[1] + first) * sizes[2] + r) * plan.shape.attention.keys;
    std::fill(row + begin, row + end, 0.0f);
  }
}

}  // namespace

GradientPlan PlanGradients(const AttentionInfo* kernel, const GradientShape& given) {
  if (kernel == nullptr) throw std::invalid_argument("jax_nano attention: no kernel for these dtypes");
  const AttentionShape& shape = given.attention;
  GradientPlan p = {};
  p.kernel = kernel;
  p.shape = given;
  p.q_bytes = ElementBytes(kernel->q);
  p.kv_bytes = ElementBytes(kernel->kv);
  p.group = shape.heads / shape.kv_heads;
  p.rs_dq = RoundUp(shape.depth, kernel->nr);
  p.rs_dv = RoundUp(shape.width, kernel->nr);

  const int64_t unit = kernel->unit, packed = kernel->pack_bytes;
  const int64_t key_bytes = (2 * RoundUp(shape.depth, kernel->kr) + RoundUp(shape.width, kernel->kr)) * packed +
                            (p.rs_dq + p.rs_dv) * static_cast<int64_t>(sizeof(float));
  p.block = BlockOfKeys(kBlockBytes, key_bytes, unit, kMostKeys, shape.keys);
  // Whole tiles, and whole steps of what takes several rows at once.
  p.chunk = std::min(RoundUp(kChunkRows, kernel->mr), RoundUp(p.rows(), kernel->mr));

  p.pieces = 1;
  const int64_t heads = p.items();
  p.pieces = std::clamp<int64_t>(CeilDiv(kItems, heads), 1, std::max<int64_t>(1, shape.keys / kPieceKeys));
  if (heads * p.pieces < kFewestItems) {
    p.pieces = std::clamp<int64_t>(CeilDiv(kFewestItems, heads), 1,
                                   std::max<int64_t>(p.pieces, shape.keys / kFewestPieceKeys));
  }
  p.piece = RoundUp(CeilDiv(shape.keys, p.pieces), unit);
  p.pieces = CeilDiv(shape.keys, p.piece);
  p.block = std::min(p.block, p.piece);
  // Blocks of about the same size: a small last one is packed for little.
  p.block = RoundUp(CeilDiv(p.piece, CeilDiv(p.piece, p.block)), unit);

  const int64_t rows = RoundUp(p.chunk, kernel->mr), keys = RoundUp(p.block, kernel->nr);
  const auto panels = [&](int64_t k, int64_t cols) {
    return WholeLines(RoundUp(cols, kernel->nr) * RoundUp(k, kernel->kr) * packed) + kPackSlackBytes;
  };
  // A tile of keys more than there are is read, as zeros.
  p.rs_scores = ScoresRow(keys + kernel->nr);
  p.packs_once =
      p.rows() * (PackedRowBytes(*kernel, shape.depth) + PackedRowBytes(*kernel, shape.width)) <= kPackedRows;
  p.q_pack = rows * PackedRowBytes(*kernel, shape.depth) + kPackSlackBytes;
  p.dout_pack = rows * PackedRowBytes(*kernel, shape.width) + kPackSlackBytes;
  if (kernel->converts) {
    p.q_panels = panels(p.chunk, shape.depth);
    p.dout_panels = panels(p.chunk, shape.width);
    p.turned = std::max(RoundUp(keys + kernel->mr, kernel->mr) * PackedRowBytes(*kernel, p.chunk),
                        kernel->mr * PackedRowBytes(*kernel, p.block)) +
               kPackSlackBytes;
  }
  p.kt_pack = panels(shape.depth, p.block);
  p.vt_pack = panels(shape.width, p.block);
  p.k_pack = panels(p.block, shape.depth);
  p.scores = p.dscores = WholeLines(rows * p.rs_scores * 4);
  p.table = WholeLines(p.chunk * static_cast<int64_t>(sizeof(GradientRow)));
  p.mask_rows = p.chunk * MaskRowBytes(p);
  p.dk = WholeLines((keys + kernel->mr) * p.rs_dq * 4);
  p.dv = WholeLines((keys + kernel->mr) * p.rs_dv * 4);
  p.dq = WholeLines(RoundUp(p.rows(), kernel->mr) * p.rs_dq * 4);

  const double scores = static_cast<double>(shape.batch * shape.heads) * static_cast<double>(shape.queries) *
                        static_cast<double>(shape.keys);
  const double products = scores * static_cast<double>(3 * shape.depth + 2 * shape.width);
  p.expected = std::chrono::nanoseconds(static_cast<int64_t>(products / 16) + 1000);
  const double sums = static_cast<double>(p.heads() * p.pieces * p.rows() * p.rs_dq);
  p.merging = std::chrono::nanoseconds(static_cast<int64_t>(sums / 2) + 1000);
  return p;
}

void RunGradientItem(const GradientPlan& plan, const GradientBuffers& buffers, void* shared, int64_t item) {
  const AttentionShape& shape = plan.shape.attention;
  const int64_t piece = item % plan.pieces, of = item / plan.pieces;
  const int64_t batch = of / plan.item_heads(), kv_head = of % plan.item_heads();
  const int64_t batches = plan.shares_batches() ? shape.batch : 1, heads = plan.shares_heads() ? shape.kv_heads : 1;
  const Rooms rooms = TakeRooms(plan);
  Head head = {};
  head.begin = piece * plan.piece;
  head.end = std::min(shape.keys, head.begin + plan.piece);
  if (buffers.dbias != nullptr) ClearBias(plan, buffers, batch, kv_head, head.begin, head.end);
  for (head.batch = batch; head.batch < batch + batches; ++head.batch) {
    for (head.kv_head = kv_head; head.kv_head < kv_head + heads; ++head.kv_head) {
      head.first_head = head.kv_head * plan.group;
      head.queries = Length(buffers.q_lengths, head.batch, shape.queries);
      head.keys = Length(buffers.kv_lengths, head.batch, shape.keys);
      head.weighs_all = AnyWeighsAll(plan, buffers, head);
      head.chunks.assign(static_cast<size_t>(plan.chunks() - 1), Chunk::kUnpacked);
      head.dq = plan.pieces > 1 ? PieceOf(plan, shared, head.batch, head.kv_head, piece) : rooms.dq;
      std::memset(head.dq, 0, static_cast<size_t>(plan.dq));
      for (int64_t s0 = head.begin; s0 < head.end; s0 += plan.block) {
        RunBlock(plan, buffers, head, rooms, s0, std::min(plan.block, head.end - s0));
      }
      if (plan.pieces == 1) WriteQueries(plan, buffers, head.batch, head.kv_head, head.dq, 0, plan.rows());
    }
  }
}

void MergeGradients(const GradientPlan& plan, const GradientBuffers& buffers, void* shared, int64_t merge) {
  const int64_t parts = CeilDiv(plan.rows(), GradientPlan::kMergedRows);
  const int64_t head = merge / parts, first = merge % parts * GradientPlan::kMergedRows;
  const int64_t batch = head / plan.shape.attention.kv_heads, kv_head = head % plan.shape.attention.kv_heads;
  const int64_t end = std::min(first + GradientPlan::kMergedRows, plan.rows());
  // Neighbours first, so that errors grow with the logarithm of the number of pieces.
  for (int64_t step = 1; step < plan.pieces; step *= 2) {
    for (int64_t i = 0; i + step < plan.pieces; i += 2 * step) {
      float* const a = PieceOf(plan, shared, batch, kv_head, i);
      const float* const b = PieceOf(plan, shared, batch, kv_head, i + step);
      for (int64_t j = first * plan.rs_dq; j < end * plan.rs_dq; ++j) a[j] += b[j];
    }
  }
  WriteQueries(plan, buffers, batch, kv_head, PieceOf(plan, shared, batch, kv_head, 0), first, end);
}

}  // namespace jax_nano
