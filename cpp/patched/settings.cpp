// What the patched c10/cuda calls (declared in c10/cuda/RustUvm.h, which the patch adds).

#include <torch_uvm/allocator.h>
#include <torch_uvm/failure.h>
#include <torch_uvm/settings.h>
#include <torch_uvm/text.h>

#include <c10/cuda/RustUvm.h>

namespace torch_uvm {

void parse_environment() {
  parse_native_settings();
}

} // namespace torch_uvm

namespace c10::cuda::CUDACachingAllocator::RustUvm {

namespace {

bool active() {
  return get() == &torch_uvm::UvmAllocator::instance();
}

} // namespace

CUDAAllocator* chosen() {
  return torch_uvm::bridge::environment().wanted ? &torch_uvm::UvmAllocator::instance() : nullptr;
}

void checkSettings(const char* settings) {
  torch_uvm::check(torch_uvm::bridge::check_settings(torch_uvm::bytes_of(settings ? settings : ""), active()));
}

void settingsChanged(const std::string& settings) {
  if (active()) {
    torch_uvm::check(torch_uvm::bridge::apply_settings(torch_uvm::bytes_of(settings), torch_uvm::native_settings()));
  }
}

} // namespace c10::cuda::CUDACachingAllocator::RustUvm
