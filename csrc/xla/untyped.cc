#include "xla/untyped.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "machine/machine.h"
#include "plan/contraction.h"
#include "plan/plan.h"
#include "plan/select.h"
#include "run/gemm.h"
#include "xla/call.h"

namespace jax_nano {

// XLA's own struct. jaxlib does not export the function that sets it; libraries that XLA calls contain their own copy
// of it. jaxlib is built with the same library's std::string (custom_calls.py says which jaxlibs were tried).
struct XlaCustomCallStatus {
  std::optional<std::string> message;  // of a failure
};

namespace {

constexpr const char* kArrayNames[] = {"lhs", "rhs", "out"};
constexpr const char* kBegin = "jax_nano abi=";
constexpr std::string_view kCheck = " check=";
constexpr size_t kLongest = 4096;  // of a description; the longest in any test has 350 characters

std::string Hex(uint64_t value, int digits) {
  std::string out(static_cast<size_t>(digits), '0');
  for (size_t i = out.size(); i-- > 0; value >>= 4) out[i] = "0123456789abcdef"[value & 15];
  return out;
}

uint64_t Fnv1a(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

std::string List(const std::vector<int64_t>& values) {
  std::string out;
  for (const int64_t x : values) {
    if (!out.empty()) out += ',';
    out += std::to_string(x);
  }
  return out;
}

// Without what is common to all calls, as programs are searched for the whole name.
std::string ShortName(std::string_view name) { return std::string(name.substr(std::string_view("jax_nano_").size())); }

std::string Write(const CallDescription& call) {
  std::string out = kBegin + std::to_string(kFfiAbi);
  out += " call=" + ShortName(call.epilogue ? kLinearCall : kDotGeneralCall) + " algorithm=" + call.algorithm;
  for (size_t i = 0; i < 3; ++i) {
    const CallArray& x = call.arrays[i];
    out += std::string(" ") + kArrayNames[i] + "=" + x.dtype + "[" + List(x.shape) + "]{" + List(x.labels) + "}";
  }
  if (call.epilogue) {
    out += " activation=" + call.epilogue->activation;
    out += " scale=" + Hex(std::bit_cast<uint32_t>(call.epilogue->scale), 8);
    out += std::string(" bias=") + (call.epilogue->bias ? "1" : "0");
    out += std::string(" residual=") + (call.epilogue->residual ? "1" : "0");
  }
  const uint64_t check = Fnv1a(out);
  out += kCheck;
  return out + Hex(check, 16);
}

// Takes a description apart, from its begin to its end. What it does not notice, writing the result again does.
class Reader {
 public:
  Reader(std::string_view text, std::string_view name) : rest_(text), name_(name) {}

  [[noreturn]] void Refuse() const {
    throw std::invalid_argument(std::string(name_) +
                                ": the description of this call is damaged, or was not written by " +
                                "jax_nano; compile the program again from its source");
  }

  bool Skip(std::string_view text) {
    if (!rest_.starts_with(text)) return false;
    rest_.remove_prefix(text.size());
    return true;
  }
  void Expect(std::string_view text) {
    if (!Skip(text)) Refuse();
  }

  std::string_view Until(char end) {
    const size_t size = std::min(rest_.find(end), rest_.size());
    const std::string_view out = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return out;
  }

  template <typename T>
  T Number(int base = 10) {
    T out = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), out, base);
    if (error != std::errc()) Refuse();
    rest_.remove_prefix(static_cast<size_t>(end - rest_.data()));
    return out;
  }

  std::vector<int64_t> Numbers(std::string_view begin, std::string_view end) {
    std::vector<int64_t> out;
    Expect(begin);
    if (Skip(end)) return out;
    do {
      out.push_back(Number<int64_t>());
    } while (Skip(","));
    Expect(end);
    return out;
  }

 private:
  std::string_view rest_, name_;
};

Operand ViewOf(const CallArray& x) { return {x.dtype, x.shape, x.labels}; }

bool HasEpilogue(const CallDescription& call) {
  if (!call.epilogue) return false;
  const CallEpilogue& x = *call.epilogue;
  return x.bias || x.residual || x.activation != "none" || x.scale != 1;
}

Plan PlanOf(const CallDescription& call) {
  Plan plan = MakePlan(ViewOf(call.arrays[0]), ViewOf(call.arrays[1]), ViewOf(call.arrays[2]), call.algorithm,
                       SelectedTargets(), 1, HostMachine(), {HasEpilogue(call), call.epilogue && call.epilogue->bias});
  if (HasEpilogue(call) && !plan.kernel->epilogue) {
    throw std::invalid_argument("jax_nano linear: " + call.arrays[2].dtype + " results have no epilogue");
  }
  return plan;
}

// A call that was read and planned.
struct Call {
  Call(std::string_view from, const char* of, const CallDescription& call)
      : opaque(from), name(of), plan(PlanOf(call)), args(plan.args), has_epilogue(HasEpilogue(call)) {
    if (!call.epilogue) return;
    const NamedActivation* const known = xla_call::FindActivation(call.epilogue->activation);
    if (known == nullptr) {
      throw std::invalid_argument("jax_nano linear: unknown activation " + call.epilogue->activation);
    }
    bias = call.epilogue->bias;
    epilogue = {known->activation, call.epilogue->scale, nullptr, call.epilogue->residual, 0};
  }

  void Run(const Buffers& buffers) {
    if (plan.one_call) return RunOneCall(plan, args, buffers);
    RunAlone(plan, buffers);
  }

