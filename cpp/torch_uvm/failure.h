// Failures of the allocator as PyTorch's exceptions.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

namespace torch_uvm {

// Throws what the last failed bridge call of this thread left behind: OutOfMemoryError after its observers were told,
// else c10::Error. Holds no lock.
[[noreturn]] void throw_failure();

// For bridge calls that answer whether they succeeded.
inline void check(bool succeeded) {
  if (C10_UNLIKELY(!succeeded)) {
    throw_failure();
  }
}

// The same as a warning, where nothing may be thrown.
void warn_failure() noexcept;

} // namespace torch_uvm
