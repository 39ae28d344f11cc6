// The versions of glibc's functions to link with. Include it where they are called; a test of the built extension
// (tests/test_extension.py) finds calls that miss it.
#ifndef JAX_NANO_MACHINE_GLIBC_H_
#define JAX_NANO_MACHINE_GLIBC_H_

#include <features.h>

#if defined(__GLIBC__) && defined(__x86_64__)
// glibc 2.29 has second versions that leave errno alone; the extension runs on 2.28 as well.
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver exp2, exp2@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver log2, log2@GLIBC_2.2.5");
__asm__(".symver pow, pow@GLIBC_2.2.5");
#endif

#endif  // JAX_NANO_MACHINE_GLIBC_H_
