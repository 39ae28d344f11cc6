#include "quantized.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "plan.h"
#include "registry.h"
#include "workspace.h"

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

constexpr int64_t kRowsAtOnce = 4;     // of the kernels that read weights where they lie
constexpr int64_t kFewRows = 8;        // beyond, making float32 of the weights pays: two passes cost as much
constexpr int64_t kUnit = 128;         // a multiple of every kernel's register of weights
constexpr int64_t kColumnsAlongK = 4;  // that are read side by side
constexpr int64_t kSumsBytes = 16 << 10;          // of few rows stay in half of L1
constexpr int64_t kMaxXBytes = 4 << 20;           // of x in workspace
constexpr int64_t kItemBytes = 128 << 10;         // of weights, at least, for a work item of few rows
constexpr int64_t kBlockK = 256, kBlockN = 256;   // of weights as float32: half of a small L2
constexpr int64_t kLine = 16;                     // elements; an odd number of lines between rows, not all in one set
constexpr int64_t kMaxItemRows = 1024;            // whose unfinished results are in workspace
constexpr double kBytesPerNs = 8, kFlopsPerNs = 60;

int64_t CeilDiv(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }
int64_t RoundUp(int64_t x, int64_t unit) { return CeilDiv(x, unit) * unit; }

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

const QuantizedInfo& Select(std::span<const Target* const> targets, std::string_view form) {
  for (const Target* target : targets) {
    for (const QuantizedInfo& k : QuantizedKernels()) {
      if (k.form == form && target->name == std::string_view(k.target)) return k;
    }
  }
  Refuse("this CPU runs no kernel");
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Piece `i` of `pieces` of [0, total), cut at multiples of `unit`.
Range Piece(int64_t total, int64_t unit, int64_t pieces, int64_t i) {
  const int64_t units = CeilDiv(total, unit);
  const auto edge = [&](int64_t j) { return std::min(total, units * j / pieces * unit); };
  return {edge(i), edge(i + 1)};
}

const void* Advance(const void* p, int64_t bytes) { return p == nullptr ? p : static_cast<const char*>(p) + bytes; }
void* Advance(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }

// Whether the kernels for few rows take these sizes: masked vectors of weights end at words of 32 bits, and a register
// of weights along K holds whole groups, or a group whole registers.
bool ReadsInPlace(const QuantizedShape& shape, const QuantizedInfo& kernel) {
  if (shape.m > kFewRows || RoundUp(shape.k, kUnit) * (kRowsAtOnce + 1) * 4 > kMaxXBytes) return false;
  if (!shape.along_k) return shape.n % kQuantizedGroup == 0;
  const bool integers = std::string_view(kernel.form).starts_with('i');
  return shape.k % kQuantizedGroup == 0 && (shape.group == shape.k || shape.group % kernel.block == 0 ||
                                            (integers && kernel.block % shape.group == 0));
}

void PlanFew(QuantizedPlan& plan, int64_t threads) {
  const QuantizedArgs& args = plan.args;
  plan.n_unit = plan.args.task == static_cast<int64_t>(QuantizedTask::kInner) ? kColumnsAlongK : kUnit;
  const double bytes = static_cast<double>(args.n) * static_cast<double>(args.k) * static_cast<double>(plan.bits) / 8;
  const auto worthwhile = static_cast<int64_t>(bytes / kItemBytes);
  plan.n_pieces = std::clamp<int64_t>(std::min(worthwhile, 2 * threads), 1, CeilDiv(args.n, plan.n_unit));
  if (threads == 1) plan.n_pieces = 1;
  plan.expected = std::chrono::nanoseconds(static_cast<int64_t>(bytes / kBytesPerNs));
}

void PlanMany(QuantizedPlan& plan, const QuantizedShape& shape, std::span<const Target* const> targets,
              int64_t threads, const Caches& caches) {
  plan.gemm = SelectKernel(targets, shape.x, "float32", "float32", "default");
  if (plan.gemm == nullptr) Refuse("no kernel multiplies " + std::string(shape.x) + " with float32");
  const KernelInfo& kernel = *plan.gemm;
  plan.block_k = std::min(RoundUp(shape.k, kQuantizedGroup), kBlockK);
  plan.block_n = std::min(RoundUp(shape.n, kernel.nr), RoundUp(kBlockN, kernel.nr));
  plan.ld = (RoundUp(shape.along_k ? plan.block_k : plan.block_n, kLine) / kLine | 1) * kLine;
  GemmArgs& x = plan.block;
  x.m = shape.m;
  x.n = plan.block_n;
  x.k = plan.block_k;
  x.rsa = shape.k;
  x.csa = 1;
  x.rsb = shape.along_k ? 1 : plan.ld;
  x.csb = shape.along_k ? plan.ld : 1;
  x.rsc = shape.out == "float32" ? shape.n : plan.block_n;
  x.batch = 1;
  ChooseSums(kernel, 2, x);

  plan.n_unit = plan.block_n;
  const int64_t n_units = CeilDiv(shape.n, plan.n_unit);
  plan.n_pieces = std::min(n_units, 2 * threads);
  const int64_t most = CeilDiv(shape.m, 4 * kernel.mr);  // the weights are made once for each piece of rows
  const int64_t wanted = threads == 1 ? 1 : CeilDiv(2 * threads, plan.n_pieces);
  plan.m_pieces = std::max(std::min(most, wanted), CeilDiv(shape.m, kMaxItemRows));
  const int64_t item_m = CeilDiv(CeilDiv(shape.m, kernel.mr), plan.m_pieces) * kernel.mr;
  ChooseBlocks(kernel, caches, std::min(item_m, shape.m), plan.block_n, x);
  plan.a_pack_bytes = RoundUp(PackedABytes(kernel, x), 64);
  plan.b_pack_bytes = RoundUp(PackedBBytes(kernel, x), 64);
  const double flops = 2 * static_cast<double>(shape.m) * static_cast<double>(shape.n) * static_cast<double>(shape.k);
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

void RunFew(const QuantizedPlan& plan, const QuantizedBuffers& buffers, Range n) {
  QuantizedArgs args = plan.args;
  args.n = n.size();
  args.x = buffers.x;
  const bool along_k = args.task == static_cast<int64_t>(QuantizedTask::kInner);
  const int64_t rows = std::min(args.m, kRowsAtOnce), groups = CeilDiv(args.k, args.group);
  args.nc = along_k ? RoundUp(args.n + kColumnsAlongK, kUnit)
                    : std::min(RoundUp(args.n, kUnit), std::max(kUnit, kSumsBytes / 4 / rows / kUnit * kUnit));
  const int64_t x_bytes = (rows + 1) * RoundUp(args.k, kUnit) * 4, sums_bytes = std::max<int64_t>(rows * args.nc, 256) * 4;
  const int64_t line_bytes = (along_k ? 4 * (groups + 32) : args.nc) * 4;
  Room room(Workspace(x_bytes + 2 * sums_bytes + 2 * line_bytes + 5 * 64));
  args.x_pack = room.Take(x_bytes);
  args.sums = room.Take(sums_bytes);
  args.y = room.Take(sums_bytes);
  args.zeros = room.Take(line_bytes);
  args.scales = room.Take(line_bytes);
  args.q = Advance(buffers.q, along_k ? n.begin * args.rsq : n.begin * plan.bits / 8);
  args.scale = Advance(buffers.scale, n.begin * (along_k ? args.rs_scale : 1) * plan.scale_bytes);
  args.zero = Advance(buffers.zero, n.begin * (along_k ? args.rs_zero : 1) * plan.zero_bytes);
  args.out = Advance(buffers.out, n.begin * plan.out_bytes);
  const int64_t m = args.m;
  // As equal as they can be.
  const int64_t chunks = CeilDiv(m, kRowsAtOnce);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = m * i / chunks, end = m * (i + 1) / chunks;
    QuantizedArgs some = args;
    some.m = end - begin;
    some.x = Advance(args.x, begin * args.rsx * plan.x_bytes);
    some.out = Advance(args.out, begin * args.rs_out * plan.out_bytes);
    plan.kernel->fn(&some);
  }
}

void RunMany(const QuantizedPlan& plan, const QuantizedBuffers& buffers, Range m, Range n) {
  const QuantizedArgs& whole = plan.args;
  const bool along_k = whole.task == static_cast<int64_t>(QuantizedTask::kDequantizeAlongK);
  const bool rounds = plan.out_bytes != 4;
  const int64_t block_bytes = plan.ld * (along_k ? plan.block_n : plan.block_k) * 4;
  const int64_t line_bytes = RoundUp(plan.block_n, kUnit) * 4;
  const int64_t y_bytes = rounds ? m.size() * plan.block_n * 4 : 0;
  Room room(Workspace(block_bytes + 2 * line_bytes + y_bytes + plan.a_pack_bytes + plan.b_pack_bytes + 6 * 64));
  void* const weights = room.Take(block_bytes);
  void* const y = room.Take(y_bytes);

  QuantizedArgs dequantize = whole;
  dequantize.zeros = room.Take(line_bytes);
  dequantize.scales = room.Take(line_bytes);
  dequantize.y = weights;
  dequantize.nc = plan.ld;
  GemmArgs x = plan.block;
  x.a_pack = room.Take(plan.a_pack_bytes);
  x.b_pack = room.Take(plan.b_pack_bytes);
  x.m = m.size();
  x.b = weights;
  for (int64_t j = n.begin; j < n.end; j += plan.block_n) {
    x.n = dequantize.n = std::min(plan.block_n, n.end - j);
    x.c = rounds ? y : Advance(buffers.out, (m.begin * whole.rs_out + j) * 4);
    for (int64_t k = 0; k < whole.k; k += plan.block_k) {
      x.k = dequantize.k = std::min(plan.block_k, whole.k - k);
      const int64_t group = k / whole.group;
      dequantize.first = k % whole.group;
      const int64_t q = along_k ? j * whole.rsq + k * plan.bits / 8 : k * whole.rsq + j * plan.bits / 8;
      dequantize.q = Advance(buffers.q, q);
      const auto at = [&](int64_t stride) { return along_k ? j * stride + group : group * stride + j; };
      dequantize.scale = Advance(buffers.scale, at(whole.rs_scale) * plan.scale_bytes);
      dequantize.zero = Advance(buffers.zero, at(whole.rs_zero) * plan.zero_bytes);
      plan.kernel->fn(&dequantize);
      x.a = Advance(buffers.x, (m.begin * whole.k + k) * plan.x_bytes);
      x.accumulate = k > 0;
      x.more = k + plan.block_k < whole.k;
      plan.gemm->fn(&x);
    }
    if (rounds) {
      QuantizedArgs round = whole;
      round.task = static_cast<int64_t>(QuantizedTask::kRound);
      round.m = m.size();
      round.n = x.n;
      round.y = y;
      round.nc = plan.block_n;
      round.out = Advance(buffers.out, (m.begin * whole.rs_out + j) * plan.out_bytes);
      plan.kernel->fn(&round);
    }
  }
}

}  // namespace

