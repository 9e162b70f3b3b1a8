// The plug-in's way into a stock PyTorch: the allocator takes the place of PyTorch's own, and our keys in the settings
// are hidden from a parser that would refuse them.

#include <torch_uvm/allocator.h>
#include <torch_uvm/c_api.h>
#include <torch_uvm/c_guard.h>
#include <torch_uvm/failure.h>
#include <torch_uvm/settings.h>
#include <torch_uvm/text.h>

#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>

namespace torch_uvm {

namespace {

// Takes our keys out of one environment variable, as getenv sees it, and puts them back at the end: processes that are
// started later must find them.
class Hidden {
 public:
  explicit Hidden(const char* variable) : variable_(variable) {
    const char* value = std::getenv(variable);
    if (value == nullptr) {
      return;
    }
    const std::string theirs(bridge::without_ours(bytes_of(value)));
    if (theirs == value) {
      return;
    }
    before_ = value;
    // Where nothing is left, PyTorch shall look into the other variable.
    const int failed = theirs.empty() ? unsetenv(variable) : setenv(variable, theirs.c_str(), 1);
    TORCH_CHECK(failed == 0, variable, ": the uvm allocator's options could not be hidden from PyTorch's parser");
  }
  ~Hidden() {
    if (before_ && setenv(variable_, before_->c_str(), 1) != 0) {
      TORCH_WARN(variable_, ": its value '", *before_, "' could not be restored");
    }
  }
  Hidden(const Hidden&) = delete;
  Hidden& operator=(const Hidden&) = delete;

 private:
  const char* variable_;
  std::optional<std::string> before_;
};

void take_place() {
  auto* ours = &UvmAllocator::instance();
  c10cca::allocator.store(ours);
#if TORCH_UVM_SINCE(209)
  // Since 2.9 c10's registry has CUDA's allocator too (torch.accelerator asks there), in some versions with a priority.
  c10::SetAllocator(c10::kCUDA, ours, /*priority=*/255);
#endif
}

} // namespace

void parse_environment() {
  static std::mutex mutex;
  static bool parsed = false;
  std::lock_guard<std::mutex> lock(mutex);
  if (parsed) {
    return;
  }
  const Hidden general("PYTORCH_ALLOC_CONF");
  const Hidden cuda("PYTORCH_CUDA_ALLOC_CONF");
  parse_native_settings();
  parsed = true;
}

} // namespace torch_uvm

using namespace torch_uvm;

int torch_uvm_activate() {
  return guarded(-1, [] {
    const auto environment = bridge::environment();
    if (!environment.has_ours) {
      return 0;
    }
    if (torch_uvm_enabled() == 1) {
      return 1;
    }
    // Wrong settings are told when CUDA is first used: by this allocator, whose initialisation then fails.
    bool take = environment.wanted || !environment.valid;
    if (!take) {
      // The settings of the allocator that stays are parsed now, while ours are hidden. Otherwise that waits, as in a
      // PyTorch without the plug-in, until CUDA is initialised.
      try {
        parse_environment();
        return 2;
      } catch (const std::exception&) {
        take = true; // PyTorch's words about its own keys, likewise when CUDA is first used
      }
    }
    TORCH_CHECK(
        !c10cca::get()->initialized(),
        "use_uvm:True comes too late: CUDA is initialised, with the allocator '",
        c10cca::get()->name(),
        "'. Set PYTORCH_CUDA_ALLOC_CONF before the process starts, or call torch_uvm.activate() before anything uses "
        "CUDA");
    take_place();
    return 1;
  });
}

const char* torch_uvm_check_settings(const char* settings) {
  return guarded<const char*>(nullptr, [&] {
    // First the environment's, so that they do not override what is set now.
    check_options();
    parse_environment();
    check(bridge::check_settings(bytes_of(settings), torch_uvm_enabled() == 1));
    return kept_text(std::string(bridge::without_ours(bytes_of(settings))));
  });
}

int torch_uvm_apply_settings(const char* settings) {
  return guarded(-1, [&] {
    if (torch_uvm_enabled() == 1) {
      check(bridge::apply_settings(bytes_of(settings), native_settings()));
    }
    return 0;
  });
}
