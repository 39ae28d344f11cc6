// Fork-join on a thread pool that this code does not own and may itself be running on.
#ifndef JAX_NANO_PARALLEL_H_
#define JAX_NANO_PARALLEL_H_

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>

#include "standby.h"

namespace jax_nano {

namespace internal {

// The longest time for which a thread spins where it would otherwise sleep: about what waking it costs. With 200 us,
// XLA's own parallel loops between products waited for the threads of the pool: a training step lost 3 %.
inline constexpr std::chrono::microseconds kPatience{50};

// Outlives the call: a helper that starts late finds no work left and touches nothing but this.
struct ForkJoin {
  explicit ForkJoin(int64_t n) : items(n) {}

  const int64_t items;
  const std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
  const int caller_cpu = sched_getcpu();
  const unsigned caller_modes = _mm_getcsr();  // of rounding and of subnormals
  std::atomic<int64_t> next = 0;               // items claimed
  std::atomic<int64_t> done = 0;               // items finished
  std::atomic<bool> failed = false;
  std::exception_ptr error;  // of the item that set `failed`; read after `done` reached `items`

  // Runs items until none is left to claim. `run` is only used for an item that was claimed, while the
  // caller is still waiting for it.
  template <typename Run>
  void Drain(Run* run) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      if (!failed.load(std::memory_order_relaxed)) {
        try {
          (*run)(i);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == items) done.notify_all();
    }
  }

  // A helper's share. It stands by for as long as the call took: waiting never costs more than it could save.
  template <typename Run>
  std::chrono::nanoseconds Help(Run* run) {
    standby::LeaveCpu(caller_cpu);
    const unsigned modes = _mm_getcsr();
    _mm_setcsr(caller_modes);
    Drain(run);
    _mm_setcsr(modes);
    return std::min<std::chrono::nanoseconds>(kPatience, std::chrono::steady_clock::now() - begin);
  }

  void Wait() {
    if (standby::SpinUntil(kPatience, [&] { return done.load(std::memory_order_acquire) == items; })) return;
    for (int64_t d; (d = done.load(std::memory_order_acquire)) != items;) done.wait(d);
  }
};

}  // namespace internal

// Calls run(i) for every i in [0, items), on the calling thread and on up to pool.num_threads() - 1 tasks of
// the pool; returns when all are done and rethrows the first exception.
//
// XLA may run the caller on a worker of this very pool. Waiting for a scheduled task to *start* would then
// deadlock as soon as every worker does so; therefore the caller works too and waits only for items that
// some running thread has claimed.
//
// Helpers stand by for a moment afterwards (standby.h), of which the next call, of any pool, makes use.
//
// Pool: `void Schedule(F&&)` and `int64_t num_threads()`, as xla::ffi::ThreadPool has them.
template <typename Pool, typename Run>
void ParallelFor(Pool& pool, int64_t items, Run run) {
  const int64_t helpers = std::min(pool.num_threads(), items) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < items; ++i) run(i);
    return;
  }
  auto state = std::make_shared<internal::ForkJoin>(items);
  try {
    const standby::Job help = [state, run_here = &run] { return state->Help(run_here); };
    int64_t h = 0;
    while (h < helpers && standby::Hand(help)) ++h;
    for (; h < helpers; ++h) pool.Schedule([help] { standby::Serve(help); });
  } catch (...) {
    // No memory for another task. Those that exist may be using `run` already: carry on with them.
  }
  state->Drain(&run);
  state->Wait();
  if (state->failed.load()) std::rethrow_exception(state->error);
}

}  // namespace jax_nano

#endif  // JAX_NANO_PARALLEL_H_
