// A thread pool of our own with the interface of xla::ffi::ThreadPool, for running plans without XLA: tests of
// bit identity, and benchmarks of the kernels alone.
#ifndef JAX_NANO_RUN_PRIVATE_POOL_H_
#define JAX_NANO_RUN_PRIVATE_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace jax_nano {

class PrivatePool {
 public:
  // `threads` counts the caller, which ParallelFor puts to work too.
  explicit PrivatePool(int64_t threads) : threads_(threads) {
    for (int64_t i = 1; i < threads; ++i) workers_.emplace_back([this] { Work(); });
  }

  ~PrivatePool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& w : workers_) w.join();
  }

  PrivatePool(const PrivatePool&) = delete;
  PrivatePool& operator=(const PrivatePool&) = delete;

  int64_t num_threads() const { return threads_; }

  void Schedule(std::function<void()> task) {
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void Work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  const int64_t threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace jax_nano

#endif  // JAX_NANO_RUN_PRIVATE_POOL_H_
