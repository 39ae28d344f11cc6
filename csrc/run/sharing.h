// Decides when a call shares its work with helper threads.
//
// A helper is a loss if its CPU has other work to do: another thread of this process (Python preparing the next batch)
// or another program. That cannot be known in advance, but is observed afterwards at no cost:
//
//   * disturbed: a waiting helper polls all the time; if two polls are far apart, another thread took its CPU;
//   * late: the caller waited for a helper's last item longer than it would have taken to compute all items alone;
//   * in vain: a helper was woken for a short call and found no work, then or soon after.
//
// Long calls always wake helpers: half of such a call is longer than a thread takes to wake. Short calls use helpers
// that are awake and waiting (standby.h) and may wake one more as a trial. After a failed trial, or any loss above,
// there are no trials for a while, with exponential back-off; a helper that pays off ends the back-off. A loss that
// helpers have outweighed with what they saved since the last one changes nothing: in a program of many short products
// a few helpers are always disturbed. So short products in a loop find helpers waiting, and where all CPUs are busy the
// calling thread computes them alone.
//
// No decision here changes a result: it does not depend on who computes an item (plan/plan.h).
#ifndef JAX_NANO_RUN_SHARING_H_
#define JAX_NANO_RUN_SHARING_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>

namespace jax_nano::sharing {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using Duration = std::chrono::nanoseconds;

// A call that takes one thread so long is worth waking others, which takes 5 to 60 us.
inline constexpr Duration kLong = std::chrono::microseconds(150);

// What a helper costs that is woken in vain or whose CPU another thread takes.
inline constexpr Duration kUsualLoss = std::chrono::microseconds(50);

// How long the calls of one plan take one thread: a running estimate.
class Pace {
 public:
  explicit Pace(Duration guess) : alone_(guess.count()) {}

  // Nothing makes this shorter: such a call always wakes all helpers.
  static constexpr Duration kEndless = Duration::max();

  Duration alone() const { return Duration(alone_.load(std::memory_order_relaxed)); }

  // A measured call. Takes over a shorter time at once and a longer one slowly: the caller may have been interrupted.
  void Saw(Duration alone);

 private:
  std::atomic<Duration::rep> alone_;
};

// The gains and losses by helpers of this process lately, and whether another may be woken. All calls and helpers share
// one; the time comes in as an argument.
class Ledger {
 public:
  // How many of `wanted` sleeping threads a call may wake that takes one thread so long.
  int64_t MayWake(int64_t wanted, Duration alone, Time now);

  // Whether helpers may stand by for other calls.
  bool Open(Time now) const { return now.time_since_epoch().count() >= closed_until_.load(std::memory_order_relaxed); }

  // A helper came in time and left undisturbed.
  void Paid();

  // A helper did work that its caller would have done in that time.
  void Saved(Duration time);

  // A helper was disturbed, came in vain, or kept its caller waiting, which cost so much time.
  void Lost(Time now, Duration cost = kUsualLoss);

  // Losses so far. A helper that stands by leaves when there are more.
  int64_t losses() const { return losses_.load(std::memory_order_relaxed); }

 private:
  void Close(Time now);

  std::atomic<int64_t> closed_until_ = std::numeric_limits<int64_t>::min();
  std::atomic<int64_t> pause_ = 0;  // after the next loss, in ns
  std::atomic<int64_t> losses_ = 0;
  std::atomic<int64_t> credit_ = 0;  // ns that helpers saved and no loss has used up
};

// The one of this process.
Ledger& TheLedger();

// For tests, whose machine may be busy: from now on, or no longer, all calls wake all helpers, which stand by for as
// long as they ever may.
void ShareEveryCall(bool on);
bool SharesEveryCall();

}  // namespace jax_nano::sharing

#endif  // JAX_NANO_RUN_SHARING_H_
