// What a process can change while its programs run: how many threads work for a call, and whether calls are logged.
#ifndef JAX_NANO_XLA_SETTINGS_H_
#define JAX_NANO_XLA_SETTINGS_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

namespace jax_nano {

inline constexpr int64_t kNoThreadLimit = std::numeric_limits<int64_t>::max();

namespace settings {

// Read by every call, so they are variables and not behind functions.
inline std::atomic<int64_t> thread_limit = kNoThreadLimit;
inline std::atomic<bool> logs_calls = false;

}  // namespace settings

// XLA's pool of threads, of which at most as many as the process allows work for a call.
//
// Pool: `void Schedule(F&&)` and `int64_t num_threads()`, as xla::ffi::ThreadPool has them.
template <typename Pool>
class LimitedPool {
 public:
  explicit LimitedPool(Pool& pool) : pool_(pool) {}

  int64_t num_threads() const {
    return std::min(pool_.num_threads(), settings::thread_limit.load(std::memory_order_relaxed));
  }

  template <typename F>
  void Schedule(F&& task) {
    pool_.Schedule(std::forward<F>(task));
  }

 private:
  Pool& pool_;
};

// Writes a line about a call to the standard error stream.
void LogCall(const std::string& what, std::chrono::nanoseconds took);

// Times a call until the end of its scope, if calls are logged.
//
// describe(): what the call is; asked only then.
template <typename Describe>
class CallTimer {
 public:
  explicit CallTimer(Describe describe)
      : describe_(std::move(describe)), on_(settings::logs_calls.load(std::memory_order_relaxed)) {
    if (on_) [[unlikely]] {
      begin_ = Clock::now();
    }
  }
  ~CallTimer() {
    if (on_) [[unlikely]] {
      LogCall(describe_(), Clock::now() - begin_);
    }
  }

  CallTimer(const CallTimer&) = delete;
  CallTimer& operator=(const CallTimer&) = delete;

 private:
  using Clock = std::chrono::steady_clock;

  Describe describe_;
  const bool on_;
  Clock::time_point begin_;
};

}  // namespace jax_nano

#endif  // JAX_NANO_XLA_SETTINGS_H_
