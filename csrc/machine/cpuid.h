// The questions that detection asks of the hardware and of the operating system.
#ifndef JAX_NANO_MACHINE_CPUID_H_
#define JAX_NANO_MACHINE_CPUID_H_

#include <array>
#include <cstdint>
#include <functional>

namespace jax_nano {

// Tests answer them with recorded or invented values.
struct CpuQueries {
  std::function<std::array<uint32_t, 4>(uint32_t leaf, uint32_t subleaf)> cpuid;  // eax ebx ecx edx
  std::function<uint64_t()> xcr0;
  std::function<bool()> request_amx;  // asked only when the CPU and XCR0 offer tiles
};

// Those that ask the machine that runs this process.
CpuQueries HostQueries();

}  // namespace jax_nano

#endif  // JAX_NANO_MACHINE_CPUID_H_
