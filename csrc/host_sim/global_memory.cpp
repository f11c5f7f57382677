#include "host_sim/global_memory.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "host_sim/host_sim.h"

namespace fastopt::host_sim {
namespace {

struct Registry {
  std::shared_mutex mutex;
  std::map<std::byte*, size_t> bytes;
};

// Never destroyed: a launch may outlive static destructors.
Registry& registry() {
  static Registry* registry = new Registry;
  return *registry;
}

}  // namespace

void register_memory(void* address, size_t bytes) {
  if (bytes == 0) return;
  auto* first = static_cast<std::byte*>(address);
  Registry& memory = registry();
  std::unique_lock<std::shared_mutex> lock(memory.mutex);
  const auto next = memory.bytes.lower_bound(first);
  const bool meets_next = next != memory.bytes.end() && first + bytes > next->first;
  const bool meets_previous =
      next != memory.bytes.begin() && std::prev(next)->first + std::prev(next)->second > first;
  if (meets_next || meets_previous) {
    throw Error("register_memory: the range overlaps one that is registered already");
  }
  memory.bytes.emplace(first, bytes);
}

void unregister_memory(void* address) {
  Registry& memory = registry();
  std::unique_lock<std::shared_mutex> lock(memory.mutex);
  memory.bytes.erase(static_cast<std::byte*>(address));
}

LaunchMemory::LaunchMemory() : shared_(registry().mutex) {
  if (registry().bytes.empty()) return;
  // Views live at the addresses themselves, so that two launches cannot have views at once.
  shared_.unlock();
  alone_ = std::unique_lock<std::shared_mutex>(registry().mutex);
  for (const auto& [address, bytes] : registry().bytes) {
    Range range{address, bytes, {address, address + bytes}, {}};
    range.writers.resize((bytes + kChunk - 1) / kChunk);
    ranges_.push_back(std::move(range));
  }
}

template <class Visit>
void LaunchMemory::for_each_difference(const Range& range, Visit visit) {
  for (size_t start = 0; start < range.bytes; start += kChunk) {
    const size_t end = std::min(range.bytes, start + kChunk);
    if (memcmp(range.address + start, range.common.data() + start, end - start) == 0) continue;
    const auto differs = [&](size_t i) { return range.address[i] != range.common[i]; };
    for (size_t i = start; i < end; ++i) {
      if (!differs(i)) continue;
      const size_t first = i;
      while (i < end && differs(i)) ++i;
      visit(first, i - first);
    }
  }
}

void LaunchMemory::switch_in(const BlockView& view) {
  for (const BlockView::Run& run : view.runs) {
    memcpy(ranges_[run.range].address + run.offset, view.data.data() + run.data, run.bytes);
  }
}

void LaunchMemory::switch_out(BlockView& view) {
  view.runs.clear();
  view.data.clear();
  for (size_t r = 0; r < ranges_.size(); ++r) {
    Range& range = ranges_[r];
    for_each_difference(range, [&](size_t offset, size_t bytes) {
      std::byte* written = range.address + offset;
      view.runs.push_back({r, offset, bytes, view.data.size()});
      view.data.insert(view.data.end(), written, written + bytes);
      memcpy(written, range.common.data() + offset, bytes);
    });
  }
}

std::optional<Race> LaunchMemory::publish(BlockView& view) {
  std::optional<Race> race;
  view.fence = ++clock_;
  for (Range& range : ranges_) {
    for_each_difference(range, [&](size_t offset, size_t bytes) {
      if (!race) race = record_write(view, range, offset, bytes, false);
      memcpy(range.common.data() + offset, range.address + offset, bytes);
    });
  }
  return race;
}

std::optional<Race> LaunchMemory::publish_pending(BlockView& view) {
  switch_in(view);
  return publish(view);
}

LaunchMemory::Range* LaunchMemory::find(const void* address, size_t bytes) {
  const auto* first = static_cast<const std::byte*>(address);
  const auto next =
      std::upper_bound(ranges_.begin(), ranges_.end(), first,
                       [](const std::byte* at, const Range& range) { return at < range.address; });
  if (next == ranges_.begin()) return nullptr;
  Range& range = *std::prev(next);
  return first + bytes <= range.address + range.bytes ? &range : nullptr;
}

bool LaunchMemory::races(const BlockView& view, const Write& earlier) const {
  if (earlier.block == 0 || earlier.block == view.block + 1) return false;
  if (earlier.publication <= barrier_) return false;
  const auto known = view.acquired.find(earlier.block - 1);
  return known == view.acquired.end() || known->second < earlier.publication;
}

// Atomics do not race with one another.
std::optional<Race> LaunchMemory::record_write(const BlockView& view, Range& range, size_t offset,
                                               size_t bytes, bool atomic) {
  std::optional<Race> race;
  for (size_t i = offset; i < offset + bytes; ++i) {
    std::unique_ptr<Writers>& writers = range.writers[i / kChunk];
    if (!writers) writers = std::make_unique<Writers>();
    Write& plain_write = writers->plain[i % kChunk];
    Write& atomic_write = writers->atomic[i % kChunk];
    if (races(view, plain_write)) race = Race{plain_write.block - 1, view.block, range.address + i};
    if (!atomic && races(view, atomic_write)) {
      race = Race{atomic_write.block - 1, view.block, range.address + i};
    }
    (atomic ? atomic_write : plain_write) = {view.block + 1, clock_};
  }
  return race;
}

// A plain write of this block to the atomic's own location comes before it.
std::optional<Race> LaunchMemory::begin_atomic(BlockView& view, void* address, size_t bytes) {
  Range* range = find(address, bytes);
  if (!range) return std::nullopt;
  const size_t offset = static_cast<std::byte*>(address) - range->address;
  if (memcmp(address, range->common.data() + offset, bytes) == 0) return std::nullopt;
  ++clock_;
  return record_write(view, *range, offset, bytes, false);
}

std::optional<Race> LaunchMemory::end_atomic(BlockView& view, void* address, size_t bytes,
                                             bool changed) {
  Range* range = find(address, bytes);
  if (!range) return std::nullopt;
  const size_t offset = static_cast<std::byte*>(address) - range->address;
  memcpy(range->common.data() + offset, address, bytes);

  auto& released = released_[address];
  for (const auto& [block, publication] : released) {
    if (block == view.block) continue;
    uint32_t& known = view.acquired[block];
    known = std::max(known, publication);
  }
  if (view.fence != 0) {
    released[view.block] = view.fence;
    for (const auto& [block, publication] : view.acquired) {
      uint32_t& handed = released[block];
      handed = std::max(handed, publication);
    }
  }
  if (!changed) return std::nullopt;
  ++clock_;
  return record_write(view, *range, offset, bytes, true);
}

}  // namespace fastopt::host_sim
