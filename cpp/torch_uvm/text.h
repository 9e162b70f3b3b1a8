// Text for the bridge, where strings are bytes: PyTorch's need not be UTF-8.
#pragma once

#include <rust/cxx.h>

#include <cstdint>
#include <string_view>

namespace torch_uvm {

inline rust::Slice<const std::uint8_t> bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}

} // namespace torch_uvm
