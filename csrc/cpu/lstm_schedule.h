#pragma once

#include <cstdint>
#include <vector>

namespace fastopt {

// The order of a layer's tokens, and the chunks of steps that are worked on together: products over
// all tokens of a chunk surround its recurrence while they are in the caches. Chunks hang on the
// sequences alone, so that sums over tokens have the same bits for any number of threads.
struct LstmSchedule {
  std::vector<int64_t> batch_sizes;  // [steps]
  std::vector<int64_t> first_token;  // [steps + 1]
  std::vector<int64_t> chunks;       // the first step of each, and the number of steps
  int64_t chunk_rows = 0;            // the most tokens in any chunk

  // Sizes of the steps of a layer; they must not grow.
  explicit LstmSchedule(std::vector<int64_t> sizes);
};

}  // namespace fastopt
