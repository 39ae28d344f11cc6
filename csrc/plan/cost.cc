#include "plan/cost.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "plan/arithmetic.h"
#include "plan/registry.h"

namespace jax_nano {
namespace {

constexpr double kLine = 64;
constexpr int64_t kPage = 4096;
constexpr int64_t kL1WayBytes = 4096, kL2WayBytes = 64 << 10;  // rows so far apart share their sets
constexpr int64_t kL1Ways = 8, kL1TlbPages = 64;
constexpr int64_t kFewRows = 8;      // of a tile of C
constexpr int64_t kHidingRows = 12;  // so many products with a line of B take longer than its way from memory
// A cycle's products and loads, loads of whole vectors where these come in halves, and cycles until a product can be
// added to: what makes a step of a tile longer than the others of its size. How long a cycle takes is a cost.
constexpr double kProducts = 2, kLoads = 2, kHalves = 2, kLatency = 4;
// Shares of a cache that data may have, beside all else that passes through it.
constexpr double kL1Share = 0.75, kL2Share = 0.8;

// A product's loops and caches, and the counts so far.
class Counter {
 public:
  Counter(const KernelInfo& kernel, const Product& product, const Product& whole, const CoreModel& core)
      : kernel_(kernel),
        x_(product),
        core_(core),
        a_bytes_(ElementBytes(kernel.lhs)),
        b_bytes_(ElementBytes(kernel.rhs)),
        c_bytes_(ElementBytes(kernel.out)) {
    const double batch = Real(std::max<int64_t>(whole.batch, 1));
    const double a = Real(whole.m) * Real(whole.k) * Real(a_bytes_) * (whole.bsa == 0 ? 1 : batch);
    const double b = Real(whole.n) * Real(whole.k) * Real(b_bytes_) * (whole.bsb == 0 ? 1 : batch);
    const double c = Real(whole.m) * Real(whole.n) * Real(c_bytes_) * batch;
    together_ = LevelOf(a + b + c);
    a_level_ = std::min(LevelOf(a), together_);
    b_level_ = std::min(LevelOf(b), together_);
  }

  void Count(const Blocked& x);
  void Count(const InnerProduct& x);
  void Count(const Sweep& x);

  // So far it was one product.
  void Repeat(int64_t batch) {
    for (double& count : counts_) count *= Real(batch);
    Add(Cost::kProduct, Real(std::max<int64_t>(batch - 1, 0)));
    Add(Cost::kCall, 1);
  }

  void Slices(int64_t slices) {
    if (slices < 2) return;
    Add(Cost::kSlice, Real(slices));
    Add(Cost::kSliceElement, Real(slices) * Real(x_.m) * Real(x_.n));
  }

  const CostCounts& counts() const { return counts_; }

 private:
  struct Height {
    int64_t rows;
    double panels;
  };

  void Add(Cost cost, double count) { counts_[static_cast<size_t>(cost)] += count; }
  void Add(Cost term, Level level, double count) {
    counts_[static_cast<size_t>(term) + static_cast<size_t>(level)] += count;
  }

  // Where so many bytes stay that are read again and again, in rows of `run` bytes that are `stride` bytes apart: rows
  // that share their sets leave most of a cache unused.
  Level LevelOf(double bytes, double run = kPage * kPage, int64_t stride = 1) const {
    const auto share = [&](int64_t way) {
      const auto apart = static_cast<double>(std::gcd(std::abs(stride), way));
      return std::min(1.0, std::max(run, kLine) / std::max(apart, kLine));
    };
    if (bytes <= kL1Share * Real(core_.l1d) * share(kL1WayBytes)) return Level::kL1;
    if (bytes <= kL2Share * Real(core_.l2) * share(kL2WayBytes)) return Level::kL2;
    return bytes <= Real(core_.near) ? Level::kNear : bytes <= Real(core_.far) ? Level::kFar : Level::kMemory;
  }

  // Of a step of `rows` elements of A times `vectors` of B.
  double Cycles(double rows, double vectors) const {
    const double halves = core_.halves_512 && IsWide() ? kHalves : 1;
    return std::max({rows * vectors * halves / kProducts, (rows + vectors * halves) / kLoads, kLatency});
  }
  bool IsWide() const { return int64_t{kernel_.lanes} * ElementBytes(kernel_.acc) * 8 == 512; }

