// What the FFI handlers have in common: the ABI's check, names of dtypes, and exceptions as XLA's errors.
#ifndef JAX_NANO_XLA_CALL_H_
#define JAX_NANO_XLA_CALL_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "plan/contraction.h"
#include "plan/kernel_abi.h"
#include "xla/ffi/api/ffi.h"
#include "xla/plans.h"
#include "xla/settings.h"

namespace jax_nano::xla_call {

namespace ffi = xla::ffi;

static_assert(HasXlasNumbers<ffi::DataType>());

// An error if the program was made for another version of the calls' attributes.
inline ffi::Error CheckAbi(int64_t abi) {
  if (abi == kFfiAbi) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("jax_nano: this program asks for ABI " + std::to_string(abi) +
                                     ", the installed one is " + std::to_string(kFfiAbi));
}

// "" if it is none of the spec's.
inline std::string_view DTypeName(ffi::DataType dtype) {
  for (const DType& x : kDTypes) {
    if (x.number == static_cast<int>(dtype)) return x.name;
  }
  return "";
}

inline bool HasShape(const ffi::AnyBuffer& buffer, const std::vector<int64_t>& shape) {
  const auto have = buffer.dimensions();
  return have.size() == shape.size() && std::equal(have.begin(), have.end(), shape.begin());
}

// Dtypes and dimensions of a call's buffers: what a plan was made for. XLA's buffers keep both where they cost nothing
// to compare, in two small arrays each.
class Shapes {
 public:
  explicit Shapes(const std::vector<ffi::AnyBuffer>& buffers) {
    for (const ffi::AnyBuffer& b : buffers) {
      dims_.emplace_back(b.dimensions().begin(), b.dimensions().end());
      dtypes_.push_back(b.element_type());
    }
  }

  bool Fit(const std::vector<ffi::AnyBuffer>& buffers) const {
    if (buffers.size() != dims_.size()) return false;
    for (size_t i = 0; i < buffers.size(); ++i) {
      if (dtypes_[i] != buffers[i].element_type() || !HasShape(buffers[i], dims_[i])) return false;
    }
    return true;
  }

 private:
  std::vector<std::vector<int64_t>> dims_;
  std::vector<ffi::DataType> dtypes_;
};

using Pool = LimitedPool<ffi::ThreadPool>;

// An array as programs print it, "float32[4,8]", whose dtype may have another name than DTypeName's.
inline std::string Text(const ffi::AnyBuffer& buffer, std::string_view dtype) {
  const auto dims = buffer.dimensions();
  return Describe(dtype, {dims.begin(), dims.size()});
}
inline std::string Text(const ffi::AnyBuffer& buffer) {
  const std::string_view name = DTypeName(buffer.element_type());
  return Text(buffer,
              name.empty() ? "dtype#" + std::to_string(static_cast<int>(buffer.element_type())) : std::string(name));
}

// Runs a call's body; what it throws becomes XLA's error.
template <typename Body>
ffi::Error Guarded(const Body& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& e) {
    return ffi::Error::InvalidArgument(e.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_nano: out of memory");
  } catch (const std::logic_error& e) {
    return ffi::Error::Internal(e.what());
  }
}

// What an Epilogue's activation is called.
inline const NamedActivation* FindActivation(std::string_view name) {
  const auto* known = std::find_if(std::begin(kActivations), std::end(kActivations),
                                   [&](const NamedActivation& x) { return x.name == name; });
  return known == std::end(kActivations) ? nullptr : known;
}

// The state type must be registered before the handlers are, and there is no public way to do so from Python that works
// before the CPU client exists: queued types are flushed after queued handlers, and the CPU backend dies (jaxlib 0.9 to
// 0.12). But XLA's first call into a handler is a query for its metadata, and that carries the API table.
//
// State: has `static ffi::TypeId id`. `name` is the type's, the same for the whole process.
template <typename State>
XLA_FFI_Error* RegisterState(const XLA_FFI_CallFrame* frame, std::string_view name) {
  static const XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<State>();
  static XLA_FFI_Error* const error = ffi::Ffi::RegisterTypeId(frame->api, name, &State::id, &info);
  return error;
}

}  // namespace jax_nano::xla_call

#endif  // JAX_NANO_XLA_CALL_H_
