#include "run/crew.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
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
      if (thread_ == nullptr) Start();
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
    // Signals are for the threads of the program, but for those of a thread's own faults. (glibc: the calling
    // thread's.)
    sigset_t others, before;
    sigfillset(&others);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&others, fault);
    sigprocmask(SIG_SETMASK, &others, &before);
    try {
      // Never destroyed or joined; to detach it would ask for glibc 2.34.
      thread_ = new std::thread([this] { Work(); });
    } catch (...) {
      sigprocmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    sigprocmask(SIG_SETMASK, &before, nullptr);
    // Later it would override a mask that somebody has given to all threads since then.
    is_on_its_cpu_.wait(false);
  }

  [[noreturn]] void Work() {
    is_member = true;
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(static_cast<size_t>(cpu_), &only);
    sched_setaffinity(0, sizeof only, &only);  // where that is forbidden it runs where the scheduler likes
    prctl(PR_SET_NAME, "jax_nano");
    is_on_its_cpu_.store(true);
    is_on_its_cpu_.notify_one();
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
  std::thread* thread_ = nullptr;  // changed while busy
  std::atomic<bool> is_on_its_cpu_ = false;
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
