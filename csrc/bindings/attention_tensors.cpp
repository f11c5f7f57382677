#include "bindings/attention_tensors.h"

#include <optional>
#include <stdexcept>

#include "bindings/layout.h"
#include "bindings/torch_access.h"

namespace py = pybind11;

namespace fastopt {

namespace {

using torch_access::Description;
using torch_access::kDLInt;

// FourSizes of a tensor [batch, heads, rows, features]; compared with those that are expected.
struct FourSizes {
  int64_t batch, heads, rows, features;
};

AttentionTensor placed(py::handle tensor, const char* name, const Place& place,
                       const FourSizes& sizes, DType dtype) {
  const Description given = described(tensor, name, place);
  const int64_t wanted[4] = {sizes.batch, sizes.heads, sizes.rows, sizes.features};
  bool fits = real_dtype_of(given) == dtype && given.dims == 4;
  for (int i = 0; fits && i < 4; ++i) fits = given.sizes[i] == wanted[i];
  if (!fits || (sizes.features > 1 && given.strides[3] != 1)) {
    throw std::invalid_argument(std::string(name) + " must be of shape " + shape_text(wanted) +
                                " with contiguous features and of the dtype that goes with query");
  }
  return {given.data, given.strides[0], given.strides[1], given.strides[2]};
}

AttentionTensor written(py::handle tensor, const char* name, const Place& place,
                        const FourSizes& sizes, DType dtype) {
  const AttentionTensor result = placed(tensor, name, place, sizes, dtype);
  const Description given = described(tensor, name, place);
  const Layout layout{dtype, std::vector<int64_t>(given.sizes, given.sizes + 4),
                      std::vector<int64_t>(given.strides, given.strides + 4)};
  if (layout.may_overlap_itself()) {
    throw std::invalid_argument(std::string(name) + " must not overlap itself");
  }
  return result;
}

// Whole numbers of 32 bits, contiguous in one dimension.
const int32_t* numbers(py::handle tensor, const char* name, const Place& place, int64_t* count) {
  const Description given = described(tensor, name, place);
  if (given.dims != 1 || given.dtype.code != kDLInt || given.dtype.bits != 32 ||
      (given.sizes[0] > 1 && given.strides[0] != 1)) {
    throw std::invalid_argument(std::string(name) + " must be contiguous int32 of one dimension");
  }
  *count = given.sizes[0];
  return static_cast<const int32_t*>(given.data);
}

// Starts of sequences among `rows` rows; the last one is the end of all. Those that lie on a card
// are not read: kernels bring them back into the rows that there are.
const int32_t* starts_of(py::handle tensor, const char* name, const Place& place, int64_t rows,
                         int64_t* batch, int64_t* longest) {
  int64_t count;
  const int32_t* starts = numbers(tensor, name, place, &count);
  bool fits = count >= 2;
  *longest = rows;
  if (place.device_type == torch_access::kDLCPU) {
    fits = fits && starts[0] == 0 && starts[count - 1] == rows;
    *longest = 0;
    for (int64_t i = 1; fits && i < count; ++i) {
      const int64_t length = static_cast<int64_t>(starts[i]) - starts[i - 1];
      fits = length >= 0;
      if (length > *longest) *longest = length;
    }
  }
  if (!fits) {
    throw std::invalid_argument(std::string(name) +
                                " must begin with 0, never fall, and end with the " +
                                std::to_string(rows) + " rows that there are, got " +
                                std::string(py::str(tensor.attr("tolist")())));
  }
  *batch = count - 1;
  return starts;
}

struct CheckedAttention {
  AttentionLayer layer{};
  DType dtype;

