// Scratch memory of the calling thread. XLA has none to offer on CPU, and its threads live as long as the
// process, so each keeps buffers that grow to the largest plan it ran: at most kMaxWorkspaceBytes together.
#ifndef JAX_NANO_RUN_WORKSPACE_H_
#define JAX_NANO_RUN_WORKSPACE_H_

#include <cstdint>

namespace jax_nano {

// At least `bytes`, aligned to 64 bytes, valid on this thread until its next call; null for 0 bytes.
// Throws std::bad_alloc.
void* Workspace(int64_t bytes);

// The same, another buffer: for what all threads of a call share, which is the caller's.
void* SharedWorkspace(int64_t bytes);

// The largest buffer that any thread of the process has held, in bytes.
int64_t WorkspaceHighWater();

}  // namespace jax_nano

#endif  // JAX_NANO_RUN_WORKSPACE_H_
