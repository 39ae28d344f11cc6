// Threads of a pool that stay awake for a moment after their work, so that the next call finds them running.
//
// Waking a thread costs 25 to 60 us where its CPU sleeps under a hypervisor, as much as a product of 150^3 lasts; and
// a scheduler that takes such a CPU for busy queues the thread behind the caller for milliseconds.
#ifndef JAX_NANO_STANDBY_H_
#define JAX_NANO_STANDBY_H_

#include <chrono>
#include <cstdint>
#include <functional>

namespace jax_nano::standby {

// Does a share of a call's work, and returns how long its thread should stand by afterwards. Must not throw.
using Job = std::function<std::chrono::nanoseconds()>;

// Gives the job to a thread that stands by; false if there is none.
bool Hand(const Job& job);

// How many jobs were given to threads that stood by, since the process began.
int64_t HandedJobs();

// Runs the job on the calling thread, which then stands by for others', for a bounded time.
void Serve(const Job& job) noexcept;

// Waits for `is_done` by spinning, in a way that lets every other thread have this CPU; false if it took too long.
bool SpinUntil(std::chrono::nanoseconds patience, const std::function<bool()>& is_done);

// Moves the calling thread to another CPU, if it runs on this one and may use others.
void LeaveCpu(int cpu);

}  // namespace jax_nano::standby

#endif  // JAX_NANO_STANDBY_H_