  CheckedAttention(const AttentionTensors& given, const Place& place) : place_(place) {
    const Description query = described(given.query, "query", place_);
    const Description key = described(given.key, "key", place_);
    const Description value = described(given.value, "value", place_);
    const std::optional<DType> found = real_dtype_of(query);
    if (!found) throw std::invalid_argument("no kernel has the dtype of query");
    if (query.dims != 4 || key.dims != 4 || value.dims != 4) {
      throw std::invalid_argument("query, key and value must be [batch, heads, rows, features]");
    }
    dtype = layer.dtype = *found;
    batch_ = layer.batch = query.sizes[0];
    layer.heads = query.sizes[1];
    layer.key_heads = key.sizes[1];
    layer.query_rows = layer.queries = query.sizes[2];
    layer.key_rows = layer.keys = key.sizes[2];
    layer.features = query.sizes[3];
    layer.value_features = value.sizes[3];
    if (layer.batch < 1 || layer.key_heads < 1 || layer.heads % layer.key_heads != 0 ||
        layer.heads < 1 || layer.features < 1 || layer.value_features < 1) {
      throw std::invalid_argument("heads of query must be a multiple of those of key, all above 0");
    }
    layer.query = placed(given.query, "query", place_, query_sizes(), dtype);
    layer.key = placed(given.key, "key", place_, key_sizes(), dtype);
    layer.value = placed(given.value, "value", place_, value_sizes(), dtype);
    layer.scale = given.scale;
    layer.softcap = given.softcap;
    // No key is further away than all rows: sums with larger bounds could overflow.
    const int64_t furthest = layer.query_rows + layer.key_rows;
    layer.left = given.left < furthest ? given.left : furthest;
    layer.right = given.right < furthest ? given.right : furthest;
    layer.bottom_right = given.bottom_right;
    layer.dropout = given.dropout;
    layer.seed = given.seed;
    if (!(given.dropout >= 0 && given.dropout < 1)) {
      throw std::invalid_argument("dropout must be in [0, 1)");
    }
    set_starts(given);
    if (!given.used_keys.is_none()) set_used_keys(given.used_keys);
    if (!given.bias.is_none()) set_bias(given.bias);
    if (!given.allowed.is_none()) set_allowed(given.allowed);
    if (!given.slopes.is_none()) set_slopes(given.slopes);
    if (!given.sinks.is_none()) set_sinks(given.sinks);
  }

  // Of the tensors: where sequences lie behind each other, those have a batch of one.
  FourSizes query_sizes() const { return {batch_, layer.heads, layer.query_rows, layer.features}; }
  FourSizes key_sizes() const { return {batch_, layer.key_heads, layer.key_rows, layer.features}; }
  FourSizes value_sizes() const {
    return {batch_, layer.key_heads, layer.key_rows, layer.value_features};
  }
  FourSizes output_sizes() const {
    return {batch_, layer.heads, layer.query_rows, layer.value_features};
  }
  FourSizes score_sizes() const { return {batch_, layer.heads, layer.query_rows, layer.key_rows}; }

  AttentionTensor logsumexp(py::handle tensor) const {
    const Description given = described(tensor, "logsumexp", place_);
    if (real_dtype_of(given) != compute_dtype(dtype) || given.dims != 3 ||
        given.sizes[0] != batch_ || given.sizes[1] != layer.heads ||
        given.sizes[2] != layer.query_rows || (layer.query_rows > 1 && given.strides[2] != 1) ||
        (layer.heads > 1 && given.strides[1] != layer.query_rows) ||
        (batch_ > 1 && given.strides[0] != layer.heads * layer.query_rows)) {
      throw std::invalid_argument("logsumexp must be contiguous [batch, heads, queries]");
    }
    return in_sequences({given.data, given.strides[0], given.strides[1], 1});
  }

  void* sink_gradient(py::handle tensor) const {
    const Description given = described(tensor, "gradient of sinks", place_);
    if (real_dtype_of(given) != compute_dtype(dtype) || given.dims != 2 || !layer.sinks ||
        given.sizes[0] != layer.batch || given.sizes[1] != layer.heads ||
        (layer.heads > 1 && given.strides[1] != 1) ||
        (layer.batch > 1 && given.strides[0] != layer.heads)) {
      throw std::invalid_argument("gradient of sinks must be contiguous [batch, heads]");
    }
    return given.data;
  }

