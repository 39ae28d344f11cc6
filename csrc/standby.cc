#include "standby.h"

#include <immintrin.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

namespace jax_nano::standby {
namespace {

using Clock = std::chrono::steady_clock;

// A pool gets its thread back after this time, however many jobs come: it has other work to do too.
constexpr std::chrono::milliseconds kLongestService{10};
constexpr int kPauses = 16;  // between two looks at the clock

// Moves a thread, 0 for the calling one, from this CPU to another that it may use.
void Move(pid_t thread, int cpu) {
  cpu_set_t allowed;
  if (sched_getaffinity(thread, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(static_cast<unsigned>(cpu), &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(thread, sizeof others, &others) != 0) return;
  sched_setaffinity(thread, sizeof allowed, &allowed);
}

// Where one thread waits; on its stack.
struct Seat {
  const pid_t thread = gettid();
  std::atomic<int> cpu = sched_getcpu();
  Job job;
  std::atomic<bool> has_job = false;
};

// The seats of all threads that stand by, of all pools: whose thread does the work makes no difference to it.
class Room {
 public:
  // A thread that is let in may enter and leave until it goes. No more than there are CPUs beside a caller's: on one
  // CPU, two that stand by keep each other from their jobs.
  bool LetIn() {
    if (members_.fetch_add(1, std::memory_order_relaxed) < most_members_) return true;
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
    if (taken_.load(std::memory_order_relaxed) == 0) return false;
    const std::lock_guard lock(mutex_);
    const size_t taken = taken_.load(std::memory_order_relaxed);
    if (taken == 0) return false;
    Seat* seat = seats_[taken - 1];  // the one that came last: its caches are warmest
    seat->job = job;
    taken_.store(taken - 1, std::memory_order_relaxed);
    handed_.fetch_add(1, std::memory_order_relaxed);
    // A thread that has yielded this very CPU would wait in its queue for as long as the caller works: nothing wakes
    // it, so nothing looks for an idle CPU. Under the lock, so that the thread and its seat still exist.
    const int here = sched_getcpu();
    if (seat->cpu.load(std::memory_order_relaxed) == here) Move(seat->thread, here);
    seat->has_job.store(true, std::memory_order_release);
    return true;
  }

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

// Never destroyed: threads of a pool may stand by while the process exits.
Room& TheRoom() {
  static Room& room = *new Room;
  return room;
}

}  // namespace

bool Hand(const Job& job) { return TheRoom().Hand(job); }

int64_t HandedJobs() { return TheRoom().handed(); }

void Serve(const Job& job) noexcept {
  const Clock::time_point end = Clock::now() + kLongestService;
  std::chrono::nanoseconds patience = job();
  if (!TheRoom().LetIn()) return;
  Seat seat;
  while (Clock::now() < end) {
    TheRoom().Enter(&seat);
    const bool handed = SpinUntil(patience, [&] {
      seat.cpu.store(sched_getcpu(), std::memory_order_relaxed);
      return seat.has_job.load(std::memory_order_acquire);
    });
    if (!handed && TheRoom().Leave(&seat)) break;
    // Handed under the room's lock: a seat that cannot leave has its job.
    patience = seat.job();
    seat.job = nullptr;
    seat.has_job.store(false, std::memory_order_relaxed);
  }
  TheRoom().Go();
}

bool SpinUntil(std::chrono::nanoseconds patience, const std::function<bool()>& is_done) {
  const Clock::time_point end = Clock::now() + patience;
  for (;;) {
    for (int i = 0; i < kPauses; ++i) {
      if (is_done()) return true;
      _mm_pause();
    }
    if (Clock::now() >= end) return is_done();
    sched_yield();
  }
}

void LeaveCpu(int cpu) {
  if (sched_getcpu() == cpu) Move(0, cpu);
}

}  // namespace jax_nano::standby
