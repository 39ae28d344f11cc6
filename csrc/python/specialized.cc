#include "python/specialized.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "machine/features.h"
#include "machine/machine.h"
#include "plan/select.h"
#include "plan/specialized.h"
#include "python/product.h"

namespace nb = nanobind;

namespace jax_nano {
namespace {

Product ParseProduct(const nb::dict& given) {
  const auto size = [&](const char* name) {
    if (!given.contains(name)) throw std::invalid_argument("a kernel for a product needs " + std::string(name));
    return nb::cast<int64_t>(given[name]);
  };
  return {.m = size("m"),
          .n = size("n"),
          .k = size("k"),
          .rsa = size("rsa"),
          .csa = size("csa"),
          .rsb = size("rsb"),
          .csb = size("csb"),
          .rsc = size("rsc"),
          .batch = size("batch"),
          .bsa = size("bsa"),
          .bsb = size("bsb"),
          .bsc = size("bsc")};
}

void Add(const Table& table, const nb::dict& given, uintptr_t function, std::string pack) {
  for (const char* name : {"mr", "nr", "parts", "epilogue"}) {
    if (!given.contains(name)) throw std::invalid_argument("a kernel for a product needs " + std::string(name));
  }
  const ForcedChoice forced = ParseChoice(given);
  const std::vector<TargetStatus> targets = DescribeTargets(HostFeatures());
  const auto runs = [&](const TargetStatus& x) { return x.supported && x.target->name == forced.kernel->target; };
  if (std::none_of(targets.begin(), targets.end(), runs)) {
    throw std::invalid_argument("this CPU cannot run " + std::string(forced.kernel->name));
  }
  auto out = std::make_unique<SpecializedKernel>();
  SetKernel(*forced.kernel, nb::cast<int32_t>(given["mr"]), nb::cast<int32_t>(given["nr"]),
            reinterpret_cast<GemmFn>(function), *out);
  out->product = ParseProduct(given);
  out->schedule = forced.choice.schedule;
  out->takes_parts = nb::cast<bool>(given["parts"]);
  out->epilogue = nb::cast<bool>(given["epilogue"]);
  out->pack = std::move(pack);
  table.kernels->Add(std::move(out));
}

void Use(const Table* table) { UseSpecializedKernels(table == nullptr ? nullptr : table->kernels); }

}  // namespace

void DefineSpecialized(nb::module_ m) {
  using namespace nb::literals;
  nb::class_<Table>(m, "Kernels")
      .def(nb::init<>())
      .def("add", &Add, "kernel"_a, "function"_a, "pack"_a)
      .def("__len__", [](const Table& x) { return x.kernels->size(); });
  m.def("use", &Use, "kernels"_a.none());
}

}  // namespace jax_nano
