// Threads of this library, one for each CPU, that help with short calls.
//
// A thread of XLA's pool that is woken for a moment's work is often queued behind the caller, on the caller's CPU,
// while another CPU sleeps: a scheduler that sees its CPUs busy for more than about 60 % of the time looks no further
// than where a thread ran last. Where a pool's threads may run is for its owner to decide. These threads are ours, and
// each stays on its CPU.
#ifndef JAX_NANO_RUN_CREW_H_
#define JAX_NANO_RUN_CREW_H_

#include <functional>

namespace jax_nano::crew {

// Runs the task, which must not throw, on a thread of another CPU than the caller's; false if no such thread sleeps.
// Throws if the thread cannot be started.
bool Wake(std::function<void()> task);

// Whether the calling thread is one of these.
bool IsMember();

}  // namespace jax_nano::crew

#endif  // JAX_NANO_RUN_CREW_H_
