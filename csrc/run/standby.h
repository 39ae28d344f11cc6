// Threads of a pool that spin for a moment after their work, so that the next call finds them running.
//
// Waking a thread takes 25 to 60 us if its CPU sleeps under a hypervisor, as long as a product of 150^3; and a
// scheduler that believes that CPU busy queues the thread behind the caller for milliseconds.
//
// The pool's owner decides where its threads run and how they are scheduled; nothing here changes that. A spinning
// thread yields to every other one, and stops when another takes its CPU (sharing.h).
#ifndef JAX_NANO_RUN_STANDBY_H_
#define JAX_NANO_RUN_STANDBY_H_

#include <chrono>
#include <cstdint>
#include <functional>

#include "run/sharing.h"

namespace jax_nano::standby {

// What came of a helper's part in a call.
struct Help {
  bool useful;                 // it found work
  sharing::Duration worked;    // how long
  sharing::Duration patience;  // how long its thread should spin afterwards
};

// Does a helper's part of a call's work. Must not throw.
using Job = std::function<Help()>;

// How many threads spin and wait for a job.
int64_t Waiting();

// Gives the job to a waiting thread on another CPU; false if there is none.
bool Hand(const Job& job);

// How many jobs were given to waiting threads since the process began.
int64_t HandedJobs();

// Runs the job on the calling thread, which then waits for other calls' jobs, for a bounded time, if the ledger is open
// or the thread was woken as a trial. Tells the ledger how it went.
void Serve(const Job& job, bool trial) noexcept;

enum class Waited { kDone, kTooLong, kDisturbed };

// Spins until `is_done`, yielding to every other thread. With `leave`, gives up when one took the CPU.
Waited SpinUntil(sharing::Duration patience, bool leave, const std::function<bool()>& is_done);

// Yields until the scheduler has moved the calling thread away from this CPU, for a bounded time.
void LeaveCpu(int cpu);

}  // namespace jax_nano::standby

#endif  // JAX_NANO_RUN_STANDBY_H_
