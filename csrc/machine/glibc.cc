// Definitions that keep the extension, with the libstdc++ that is linked into it, from asking for a newer glibc than
// wheels may: manylinux_2_28 has 2.28.
#include <pthread.h>

// libstdc++ reads this to leave out atomic operations in processes of one thread. glibc 2.32 has it; this one says that
// there are always several.
extern "C" {
__attribute__((visibility("hidden"))) extern const char __libc_single_threaded = 0;
}

// glibc 2.34 moved these from libpthread and gave them a second version, which is the same function. The linker turns
// calls of NAME into calls of __wrap_NAME (--wrap).
__asm__(".symver jax_nano_pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver jax_nano_pthread_join, pthread_join@GLIBC_2.2.5");
__asm__(".symver jax_nano_pthread_once, pthread_once@GLIBC_2.2.5");

extern "C" {
int jax_nano_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument);
int jax_nano_pthread_join(pthread_t thread, void** result);
int jax_nano_pthread_once(pthread_once_t* control, void (*routine)());

int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  return jax_nano_pthread_create(thread, attributes, start, argument);
}

int __wrap_pthread_join(pthread_t thread, void** result) { return jax_nano_pthread_join(thread, result); }

int __wrap_pthread_once(pthread_once_t* control, void (*routine)()) { return jax_nano_pthread_once(control, routine); }
}
