#include <torch_uvm/failure.h>

#include <torch_uvm/observers.h>
#include <torch_uvm/torch_version.h>

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <string>

namespace torch_uvm {

namespace {

[[noreturn]] void throw_out_of_memory(const bridge::Failure& failure) {
  c10::reportOutOfMemoryToProfiler(
      static_cast<int64_t>(failure.requested),
      failure.allocated,
      failure.reserved,
      c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(failure.device)));
  for (const auto& observer : out_of_memory_observers().all()) {
    observer(failure.device, failure.requested, failure.total, failure.free);
  }
  if (failure.rejected) {
    for (const auto& observer : rejection_observers().all()) {
      observer(failure.device, failure.requested, failure.allocated, failure.total);
    }
  }
  TORCH_CHECK_WITH(OutOfMemoryError, false, std::string(failure.message));
}

} // namespace

void throw_failure() {
  const bridge::Failure failure = bridge::take_failure();
  switch (failure.kind) {
    case bridge::FailureKind::OutOfMemory:
      throw_out_of_memory(failure);
    case bridge::FailureKind::Cuda:
      TORCH_CHECK(false, "CUDA error: ", std::string(failure.message));
    default:
      TORCH_CHECK(false, std::string(failure.message));
  }
}

void warn_failure() noexcept {
  const bridge::Failure failure = bridge::take_failure();
  try {
    TORCH_WARN("uvm allocator: ", std::string(failure.message));
  } catch (...) { // NOLINT(bugprone-empty-catch): a warning handler that throws must not end the process
  }
}

} // namespace torch_uvm
