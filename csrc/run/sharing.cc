#include "run/sharing.h"

#include <algorithm>

namespace jax_nano::sharing {
namespace {

// A trial costs up to 100 us of one CPU: at most 0.2 % where all fail.
constexpr int64_t kShortestPause = 500'000;  // ns
constexpr int64_t kLongestPause = 64'000'000;

// A loss is outweighed by so many times its cost: what helpers save where nothing disturbs them is more than that.
constexpr int64_t kOutweighs = 4;
// What was saved counts for so long: a program that changes, or a neighbour that begins, is noticed after some losses.
constexpr int64_t kMostCredit = 2'000'000;  // ns

constexpr int64_t kDrift = 16;  // a longer measurement raises Pace by at most 1/16

std::atomic<bool> share_every_call = false;

}  // namespace

void Pace::Saw(Duration alone) {
  const Duration::rep old = alone_.load(std::memory_order_relaxed);
  if (old == kEndless.count()) return;
  alone_.store(std::min(alone.count(), old + old / kDrift + 1), std::memory_order_relaxed);
}

int64_t Ledger::MayWake(int64_t wanted, Duration alone, Time now) {
  if (alone >= kLong || SharesEveryCall()) return wanted;
  int64_t until = closed_until_.load(std::memory_order_relaxed);
  const int64_t at = now.time_since_epoch().count();
  if (wanted < 1 || at < until) return 0;
  // Counts as lost until the helper says that it paid: calls that follow while it wakes up do not wake another.
  const int64_t pause = std::max(pause_.load(std::memory_order_relaxed), kShortestPause);
  if (!closed_until_.compare_exchange_strong(until, at + pause, std::memory_order_relaxed)) return 0;
  pause_.store(std::min(2 * pause, kLongestPause), std::memory_order_relaxed);
  return 1;
}

void Ledger::Paid() {
  pause_.store(pause_.load(std::memory_order_relaxed) / 4, std::memory_order_relaxed);
  closed_until_.store(std::numeric_limits<int64_t>::min(), std::memory_order_relaxed);
}

// Threads that save or lose at the same moment may overwrite each other's sums: an error of one call.
void Ledger::Saved(Duration time) {
  credit_.store(std::min(credit_.load(std::memory_order_relaxed) + time.count(), kMostCredit),
                std::memory_order_relaxed);
}

void Ledger::Lost(Time now, Duration cost) {
  losses_.fetch_add(1, std::memory_order_relaxed);
  const int64_t credit = credit_.load(std::memory_order_relaxed);
  const int64_t weight = std::min(cost.count(), kMostCredit) * kOutweighs;
  credit_.store(std::max<int64_t>(credit - weight, 0), std::memory_order_relaxed);
  if (credit >= weight) return;
  const int64_t at = now.time_since_epoch().count();
  if (at < closed_until_.load(std::memory_order_relaxed)) return;  // known already
  const int64_t pause = std::max(pause_.load(std::memory_order_relaxed), kShortestPause);
  closed_until_.store(at + pause, std::memory_order_relaxed);
  pause_.store(std::min(2 * pause, kLongestPause), std::memory_order_relaxed);
}

Ledger& TheLedger() {
  static Ledger ledger;
  return ledger;
}

void ShareEveryCall(bool on) { share_every_call.store(on, std::memory_order_relaxed); }
bool SharesEveryCall() { return share_every_call.load(std::memory_order_relaxed); }

}  // namespace jax_nano::sharing
