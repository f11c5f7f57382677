#include "cpu/lstm_schedule.h"

#include <algorithm>
#include <utility>

namespace fastopt {

namespace {
constexpr int64_t kChunkRows = 512;
}

LstmSchedule::LstmSchedule(std::vector<int64_t> sizes)
    : batch_sizes(std::move(sizes)), first_token{0}, chunks{0} {
  const int64_t steps = static_cast<int64_t>(batch_sizes.size());
  for (int64_t t = 0; t < steps; ++t) {
    if (first_token[t] + batch_sizes[t] - first_token[chunks.back()] > kChunkRows &&
        t > chunks.back()) {
      chunks.push_back(t);
    }
    first_token.push_back(first_token[t] + batch_sizes[t]);
    chunk_rows = std::max(chunk_rows, first_token[t + 1] - first_token[chunks.back()]);
  }
  chunks.push_back(steps);
}

}  // namespace fastopt
