// Fork-join on a thread pool that this code does not own and may itself be running on.
#ifndef JAX_NANO_RUN_PARALLEL_H_
#define JAX_NANO_RUN_PARALLEL_H_

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "run/crew.h"
#include "run/sharing.h"
#include "run/standby.h"

namespace jax_nano {

namespace internal {

// The longest time for which a thread spins before it sleeps: about what waking it costs. With 200 us, XLA's own
// parallel loops between products waited for the pool's threads: a training step lost 3 %.
inline constexpr std::chrono::microseconds kPatience{50};

// A range of items that are not claimed yet. Both ends are one word: 2^32 items would have results of petabytes.
class Share {
 public:
  // Before any other thread knows of it.
  void Set(int64_t begin, int64_t end) { ends_.store(Pack(begin, end), std::memory_order_relaxed); }

  // Claims an item; -1 if none is left.
  int64_t ClaimFirst() {
    return Claim([](int64_t begin, int64_t end) { return std::array{begin, begin + 1, end}; });
  }
  int64_t ClaimLast() {
    return Claim([](int64_t begin, int64_t end) { return std::array{end - 1, begin, end - 1}; });
  }

 private:
  static uint64_t Pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }

  // `take` says which item, and what is left, of a range that is not empty.
  template <typename Take>
  int64_t Claim(Take take) {
    for (uint64_t seen = ends_.load(std::memory_order_relaxed);;) {
      const int64_t begin = static_cast<int64_t>(seen >> 32), end = static_cast<int64_t>(seen & UINT32_MAX);
      if (begin == end) return -1;
      const auto [item, new_begin, new_end] = take(begin, end);
      if (ends_.compare_exchange_weak(seen, Pack(new_begin, new_end), std::memory_order_relaxed)) return item;
    }
  }

  alignas(64) std::atomic<uint64_t> ends_ = 0;
};

// Outlives the call: a helper that starts late finds no work left and touches nothing but this.
//
// Each thread has a share of neighbouring items, and steals from the far end of other shares when it is through: so a
// repeated call finds most of its operands and of its result in the caches of the same core as the last time.
struct ForkJoin {
  ForkJoin(int64_t n, int64_t threads, sharing::Time now) : items(n), begin(now), shares(static_cast<size_t>(threads)) {
    for (int64_t t = 0; t < threads; ++t) {
      shares[static_cast<size_t>(t)].Set(n * t / threads, n * (t + 1) / threads);
    }
  }

  const int64_t items;
  const sharing::Time begin;
  const int caller_cpu = sched_getcpu();
  const unsigned caller_modes = _mm_getcsr();  // of rounding and of subnormals
  std::vector<Share> shares;                   // one for each thread, the caller's first
  std::atomic<int64_t> done = 0;               // items finished
  std::atomic<bool> failed = false;
  std::exception_ptr error;  // of the item that set `failed`; read after `done` reached `items`

  // Runs items until none is left to claim, beginning with this thread's own; returns how many.
  template <typename Run>
  int64_t Drain(size_t thread, Run* run) {
    int64_t ran = 0;
    const auto run_claimed = [&](int64_t item) {
      RunClaimed(item, run);
      ++ran;
    };
    for (int64_t i; (i = shares[thread].ClaimFirst()) >= 0;) run_claimed(i);
    for (size_t other = 1; other < shares.size(); ++other) {
      Share& share = shares[(thread + other) % shares.size()];
      for (int64_t i; (i = share.ClaimLast()) >= 0;) run_claimed(i);
    }
    return ran;
  }

