// Threads of a pool that stay awake for a moment after their work, so that the next call finds them running.
//
// Waking a thread costs 25 to 60 us where its CPU sleeps under a hypervisor, as much as a product of 150^3 lasts; and
// a scheduler that takes such a CPU for busy queues the thread behind the caller for milliseconds.
//
// The threads belong to others, so where they may run and how they are scheduled is theirs: nothing here changes that.
// A thread that waits lets every other thread have its CPU, and goes when one takes it (sharing.h).
#ifndef JAX_NANO_RUN_STANDBY_H_
#define JAX_NANO_RUN_STANDBY_H_

#include <chrono>
#include <cstdint>
#include <functional>

#include "run/sharing.h"

namespace jax_nano::standby {

// How a helper's share of a call's work went.
struct Help {
  bool useful;                 // it found work
  sharing::Duration patience;  // how long its thread should stand by afterwards
};

// Does a share of a call's work. Must not throw.
using Job = std::function<Help()>;

// How many threads stand by.
int64_t Waiting();

// Gives the job to a thread that stands by, on another CPU; false if there is none.
bool Hand(const Job& job);

// How many jobs were given to threads that stood by, since the process began.
int64_t HandedJobs();

// Runs the job on the calling thread, which then stands by for others', for a bounded time, if the ledger is open or
// the thread was woken as a trial. Tells the ledger how it went.
void Serve(const Job& job, bool trial) noexcept;

enum class Waited { kDone, kTooLong, kDisturbed };

// Waits for `is_done` by spinning, in a way that lets every other thread have this CPU. With `leave`, gives up when one
// took it.
Waited SpinUntil(sharing::Duration patience, bool leave, const std::function<bool()>& is_done);

// Lets other threads have this CPU until the scheduler has moved the calling thread to another, for a bounded time.
void LeaveCpu(int cpu);

}  // namespace jax_nano::standby

#endif  // JAX_NANO_RUN_STANDBY_H_
