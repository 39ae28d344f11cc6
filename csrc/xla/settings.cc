#include "xla/settings.h"

#include <cstdio>
#include <string>

namespace jax_nano {

void LogCall(const std::string& what, std::chrono::nanoseconds took) {
  char number[32];
  std::snprintf(number, sizeof number, "%.3f us", static_cast<double>(took.count()) * 1e-3);
  const std::string line = "jax_nano: ran " + what + ": " + number + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);  // at once, so that threads do not mix their lines
}

}  // namespace jax_nano