  // `run` is only used for an item that was claimed, while the caller is still waiting for it.
  template <typename Run>
  void RunClaimed(int64_t item, Run* run) {
    if (!failed.load(std::memory_order_relaxed)) {
      try {
        (*run)(item);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == items) done.notify_all();
  }

  // A helper's part. It spins afterwards for as long as the call took: waiting never costs more than it could save.
  template <typename Run>
  standby::Help Assist(size_t thread, Run* run) {
    if (!crew::IsMember()) standby::LeaveCpu(caller_cpu);
    const unsigned modes = _mm_getcsr();
    _mm_setcsr(caller_modes);
    const sharing::Time start = sharing::Clock::now();
    const int64_t ran = Drain(thread, run);
    const sharing::Time end = sharing::Clock::now();
    _mm_setcsr(modes);
    return {ran > 0, ran > 0 ? end - start : sharing::Duration(0), std::min<sharing::Duration>(kPatience, end - begin)};
  }

  bool IsDone() const { return done.load(std::memory_order_acquire) == items; }

  void Wait() {
    if (standby::SpinUntil(kPatience, false, [&] { return IsDone(); }) == standby::Waited::kDone) return;
    for (int64_t d; (d = done.load(std::memory_order_acquire)) != items;) done.wait(d);
  }
};

}  // namespace internal

// Calls run(i) for every i in [0, items), on the calling thread and on up to pool.num_threads() - 1 others, or calls
// alone(), which does the same work on the calling thread, as sharing.h decides. Returns when all is done and rethrows
// the first exception. `pace` is of all calls with this work.
//
// XLA may run the caller on a worker of this very pool. Waiting for a scheduled task to *start* would then
// deadlock as soon as every worker does so; therefore the caller works too and waits only for items that
// some running thread has claimed.
//
// Pool: `void Schedule(F&&)` and `int64_t num_threads()`, as xla::ffi::ThreadPool has them.
template <typename Pool, typename Alone, typename Run>
void ParallelFor(Pool& pool, int64_t items, sharing::Pace& pace, Alone alone, Run run) {
  using sharing::Clock;
  sharing::Ledger& ledger = sharing::TheLedger();
  const int64_t helpers = std::min(pool.num_threads(), items) - 1;
  if (helpers < 1) return alone();
  const sharing::Time begin = Clock::now();
  const sharing::Duration takes = pace.alone();
  int64_t to_wake = standby::Waiting() > 0 ? 0 : ledger.MayWake(helpers, takes, begin);
  if (to_wake == 0 && standby::Waiting() == 0) {
    alone();
    pace.Saw(Clock::now() - begin);
    return;
  }
  auto state = std::make_shared<internal::ForkJoin>(items, helpers + 1, begin);
  try {
    const auto job = [&](int64_t helper) -> standby::Job {
      return [state, helper, run_here = &run] { return state->Assist(static_cast<size_t>(helper), run_here); };
    };
    int64_t helper = 1;
    if (to_wake == 0) {
      while (helper <= helpers && standby::Hand(job(helper))) ++helper;
      to_wake = ledger.MayWake(helpers + 1 - helper, takes, begin);
    }
    const bool trial = takes < sharing::kLong;
    for (; to_wake > 0; --to_wake, ++helper) {
      std::function<void()> serve = [help = job(helper), trial] { standby::Serve(help, trial); };
      if (!trial) {
        pool.Schedule(std::move(serve));
      } else if (!crew::Wake(std::move(serve))) {
        break;
      }
    }
  } catch (...) {
    // No memory for another task. Those that exist may be using `run` already: carry on with them.
  }
  const int64_t ran = state->Drain(0, &run);
  const sharing::Time through = Clock::now();
  if (!state->IsDone()) {
    state->Wait();
    // Longer than all items would have taken the caller?
    const sharing::Time now = Clock::now();
    const sharing::Duration alone_takes = ran > 0 ? (through - begin) * items / ran : takes;
    if (now - begin > alone_takes) ledger.Lost(now, now - begin - alone_takes);
  }
  if (ran > 0) pace.Saw((through - begin) * items / ran);
  if (state->failed.load()) std::rethrow_exception(state->error);
}

}  // namespace jax_nano

#endif  // JAX_NANO_RUN_PARALLEL_H_
