// The plans of a call site, each for the shapes that it was made for.
#ifndef JAX_NANO_XLA_PLANS_H_
#define JAX_NANO_XLA_PLANS_H_

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

namespace jax_nano::xla_call {

// The plans of one call site, shared by all its concurrent runs. There is nearly always one, as shapes are fixed when a
// program is compiled: it is found without a lock. A program that was exported with symbolic sizes may run with any
// number of shapes; the first ones are kept for good, and of the others those that ran last.
template <typename Entry>
class Plans {
 public:
  // The entry that `fits(entry)`; if there is none, what `make()` returns, a std::unique_ptr<const Entry>, is kept.
  template <typename Fits, typename Make>
  std::shared_ptr<const Entry> Find(const Fits& fits, const Make& make) {
    const Entry* last = last_.load(std::memory_order_acquire);
    if (last != nullptr && fits(*last)) return Unowned(last);
    const std::lock_guard lock(mutex_);
    for (const auto& entry : kept_) {
      if (fits(*entry)) return Unowned(Last(entry.get()));
    }
    const auto found = std::find_if(recent_.begin(), recent_.end(), [&](const auto& entry) { return fits(*entry); });
    if (found != recent_.end()) {
      recent_.splice(recent_.begin(), recent_, found);
      return recent_.front();
    }
    if (kept_.size() < kMostKept) {
      kept_.push_back(make());
      return Unowned(Last(kept_.back().get()));
    }
    recent_.push_front(make());
    if (recent_.size() > kMostRecent) recent_.pop_back();  // a run that uses it owns it
    return recent_.front();
  }

 private:
  static constexpr size_t kMostKept = 16, kMostRecent = 112;

  // Of an entry that lives as long as this does: a pointer that counts no references.
  static std::shared_ptr<const Entry> Unowned(const Entry* entry) { return {std::shared_ptr<const Entry>(), entry}; }

  const Entry* Last(const Entry* entry) {
    last_.store(entry, std::memory_order_release);
    return entry;
  }

  std::atomic<const Entry*> last_ = nullptr;  // of kept_
  std::mutex mutex_;                          // guards what follows
  std::vector<std::unique_ptr<const Entry>> kept_;
  std::list<std::shared_ptr<const Entry>> recent_;
};

}  // namespace jax_nano::xla_call

#endif  // JAX_NANO_XLA_PLANS_H_
