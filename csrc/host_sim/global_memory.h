#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace fastopt::host_sim {

// Two blocks left different values in one byte, and nothing ordered them.
struct Race {
  uint32_t first_block, second_block;
  const void* address;
};

// What one block knows of registered memory beyond the common contents.
struct BlockView {
  struct Run {
    size_t range, offset, bytes, data;  // data: where the bytes start in `data`
  };
  uint32_t block = 0;
  std::vector<Run> runs;  // written, but not published
  std::vector<std::byte> data;
  // The youngest publication of each other block that is ordered before this block's next write.
  std::unordered_map<uint32_t, uint32_t> acquired;
  uint32_t fence = 0;  // number of the last publication, which later atomics hand on
};

// Registered memory during one launch. The addresses show the view of the block that runs; a copy
// beside them holds what all blocks have agreed on. Between blocks the two are equal.
class LaunchMemory {
 public:
  LaunchMemory();
  bool empty() const { return ranges_.empty(); }

  void switch_in(const BlockView& view);
  void switch_out(BlockView& view);
  // Makes the writes of the running block common.
  std::optional<Race> publish(BlockView& view);
  // The same for a block that is switched out.
  std::optional<Race> publish_pending(BlockView& view);
  // A grid barrier: whatever was published is ordered before whatever comes.
  void order_all() { barrier_ = clock_; }

  std::optional<Race> begin_atomic(BlockView& view, void* address, size_t bytes);
  std::optional<Race> end_atomic(BlockView& view, void* address, size_t bytes, bool changed);

 private:
  static constexpr size_t kChunk = 4096;
  struct Write {
    uint32_t block;  // plus 1; 0 where no block wrote
    uint32_t publication;
  };
  // The last writes of each byte.
  struct Writers {
    Write plain[kChunk];
    Write atomic[kChunk];
  };
  struct Range {
    std::byte* address;
    size_t bytes;
    std::vector<std::byte> common;
    std::vector<std::unique_ptr<Writers>> writers;  // per chunk
  };

  template <class Visit>
  static void for_each_difference(const Range& range, Visit visit);
  bool races(const BlockView& view, const Write& earlier) const;
  Range* find(const void* address, size_t bytes);
  std::optional<Race> record_write(const BlockView& view, Range& range, size_t offset, size_t bytes,
                                   bool atomic);

  std::shared_lock<std::shared_mutex> shared_;
  std::unique_lock<std::shared_mutex> alone_;
  std::vector<Range> ranges_;  // by address
  // What the atomics on an address hand on: the last publication of each block.
  std::unordered_map<const void*, std::unordered_map<uint32_t, uint32_t>> released_;
  uint32_t clock_ = 0;
  uint32_t barrier_ = 0;
};

}  // namespace fastopt::host_sim
