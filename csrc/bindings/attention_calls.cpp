#include "bindings/attention_calls.h"

#include <optional>
#include <stdexcept>

#include "bindings/cpu_tensor.h"
#include "bindings/layout.h"
#include "bindings/torch_access.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

namespace {

using torch_access::Description;

// Sizes of a tensor [batch, heads, rows, features]; compared with those that are expected.
struct Sizes {
  int64_t batch, heads, rows, features;
};

AttentionTensor placed(py::handle tensor, const char* name, const Sizes& sizes, DType dtype) {
  const Description given = described(tensor, name);
  const int64_t wanted[4] = {sizes.batch, sizes.heads, sizes.rows, sizes.features};
  bool fits = real_dtype_of(given) == dtype && given.dims == 4;
  for (int i = 0; fits && i < 4; ++i) fits = given.sizes[i] == wanted[i];
  if (!fits || (sizes.features > 1 && given.strides[3] != 1)) {
    throw std::invalid_argument(std::string(name) + " must be of shape " + shape_text(wanted) +
                                " with contiguous features and of the dtype that goes with query");
  }
  return {given.data, given.strides[0], given.strides[1], given.strides[2]};
}

AttentionTensor written(py::handle tensor, const char* name, const Sizes& sizes, DType dtype) {
  const AttentionTensor result = placed(tensor, name, sizes, dtype);
  const Description given = described(tensor, name);
  const Layout layout{dtype, std::vector<int64_t>(given.sizes, given.sizes + 4),
                      std::vector<int64_t>(given.strides, given.strides + 4)};
  if (layout.may_overlap_itself()) {
    throw std::invalid_argument(std::string(name) + " must not overlap itself");
  }
  return result;
}

struct CheckedAttention {
  AttentionLayer layer{};
  DType dtype;

  CheckedAttention(const AttentionTensors& given, int threads) {
    const Description query = described(given.query, "query"), key = described(given.key, "key");
    const Description value = described(given.value, "value");
    const std::optional<DType> found = real_dtype_of(query);
    if (!found) throw std::invalid_argument("no kernel has the dtype of query");
    if (query.dims != 4 || key.dims != 4 || value.dims != 4) {
      throw std::invalid_argument("query, key and value must be [batch, heads, rows, features]");
    }
    dtype = layer.dtype = *found;
    layer.threads = threads;
    layer.batch = query.sizes[0];
    layer.heads = query.sizes[1];
    layer.key_heads = key.sizes[1];
    layer.queries = query.sizes[2];
    layer.keys = key.sizes[2];
    layer.features = query.sizes[3];
    layer.value_features = value.sizes[3];
    if (layer.batch < 1 || layer.queries < 1 || layer.keys < 1 || layer.key_heads < 1 ||
        layer.heads % layer.key_heads != 0 || layer.heads < 1 || layer.features < 1 ||
        layer.value_features < 1) {
      throw std::invalid_argument("heads of query must be a multiple of those of key, all above 0");
    }
    layer.query = placed(given.query, "query", query_sizes(), dtype);
    layer.key = placed(given.key, "key", key_sizes(), dtype);
    layer.value = placed(given.value, "value", value_sizes(), dtype);
    layer.scale = given.scale;
    layer.softcap = given.softcap;
    layer.left = given.left;
    layer.right = given.right;
    layer.diagonal = given.diagonal;
    layer.dropout = given.dropout;
    layer.seed = given.seed;
    if (!(given.dropout >= 0 && given.dropout < 1)) {
      throw std::invalid_argument("dropout must be in [0, 1)");
    }
    if (!given.bias.is_none()) set_bias(given.bias);
    if (!given.allowed.is_none()) set_allowed(given.allowed);
    if (!given.slopes.is_none()) set_slopes(given.slopes);
  }

  Sizes query_sizes() const { return {layer.batch, layer.heads, layer.queries, layer.features}; }
  Sizes key_sizes() const { return {layer.batch, layer.key_heads, layer.keys, layer.features}; }
  Sizes value_sizes() const {
    return {layer.batch, layer.key_heads, layer.keys, layer.value_features};
  }
  Sizes output_sizes() const {
    return {layer.batch, layer.heads, layer.queries, layer.value_features};
  }
  Sizes score_sizes() const { return {layer.batch, layer.heads, layer.queries, layer.keys}; }

