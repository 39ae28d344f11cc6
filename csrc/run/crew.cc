#include "run/crew.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

namespace jax_nano::crew {
namespace {

thread_local bool is_member = false;

// One thread, which starts with its first task and never ends.
class Member {
 public:
  explicit Member(int cpu) : cpu_(cpu) {}

  int cpu() const { return cpu_; }

  // False if it has a task.
  bool Take(std::function<void()>& task) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    try {
      if (!started_) Start();
    } catch (...) {
      busy_.store(false, std::memory_order_release);
      throw;
    }
    {
      const std::lock_guard lock(mutex_);
      task_ = std::move(task);
    }
    wake_.notify_one();
    return true;
  }

 private:
  void Start() {
    // Signals are for the threads of the program, but for those of a thread's own faults.
    sigset_t others, before;
    sigfillset(&others);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&others, fault);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    // It is on its CPU before anybody can know of it and give it another mask, which then stays.
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(static_cast<size_t>(cpu_), &only);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setaffinity_np(&attributes, sizeof only, &only);
    pthread_t thread;
    const int error = pthread_create(&thread, &attributes, &Run, this);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (error != 0) throw std::system_error(error, std::generic_category(), "a helper's thread");
    started_ = true;
  }

  static void* Run(void* self) { static_cast<Member*>(self)->Work(); }

  [[noreturn]] void Work() {
    is_member = true;
    pthread_setname_np(pthread_self(), "jax_nano");
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return static_cast<bool>(task_); });
        task = std::exchange(task_, nullptr);
      }
      task();
      task = nullptr;
      busy_.store(false, std::memory_order_release);
    }
  }

  const int cpu_;
  std::atomic<bool> busy_ = false;
  bool started_ = false;  // changed while busy
  std::mutex mutex_;
  std::condition_variable wake_;
  std::function<void()> task_;  // under the mutex
};

using Crew = std::vector<std::unique_ptr<Member>>;

// A thread for each CPU that the calling thread may use.
Crew* Hire() {
  auto* crew = new Crew;
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return crew;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(static_cast<size_t>(cpu), &allowed)) crew->push_back(std::make_unique<Member>(cpu));
  }
  return crew;
}

// Never destroyed: its threads wait while the process exits. A forked process has none of its parent's threads.
std::atomic<Crew*>& TheCrew() {
  static std::atomic<Crew*> crew = [] {
    pthread_atfork(nullptr, nullptr, [] { TheCrew().store(Hire()); });
    return Hire();
  }();
  return crew;
}

}  // namespace

bool Wake(std::function<void()> task) {
  Crew& crew = *TheCrew().load(std::memory_order_acquire);
  const int here = sched_getcpu();
  // The nearest after the caller's, which are likely to share its caches.
  const auto first = std::find_if(crew.begin(), crew.end(), [&](const auto& member) { return member->cpu() > here; });
  const size_t skip = static_cast<size_t>(first - crew.begin());
  for (size_t i = 0; i < crew.size(); ++i) {
    Member& member = *crew[(skip + i) % crew.size()];
    if (member.cpu() != here && member.Take(task)) return true;
  }
  return false;
}

bool IsMember() { return is_member; }

}  // namespace jax_nano::crew
