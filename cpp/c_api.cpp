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

int torch_uvm_place_stats(int device, torch_uvm_place_stats_t* stats) {
  return guarded(-1, [&] {
    bridge::PlaceStats from{};
    check(bridge::place_stats(device, from));
    stats->populated_device = from.populated_device;
    stats->populated_device_peak = from.populated_device_peak;
    stats->populated_host = from.populated_host;
    stats->populated_host_peak = from.populated_host_peak;
    stats->populated_unplaced = from.populated_unplaced;
    stats->populated_unplaced_peak = from.populated_unplaced_peak;
    stats->moved_to_device = from.moved_to_device;
    stats->moved_to_host = from.moved_to_host;
    stats->discarded = from.discarded;
    stats->prefetches = from.prefetches;
    stats->advices = from.advices;
    stats->discards = from.discards;
    stats->stage = from.stage;
    stats->stage_changes = from.stage_changes;
    stats->light_reclamations = from.light_reclamations;
    stats->hard_reclamations = from.hard_reclamations;
    stats->reclaimed = from.reclaimed;
    stats->moves_out = from.moves_out;
    stats->moved_out = from.moved_out;
    stats->regrets = from.regrets;
    return 0;
  });
}

int64_t torch_uvm_segments(int device, torch_uvm_segment_t* segments, uint64_t capacity) {
  return guarded<int64_t>(-1, [&] {
    rust::Vec<bridge::SegmentPlace> all;
    check(bridge::segment_places(device, all));
    for (uint64_t index = 0; index < all.size() && index < capacity; ++index) {
      const auto& from = all[index];
      auto& to = segments[index];
      to.base = from.base;
      to.range_bytes = from.range_bytes;
      to.filled = from.filled;
      to.vacant = from.vacant;
      to.discarded_end = from.discarded_end;
      to.populated_device = from.populated_device;
      to.populated_host = from.populated_host;
      to.populated_unplaced = from.populated_unplaced;
      to.pool_first = from.pool_first;
      to.pool_second = from.pool_second;
      to.memory = from.memory;
      to.place = from.place;
      to.is_small = from.small ? 1 : 0;
      to.growing = from.growing ? 1 : 0;
    }
    return static_cast<int64_t>(all.size());
  });
}

int64_t torch_uvm_place_samples(int device, torch_uvm_place_sample_t* samples, uint64_t capacity) {
  return guarded<int64_t>(-1, [&] {
    rust::Vec<bridge::PlaceSample> all;
    check(bridge::place_samples(device, all));
    const auto to_nanoseconds = UvmAllocator::instance().time_converter();
    for (uint64_t index = 0; index < all.size() && index < capacity; ++index) {
      const auto& from = all[index];
      samples[index] = {
          static_cast<int64_t>(to_nanoseconds(from.time)) / 1000,
          from.device,
          from.host,
          from.unplaced,
          from.allocated};
    }
    return static_cast<int64_t>(all.size());
  });
}
