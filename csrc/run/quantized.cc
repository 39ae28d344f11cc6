#include "run/quantized.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "plan/arithmetic.h"
#include "plan/policy.h"
#include "plan/registry.h"
#include "plan/schedule.h"

#define JAX_NANO_QUANTIZED(symbol, ...) extern "C" void symbol(const jax_nano::QuantizedArgs*);
#include "quantized.inc"
#undef JAX_NANO_QUANTIZED

namespace jax_nano {
namespace {

constexpr QuantizedInfo kKernels[] = {
#define JAX_NANO_QUANTIZED(symbol, ...) {__VA_ARGS__, &symbol},
#include "quantized.inc"
#undef JAX_NANO_QUANTIZED
    {},
};

// What decides the order of sums, so results' bits.
constexpr int64_t kRowsAtOnce = 4;               // of the kernels that read weights where they lie
constexpr int64_t kFewRows = 16;                 // beyond, making float32 of the weights pays: four passes cost as much
constexpr int64_t kFewRowsInFloat32 = 6;         // of those whose products of many rows are of bfloat16
constexpr int64_t kCallK = 512;                  // values of k that columns are summed over at once
constexpr int64_t kMaxXBytes = 4 << 20;          // of x in workspace
constexpr int64_t kBlockK = 256, kBlockN = 256;  // of weights as float32: half of a small L2
// Parts of k, each summed separately. Rows of weights are read whole then, one after the other, also by several
// threads; and where columns are few, there is work for more of them.
constexpr int64_t kParts = 4, kMostParts = 8;
constexpr int64_t kPartBytes = 256 << 10, kWholeBytes = 128 << 10;  // of weights, at least, in a part: of few columns,
                                                                    // or for the sake of whole rows
constexpr int64_t kPartK = 128;                                     // of k, at least, that parts are multiples of
constexpr int64_t kMaxSliceBytes = 4 << 20;                         // of the sums of all parts

constexpr int64_t kUnit = 128;               // a multiple of every kernel's register of weights
constexpr int64_t kColumnsAlongK = 4;        // that are read side by side
constexpr int64_t kSums = 16384;             // of few rows: in L2, for rows of weights that are read whole
constexpr int64_t kMostColumns = 16384;      // along k: of sums in workspace
constexpr int64_t kReusedBytes = 128 << 10;  // of weights that several calls read stay in L2
constexpr int64_t kItemBytes = 128 << 10;    // of weights, at least, for a work item of few rows
constexpr int64_t kLine = 16;                // elements; an odd number of lines between rows, not all in one set
constexpr int64_t kLineBytes = 64;
constexpr int64_t kMaxItemRows = 1024;   // whose unfinished results are in workspace
constexpr int64_t kMaxScaledRows = 256;  // the same of sums that are scaled group by group, and stay in L2
constexpr double kBytesPerNs = 8, kFlopsPerNs = 60;

[[noreturn]] void Refuse(const std::string& what) { throw std::invalid_argument("jax_nano quantized: " + what); }

int64_t RowNumber(std::string_view dtype, bool is_zero) {
  for (size_t i = 0; i < std::size(kQuantizedRows); ++i) {
    const bool for_zero = kQuantizedRows[i] == "int8" || kQuantizedRows[i] == "uint8";
    if (kQuantizedRows[i] == dtype && for_zero == is_zero) return static_cast<int64_t>(i);
  }
  Refuse("no kernel takes " + std::string(dtype));
}

const Weight& WeightNamed(std::string_view name) {
  for (const Weight& w : kWeights) {
    if (w.name == name) return w;
  }
  Refuse("no kernel takes weights of " + std::string(name));
}

// `pairs`: whether one will do that takes pairs of bfloat16.
const QuantizedInfo& Select(std::span<const Target* const> targets, std::string_view form, bool pairs = false) {
  for (const Target* target : targets) {
    for (const QuantizedInfo& k : QuantizedKernels()) {
      if (k.pairs > int32_t{pairs}) continue;
      if (k.form == form && target->name == std::string_view(k.target)) return k;
    }
  }
  Refuse("this CPU runs no kernel");
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `i` of `parts` of [0, total), cut at multiples of `unit`.
Range Part(int64_t total, int64_t unit, int64_t parts, int64_t i) {
  const int64_t units = CeilDiv(total, unit);
  const auto edge = [&](int64_t j) { return std::min(total, units * j / parts * unit); };
  return {edge(i), edge(i + 1)};
}

const void* Advance(const void* p, int64_t bytes) { return p == nullptr ? p : static_cast<const char*>(p) + bytes; }
void* Advance(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

bool IsTask(const QuantizedArgs& args, QuantizedTask task) { return args.task == static_cast<int64_t>(task); }

bool IsInteger(const Weight& weight) { return !weight.form.starts_with('f'); }

// Whether the kernels for few rows take these sizes: masked vectors of weights end at words of 32 bits, and a register
// of weights along K holds whole groups, or a group whole registers.
bool ReadsInPlace(const QuantizedShape& shape, const QuantizedInfo& kernel, const Weight& weight, int64_t rows) {
  if (shape.m > rows) return false;
  if (!shape.along_k) return shape.n % kQuantizedGroup == 0;
  if (RoundUp(shape.k, kUnit) * (kFewRows + 1) * 4 > kMaxXBytes) return false;
  const bool parts = IsInteger(weight) && kernel.block % shape.group == 0 && shape.group * weight.bits >= 128;
  return shape.k % kQuantizedGroup == 0 && (shape.group == shape.k || shape.group % kernel.block == 0 || parts);
}

// How many parts `units` are cut into: as many as wanted, or a few more if only they are equal. With 6 units in 4 parts
// one of two threads had 4 of them.
int64_t EqualParts(int64_t units, int64_t wanted) {
  const int64_t parts = std::clamp<int64_t>(wanted, 1, units);
  for (int64_t more = parts; parts > 1 && more <= std::min(kMostParts, units); ++more) {
    if (units % more == 0) return more;
  }
  return parts;
}

void PlanFew(QuantizedPlan& plan, int64_t threads) {
  const QuantizedArgs& args = plan.args;
  const bool along_k = IsTask(args, QuantizedTask::kInner), again = args.m > kRowsAtOnce;
  const int64_t bytes = args.n * args.k * plan.bits / 8;
  plan.n_unit = along_k ? kColumnsAlongK : kUnit;
  const int64_t units = CeilDiv(args.n, plan.n_unit);
  if (along_k) {
    plan.call_k = plan.k_unit = args.k;
    const int64_t reused = kReusedBytes * 8 / (args.k * plan.bits) / kUnit * kUnit;
    plan.call_n = again ? std::max(kUnit, reused) : kMostColumns;
  } else {
    plan.call_k = args.group < kCallK ? kCallK / args.group * args.group : kCallK;
    plan.k_unit = args.group > plan.call_k ? kPartK : CeilDiv(kPartK, args.group) * args.group;
    const int64_t reused = kReusedBytes * 8 / (plan.call_k * plan.bits) / kUnit * kUnit;
    plan.call_n = std::max(kUnit, again ? reused : kSums / args.m / kUnit * kUnit);
    int64_t parts = std::max(std::min(bytes / kPartBytes, kMostParts / units), std::min(bytes / kWholeBytes, kParts));
    parts = std::min(parts, kMaxSliceBytes / plan.slice_bytes());
    plan.k_parts = EqualParts(CeilDiv(args.k, plan.k_unit), parts);
  }
  const int64_t wanted = CeilDiv(2 * threads, plan.k_parts);
  plan.n_parts = threads == 1 ? 1 : std::clamp<int64_t>(std::min(bytes / kItemBytes, wanted), 1, units);
  plan.expected = std::chrono::nanoseconds(static_cast<int64_t>(Real(bytes) / kBytesPerNs));
}

// Whether bfloat16 holds every q - zero: 8 bits of an integer, and the sign.
bool AreExactInBfloat16(const QuantizedShape& shape) {
  if (shape.zero.empty()) return true;
  return shape.zero == "int8" ? shape.q != "uint8" : shape.q == "uint8" || shape.q == "uint4";
}

// The kernel that multiplies weights as bfloat16 by bfloat16 x faster than float32; null: there is none.
const KernelInfo* Bfloat16Kernel(const QuantizedShape& shape, std::span<const Target* const> targets) {
  if (shape.x != "bfloat16" || !AreExactInBfloat16(shape)) return nullptr;
  const KernelInfo* const kernel = SelectKernel(targets, "bfloat16", "bfloat16", "float32", "default");
  return kernel != nullptr && kernel->kr > 1 ? kernel : nullptr;
}

void PlanMany(QuantizedPlan& plan, const QuantizedShape& shape, std::span<const Target* const> targets, int64_t threads,
              const Machine& machine) {
  plan.gemm = Bfloat16Kernel(shape, targets);
  plan.scales_sums = plan.gemm != nullptr;
  if (!plan.scales_sums) plan.gemm = SelectKernel(targets, shape.x, "float32", "float32", "default");
  if (plan.gemm == nullptr) Refuse("no kernel multiplies " + std::string(shape.x) + " with float32");
  const KernelInfo& kernel = *plan.gemm;
  plan.block_k = std::min(RoundUp(shape.k, kQuantizedGroup), kBlockK);
  plan.block_n = std::min(RoundUp(shape.n, kernel.nr), RoundUp(kBlockN, kernel.nr));
  plan.ld = (RoundUp(shape.along_k ? plan.block_k : plan.block_n, kLine) / kLine | 1) * kLine;

  plan.n_unit = plan.block_n;
  const int64_t n_units = CeilDiv(shape.n, plan.n_unit);
  plan.n_parts = std::min(n_units, 2 * threads);
  const int64_t most = CeilDiv(shape.m, 4 * kernel.mr);  // the weights are made once for each part of rows
  const int64_t wanted = threads == 1 ? 1 : CeilDiv(2 * threads, plan.n_parts);
  const bool by_group = plan.scales_sums && shape.group < shape.k;
  plan.m_parts = std::max(std::min(most, wanted), CeilDiv(shape.m, by_group ? kMaxScaledRows : kMaxItemRows));
  const int64_t item_m = std::min(CeilDiv(CeilDiv(shape.m, kernel.mr), plan.m_parts) * kernel.mr, shape.m);

  Product product;
  product.m = item_m;
  product.n = plan.block_n;
  product.k = by_group ? std::min(shape.group, plan.block_k) : plan.block_k;
  product.rsa = shape.k;
  product.rsb = shape.along_k ? 1 : plan.ld;
  product.csb = shape.along_k ? plan.ld : 1;
  product.rsc = plan.block_n;
  product.accumulates = product.unfinished = (by_group ? shape.group : shape.k) > plan.block_k;
  product.rs_partial = plan.block_n;
  const Schedule depth = ChooseDepth(kernel, product, machine.profile);
  Schedule schedule = ChooseBlocks(depth, kernel, product, item_m, plan.block_n, machine);
  // The last block of k may be one that the kernel cannot read where it lies; or a part of a group in a block.
  Product last = product;
  last.k = by_group ? shape.group : shape.k - (CeilDiv(shape.k, plan.block_k) - 1) * plan.block_k;
  if (!ReadsA(kernel, last)) std::get<Blocked>(schedule).pack_a = true;
  if (const std::string why = Validate(schedule, kernel, product); !why.empty()) {
    throw std::logic_error("jax_nano quantized: " + why);
  }
  plan.block = Arguments(schedule, product);
  plan.a_pack_bytes = PackedABytes(schedule, kernel, product);
  plan.b_pack_bytes = PackedBBytes(schedule, kernel, product);
  plan.partial_bytes = kernel.narrow_out ? PartialBytes(kernel, RoundUp(item_m, kernel.mr), plan.block_n) : 0;
  const double flops = 2 * Real(shape.m) * Real(shape.n) * Real(shape.k);
  plan.expected = std::chrono::nanoseconds(static_cast<int64_t>(flops / kFlopsPerNs));
}

// Carves workspace.
class Room {
 public:
  explicit Room(void* memory) : at_(static_cast<char*>(memory)) {}
  void* Take(int64_t bytes) {
    void* const p = at_;
    at_ += RoundUp(bytes, 64);
    return p;
  }

 private:
  char* at_;
};

// Finished sums as `m` x `n` results from row and column `at_m`, `at_n` on.
void Finish(const QuantizedPlan& plan, const QuantizedBuffers& buffers, const void* y, int64_t rs_y, int64_t at_m,
            int64_t at_n, int64_t m, int64_t n) {
  QuantizedArgs x = plan.args;
  x.task = static_cast<int64_t>(QuantizedTask::kFinish);
  x.m = m;
  x.n = n;
  x.y = const_cast<void*>(y);
  x.nc = rs_y;
  x.out = Advance(buffers.out, (at_m * x.rs_out + at_n) * plan.out_bytes);
  Epilogue epilogue;
  if (buffers.epilogue != nullptr) {
    epilogue = *buffers.epilogue;
    epilogue.bias = Advance(epilogue.bias, at_n * plan.out_bytes);
    x.epilogue = &epilogue;
  }
  plan.finish->fn(&x);
}

int64_t SliceRow(const QuantizedPlan& plan) { return RoundUp(plan.args.n, kUnit); }

// As equal as they can be.
Range RowsAtOnce(int64_t m, int64_t i) {
  const int64_t chunks = CeilDiv(m, kRowsAtOnce);
  return {m * i / chunks, m * (i + 1) / chunks};
}

// Columns n of the sums over k of a few rows, whose columns lie side by side.
void SumColumns(const QuantizedPlan& plan, const QuantizedBuffers& buffers, QuantizedArgs args, Range n, Range k) {
  for (int64_t at = k.begin, end; at < k.end; at = end) {
    end = std::min(k.end, at + plan.call_k);
    if (plan.args.group > plan.call_k) end = std::min(end, (at / plan.args.group + 1) * plan.args.group);
    QuantizedArgs x = args;
    x.n = n.size();
    x.k = end - at;
    x.group = std::min(plan.args.group, x.k);
    x.q = Advance(buffers.q, at * x.rsq + n.begin * plan.bits / 8);
    x.scale = Advance(buffers.scale, (at / plan.args.group * x.rs_scale + n.begin) * plan.scale_bytes);
    x.zero = Advance(buffers.zero, (at / plan.args.group * x.rs_zero + n.begin) * plan.zero_bytes);
    for (int64_t i = 0; i < CeilDiv(args.m, kRowsAtOnce); ++i) {
      const Range rows = RowsAtOnce(args.m, i);
      x.m = rows.size();
      x.x = Advance(buffers.x, (rows.begin * x.rsx + at) * plan.x_bytes);
      x.y = Advance(args.y, rows.begin * x.nc * 4);
      plan.kernel->fn(&x);
    }
  }
}

// The same of weights along K.
void SumAlongK(const QuantizedPlan& plan, const QuantizedBuffers& buffers, const QuantizedArgs& args, Range n) {
  QuantizedArgs x = args;
  x.n = n.size();
  x.q = Advance(buffers.q, n.begin * x.rsq);
  x.scale = Advance(buffers.scale, n.begin * x.rs_scale * plan.scale_bytes);
  x.zero = Advance(buffers.zero, n.begin * x.rs_zero * plan.zero_bytes);
  for (int64_t i = 0; i < CeilDiv(args.m, kRowsAtOnce); ++i) {
    const Range rows = RowsAtOnce(args.m, i);
    x.m = rows.size();
    x.x = Advance(buffers.x, rows.begin * x.rsx * plan.x_bytes);
    x.x_pack = Advance(args.x_pack, rows.begin * RoundUp(x.k, kUnit) * 4);
    x.y = Advance(args.y, rows.begin * x.nc * 4);
    // It copies a row through the room behind its last one, where the next rows go afterwards.
    plan.kernel->fn(&x);
  }
}

void RunFew(const QuantizedPlan& plan, const QuantizedBuffers& buffers, void* slice, Range n, Range k) {
  QuantizedArgs args = plan.args;
  const bool along_k = IsTask(args, QuantizedTask::kInner);
  const int64_t rows = std::min(args.m, kRowsAtOnce), groups = CeilDiv(args.k, args.group);
  const int64_t width = RoundUp(std::min(n.size() + kColumnsAlongK, plan.call_n + kColumnsAlongK), kUnit);
  const int64_t x_bytes = (along_k ? args.m + 1 : rows + 1) * RoundUp(along_k ? args.k : plan.call_k, kUnit) * 4;
  const int64_t sums_bytes = std::max<int64_t>(along_k ? 0 : rows * width, 512) * 4;
  const int64_t y_bytes = slice == nullptr ? args.m * width * 4 : 0;
  const int64_t line_bytes = (along_k ? 4 * (groups + 32) : width) * 4;
  Room room(Workspace(x_bytes + sums_bytes + y_bytes + 2 * line_bytes + 5 * 64));
  args.x_pack = room.Take(x_bytes);
  args.sums = room.Take(sums_bytes);
  args.zeros = room.Take(line_bytes);
  args.scales = room.Take(line_bytes);
  void* const y = room.Take(y_bytes);
  args.nc = slice == nullptr ? width : SliceRow(plan);
  for (int64_t j = n.begin; j < n.end; j += plan.call_n) {
    const Range here = {j, std::min(n.end, j + plan.call_n)};
    args.y = slice == nullptr ? y : Advance(slice, j * 4);
    if (along_k) {
      args.keep_x = j != n.begin;
      SumAlongK(plan, buffers, args, here);
    } else {
      for (int64_t i = 0; i < args.m; ++i) {
        std::memset(Advance(args.y, i * args.nc * 4), 0, static_cast<size_t>(RoundUp(here.size(), kUnit) * 4));
      }
      SumColumns(plan, buffers, args, here, k);
    }
    if (slice == nullptr) Finish(plan, buffers, y, args.nc, 0, j, args.m, here.size());
  }
}

// Fetches a block of weights: rows of it are too short and too far apart for the hardware to foresee the next one.
// 16x4096x14336 takes 60 to 80 ms on Zen 3 without this.
void Prefetch(const void* block, int64_t rows, int64_t row_bytes, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const char* const row = static_cast<const char*>(block) + i * stride;
    for (int64_t at = 0; at < row_bytes; at += kLineBytes) _mm_prefetch(row + at, _MM_HINT_T1);
    _mm_prefetch(row + row_bytes - 1, _MM_HINT_T1);
  }
}

// The sums of x and a block of weights as bfloat16 from `first` on in k, group by group; those of a group that ends are
// scaled and added to y. `dequantize` has the block's pointers.
void MultiplyGroups(const QuantizedPlan& plan, const QuantizedBuffers& buffers, const QuantizedArgs& dequantize,
                    const GemmArgs& gemm, int64_t at_m, int64_t at_n, int64_t first) {
  const QuantizedArgs& whole = plan.args;
  const bool along_k = IsTask(whole, QuantizedTask::kBfloat16AlongK);
  const int64_t end = first + gemm.k;
  for (int64_t k = first, next; k < end; k = next) {
    const int64_t group = k / whole.group, last = (group + 1) * whole.group;
    next = std::min(end, last);
    GemmArgs x = gemm;
    x.k = next - k;
    x.a = Advance(buffers.x, (at_m * whole.k + k) * plan.x_bytes);
    x.b = Advance(gemm.b, (k - first) * (along_k ? 1 : plan.ld) * plan.x_bytes);
    x.accumulate = k % whole.group != 0;
    x.more = next < last;
    plan.gemm->fn(&x);
    if (next < last) continue;
    QuantizedArgs add = whole;
    add.task = static_cast<int64_t>(QuantizedTask::kAddScaled);
    add.m = x.m;
    add.n = x.n;
    add.sums = x.c;
    add.rsx = x.rsc;
    add.y = dequantize.sums;
    add.nc = dequantize.rs_out;
    add.keep_x = group == 0;
    const int64_t at = along_k ? at_n * whole.rs_scale + group : group * whole.rs_scale + at_n;
    add.scale = Advance(buffers.scale, at * plan.scale_bytes);
    add.rs_scale = along_k ? whole.rs_scale : 1;
    add.scales = dequantize.scales;
    plan.finish->fn(&add);
  }
}

void RunMany(const QuantizedPlan& plan, const QuantizedBuffers& buffers, Range m, Range n) {
  const QuantizedArgs& whole = plan.args;
  const bool along_k = IsTask(whole, QuantizedTask::kDequantizeAlongK) || IsTask(whole, QuantizedTask::kBfloat16AlongK);
  const bool finishes = plan.out_bytes != 4 || buffers.epilogue != nullptr;
  const int64_t block_bytes = plan.ld * (along_k ? plan.block_n : plan.block_k) * (plan.scales_sums ? 2 : 4);
  const int64_t line_bytes = RoundUp(plan.block_n, kUnit) * 4;
  const int64_t of_rows = m.size() * plan.block_n * 4;
  const int64_t y_bytes = finishes ? of_rows : 0, sums_bytes = plan.scales_sums ? of_rows : 0;
  Room room(Workspace(block_bytes + 2 * line_bytes + y_bytes + sums_bytes + plan.a_pack_bytes + plan.b_pack_bytes +
                      plan.partial_bytes + 8 * 64));
  void* const weights = room.Take(block_bytes);
  void* const y = room.Take(y_bytes);
  void* const sums = room.Take(sums_bytes);

  QuantizedArgs dequantize = whole;
  dequantize.zeros = room.Take(line_bytes);
  dequantize.scales = room.Take(line_bytes);
  dequantize.y = weights;
  dequantize.nc = plan.ld;
  GemmArgs x = plan.block;
  x.a_pack = room.Take(plan.a_pack_bytes);
  x.b_pack = room.Take(plan.b_pack_bytes);
  x.partial = room.Take(plan.partial_bytes);
  x.m = m.size();
  x.b = weights;
  const int64_t rs_y = finishes ? plan.block_n : whole.rs_out;
  x.rsc = plan.scales_sums ? plan.block_n : rs_y;
  for (int64_t j = n.begin; j < n.end; j += plan.block_n) {
    x.n = dequantize.n = std::min(plan.block_n, n.end - j);
    void* const c = finishes ? y : Advance(buffers.out, (m.begin * whole.rs_out + j) * 4);
    x.c = plan.scales_sums ? sums : c;
    dequantize.sums = c;
    dequantize.rs_out = rs_y;
    for (int64_t k = 0; k < whole.k; k += plan.block_k) {
      x.k = dequantize.k = std::min(plan.block_k, whole.k - k);
      const int64_t group = k / whole.group;
      dequantize.first = k % whole.group;
      const int64_t q = along_k ? j * whole.rsq + k * plan.bits / 8 : k * whole.rsq + j * plan.bits / 8;
      dequantize.q = Advance(buffers.q, q);
      const auto at = [&](int64_t stride) { return along_k ? j * stride + group : group * stride + j; };
      dequantize.scale = Advance(buffers.scale, at(whole.rs_scale) * plan.scale_bytes);
      dequantize.zero = Advance(buffers.zero, at(whole.rs_zero) * plan.zero_bytes);
      const int64_t rows = along_k ? x.n : x.k, row_bytes = CeilDiv((along_k ? x.k : x.n) * plan.bits, 8);
      Prefetch(dequantize.q, rows, row_bytes, whole.rsq);
      plan.kernel->fn(&dequantize);
      if (plan.scales_sums) {
        MultiplyGroups(plan, buffers, dequantize, x, m.begin, j, k);
        continue;
      }
      x.a = Advance(buffers.x, (m.begin * whole.k + k) * plan.x_bytes);
      x.accumulate = k > 0;
      x.more = k + plan.block_k < whole.k;
      plan.gemm->fn(&x);
    }
    if (finishes) Finish(plan, buffers, y, plan.block_n, m.begin, j, m.size(), x.n);
  }
}

}  // namespace

std::span<const QuantizedInfo> QuantizedKernels() { return {kKernels, std::size(kKernels) - 1}; }

int64_t QuantizedPlan::slice_bytes() const { return args.m * RoundUp(args.n, kUnit) * 4; }

QuantizedPlan PlanQuantized(const QuantizedShape& shape, std::span<const Target* const> targets, int64_t threads,
                            const Machine& machine) {
  const Weight& weight = WeightNamed(shape.q);
  const int64_t group = shape.group;
  if (shape.m < 1 || shape.n < 1 || shape.k < 1) Refuse("no size may be below 1");
  if (group < 1 || shape.k % group != 0 || (group != shape.k && group % kQuantizedGroup != 0)) {
    Refuse("groups of " + std::to_string(group) + " in " + std::to_string(shape.k));
  }
  const int64_t row = shape.along_k ? shape.k : shape.n;
  if (row * weight.bits % 8 != 0) Refuse("rows of weights that end inside a byte");
  QuantizedPlan plan;
  plan.kernel = &Select(targets, weight.form);
  plan.finish = &Select(targets, "finish");
  plan.bits = weight.bits;
  plan.x_bytes = ElementBytes(shape.x);
  plan.scale_bytes = ElementBytes(shape.scale);
  plan.zero_bytes = shape.zero.empty() ? 0 : ElementBytes(shape.zero);
  plan.out_bytes = ElementBytes(shape.out);
  if (!shape.zero.empty() && !IsInteger(weight)) Refuse("zero points of floats");
  QuantizedArgs& args = plan.args;
  const int64_t groups = shape.k / group;
  args.m = shape.m;
  args.n = shape.n;
  args.k = shape.k;
  args.group = group;
  args.rsx = shape.k;
  args.x_dtype = RowNumber(shape.x, false);
  args.rsq = row * weight.bits / 8;
  args.rs_scale = args.rs_zero = shape.along_k ? groups : shape.n;
  args.scale_dtype = RowNumber(shape.scale, false);
  args.zero_dtype = shape.zero.empty() ? 0 : RowNumber(shape.zero, true);
  args.rs_out = shape.n;
  args.out_dtype = RowNumber(shape.out, false);
  // Pairs of 8 bits along K have no lanes for several groups in a register.
  const bool shares = shape.along_k && weight.bits == 8 && group != shape.k && group % plan.kernel->block != 0;
  const bool pairs = shape.x == "bfloat16" && shape.zero.empty() && shape.k % 2 == 0 && !shares;
  const QuantizedInfo& of_few = Select(targets, weight.form, pairs);
  const bool in_float32 = of_few.pairs == 0 && Bfloat16Kernel(shape, targets) != nullptr;
  plan.few = ReadsInPlace(shape, of_few, weight, in_float32 ? kFewRowsInFloat32 : kFewRows);
  if (plan.few) plan.kernel = &of_few;
  const QuantizedTask task = plan.few        ? (shape.along_k ? QuantizedTask::kInner : QuantizedTask::kColumns)
                             : shape.along_k ? QuantizedTask::kDequantizeAlongK
                                             : QuantizedTask::kDequantizeColumns;
  args.task = static_cast<int64_t>(task);
  if (plan.few) {
    PlanFew(plan, threads);
  } else {
    PlanMany(plan, shape, targets, threads, machine);
    if (plan.scales_sums) {
      args.task =
          static_cast<int64_t>(shape.along_k ? QuantizedTask::kBfloat16AlongK : QuantizedTask::kBfloat16Columns);
    }
  }
  return plan;
}

void RunQuantizedItem(const QuantizedPlan& plan, const QuantizedBuffers& buffers, void* shared, int64_t item) {
  const Range n = Part(plan.args.n, plan.n_unit, plan.n_parts, item % plan.n_parts);
  if (n.size() == 0) return;
  const int64_t rest = item / plan.n_parts;
  if (plan.few) {
    const Range k = Part(plan.args.k, plan.k_unit, plan.k_parts, rest);
    void* const slice = plan.k_parts > 1 ? Advance(shared, rest * plan.slice_bytes()) : nullptr;
    return RunFew(plan, buffers, slice, n, k);
  }
  const Range m = Part(plan.args.m, plan.gemm->mr, plan.m_parts, rest);
  if (m.size() != 0) RunMany(plan, buffers, m, n);
}

void ReduceQuantized(const QuantizedPlan& plan, const QuantizedBuffers& buffers, void* shared) {
  const int64_t row = SliceRow(plan);
  const auto slice = [&](int64_t i) { return static_cast<float*>(Advance(shared, i * plan.slice_bytes())); };
  for (int64_t step = 1; step < plan.k_parts; step *= 2) {
    for (int64_t i = 0; i + step < plan.k_parts; i += 2 * step) {
      float *const to = slice(i), *const from = slice(i + step);
      for (int64_t r = 0; r < plan.args.m; ++r) {
        for (int64_t j = 0; j < plan.args.n; ++j) to[r * row + j] += from[r * row + j];
      }
    }
  }
  Finish(plan, buffers, slice(0), row, 0, 0, plan.args.m, plan.args.n);
}

}  // namespace jax_nano
