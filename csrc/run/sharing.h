// When a call shares its work with other threads.
//
// A thread that helps costs the process something only if its CPU has other work: a Python thread that cuts the next
// batch out of an array meanwhile, another program. Nothing says so in advance, but what helpers met says it soon
// after, at no cost:
//
//   * a helper that waits for work looks around all the time; when a look takes long, another thread wanted its CPU;
//   * a caller that waits for a helper's last item knows from its own items how long all would have taken it alone;
//   * a helper that was woken for a short call and found no work, then or soon after, was woken in vain.
//
// A long call wakes helpers in any case: half of it is more than a thread needs to wake up. A short one takes those
// that are awake and idle now (standby.h), and may wake another only as a trial. After a trial that failed, or any of
// the above, there is none for a while, twice as long each time; while helpers come in time, trials cost nothing. So a
// loop of short products inside a program finds its helpers standing by, and a process whose CPUs are busy computes
// short products on the thread that asks for them.
//
// What is decided here never changes a result: who computes an item makes no difference to it (plan.h).
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

// How long the calls of one plan take one thread.
class Pace {
 public:
  explicit Pace(Duration guess) : alone_(guess.count()) {}

  // Nothing makes this shorter: such a call always wakes all helpers.
  static constexpr Duration kEndless = Duration::max();

  Duration alone() const { return Duration(alone_.load(std::memory_order_relaxed)); }

  // Follows a shorter time at once and longer ones slowly: those may be of a caller that was interrupted.
  void Saw(Duration alone);

 private:
  std::atomic<Duration::rep> alone_;
};

// What the helpers of this process met lately, and what may be done about it. All calls and helpers share one; the time
// comes in as an argument.
class Ledger {
 public:
  // How many of `wanted` sleeping threads a call may wake that takes one thread so long.
  int64_t MayWake(int64_t wanted, Duration alone, Time now);

  // Whether helpers may stand by for other calls.
  bool Open(Time now) const { return now.time_since_epoch().count() >= closed_until_.load(std::memory_order_relaxed); }

  // A helper came in time and left undisturbed.
  void Paid();

  // A helper was disturbed, came in vain, or kept its caller waiting.
  void Lost(Time now);

  // Losses so far. A helper that stands by leaves when there are more.
  int64_t losses() const { return losses_.load(std::memory_order_relaxed); }

 private:
  void Close(Time now);

  std::atomic<int64_t> closed_until_ = std::numeric_limits<int64_t>::min();
  std::atomic<int64_t> pause_ = 0;  // after the next loss, in ns
  std::atomic<int64_t> losses_ = 0;
};

// The one of this process.
Ledger& TheLedger();

// For tests, whose machine may be busy: from now on, or no longer, all calls wake all helpers, which stand by for as
// long as they ever may.
void ShareEveryCall(bool on);
bool SharesEveryCall();

}  // namespace jax_nano::sharing

#endif  // JAX_NANO_RUN_SHARING_H_
