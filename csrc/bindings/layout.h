#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/torch_access.h"
#include "core/dtypes.h"
#include "core/operands.h"

namespace fastopt {

int64_t bytes_of(DType dtype);

// Sizes and strides in elements of the real dtype: a complex tensor gets a last dimension of 2.
struct Layout {
  DType dtype;
  std::vector<int64_t> sizes, strides;

  int64_t numel() const;
  int64_t element_size() const;  // bytes
  // Bytes from the first element to the end of the last.
  int64_t extent() const;
  // True where two indices may mean one address; never false where they do.
  bool may_overlap_itself() const;
};

// Nothing for a dtype that no kernel takes.
std::optional<DType> real_dtype_of(const torch_access::Description& tensor);

// True where elements follow each other in memory in the order of their indices.
bool is_contiguous(const torch_access::Description& tensor);

// Throws std::invalid_argument for a dtype that no kernel takes.
Layout layout_of(const torch_access::Description& tensor);

// Orders the dimensions as the first operand lies in memory and joins those that all operands walk
// through without a gap. None where all are dense and lie alike. Operands have equal sizes.
std::unique_ptr<Walk> walk_of(const std::vector<std::pair<int, const Layout*>>& operands);

// The memory of a tensor.
struct Extent {
  uintptr_t begin, end;
  size_t owner;

  Extent(const void* data, int64_t bytes, size_t owner)
      : begin(reinterpret_cast<uintptr_t>(data)),
        end(begin + static_cast<uintptr_t>(bytes)),
        owner(owner) {}
};

void sort_extents(std::vector<Extent>& extents);

// The owners in `changing` whose memory another extent of `changing` or `fixed` shares. Both
// sorted.
std::vector<size_t> sharing_owners(const std::vector<Extent>& changing,
                                   const std::vector<Extent>& fixed);

}  // namespace fastopt
