#include "run/standby.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

namespace jax_nano::standby {
namespace {

using sharing::Clock;

// A pool gets its thread back after this time, however many jobs come: it may have other work.
constexpr std::chrono::milliseconds kLongestService{10};
constexpr int kPauses = 16;  // between two polls of the clock
// Polls are 1 us apart. Interrupts by the kernel or a hypervisor take some us; another thread takes longer, with two
// context switches.
constexpr std::chrono::microseconds kDisturbance{20};
// On the caller's CPU a yield lasts for the caller's time slice: so many are milliseconds, in which the scheduler
// balances its queues. If the caller sleeps they take no time.
constexpr int kYields = 8;

// One waiting thread; on its stack.
struct Seat {
  std::atomic<int> cpu = sched_getcpu();
  Job job;
  std::atomic<bool> has_job = false;
};

// The waiting threads of all pools: any of them can take any call's job.
class Room {
 public:
  // A thread that is let in may enter and leave until it goes. At most one for each CPU but the caller's: two that spin
  // on one CPU would delay each other's jobs.
  bool LetIn(bool trial) {
    if (members_.fetch_add(1, std::memory_order_relaxed) < most_members_ || trial) return true;
    Go();
    return false;
  }
  void Go() { members_.fetch_sub(1, std::memory_order_relaxed); }

  void Enter(Seat* seat) {
    const std::lock_guard lock(mutex_);
    const size_t taken = taken_.load(std::memory_order_relaxed);
    seats_[taken] = seat;
    taken_.store(taken + 1, std::memory_order_relaxed);
  }

  // False if a job has been handed to the seat.
  bool Leave(Seat* seat) {
    const std::lock_guard lock(mutex_);
    const auto end = seats_.begin() + taken_.load(std::memory_order_relaxed);
    const auto at = std::find(seats_.begin(), end, seat);
    if (at == end) return false;
    std::copy(at + 1, end, at);
    taken_.fetch_sub(1, std::memory_order_relaxed);
    return true;
  }

  bool Hand(const Job& job) {
    if (waiting() == 0) return false;
    const std::lock_guard lock(mutex_);
    const int here = sharing::SharesEveryCall() ? -1 : sched_getcpu();
    // The one that came last: its caches are warmest. Not one on this CPU: it runs only when the caller yields.
    for (size_t i = taken_.load(std::memory_order_relaxed); i-- > 0;) {
      Seat* const seat = seats_[i];
      if (seat->cpu.load(std::memory_order_relaxed) == here) continue;
      const auto at = seats_.begin() + static_cast<int64_t>(i);
      std::copy(at + 1, seats_.begin() + taken_.load(std::memory_order_relaxed), at);
      taken_.fetch_sub(1, std::memory_order_relaxed);
      handed_.fetch_add(1, std::memory_order_relaxed);
      seat->job = job;
      seat->has_job.store(true, std::memory_order_release);
      return true;
    }
    return false;
  }

  size_t waiting() const { return taken_.load(std::memory_order_relaxed); }
  int64_t handed() const { return handed_.load(std::memory_order_relaxed); }

 private:
  static int MostMembers() {
    cpu_set_t allowed;
    return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) - 1 : 0;
  }

  const int most_members_ = MostMembers();
  std::atomic<int> members_ = 0;
  std::mutex mutex_;
  std::array<Seat*, CPU_SETSIZE> seats_;
  std::atomic<size_t> taken_ = 0;  // the first of `seats_`; changed under the lock, looked at without it
  std::atomic<int64_t> handed_ = 0;
};

// Never destroyed: threads of a pool may stand by while the process exits. A forked process has a room of its own:
// those who wait in its parent's are not there, their seats are memory that its threads get as stacks, and one of them
// may have held the lock.
Room& TheRoom() {
  static std::atomic<Room*> room = [] {
    pthread_atfork(nullptr, nullptr, [] { room.store(new Room, std::memory_order_relaxed); });
    return new Room;
  }();
  return *room.load(std::memory_order_relaxed);
}

}  // namespace

int64_t Waiting() { return static_cast<int64_t>(TheRoom().waiting()); }

bool Hand(const Job& job) { return TheRoom().Hand(job); }

int64_t HandedJobs() { return TheRoom().handed(); }

void Serve(const Job& job, bool trial) noexcept {
  sharing::Ledger& ledger = sharing::TheLedger();
  const int64_t losses = ledger.losses();
  const bool whatever_happens = sharing::SharesEveryCall();
  const Help first = job();
  ledger.Saved(first.worked);
  sharing::Duration patience = first.patience;
  sharing::Time now = Clock::now();
  const sharing::Time end = now + kLongestService;
  if (!(trial || whatever_happens || ledger.Open(now))) return;
  if (!TheRoom().LetIn(trial)) return;
  Seat seat;
  bool useful = false, disturbed = false;
  while (now < end && (whatever_happens || (!disturbed && ledger.losses() == losses))) {
    TheRoom().Enter(&seat);
    if (whatever_happens) patience = end - now;
    const Waited waited = SpinUntil(patience, !whatever_happens, [&] {
      seat.cpu.store(sched_getcpu(), std::memory_order_relaxed);
      return seat.has_job.load(std::memory_order_acquire);
    });
    disturbed = waited == Waited::kDisturbed;
    if (waited != Waited::kDone && TheRoom().Leave(&seat)) break;
    // Handed under the room's lock: a seat that cannot leave has its job.
    const Help help = seat.job();
    ledger.Saved(help.worked);
    useful = useful || help.useful;
    patience = help.patience;
    seat.job = nullptr;
    seat.has_job.store(false, std::memory_order_relaxed);
    now = Clock::now();
  }
  TheRoom().Go();
  if (useful && !disturbed && ledger.losses() == losses) {
    ledger.Paid();
  } else {
    ledger.Lost(Clock::now());
  }
}

Waited SpinUntil(sharing::Duration patience, bool leave, const std::function<bool()>& is_done) {
  sharing::Time last = Clock::now();
  const sharing::Time end = last + patience;
  int cpu = sched_getcpu();
  for (;;) {
    for (int i = 0; i < kPauses; ++i) {
      if (is_done()) return Waited::kDone;
      _mm_pause();
    }
    const sharing::Time now = Clock::now();
    const int here = sched_getcpu();
    // A thread that was moved has a CPU of its own again.
    const bool disturbed = leave && now - last > kDisturbance && here == cpu;
    if (disturbed || now >= end) {
      if (is_done()) return Waited::kDone;
      return disturbed ? Waited::kDisturbed : Waited::kTooLong;
    }
    last = now;
    cpu = here;
    sched_yield();
  }
}

void LeaveCpu(int cpu) {
  for (int i = 0; i < kYields && sched_getcpu() == cpu; ++i) sched_yield();
}

}  // namespace jax_nano::standby