  const std::string opaque;
  const char* const name;  // kDotGeneralCall or kLinearCall
  const Plan plan;
  GemmArgs args;            // of a plan that is one call: this thread's own, so only their pointers are written
  const bool has_epilogue;  // that changes something
  bool bias = false;
  Epilogue epilogue = {Activation::kNone, 1, nullptr, 0, 0};
};

// For the log.
std::string Text(const Call& call) {
  const CallDescription description = ReadDescription(call.opaque, call.name);
  std::string out = ShortName(call.name);
  for (size_t i = 0; i < 3; ++i) {
    const CallArray& x = description.arrays[i];
    out += (i == 0 ? " " : i == 1 ? " x " : " -> ") + Describe(x.dtype, x.shape);
  }
  return out;
}

// This thread's calls of one name. Each thread has its own, so that finding one takes no lock, and a thread or a
// process that ends or is forked at any moment leaves the others' as they are.
//
// XLA keeps a call's description at one address as long as the program is loaded; afterwards another may stand there.
// So the address only says where to look first, and every byte is compared: 5 ns of 100 characters.
class Calls {
 public:
  Call& Find(std::string_view opaque, const char* name) {
    if (at_.empty()) at_.resize(size_t{1} << kSlotBits);
    Call*& at = at_[Slot(opaque.data())];
    if (at == nullptr || at->opaque != opaque) at = &FindElsewhere(opaque, name);
    return *at;
  }

 private:
  static constexpr int kSlotBits = 10;
  static constexpr size_t kMostCalls = 1024;  // about 1 KB each

  static size_t Slot(const char* address) {
    return (reinterpret_cast<uintptr_t>(address) >> 4) * 0x9e3779b97f4a7c15 >> (64 - kSlotBits);
  }

  Call& FindElsewhere(std::string_view opaque, const char* name) {
    const auto found = calls_.find(opaque);
    if (found != calls_.end()) return *found->second;
    auto made = std::make_unique<Call>(opaque, name, ReadDescription(opaque, name));
    if (calls_.size() >= kMostCalls) Forget(calls_.begin());
    const std::string_view key = made->opaque;
    return *calls_.emplace(key, std::move(made)).first->second;
  }

  using Map = std::unordered_map<std::string_view, std::unique_ptr<Call>>;

  void Forget(Map::iterator call) {
    std::replace(at_.begin(), at_.end(), call->second.get(), static_cast<Call*>(nullptr));
    calls_.erase(call);
  }

  std::vector<Call*> at_;  // by address; on the heap, as every thread has room for thread-local variables
  Map calls_;              // by description
};

template <typename Body>
void Guarded(XlaCustomCallStatus* status, const Body& body) {
  try {
    body();
  } catch (const std::bad_alloc&) {
    status->message = "jax_nano: out of memory";
  } catch (const std::exception& e) {
    status->message = e.what();
  }
}

}  // namespace

void DotUntyped(void* out, const void** in, const char* opaque, size_t size, XlaCustomCallStatus* status) {
  Guarded(status, [&] {
    thread_local Calls calls;
    Call& call = calls.Find({opaque, size}, kDotGeneralCall);
    const CallTimer timer([&] { return Text(call); });
    call.Run({in[0], in[1], out});
  });
}

void LinearUntyped(void* out, const void** in, const char* opaque, size_t size, XlaCustomCallStatus* status) {
  Guarded(status, [&] {
    thread_local Calls calls;
    Call& call = calls.Find({opaque, size}, kLinearCall);
    const CallTimer timer([&] { return Text(call); });
    Epilogue epilogue = call.epilogue;
    const void** more = in + 2;
    if (call.bias) epilogue.bias = *more++;
    if (epilogue.has_residual != 0) {
      epilogue.residual_offset = static_cast<const char*>(*more) - static_cast<const char*>(out);
    }
    call.Run({in[0], in[1], out, call.has_epilogue ? &epilogue : nullptr});
  });
}

std::optional<std::string> DescribeCall(const CallDescription& call) {
  try {
    const Plan plan = PlanOf(call);
    if (plan.divisible) return std::nullopt;
  } catch (const std::invalid_argument&) {
    return std::nullopt;  // the typed call says what is wrong
  }
  std::string out = Write(call);
  if (out.size() > kLongest) return std::nullopt;
  return out;
}

CallDescription ReadDescription(std::string_view opaque, std::string_view name) {
  Reader reader(opaque, name);
  if (opaque.size() > kLongest) reader.Refuse();
  reader.Expect(kBegin);
  const auto abi = reader.Number<int64_t>();
  reader.Expect(" ");
  if (abi != kFfiAbi) {
    throw std::invalid_argument("jax_nano: this program asks for ABI " + std::to_string(abi) +
                                ", the installed one is " + std::to_string(kFfiAbi));
  }
  CallDescription call;
  reader.Expect("call=" + ShortName(name));
  reader.Expect(" algorithm=");
  call.algorithm = reader.Until(' ');
  for (size_t i = 0; i < 3; ++i) {
    CallArray& x = call.arrays[i];
    reader.Expect(std::string(" ") + kArrayNames[i] + "=");
    x.dtype = reader.Until('[');
    x.shape = reader.Numbers("[", "]");
    x.labels = reader.Numbers("{", "}");
  }
  if (name == kLinearCall) {
    CallEpilogue& epilogue = call.epilogue.emplace();
    reader.Expect(" activation=");
    epilogue.activation = reader.Until(' ');
    reader.Expect(" scale=");
    epilogue.scale = std::bit_cast<float>(reader.Number<uint32_t>(16));
    reader.Expect(" bias=");
    epilogue.bias = reader.Number<uint8_t>() != 0;
    reader.Expect(" residual=");
    epilogue.residual = reader.Number<uint8_t>() != 0;
  }
  if (Write(call) != opaque) reader.Refuse();
  return call;
}

}  // namespace jax_nano
