#include <torch_uvm/c_api.h>

#include <torch_uvm/allocator.h>
#include <torch_uvm/c_guard.h>
#include <torch_uvm/failure.h>
#include <torch_uvm/text.h>

#include <algorithm>

namespace torch_uvm {

std::string& last_error() noexcept {
  thread_local std::string text = "no call of this thread has failed";
  return text;
}

const char* kept_text(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

} // namespace torch_uvm

using namespace torch_uvm;

int torch_uvm_c_api() {
  return TORCH_UVM_C_API;
}

const char* torch_uvm_last_error() {
  return last_error().c_str();
}

int torch_uvm_torch_version() {
  return TORCH_UVM_TORCH_VERSION;
}

int torch_uvm_enabled() {
  return c10cca::get() == &UvmAllocator::instance() ? 1 : 0;
}

int torch_uvm_initialized() {
  return bridge::initialized() ? 1 : 0;
}

const char* torch_uvm_options() {
  return guarded<const char*>(nullptr, [] {
    rust::String text;
    check(bridge::options(text));
    return kept_text(std::string(text));
  });
}

const char* torch_uvm_description() {
  return guarded<const char*>(nullptr, [] {
    static const auto* text = new std::string(bridge::description());
    return text->c_str();
  });
}

int64_t torch_uvm_rows(const char* table, int device, uint64_t* numbers, uint64_t capacity) {
  return guarded<int64_t>(-1, [&] {
    rust::Vec<std::uint64_t> all;
    check(bridge::rows(bytes_of(table), device, all));
    std::copy_n(all.begin(), std::min<uint64_t>(all.size(), capacity), numbers);
    return static_cast<int64_t>(all.size());
  });
}

int torch_uvm_set_pool_placement(int device, uint64_t pool_first, uint64_t pool_second, const char* placement) {
  return guarded(-1, [&] {
    check(bridge::set_pool_placement(device, {pool_first, pool_second}, bytes_of(placement)));
    return 0;
  });
}

int torch_uvm_prefetch(uint64_t ptr, uint64_t bytes, int to, uint64_t stream) {
  return guarded(-1, [&] {
    check(bridge::prefetch(ptr, bytes, to, stream));
    return 0;
  });
}

int torch_uvm_advise(uint64_t ptr, uint64_t bytes, const char* advice, int location) {
  return guarded(-1, [&] {
    check(bridge::advise(ptr, bytes, bytes_of(advice), location));
    return 0;
  });
}

int torch_uvm_discard(uint64_t ptr, uint64_t bytes, uint64_t stream) {
  return guarded(-1, [&] {
    check(bridge::discard(ptr, bytes, stream));
    return 0;
  });
}
