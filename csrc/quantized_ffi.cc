// The XLA FFI handler "jax_nano_quantized" (x, q, scale[, zero]) -> out, of dense row-major matrices:
//
//   x [m, k]; q [k, n] of a dtype of kWeights (spec.h), scale and zero [groups, n]; out [m, n]
//   along_k: q [n, k], scale and zero [n, groups]
//
//   abi      int64   kFfiAbi (spec.h)
//   along_k  int64   1: the weights lie along k
//
// Zero points are int8 or uint8; x, scale and out are float32, bfloat16 or float16.
#include "quantized_ffi.h"

#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "quantized.h"
#include "registry.h"
#include "select.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nano {
namespace {

namespace ffi = xla::ffi;

struct QuantizedState {
  static ffi::TypeId id;

  bool along_k = false;
  std::once_flag once;
  std::unique_ptr<sharing::Pace> pace;  // of the first call's shape: calls of one executable nearly always have one
};

ffi::TypeId QuantizedState::id = {};
const XLA_FFI_TypeInfo kStateInfo = ffi::MakeTypeInfo<QuantizedState>();

ffi::ErrorOr<std::unique_ptr<QuantizedState>> Instantiate(int64_t abi, int64_t along_k) {
  if (abi != kFfiAbi) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jax_nano: this program asks for ABI " + std::to_string(abi) +
                                                       ", the installed one is " + std::to_string(kFfiAbi)));
  }
  auto state = std::make_unique<QuantizedState>();
  state->along_k = along_k != 0;
  return state;
}

std::string_view NameOf(ffi::DataType dtype) {
  const int number = static_cast<int>(dtype);
  for (const Weight& w : kWeights) {
    if (w.number == number) return w.name;
  }
  for (const DType& x : kDTypes) {
    if (x.number == number) return x.name;
  }
  return "an unknown dtype";
}

void CheckDims(std::string_view what, const ffi::AnyBuffer& buffer, int64_t rows, int64_t cols) {
  const auto have = buffer.dimensions();
  if (have.size() == 2 && have[0] == rows && have[1] == cols) return;
  throw std::invalid_argument("jax_nano quantized: " + std::string(what) + " is not [" + std::to_string(rows) + ", " +
                              std::to_string(cols) + "]");
}

ffi::Error Execute(QuantizedState* state, ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer q,
                   ffi::AnyBuffer scale, ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> out) {
  try {
    const auto dims = x.dimensions(), result = out->dimensions(), groups_of = scale.dimensions();
    if (dims.size() != 2 || result.size() != 2 || groups_of.size() != 2 || more.size() > 1) {
      throw std::invalid_argument("jax_nano quantized: operands are not matrices");
    }
    const int64_t m = dims[0], k = dims[1], n = result[1];
    const bool along_k = state->along_k;
    const int64_t groups = along_k ? groups_of[1] : groups_of[0];
    std::optional<ffi::AnyBuffer> zero;
    if (more.size() == 1) zero = *more.get<ffi::AnyBuffer>(0);
    if (groups < 1 || k % groups != 0) throw std::invalid_argument("jax_nano quantized: groups do not divide k");
    CheckDims("out", *out, m, n);
    CheckDims("q", q, along_k ? n : k, along_k ? k : n);
    CheckDims("scale", scale, along_k ? n : groups, along_k ? groups : n);
    if (zero) CheckDims("zero", *zero, along_k ? n : groups, along_k ? groups : n);
    if (m == 0 || n == 0) return ffi::Error::Success();
    const QuantizedShape shape = {m,
                                  n,
                                  k,
                                  k / groups,
                                  along_k,
                                  NameOf(x.element_type()),
                                  NameOf(q.element_type()),
                                  NameOf(scale.element_type()),
                                  zero ? NameOf(zero->element_type()) : "",
                                  NameOf(out->element_type())};
    const QuantizedPlan plan = PlanQuantized(shape, SelectedTargets(), pool.num_threads(), HostCaches());
    std::call_once(state->once, [&] { state->pace = std::make_unique<sharing::Pace>(plan.expected); });
    RunQuantized(plan,
                 {x.untyped_data(), q.untyped_data(), scale.untyped_data(), zero ? zero->untyped_data() : nullptr,
                  out->untyped_data()},
                 *state->pace, pool);
    return ffi::Error::Success();
  } catch (const std::invalid_argument& e) {
    return ffi::Error::InvalidArgument(e.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_nano: out of memory");
  }
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate().Attr<int64_t>("abi").Attr<int64_t>("along_k"));

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::State<QuantizedState>>()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // q
                           .Arg<ffi::AnyBuffer>()    // scale
                           .RemainingArgs()          // zero
                           .Ret<ffi::AnyBuffer>());  // out

// As RegisterState of ffi.cc, for this state.
XLA_FFI_Error* RegisterState(const XLA_FFI_CallFrame* frame) {
  static XLA_FFI_Error* const error =
      ffi::Ffi::RegisterTypeId(frame->api, "jax_nano.quantized", &QuantizedState::id, &kStateInfo);
  return error;
}

}  // namespace

XLA_FFI_Error* QuantizedInstantiate(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Error* const error = RegisterState(frame);
  return error != nullptr ? error : (*kInstantiate)(frame);
}

XLA_FFI_Error* QuantizedExecute(XLA_FFI_CallFrame* frame) { return (*kExecute)(frame); }

}  // namespace jax_nano
