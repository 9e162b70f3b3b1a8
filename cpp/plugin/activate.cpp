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

// Gives one environment variable another value, or none, as getenv sees it, and the old one back at the end: processes
// that are started later must find it.
class Hidden {
 public:
  Hidden(const char* variable, const std::optional<std::string>& shown) : variable_(variable) {
    const char* value = std::getenv(variable);
    if (value == nullptr) {
      return;
    }
    before_ = value;
    const int failed = shown ? setenv(variable, shown->c_str(), 1) : unsetenv(variable);
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

// What PyTorch may see of a variable. Where it has keys of ours only, PyTorch shall look into the other variable.
std::optional<std::string> shown(const char* variable) {
  const char* value = std::getenv(variable);
  if (value == nullptr) {
    return std::nullopt;
  }
  if (!bridge::has_ours(bytes_of(value))) {
    return value;
  }
  std::string theirs(bridge::without_ours(bytes_of(value)));
  return theirs.empty() ? std::nullopt : std::optional<std::string>(std::move(theirs));
}

} // namespace

void parse_environment() {
  static std::mutex mutex;
  static bool parsed = false;
  std::lock_guard<std::mutex> lock(mutex);
  if (parsed) {
    return;
  }
  constexpr const char* kGeneral = "PYTORCH_ALLOC_CONF";
  constexpr const char* kCuda = "PYTORCH_CUDA_ALLOC_CONF";
  constexpr const char* kHip = "PYTORCH_HIP_ALLOC_CONF";
  // PyTorch ignores the variable for HIP where the one for CUDA is set. It must not read it because ours are hidden.
  std::optional<Hidden> hip;
  if (std::getenv(kCuda) != nullptr) {
    hip.emplace(kHip, std::nullopt);
  }
  const Hidden general(kGeneral, shown(kGeneral));
  const Hidden cuda(kCuda, shown(kCuda));
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
    take_place_of_native(&UvmAllocator::instance());
    return 1;
  });
}

const char* torch_uvm_check_settings(const char* settings) {
  return guarded<const char*>(nullptr, [&] {
    // First the environment's, so that they do not override what is set now.
    check_options();
    parse_environment();
    check(bridge::check_settings(bytes_of(settings), torch_uvm_enabled() == 1));
    if (!bridge::has_ours(bytes_of(settings))) {
      return kept_text(settings);
    }
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