  void* logsumexp(py::handle tensor) const {
    const Description given = described(tensor, "logsumexp");
    const int64_t rows = layer.heads * layer.queries;
    if (real_dtype_of(given) != compute_dtype(dtype) || given.dims != 3 ||
        given.sizes[0] != layer.batch || given.sizes[1] != layer.heads ||
        given.sizes[2] != layer.queries || (layer.queries > 1 && given.strides[2] != 1) ||
        (layer.heads > 1 && given.strides[1] != layer.queries) ||
        (layer.batch > 1 && given.strides[0] != rows)) {
      throw std::invalid_argument("logsumexp must be contiguous [batch, heads, queries]");
    }
    return given.data;
  }

 private:
  void set_strides(const AttentionTensor& mask) {
    layer.mask_strides[0] = mask.batch_stride;
    layer.mask_strides[1] = mask.head_stride;
    layer.mask_strides[2] = mask.row_stride;
  }

  void set_bias(py::handle tensor) {
    const AttentionTensor bias = placed(tensor, "bias", score_sizes(), dtype);
    layer.bias = bias.data;
    set_strides(bias);
  }

  void set_allowed(py::handle tensor) {
    const Description given = described(tensor, "allowed");
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
    const Description given = described(tensor, "slopes");
    if (real_dtype_of(given) != DType::kFloat32 || given.dims != 2 ||
        given.sizes[0] != layer.batch || given.sizes[1] != layer.heads ||
        (layer.heads > 1 && given.strides[1] != 1)) {
      throw std::invalid_argument("slopes must be fp32 [batch, heads]");
    }
    layer.slopes = static_cast<const float*>(given.data);
    layer.slope_batch_stride = given.strides[0];
  }
};

}  // namespace

void attention_forward(const AttentionTensors& given, py::object output, py::object logsumexp,
                       int threads) {
  const CheckedAttention checked(given, threads);
  AttentionForward call{};
  call.layer = checked.layer;
  call.output = written(output, "output", checked.output_sizes(), checked.dtype);
  call.logsumexp = checked.logsumexp(logsumexp);
  py::gil_scoped_release released;
  chosen_instruction_set().attention->forward(call);
}

void attention_backward(const AttentionTensors& given, py::object output, py::object logsumexp,
                        py::object output_gradient, const std::vector<py::object>& gradients,
                        int threads) {
  const CheckedAttention checked(given, threads);
  if (gradients.size() != 4) throw std::invalid_argument("gradients must be four");
  AttentionBackward call{};
  call.layer = checked.layer;
  call.output = placed(output, "output", checked.output_sizes(), checked.dtype);
  call.output_gradient =
      placed(output_gradient, "gradient of output", checked.output_sizes(), checked.dtype);
  call.logsumexp = checked.logsumexp(logsumexp);
  call.query_gradient =
      written(gradients[0], "gradient of query", checked.query_sizes(), checked.dtype);
  call.key_gradient = written(gradients[1], "gradient of key", checked.key_sizes(), checked.dtype);
  call.value_gradient =
      written(gradients[2], "gradient of value", checked.value_sizes(), checked.dtype);
  if (!gradients[3].is_none()) {
    const AttentionTensor bias = placed(gradients[3], "gradient of bias", checked.score_sizes(),
                                        compute_dtype(checked.dtype));
    call.bias_gradient = bias.data;
    call.bias_gradient_strides[0] = bias.batch_stride;
    call.bias_gradient_strides[1] = bias.head_stride;
    call.bias_gradient_strides[2] = bias.row_stride;
  }
  py::gil_scoped_release released;
  chosen_instruction_set().attention->backward(call);
}

void attention_random_words(uint64_t seed, int64_t head, py::object words) {
  const Description given = described(words, "words");
  if (given.dims != 2 || given.dtype.bits != 32 || given.sizes[1] % 64 != 0 ||
      given.strides[1] != 1 || given.strides[0] != given.sizes[1]) {
    throw std::invalid_argument("words must be contiguous int32 [rows, a multiple of 64]");
  }
  chosen_instruction_set().attention->random_words(seed, head, given.sizes[0], given.sizes[1],
                                                   static_cast<uint32_t*>(given.data));
}

}  // namespace fastopt