  static bool Within(Level level, Level most) { return level <= most; }
  bool Aliased(int64_t stride_bytes) const { return stride_bytes != 0 && stride_bytes % kL1WayBytes == 0; }
  // Whether so many rows lie in one set of L1, which has not as many ways: a line is gone before its next element is
  // read.
  static bool Evicted(int64_t stride_bytes, int64_t rows) {
    const int64_t past = std::abs(stride_bytes) % kL1WayBytes;
    return rows > kL1Ways && Real(rows * std::min(past, kL1WayBytes - past)) < kLine;
  }
  int64_t DirectVectors(int64_t rows) const { return kernel_.direct_vectors[rows - 1] - '0'; }

  // An A whose columns are contiguous has a line for each step, which the next panels share: where those of a panel
  // stay, and how many there are.
  Level LevelOfSteps(double depth) const {
    constexpr double kFew = 128;
    const double bytes = depth * kLine;
    if (Aliased(std::abs(x_.csa) * a_bytes_)) return depth <= kFew ? Level::kL2 : Level::kNear;
    return bytes <= Real(core_.l1d) / 2 ? Level::kL1 : bytes <= Real(core_.l2) / 2 ? Level::kL2 : Level::kNear;
  }
  double LinesOfSteps(int64_t rows, double depth) const {
    return depth * (1 + Real(rows - 1) * Real(a_bytes_) / kLine);
  }

  bool IsUnblocked(const Blocked& x) const;
  std::vector<Height> Heights(const Blocked& x) const;
  void CountPanels(const Blocked& x, const Height& height, double depth, int64_t columns, double times,
                   double& first_of_b);
  void CountTiles(const Blocked& x, int64_t rows, double depth, int64_t columns, double times);
  void CountPacking(const Blocked& x, double depth);