  // From one sequence to the next one goes by rows.
  AttentionTensor in_sequences(AttentionTensor tensor) const {
    if (layer.query_starts) tensor.batch_stride = 0;
    return tensor;
  }

 private:
  void set_starts(const AttentionTensors& given) {
    if (given.query_starts.is_none() != given.key_starts.is_none()) {
      throw std::invalid_argument("cu_seqlens_q and cu_seqlens_k go together");
    }
    if (given.query_starts.is_none()) return;
    if (batch_ != 1 || !given.bias.is_none() || !given.allowed.is_none()) {
      throw std::invalid_argument("sequences go with a batch of one and without a mask");
    }
    int64_t key_batch;
    layer.query_starts = starts_of(given.query_starts, "cu_seqlens_q", place_, layer.query_rows,
                                   &layer.batch, &layer.queries);
    layer.key_starts = starts_of(given.key_starts, "cu_seqlens_k", place_, layer.key_rows,
                                 &key_batch, &layer.keys);
    if (key_batch != layer.batch) {
      throw std::invalid_argument("cu_seqlens_q and cu_seqlens_k must be of one length");
    }
    for (AttentionTensor* tensor : {&layer.query, &layer.key, &layer.value}) {
      *tensor = in_sequences(*tensor);
    }
  }

  void set_used_keys(py::handle tensor) {
    int64_t count;
    layer.used_keys = numbers(tensor, "cache_seqlens", place_, &count);
    bool fits = count == layer.batch;
    const bool readable = place_.device_type == torch_access::kDLCPU;
    for (int64_t i = 0; readable && fits && i < count; ++i) {
      const int64_t there =
          layer.key_starts ? layer.key_starts[i + 1] - layer.key_starts[i] : layer.keys;
      fits = layer.used_keys[i] >= 0 && layer.used_keys[i] <= there;
    }
    if (!fits) {
      throw std::invalid_argument(
          "cache_seqlens must be one number for each sequence, from 0 to its keys, got " +
          std::string(py::str(tensor.attr("tolist")())));
    }
  }

  void set_strides(const AttentionTensor& mask) {
    layer.mask_strides[0] = mask.batch_stride;
    layer.mask_strides[1] = mask.head_stride;
    layer.mask_strides[2] = mask.row_stride;
  }

  void set_bias(py::handle tensor) {
    const AttentionTensor bias = placed(tensor, "bias", place_, score_sizes(), dtype);
    layer.bias = bias.data;
    set_strides(bias);
  }

  void set_allowed(py::handle tensor) {
    const Description given = described(tensor, "allowed", place_);
    const int64_t wanted[4] = {layer.batch, layer.heads, layer.queries, layer.keys};
    bool fits = given.dims == 4 && given.dtype.bits == 8 && !layer.bias;
    for (int i = 0; fits && i < 4; ++i) fits = given.sizes[i] == wanted[i];
    if (!fits || (layer.keys > 1 && given.strides[3] != 1)) {
      throw std::invalid_argument("allowed must be bool [batch, heads, queries, keys], alone");
    }
    layer.allowed = static_cast<const uint8_t*>(given.data);
    set_strides({given.data, given.strides[0], given.strides[1], given.strides[2]});
  }

  void set_slopes(py::handle tensor) {
    const Description given = described(tensor, "slopes", place_);
    if (real_dtype_of(given) != DType::kFloat32 || given.dims != 2 ||
        given.sizes[0] != layer.batch || given.sizes[1] != layer.heads ||
        (layer.heads > 1 && given.strides[1] != 1)) {
      throw std::invalid_argument("slopes must be fp32 [batch, heads]");
    }
    layer.slopes = static_cast<const float*>(given.data);
    layer.slope_batch_stride = given.strides[0];
  }

