#include <torch_uvm/c_api.h>

#include <torch_uvm/allocator.h>
#include <torch_uvm/c_guard.h>
#include <torch_uvm/failure.h>
#include <torch_uvm/text.h>

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

int torch_uvm_memory_info(int device, torch_uvm_memory_info_t* info) {
  return guarded(-1, [&] {
    bridge::MemoryInfo from{};
    check(bridge::memory_info(device, from));
    info->capacity = from.capacity;
    info->free = from.free;
    info->populated_device = from.populated_device;
    info->populated_host = from.populated_host;
    info->populated_unplaced = from.populated_unplaced;
    info->allocated = from.allocated;
    info->reserved = from.reserved;
    info->device_limit = from.device_limit;
    info->device_total = from.device_total;
    info->device_free = from.device_free;
    info->host_total = from.host_total;
    info->host_available = from.host_available;
    info->host_reserve = from.host_reserve;
    return 0;
  });
}

int torch_uvm_set_pool_placement(int device, uint64_t pool_first, uint64_t pool_second, const char* placement) {
  return guarded(-1, [&] {
    check(bridge::set_pool_placement(device, {pool_first, pool_second}, bytes_of(placement)));
    return 0;
  });
}