  const KernelInfo& kernel_;
  const Product& x_;
  const CoreModel& core_;
  int64_t a_bytes_, b_bytes_, c_bytes_;
  Level together_, a_level_, b_level_;
  CostCounts counts_ = {};
};

bool Counter::IsUnblocked(const Blocked& x) const {
  if (x.pack_a || x.pack_b || !kernel_.direct_a || !kernel_.direct_b || x.kc < x_.k || x.nc < x_.n) return false;
  const bool near = x_.k * x_.n * b_bytes_ <= loops::kNearBytes;
  const int64_t lines = CeilDiv(int64_t{kernel_.nr} * c_bytes_, 64), vectors = kernel_.nr / kernel_.lanes;
  const int64_t a_turn = std::max<int64_t>(1, kernel_.mr * vectors * loops::kUnroll / loops::kProductsALine);
  return x_.k / kernel_.kr < (near ? loops::kNearSteps : 2 * kernel_.mr * lines * loops::kUnroll / a_turn);
}

// How many panels of A there are of each height.
std::vector<Counter::Height> Counter::Heights(const Blocked& x) const {
  std::vector<Height> out;
  const auto add = [&](int64_t rows, int64_t panels) {
    if (rows > 0 && panels > 0) out.push_back({rows, Real(panels)});
  };
  if (IsUnblocked(x)) {
    int64_t most = x.tile_rows;
    if (IsWide() && x_.n > kernel_.nr) {
      most = std::min(most, x_.n > loops::kWideVectors * kernel_.lanes ? loops::kShortWideRows : loops::kShortRows);
    }
    const int64_t rows = CeilDiv(x_.m, CeilDiv(x_.m, most));  // of equal height
    add(rows, x_.m / rows);
    add(x_.m % rows, 1);
    return out;
  }
  for (const auto& [blocks, rows] : {std::pair{x_.m / x.mc, x.mc}, std::pair{int64_t{1}, x_.m % x.mc}}) {
    add(x.tile_rows, blocks * (rows / x.tile_rows));
    add(rows % x.tile_rows, blocks);
  }
  return out;
}

// The tiles of `times` rows of tiles.
void Counter::CountTiles(const Blocked& x, int64_t rows, double depth, int64_t columns, double times) {
  const int64_t lanes = kernel_.lanes, widest = x.pack_b ? kernel_.nr / lanes : DirectVectors(rows);
  const double added = std::ceil(Real(x_.k) / depth) - 1, again = added / (added + 1);
  const double steps = std::ceil(depth / Real(kernel_.kr));
  const auto tiles = [&](int64_t vectors, int64_t count) {
    if (vectors == 0 || count == 0) return;
    const double all = times * Real(count), stored = all * Real(rows * vectors);
    Add(x.pack_b ? Cost::kPackedStep : Cost::kDirectStep, all * steps * Cycles(Real(rows), Real(vectors)));
    Add(Cost::kCVector, stored);
    Add(Cost::kCAdd, stored * again);
  };
  tiles(widest, columns / (widest * lanes));
  tiles(columns % (widest * lanes) / lanes, 1);
  if (columns % lanes != 0) {
    // Of at most half a vector's columns, half a vector (codegen/tile_row.py).
    const bool half = IsWide() && kernel_.direct_a && columns % lanes * 2 <= lanes;
    Add(x.pack_b ? Cost::kPackedStep : Cost::kMaskedStep, times * steps * Cycles(Real(rows), half ? 0.5 : 1));
    Add(Cost::kCMasked, times * Real(rows));
    Add(Cost::kCAddMasked, times * Real(rows) * again);
  }
}

// All panels of A of one height against the blocks of B of `columns` columns, `times` of them in each of k's blocks.
// `first_of_b` of them are the first to read their block of B, if it is read where it lies; what is left is returned.
void Counter::CountPanels(const Blocked& x, const Height& height, double depth, int64_t columns, double times,
                          double& first_of_b) {
  const int64_t rows = height.rows, lanes = kernel_.lanes;
  const double blocks_of_k = std::ceil(Real(x_.k) / depth), calls = height.panels * times * blocks_of_k;
  Add(IsUnblocked(x) ? Cost::kPlainRowOfTiles : Cost::kRowOfTiles, calls);
  CountTiles(x, rows, depth, columns, calls);

  const int64_t widest = x.pack_b ? kernel_.nr / lanes : DirectVectors(rows);
  const double tiles = std::ceil(Real(columns) / Real(widest * lanes));
  const double block_of_b = depth * Real(std::min(x.nc, x_.n) * b_bytes_);
  const double block_of_a = Real(std::min(x.mc, x_.m)) * depth * Real(a_bytes_);
  // Each tile reads the panel of A, which costs something if it does not stay in L1.
  const double a_element = Real(x.pack_a ? kernel_.a_panel_bytes : a_bytes_);
  const double panel_of_a = Real(rows) * depth * a_element;
  const double lines_again = LevelOf(panel_of_a) == Level::kL1 ? 0 : calls * (tiles - 1) * panel_of_a / kLine;
  if (x.pack_a) {
    Add(Cost::kAPackedLine, LevelOf(block_of_a), calls * panel_of_a / kLine);
    Add(Cost::kAPackedLine, LevelOf(panel_of_a), lines_again);
  } else if (x_.csa == 1) {
    const double first = height.panels * blocks_of_k, lines = Real(rows) * (depth * Real(a_bytes_) / kLine + 1);
    Add(Cost::kALine, a_level_, std::min(first, calls) * lines);
    Add(Cost::kALineAgain, LevelOf(block_of_a + block_of_b), std::max(calls - first, 0.0) * lines);
    Add(Cost::kALineAgain, LevelOf(panel_of_a), lines_again);
    if (Evicted(x_.rsa * a_bytes_, rows)) {
      Add(Cost::kAStepLine, Level::kL2, calls * tiles * Real(rows) * depth);
    } else if (Aliased(x_.rsa * a_bytes_)) {
      Add(Cost::kAAliasedLine, calls * Real(rows) * depth * Real(a_bytes_) / kLine * tiles);
    }
  } else {
    const int64_t stride = std::abs(x_.csa) * a_bytes_;
    const bool far = stride >= kPage / 2 && depth > Real(kL1TlbPages);
    Add(far ? Cost::kAFarStepLine : Cost::kAStepLine, LevelOfSteps(depth), calls * tiles * LinesOfSteps(rows, depth));
    Add(Cost::kAColumnLine, a_level_, height.panels * blocks_of_k * Real(rows) * depth * Real(a_bytes_) / kLine);
  }

  const double lines = depth * Real(columns * b_bytes_) / kLine;
  if (x.pack_b) {
    Add(Cost::kBPackedLine, LevelOf(depth * Real(std::min(x.nc, x_.n)) * Real(kernel_.b_panel_bytes)),
        calls * depth * Real(columns) * Real(kernel_.b_panel_bytes) / kLine);
    return;
  }
  const int64_t stride = std::abs(x_.rsb) * b_bytes_;
  const double first = std::min(calls, first_of_b);
  first_of_b -= first;
  Add(Cost::kBLine, b_level_, first * lines);
  if (rows < kHidingRows) Add(Cost::kBExposedLine, b_level_, first * lines * (1 - Real(rows) / Real(kHidingRows)));
  const double run = Real(std::min(x_.n, (loops::kTilesAhead + 1) * widest * lanes) * b_bytes_);
  if (!Within(b_level_, Level::kL2) && !Within(LevelOf(depth * run, run, stride), Level::kL2)) {
    counts_[static_cast<size_t>(Cost::kBLateLine) + (b_level_ == Level::kNear ? 0 : 1)] += first * lines;
  }
  const Level again = LevelOf(block_of_b + Real(rows) * depth * Real(a_bytes_), Real(columns * b_bytes_), stride);
  Add(Cost::kBLineAgain, again, (calls - first) * lines);
  // Lines that two tiles share stay in L1 until the next one if all of a tile's do.
  const int64_t apart = std::max<int64_t>(64, std::gcd(stride, kL1WayBytes));
  const double lines_of_a_row = Real(widest * lanes * b_bytes_) / kLine + (stride % 64 != 0 ? 1 : 0);
  const double room =
      std::min(Real(kL1Ways * (kL1WayBytes / apart)), kL1Share * Real(core_.l1d) / kLine / lines_of_a_row);
  if (depth > room) Add(Cost::kBConflictLine, calls * lines);
  if (stride % 64 != 0) Add(Cost::kBUnalignedLine, calls * lines);
  if (depth * Real(stride) > Real(kL1TlbPages * kPage)) {
    Add(Cost::kBPage, calls * tiles * depth * std::min(1.0, Real(stride) / Real(kPage)));
  }
}

void Counter::CountPacking(const Blocked& x, double depth) {
  const double blocks_of_m = Real(CeilDiv(x_.m, x.mc)), blocks_of_n = Real(CeilDiv(x_.n, x.nc));
  const double blocks_of_k = std::ceil(Real(x_.k) / depth);
  if (x.pack_b) {
    const double packed = blocks_of_m * Real(x_.k) * Real(x_.n);
    Add(Cost::kPackBPanel, blocks_of_m * blocks_of_k * Real(CeilDiv(x_.n, kernel_.nr)));
    if (x_.csb == 1) {
      Add(Cost::kPackBRows, b_level_, packed);
      Add(Cost::kPackBRow, blocks_of_m * blocks_of_n * Real(x_.k));
      if (std::abs(x_.rsb) * b_bytes_ >= kPage) {
        Add(Cost::kPackBPage, blocks_of_m * Real(x_.k) * Real(CeilDiv(x_.n, kernel_.nr)));
      }
    } else {
      Add(Cost::kPackBColumns, b_level_, packed);
      Add(Cost::kPackBColumn, blocks_of_m * blocks_of_k * Real(x_.n));
    }
  }
  if (x.pack_a) {
    const double packed = Real(x_.m) * Real(x_.k), panels = Real(CeilDiv(x_.m, x.tile_rows));
    const int64_t rows = std::abs(x_.rsa) * a_bytes_, columns = std::abs(x_.csa) * a_bytes_;
    if (x_.csa == 1) {
      Add(Cost::kPackARows, a_level_, packed);
      Add(Cost::kPackARowPanel, panels * blocks_of_k);
      if (Aliased(rows)) Add(Cost::kPackAAliased, packed);
    } else {
      Add(Cost::kPackAColumns, a_level_, packed);
      Add(Cost::kPackAColumnPanel, panels * blocks_of_k);
      Add(Cost::kPackAStepLine, LevelOfSteps(depth), panels * blocks_of_k * LinesOfSteps(x.tile_rows, depth));
      if (columns >= kPage) Add(Cost::kPackAPage, Real(x_.k) * panels);
    }
  }
}

void Counter::Count(const Blocked& x) {
  const double blocks_of_k = Real(std::max<int64_t>(1, CeilDiv(x_.k, x.kc))), blocks_of_m = Real(CeilDiv(x_.m, x.mc));
  const double blocks_of_n = Real(CeilDiv(x_.n, x.nc));
  const double depth = Real(std::max<int64_t>(x_.k, 1)) / blocks_of_k;
  Add(Cost::kBlockOfK, blocks_of_m * blocks_of_k);
  Add(Cost::kBlockOfN, blocks_of_m * blocks_of_k * blocks_of_n);
  int64_t highest = 1;
  const int64_t whole = x_.n / x.nc, rest = x_.n % x.nc;
  double first_of_whole = blocks_of_m * blocks_of_k * Real(whole), first_of_rest = blocks_of_m * blocks_of_k;
  for (const Height& height : Heights(x)) {
    highest = std::max(highest, height.rows);
    if (const int64_t row = x_.n * c_bytes_; height.rows > kFewRows && row >= 64) {
      Add(Cost::kCHighTileLine, together_, blocks_of_k * height.panels * Real(height.rows * CeilDiv(row, 64)));
    }
    if (whole > 0) CountPanels(x, height, depth, x.nc, Real(whole), first_of_whole);
    if (rest > 0) CountPanels(x, height, depth, rest, 1, first_of_rest);
  }
  CountPacking(x, depth);

  const int64_t row = x_.n * c_bytes_;
  const int64_t wide = (x.pack_b ? kernel_.nr / kernel_.lanes : DirectVectors(highest)) * kernel_.lanes;
  const double rows = blocks_of_k * Real(x_.m);
  if (NeedsPartialSums(x, kernel_, x_)) {
    const double bytes = Real(x_.m) * Real(x_.n) * Real(ElementBytes(kernel_.acc));
    Add(Cost::kPartialLine, LevelOf(bytes), bytes * blocks_of_k / kLine);
    Add(Cost::kCLine, together_, Real(x_.m) * Real(CeilDiv(row, 64)));
  } else {
    Add(Cost::kCLine, together_, rows * Real(CeilDiv(row, 64)));
  }
  Add(Cost::kCSegment, together_, rows * Real(CeilDiv(x_.n, wide)));
  if (x_.m > 1 && row >= kPage) Add(Cost::kCPage, rows * Real(CeilDiv(x_.n, kernel_.nr)));
}

void Counter::Count(const InnerProduct& x) {
  const int64_t lanes = int64_t{kernel_.lanes} * kernel_.kr;
  const auto tiles = [&](int64_t rows, int64_t columns, int64_t count) {
    if (rows == 0 || columns == 0 || count == 0) return;
    const double all = Real(count), steps = Real(x_.k / lanes);
    Add(Cost::kInnerStep, all * steps * Cycles(Real(rows), Real(columns)));
    Add(Cost::kInnerLanes, all * Real(rows * columns));
    Add(Cost::kInnerTile, all);
    const int64_t vector_bytes = lanes * b_bytes_;
    if (x_.k * b_bytes_ % vector_bytes != 0) Add(Cost::kInnerUnaligned, all * steps * Real(rows + columns));
    if (x_.k % lanes != 0) Add(Cost::kInnerRest, all * Real(rows * columns));
  };
  const int64_t side = IsWide() ? loops::kInnerWideTile : loops::kInnerTile, few = std::min(x_.m, x_.n);
  int64_t longer_left = std::max(x_.m, x_.n), turns = CeilDiv(longer_left, side);
  if (IsWide() && few >= loops::kFewestTall &&
      few < loops::kFewestTall + static_cast<int64_t>(std::size(loops::kTallRows))) {
    const int64_t rows = loops::kTallRows[few - loops::kFewestTall];
    tiles(rows, few, longer_left / rows);
    turns = longer_left / rows + 1;
    longer_left %= rows;
  }
  tiles(side, side, longer_left / side * (few / side));
  tiles(side, few % side, longer_left / side);
  tiles(longer_left % side, side, few / side);
  tiles(longer_left % side, few % side, 1);
  if (x.pack_a) Add(Cost::kInnerCopyA, Real(x_.m) * Real(x_.k));
  if (x.pack_b) Add(Cost::kInnerCopyB, Real(x_.n) * Real(x_.k));
  const double a = Real(x_.m) * Real(x_.k) * Real(a_bytes_), b = Real(x_.n) * Real(x_.k) * Real(b_bytes_);
  const auto [longer, other] = x_.n >= x_.m ? std::pair{b, a} : std::pair{a, b};
  Add(x.prefetch ? Cost::kInnerPrefetchedLine : Cost::kInnerLine, together_, longer / kLine);
  Add(Cost::kInnerAgainLine, LevelOf(other), other / kLine * Real(turns));
}

void Counter::Count(const Sweep& x) {
  const int64_t lanes = int64_t{kernel_.lanes} * kernel_.kr, stride = std::abs(x_.rsb) * b_bytes_;
  const double lines = Real(x_.k) * std::ceil(Real(x_.n * b_bytes_) / kLine);
  for (int64_t i = 0; i < x_.m; i += loops::kSweepRows) {
    const int64_t rows = std::min(loops::kSweepRows, x_.m - i);
    const int64_t width = loops::kSweepSumsBytes / ElementBytes(kernel_.acc) / rows;
    const double blocks = Real(CeilDiv(x_.n, width)), sweeps = Real(CeilDiv(x_.k, loops::kSweepDepth));
    Add(Cost::kSweep, sweeps * blocks);
    const double cycles = std::max(Cycles(Real(rows), Real(loops::kSweepDepth)), Real(rows));
    counts_[static_cast<size_t>(Cost::kSweepVector) + static_cast<size_t>(rows - 1)] +=
        sweeps * Real(CeilDiv(x_.n, lanes)) * cycles;
    if (x_.n % lanes != 0) Add(Cost::kSweepMasked, sweeps * blocks * Real(rows));
    Add(x.prefetch ? Cost::kSweepPrefetchedLine : Cost::kSweepLine, b_level_, lines);
    Add(Cost::kSweepA, Real(rows) * Real(x_.k) * blocks);
    if (stride >= kPage) Add(Cost::kSweepPage, Real(x_.k) * blocks);
    if (stride % 64 != 0) Add(Cost::kSweepUnalignedLine, lines);
  }
  Add(Cost::kSweepSumsLine, together_, Real(x_.m) * std::ceil(Real(x_.n * c_bytes_) / kLine));
}

CostCounts Counts(const Schedule& schedule, const KernelInfo& kernel, const Product& product, const Product& whole,
                  int64_t slices, const CoreModel& core) {
  Counter counter(kernel, product, whole, core);
  if (product.m > 0 && product.n > 0) {
    std::visit([&](const auto& path) { counter.Count(path); }, schedule);
  }
  counter.Repeat(product.batch);
  counter.Slices(slices);
  return counter.counts();
}

}  // namespace

CostCounts CountCosts(const Schedule& schedule, const KernelInfo& kernel, const Product& product, int64_t slices,
                      const CoreModel& core) {
  return Counts(schedule, kernel, product, product, slices, core);
}

CostCounts CountCostsOfPart(const Schedule& schedule, const KernelInfo& kernel, const Product& part,
                            const Product& whole, const CoreModel& core) {
  return Counts(schedule, kernel, part, whole, 1, core);
}

double PredictedNs(const CostCounts& counts, const CostNs& ns) {
  return std::inner_product(counts.begin(), counts.end(), ns.begin(), 0.0);
}

}  // namespace jax_nano