  void set_sinks(py::handle tensor) {
    const Description given = described(tensor, "sinks", place_);
    if (real_dtype_of(given) != compute_dtype(dtype) || given.dims != 1 ||
        given.sizes[0] != layer.heads || (layer.heads > 1 && given.strides[0] != 1)) {
      throw std::invalid_argument("sinks must be contiguous [heads]");
    }
    layer.sinks = given.data;
  }

  Place place_;
  int64_t batch_;
};

}  // namespace

void export_attention_tensors(py::module_& m) {
  py::class_<AttentionTensors>(m, "AttentionTensors", py::module_local())
      .def(py::init([](py::object query, py::object key, py::object value, py::object bias,
                       py::object allowed, py::object slopes, py::object sinks,
                       py::object query_starts, py::object key_starts, py::object used_keys,
                       double scale, double softcap, int64_t left, int64_t right, bool bottom_right,
                       double dropout, uint64_t seed) {
             return AttentionTensors{query, key,          value,        bias,      allowed, slopes,
                                     sinks, query_starts, key_starts,   used_keys, scale,   softcap,
                                     left,  right,        bottom_right, dropout,   seed};
           }),
           py::arg("query"), py::arg("key"), py::arg("value"), py::arg("bias"), py::arg("allowed"),
           py::arg("slopes"), py::arg("sinks"), py::arg("query_starts"), py::arg("key_starts"),
           py::arg("used_keys"), py::arg("scale"), py::arg("softcap"), py::arg("left"),
           py::arg("right"), py::arg("bottom_right"), py::arg("dropout"), py::arg("seed"));
}

void check_attention(const AttentionTensors& given, const Place& place) {
  CheckedAttention(given, place);
}

AttentionForward forward_call(const AttentionTensors& given, const Place& place, py::handle output,
                              py::handle logsumexp) {
  const CheckedAttention checked(given, place);
  AttentionForward call{};
  call.layer = checked.layer;
  call.output =
      checked.in_sequences(written(output, "output", place, checked.output_sizes(), checked.dtype));
  call.logsumexp = checked.logsumexp(logsumexp);
  return call;
}

AttentionBackward backward_call(const AttentionTensors& given, const Place& place,
                                py::handle output, py::handle logsumexp, py::handle output_gradient,
                                const std::vector<py::object>& gradients) {
  const CheckedAttention checked(given, place);
  if (gradients.size() != 5) throw std::invalid_argument("gradients must be five");
  const FourSizes output_sizes = checked.output_sizes();
  const DType dtype = checked.dtype;
  const auto read = [&](py::handle tensor, const char* name) {
    return checked.in_sequences(placed(tensor, name, place, output_sizes, dtype));
  };
  const auto to_write = [&](int number, const char* name, const FourSizes& sizes) {
    return checked.in_sequences(written(gradients[number], name, place, sizes, dtype));
  };
  AttentionBackward call{};
  call.layer = checked.layer;
  call.output = read(output, "output");
  call.output_gradient = read(output_gradient, "gradient of output");
  call.logsumexp = checked.logsumexp(logsumexp);
  call.query_gradient = to_write(0, "gradient of query", checked.query_sizes());
  call.key_gradient = to_write(1, "gradient of key", checked.key_sizes());
  call.value_gradient = to_write(2, "gradient of value", checked.value_sizes());
  if (!gradients[3].is_none()) {
    const AttentionTensor bias = placed(gradients[3], "gradient of bias", place,
                                        checked.score_sizes(), compute_dtype(dtype));
    call.bias_gradient = bias.data;
    call.bias_gradient_strides[0] = bias.batch_stride;
    call.bias_gradient_strides[1] = bias.head_stride;
    call.bias_gradient_strides[2] = bias.row_stride;
  }
  if (!gradients[4].is_none()) call.sink_gradient = checked.sink_gradient(gradients[4]);
  return call;
}

}  // namespace fastopt
