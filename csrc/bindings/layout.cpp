#include "bindings/layout.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>

namespace fastopt {

using torch_access::Description;

int64_t Layout::numel() const {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

int64_t Layout::element_size() const { return bytes_of(dtype); }

int64_t Layout::extent() const {
  if (numel() == 0) return 0;
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return (last + 1) * element_size();
}

bool Layout::may_overlap_itself() const {
  if (numel() == 0) return false;
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t reach = 0;  // of all dimensions with smaller strides
  for (size_t d : order) {
    if (sizes[d] == 1) continue;
    if (strides[d] <= reach) return true;
    reach += (sizes[d] - 1) * strides[d];
  }
  return false;
}

std::optional<DType> real_dtype_of(const Description& tensor) {
  const auto [code, bits, lanes] = tensor.dtype;
  if (code == torch_access::kDLBfloat && bits == 16) return DType::kBFloat16;
  const bool is_complex = code == torch_access::kDLComplex;
  if (!is_complex && code != torch_access::kDLFloat) return std::nullopt;
  switch (is_complex ? bits / 2 : bits) {
    case 16:
      return is_complex ? std::nullopt : std::optional(DType::kFloat16);
    case 32:
      return DType::kFloat32;
    case 64:
      return DType::kFloat64;
    default:
      return std::nullopt;
  }
}

bool is_contiguous(const Description& tensor) {
  int64_t expected = 1;
  for (int d = tensor.dims - 1; d >= 0; --d) {
    if (tensor.sizes[d] == 1) continue;
    if (tensor.strides[d] != expected) return false;
    expected *= tensor.sizes[d];
  }
  return true;
}

Layout layout_of(const Description& tensor) {
  Layout layout;
  const std::optional<DType> dtype = real_dtype_of(tensor);
  if (!dtype) throw std::invalid_argument("no kernel takes this dtype");
  layout.dtype = *dtype;
  const bool is_complex = tensor.dtype.code == torch_access::kDLComplex;
  layout.sizes.assign(tensor.sizes, tensor.sizes + tensor.dims);
  layout.strides.assign(tensor.strides, tensor.strides + tensor.dims);
  if (is_complex) {
    for (int64_t& stride : layout.strides) stride *= 2;
    layout.sizes.push_back(2);
    layout.strides.push_back(1);
  }
  return layout;
}

std::unique_ptr<Walk> walk_of(const std::vector<std::pair<int, const Layout*>>& operands) {
  const Layout& first = *operands[0].second;
  if (first.numel() == 0) return nullptr;
  std::vector<size_t> order;
  for (size_t d = 0; d < first.sizes.size(); ++d) {
    if (first.sizes[d] != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return first.strides[a] > first.strides[b]; });
  Walk walk{};
  for (size_t d : order) {
    const int last = walk.dims - 1;
    bool joins = last >= 0;
    for (const auto& [k, layout] : operands) {
      joins = joins && walk.strides[k][last] == layout->strides[d] * first.sizes[d];
    }
    const int target = joins ? last : walk.dims++;
    walk.sizes[target] = joins ? walk.sizes[last] * first.sizes[d] : first.sizes[d];
    for (const auto& [k, layout] : operands) walk.strides[k][target] = layout->strides[d];
  }
  bool flat = walk.dims <= 1;
  for (const auto& [k, layout] : operands) {
    flat = flat && (walk.dims == 0 || walk.strides[k][0] == 1);
  }
  return flat ? nullptr : std::make_unique<Walk>(walk);
}

void sort_extents(std::vector<Extent>& extents) {
  const auto by_begin = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };
  if (!std::is_sorted(extents.begin(), extents.end(), by_begin)) {
    std::sort(extents.begin(), extents.end(), by_begin);
  }
}

std::vector<size_t> sharing_owners(const std::vector<Extent>& changing,
                                   const std::vector<Extent>& fixed) {
  std::vector<size_t> owners;
  const Extent* furthest = nullptr;  // of those in `changing` so far
  auto other = fixed.begin();
  uintptr_t fixed_end = 0;  // of those in `fixed` that begin before the present one
  for (const Extent& extent : changing) {
    if (extent.begin == extent.end) continue;
    for (; other != fixed.end() && other->begin < extent.end; ++other) {
      fixed_end = std::max(fixed_end, other->end);
    }
    if (fixed_end > extent.begin) owners.push_back(extent.owner);
    if (furthest && furthest->end > extent.begin) {
      owners.push_back(furthest->owner);
      owners.push_back(extent.owner);
    }
    if (!furthest || extent.end > furthest->end) furthest = &extent;
  }
  return owners;
}

}  // namespace fastopt
