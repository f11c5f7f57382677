#include "bindings/gradient_list.h"

#include <optional>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

namespace {

GradBatch batch_of(std::vector<GradTask>& tasks, int threads) {
  int64_t chunks = 0;
  for (GradTask& task : tasks) {
    task.first_chunk = chunks;
    chunks += task.chunks();
  }
  return {tasks.data(), static_cast<int64_t>(tasks.size()), chunks, threads};
}

}  // namespace

double total_norm(std::vector<GradTask>& tasks, double order, int threads) {
  const GradBatch batch = batch_of(tasks, threads);
  std::vector<double> partials(batch.chunk_count);
  return chosen_instruction_set().grad_norm->norm(batch, order, partials.data());
}

GradientList::GradientList(py::list given, bool of_parameters) {
  tasks_.reserve(given.size());
  extents_.reserve(given.size());
  for (py::handle item : given) {
    if (!torch_access::has_plain_type(item.ptr())) {
      unreadable_ = "a tensor is a subclass of torch.Tensor";
      return;
    }
    if (!of_parameters) {
      add(item);
    } else {
      py::object grad = py::reinterpret_steal<py::object>(torch_access::gradient_of(item.ptr()));
      if (!grad.is_none()) add(grad);
    }
    if (!unreadable_.empty()) return;
  }
}

void GradientList::add(py::handle tensor) {
  torch_access::Description description;
  if (!torch_access::has_plain_type(tensor.ptr())) {
    unreadable_ = "a gradient is a subclass of torch.Tensor";
  } else if (!torch_access::describe(tensor.ptr(), description)) {
    unreadable_ = "a gradient is not a strided tensor with memory of its own";
  } else if (description.device_type != torch_access::kDLCPU) {
    unreadable_ = "a gradient is not on the CPU";
  } else if (torch_access::is_lazily_changed(tensor.ptr(), description)) {
    unreadable_ = "a gradient is a lazily conjugated or negated view";
  }
  if (!unreadable_.empty()) return;
  const std::optional<DType> dtype = real_dtype_of(description);
  const bool is_complex = description.dtype.code == torch_access::kDLComplex;
  if (!dtype || description.dims + is_complex > kMaxDims) {
    unreadable_ = "a gradient has a dtype or a number of dimensions that no kernel takes";
    return;
  }
  tensors.append(tensor);
  dtypes_ |= 1u << static_cast<int>(*dtype);
  has_complex = has_complex || is_complex;
  GradTask task{description.data, nullptr, is_complex ? 2 : 1, 0, *dtype};
  for (int d = 0; d < description.dims; ++d) task.numel *= description.sizes[d];
  if (task.numel == 0) {
    has_empty = true;
    return;
  }
  int64_t extent = task.numel * bytes_of(*dtype);
  if (!is_contiguous(description)) {
    const Layout layout = layout_of(description);
    extent = layout.extent();
    overlaps_itself_ = overlaps_itself_ || layout.may_overlap_itself();
    walks_.push_back(walk_of({{kGrad, &layout}}));
    task.walk = walks_.back().get();
  }
  tasks_.push_back(task);
  extents_.emplace_back(description.data, extent, extents_.size());
}

py::list GradientList::dtypes() const {
  py::list numbers;
  for (int dtype = 0; dtype < kDTypes; ++dtype) {
    if (dtypes_ >> dtype & 1u) numbers.append(dtype);
  }
  return numbers;
}

std::string GradientList::unwritable() const {
  if (!unreadable_.empty()) return unreadable_;
  if (overlaps_itself_) return "elements of a gradient share memory";
  std::vector<Extent> sorted = extents_;
  sort_extents(sorted);
  return sharing_owners(sorted, {}).empty() ? "" : "gradients share memory";
}

double GradientList::norm(double order, int threads) {
  py::gil_scoped_release unlocked;
  return total_norm(tasks_, order, threads);
}

py::list GradientList::clip(double scale, double clip_value, int threads) {
  {
    py::gil_scoped_release unlocked;
    chosen_instruction_set().grad_norm->clip(batch_of(tasks_, threads), scale, clip_value);
  }
  return tensors;
}

}  // namespace fastopt