std::span<const QuantizedInfo> QuantizedKernels() { return {kKernels, std::size(kKernels) - 1}; }

QuantizedPlan PlanQuantized(const QuantizedShape& shape, std::span<const Target* const> targets, int64_t threads,
                            const Caches& caches) {
  const Weight& weight = WeightNamed(shape.q);
  const int64_t group = shape.group;
  if (group < 1 || shape.k % group != 0 || (group != shape.k && group % kQuantizedGroup != 0)) {
    Refuse("groups of " + std::to_string(group) + " in " + std::to_string(shape.k));
  }
  const int64_t row = shape.along_k ? shape.k : shape.n;
  if (row * weight.bits % 8 != 0) Refuse("rows of weights that end inside a byte");
  QuantizedPlan plan;
  plan.kernel = &Select(targets, weight.form);
  plan.bits = weight.bits;
  plan.x_bytes = ElementBytes(shape.x);
  plan.scale_bytes = ElementBytes(shape.scale);
  plan.zero_bytes = shape.zero.empty() ? 0 : ElementBytes(shape.zero);
  plan.out_bytes = ElementBytes(shape.out);
  if (!shape.zero.empty() && !std::string_view(weight.form).starts_with('i')) Refuse("zero points of floats");
  QuantizedArgs& args = plan.args;
  const int64_t groups = shape.k / group;
  args.m = shape.m;
  args.n = shape.n;
  args.k = shape.k;
  args.group = group;
  args.flip = weight.flip;
  args.rsx = shape.k;
  args.x_dtype = RowNumber(shape.x, false);
  args.rsq = row * weight.bits / 8;
  args.rs_scale = args.rs_zero = shape.along_k ? groups : shape.n;
  args.scale_dtype = RowNumber(shape.scale, false);
  args.zero_dtype = shape.zero.empty() ? 0 : RowNumber(shape.zero, true);
  args.rs_out = shape.n;
  args.out_dtype = RowNumber(shape.out, false);
  plan.few = ReadsInPlace(shape, *plan.kernel);
  const QuantizedTask task = plan.few ? (shape.along_k ? QuantizedTask::kInner : QuantizedTask::kColumns)
                                      : (shape.along_k ? QuantizedTask::kDequantizeAlongK : QuantizedTask::kDequantizeColumns);
  args.task = static_cast<int64_t>(task);
  if (plan.few) {
    PlanFew(plan, threads);
  } else {
    PlanMany(plan, shape, targets, threads, caches);
  }
  return plan;
}

void RunQuantizedItem(const QuantizedPlan& plan, const QuantizedBuffers& buffers, int64_t item) {
  const Range n = Piece(plan.args.n, plan.n_unit, plan.n_pieces, item % plan.n_pieces);
  if (n.size() == 0) return;
  if (plan.few) return RunFew(plan, buffers, n);
  const Range m = Piece(plan.args.m, plan.gemm->mr, plan.m_pieces, item / plan.n_pieces);
  if (m.size() != 0) RunMany(plan, buffers, m, n);
}

}  // namespace jax_nano
