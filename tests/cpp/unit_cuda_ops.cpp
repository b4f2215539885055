// The generic CUDA ops up to their kernels: what a call gets wrong is named, whatever a damaged file
// puts there. Linked without CUDA, so that a call that is right ends with that being said.
#include "unit_cuda_ops.h"

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/portable_type/tensor_impl.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "runtime/cuda_ops.h"
#include "runtime/errors.h"
#include "runtime/op_table.h"

using namespace cuda_int4;
using executorch::aten::DimOrderType;
using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::StridesType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::aten::TensorShapeDynamism;
using executorch::runtime::BoxedEvalueList;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::KernelRuntimeContext;

namespace {

/// The arguments of a call, and all that they point at.
class Call {
 public:
  Call& tensor(std::vector<SizesType> sizes, ScalarType dtype = ScalarType::Float) {
    Held& held = tensors_.emplace_back();
    held.sizes = std::move(sizes);
    const size_t ndim = held.sizes.size();
    held.strides.resize(ndim);
    SizesType numel = 1;
    for (size_t d = ndim; d-- > 0;) {
      held.strides[d] = StridesType(numel);
      numel *= held.sizes[d];
    }
    for (size_t d = 0; d < ndim; ++d) held.order.push_back(DimOrderType(d));
    held.data.resize(size_t(numel) * 8 + 8);
    held.impl = std::make_unique<TensorImpl>(
        dtype, ssize_t(ndim), held.sizes.data(), held.data.data(), held.order.data(),
        held.strides.data(), TensorShapeDynamism::DYNAMIC_BOUND);
    return add(EValue(Tensor(held.impl.get())));
  }
  /// The latest tensor has no memory.
  Call& without_data() {
    tensors_.back().impl->set_data(nullptr);
    return *this;
  }
  /// The latest tensor has its first dimension inside.
  Call& turned() {
    Held& held = tensors_.back();
    std::rotate(held.order.begin(), held.order.begin() + 1, held.order.end());
    for (size_t d = 1, stride = size_t(held.sizes[0]); d <= held.sizes.size(); ++d) {
      const size_t dim = held.sizes.size() - d;
      held.strides[dim] = dim == 0 ? 1 : StridesType(stride);
      stride *= size_t(held.sizes[dim]);
    }
    return *this;
  }
  Call& integer(int64_t value) { return add(EValue(value)); }
  Call& number(double value) { return add(EValue(value)); }
  Call& truth(bool value) { return add(EValue(value)); }
  Call& none() { return add(EValue()); }
  Call& integers(std::vector<int64_t> values) {
    Ints& ints = ints_.emplace_back();
    ints.unwrapped = values;
    ints.unwrapped.reserve(values.size() + 1);  // not null, even of an empty list
    ints.wrapped.reserve(values.size() + 1);
    for (const int64_t value : values) ints.boxed.emplace_back(value);
    for (EValue& value : ints.boxed) ints.wrapped.push_back(&value);
    ints.list = std::make_unique<BoxedEvalueList<int64_t>>(
        ints.wrapped.data(), ints.unwrapped.data(), int(ints.wrapped.size()));
    return add(EValue(ints.list.get()));
  }

  Call& tensors(const std::vector<std::vector<SizesType>>& sizes,
                ScalarType dtype = ScalarType::Float) {
    Tensors& list = lists_.emplace_back();
    for (const std::vector<SizesType>& of_one : sizes) {
      tensor(of_one, dtype);
      list.boxed.push_back(values_.back());
      values_.pop_back();
    }
    list.unwrapped.reserve(sizes.size() + 1);
    list.wrapped.reserve(sizes.size() + 1);
    for (EValue& value : list.boxed) {
      list.unwrapped.push_back(value.toTensor());
      list.wrapped.push_back(&value);
    }
    list.list = std::make_unique<BoxedEvalueList<Tensor>>(
        list.wrapped.data(), list.unwrapped.data(), int(list.wrapped.size()));
    return add(EValue(list.list.get()));
  }

  /// The op's verdict; last_error() has its words.
  Error run(const std::string& graph_name) {
    const auto kernel = find_cuda_kernel(nested(graph_name));
    CHECK(kernel != nullptr);
    if (kernel == nullptr) return Error::NotFound;
    std::vector<EValue*> stack;
    for (EValue& value : values_) stack.push_back(&value);
    clear_last_error();
    KernelRuntimeContext context;
    kernel(context, {stack.data(), stack.size()});
    return context.failure_state();
  }

  static std::string nested(const std::string& graph_name) {
    return graph_name == "aten::linear.out"
               ? "cuda_int4::dense_linear.out"
               : "cuda_int4" + graph_name.substr(graph_name.find("::"));
  }

 private:
  struct Held {
    std::vector<SizesType> sizes;
    std::vector<StridesType> strides;
    std::vector<DimOrderType> order;
    std::vector<char> data;
    std::unique_ptr<TensorImpl> impl;
  };
  struct Ints {
    std::vector<int64_t> unwrapped;
    std::deque<EValue> boxed;
    std::vector<EValue*> wrapped;
    std::unique_ptr<BoxedEvalueList<int64_t>> list;
  };
  struct Tensors {
    std::vector<Tensor> unwrapped;
    std::deque<EValue> boxed;
    std::vector<EValue*> wrapped;
    std::unique_ptr<BoxedEvalueList<Tensor>> list;
  };
  Call& add(EValue value) {
    values_.push_back(value);
    return *this;
  }

  std::deque<Tensors> lists_;  // outlives the values, which look into it when they go
  std::deque<EValue> values_;
  std::deque<Held> tensors_;
  std::deque<Ints> ints_;
};

void expect_words(Call& call, const char* op, const char* words) {
  const Error error = call.run(op);
  const bool right =
      error != Error::Ok && std::string(last_error()).find(words) != std::string::npos;
  if (!right) std::fprintf(stderr, "%s: expected \"%s\" in: %s\n", op, words, last_error());
  CHECK(right);
}

constexpr ScalarType kHalf = ScalarType::Half, kLong = ScalarType::Long, kBool = ScalarType::Bool;

void test_calls_that_are_right_reach_the_kernels() {
  const char* const words = "built without nvcc";
  expect_words(Call().tensor({2, 3}).tensor({3, 4}).tensor({2, 4}), "aten::mm.out", words);
  expect_words(Call().tensor({5, 2, 3}).tensor({5, 3, 4}).tensor({5, 2, 4}), "aten::bmm.out",
               words);
  expect_words(Call().tensor({4}).tensor({2, 3}).tensor({3, 4}).integer(1).number(2).tensor({2, 4}),
               "aten::addmm.out", words);
  expect_words(Call().tensor({7, 3}, kHalf).tensor({4, 3}, kHalf).none().tensor({7, 4}, kHalf),
               "aten::linear.out", words);
  expect_words(Call().tensor({2, 3}).integers({-1}).truth(true).none().tensor({2, 1}),
               "aten::sum.IntList_out", words);
  expect_words(Call().tensor({2, 3}).none().truth(false).tensor({}, kLong), "aten::argmax.out",
               words);
  expect_words(Call().tensor({2, 3}).integer(-2).truth(false).tensor({2, 3}), "aten::_softmax.out",
               words);
  expect_words(
      Call().tensor({2, 8}).integer(8).integer(1).truth(true).truth(true).tensor({2, 8}).tensor(
          {2, 8}, kLong),
      "aten::topk.values", words);
  expect_words(Call()
                   .tensor({2, 3, 4})
                   .integers({3, 4})
                   .none()
                   .none()
                   .number(1e-5)
                   .tensor({2, 3, 4})
                   .tensor({2, 1, 1})
                   .tensor({2, 1, 1}),
               "aten::native_layer_norm.out", words);
  expect_words(Call()
                   .tensor({1, 4, 8})
                   .tensor({6, 2, 3})
                   .none()
                   .integers({1})
                   .integers({1})
                   .integers({1})
                   .truth(false)
                   .integers({0})
                   .integer(2)
                   .tensor({1, 6, 8}),
               "aten::convolution.out", words);
}

void test_wrong_calls_are_named() {
  expect_words(Call().tensor({2, 3}).tensor({4, 4}).tensor({2, 4}), "aten::mm.out",
               "expected the inner sizes to agree, got 3 and 4");
  expect_words(Call().tensor({3}).tensor({3, 4}).tensor({4}), "aten::mm.out",
               "expected self of 2 dimensions, got [3]");
  expect_words(Call().tensor({2, 3}, kBool).tensor({3, 4}, kBool).tensor({2, 4}, kBool),
               "aten::mm.out", "expected numbers, got bool");
  expect_words(Call().tensor({2, 3}).tensor({3, 4}).tensor({2, 3}), "aten::mm.out",
               "does not fit the memory planned");
  expect_words(Call().tensor({5, 2, 3}).tensor({6, 3, 4}).tensor({5, 2, 4}), "aten::bmm.out",
               "expected the batch sizes to agree, got 5 and 6");
  expect_words(
      Call().tensor({3}).tensor({2, 3}).tensor({3, 4}).integer(1).integer(1).tensor({2, 4}),
      "aten::addmm.out", "expected self to broadcast to [2, 4], got [3]");
  expect_words(Call().tensor({7, 3}, kHalf).tensor({4, 3}).none().tensor({7, 4}, kHalf),
               "aten::linear.out", "expected weight of dtype float16, got float32");
  expect_words(Call().tensor({7, 3}).tensor({4, 3}).tensor({3}).tensor({7, 4}), "aten::linear.out",
               "expected bias [4], got [3]");
  expect_words(Call().tensor({2, 3}).integers({1, -1}).truth(false).none().tensor({2}),
               "aten::sum.IntList_out", "expected each dim once, got 1 twice");
  expect_words(Call().tensor({2, 3}).integers({2}).truth(false).none().tensor({2}),
               "aten::sum.IntList_out", "expected dim in -2..1");
  expect_words(Call().tensor({2, 3}).none().truth(false).none().tensor({}, kLong), "aten::mean.out",
               "expected out of a float dtype, got int64");
  expect_words(Call().tensor({0, 3}).integer(0).truth(false).tensor({3}, kLong), "aten::argmax.out",
               "expected at least one value to choose from");
  expect_words(Call().tensor({2, 3}).integer(0).truth(false).tensor({3}), "aten::argmax.out",
               "expected out of dtype int64, got float32");
  expect_words(Call().tensor({2, 3}).integer(1).truth(true).tensor({2, 3}), "aten::_softmax.out",
               "with half_to_float, got float32");
  expect_words(
      Call().tensor({2, 8}).integer(9).integer(1).truth(true).truth(true).tensor({2, 8}).tensor(
          {2, 8}, kLong),
      "aten::topk.values", "expected k in 0..8, the size of dim 1, got 9");
  expect_words(Call()
                   .tensor({2, 3, 4})
                   .integers({4, 3})
                   .none()
                   .none()
                   .number(1e-5)
                   .tensor({2, 3, 4})
                   .tensor({2, 1, 1})
                   .tensor({2, 1, 1}),
               "aten::native_layer_norm.out", "expected normalized_shape to be the last sizes");
  expect_words(Call()
                   .tensor({2, 6, 5})
                   .none()
                   .none()
                   .integer(2)
                   .integer(6)
                   .integer(5)
                   .integer(4)
                   .number(1e-5)
                   .tensor({2, 6, 5})
                   .tensor({2, 4})
                   .tensor({2, 4}),
               "aten::native_group_norm.out", "expected C in whole groups, got C=6 and 4 groups");
  expect_words(Call()
                   .tensor({1, 4, 8})
                   .tensor({6, 2, 3})
                   .none()
                   .integers({1})
                   .integers({0})
                   .integers({1})
                   .truth(false)
                   .integers({0})
                   .integer(3)
                   .tensor({1, 6, 6}),
               "aten::convolution.out", "to fall in 3 groups");
  expect_words(Call()
                   .tensor({1, 4, 2})
                   .tensor({6, 4, 3})
                   .none()
                   .integers({1})
                   .integers({0})
                   .integers({1})
                   .truth(false)
                   .integers({0})
                   .integer(1)
                   .tensor({1, 6, 6}),
               "aten::convolution.out", "expected input of at least the kernel's size");
  expect_words(Call()
                   .tensor({1, 4, 8})
                   .tensor({6, 4, 3})
                   .none()
                   .integers({0})
                   .integers({0})
                   .integers({1})
                   .truth(false)
                   .integers({0})
                   .integer(1)
                   .tensor({1, 6, 6}),
               "aten::convolution.out", "expected stride of at least 1, got 0");
  expect_words(Call()
                   .tensor({1, 8, 8})
                   .integers({3, 3})
                   .integers({1, 1})
                   .integers({2, 2})
                   .truth(false)
                   .truth(true)
                   .none()
                   .tensor({1, 8, 8}),
               "aten::avg_pool2d.out", "expected padding of at most half the kernel 3, got 2");
}

void test_tensor_ops_that_are_right_reach_the_kernels() {
  const char* const words = "built without nvcc";
  expect_words(Call().tensor({2, 3}).tensor({3}).integer(1).tensor({2, 3}), "aten::add.out", words);
  expect_words(Call().tensor({2, 3}).number(0.5).tensor({2, 3}), "aten::mul.Scalar_out", words);
  expect_words(Call().tensor({2, 1}, kBool).tensor({3}).tensor({}).tensor({2, 3}),
               "aten::where.self_out", words);
  expect_words(Call().tensor({2, 3}).none().number(1).tensor({2, 3}), "aten::clamp.out", words);
  expect_words(Call().tensor({2, 3}).integers({1, -2}).tensor({3, 2}), "aten::permute_copy.out",
               words);
  expect_words(Call().tensor({4, 3}).integer(0).integer(-3).none().integer(2).tensor({2, 3}),
               "aten::slice_copy.Tensor_out", words);
  expect_words(Call().tensors({{2, 3}, {0}, {1, 3}}).integer(-2).tensor({3, 3}), "aten::cat.out",
               words);
  expect_words(Call().tensor({4, 6}).integers({2, 4}).integer(1).tensors({{4, 2}, {4, 4}}),
               "aten::split_with_sizes_copy.out", words);
  expect_words(Call()
                   .tensor({9, 4})
                   .tensor({2, 3}, kLong)
                   .integer(-1)
                   .truth(false)
                   .truth(false)
                   .tensor({2, 3, 4}),
               "aten::embedding.out", words);
  expect_words(Call().tensor({9, 4}).tensors({{3}, {2, 1}}, kLong).tensor({2, 3}),
               "aten::index.Tensor_out", words);
  expect_words(Call().tensor({9, 4}).tensors({{3}}, kLong).tensor({4}).truth(false),
               "aten::index_put_", words);
  expect_words(Call().tensor({2, 3}).integers({1, -1}).number(0).tensor({2, 3}),
               "aten::constant_pad_nd.out", words);
  expect_words(Call().integer(1).number(2.5).number(0.5).tensor({3}), "aten::arange.start_out",
               words);
}

void test_wrong_tensor_ops_are_named() {
  expect_words(Call().tensor({2, 3}).tensor({2}).integer(1).tensor({2, 3}), "aten::add.out",
               "operands whose shapes broadcast to one");
  expect_words(Call().tensor({2, 3}).tensor({2, 3}).integer(1).tensor({2, 2}, kBool),
               "aten::add.out", "does not fit the memory planned");
  expect_words(Call().tensor({2, 3}).integers({0, 0}).tensor({3, 2}), "aten::permute_copy.out",
               "each dimension of the tensor once");
  expect_words(Call().tensor({2, 3}).integer(2).integer(0).tensor({3}), "aten::select_copy.int_out",
               "a dimension that the tensor has");
  expect_words(Call().tensor({2, 3}).integer(1).integer(-4).tensor({2}),
               "aten::select_copy.int_out", "an index that the dimension has");
  expect_words(Call().tensor({4, 3}).integer(0).none().none().integer(0).tensor({4, 3}),
               "aten::slice_copy.Tensor_out", "a step of at least 1");
  expect_words(Call().tensors({{2, 3}, {2, 4}}).integer(0).tensor({4, 3}), "aten::cat.out",
               "the same sizes but along one dimension");
  expect_words(Call().tensor({4, 6}).integers({2, 3}).integer(1).tensors({{4, 2}, {4, 3}}),
               "aten::split_with_sizes_copy.out", "parts that make up the dimension");
  expect_words(Call().tensor({2, 3}).integers({2, 2}).integers({3, 3}).none().tensor({2, 2}),
               "aten::as_strided_copy.out", "to have at least 28 bytes, got 24");
  expect_words(Call().tensor({2, 3}).integers({-3, -1}).number(0).tensor({2, 4}),
               "aten::constant_pad_nd.out", "margins that leave something");
  expect_words(
      Call().tensor({9, 4}).tensor({2}).integer(-1).truth(false).truth(false).tensor({2, 4}),
      "aten::embedding.out", "an index of int32 or int64");
  expect_words(Call().tensor({9, 4}).tensors({{9}}, kBool).tensor({3, 4}), "aten::index.Tensor_out",
               "indices of int32 or int64");
  expect_words(Call().tensor({9, 4}).tensors({{3}}, kLong).tensor({3, 3}).truth(false),
               "aten::index_put_", "values that broadcast to the positions");
  expect_words(Call().tensor({9, 4}).tensors({{3}}, kLong).tensor({4}, kHalf).truth(false),
               "aten::index_put_", "values of the tensor's dtype");
  expect_words(Call().integer(1).integer(5).integer(0).tensor({3}), "aten::arange.start_out",
               "an end that steps from the start reach");
}

// What a kernel would follow out of bounds.
void test_tensors_that_memory_does_not_hold_are_named() {
  const char* const data = "expected a tensor to have data";
  expect_words(Call().tensor({2, 3}).without_data().tensor({3, 4}).tensor({2, 4}), "aten::mm.out",
               data);
  expect_words(Call().tensor({2, 3}).tensor({3, 4}).without_data().tensor({2, 4}), "aten::mm.out",
               data);
  expect_words(Call().tensor({7, 3}).tensor({4, 3}).tensor({4}).without_data().tensor({7, 4}),
               "aten::linear.out", data);
  expect_words(
      Call().tensor({2, 3}).without_data().integers({-1}).truth(true).none().tensor({2, 1}),
      "aten::sum.IntList_out", data);
  expect_words(Call()
                   .tensor({1, 4, 8})
                   .tensor({6, 2, 3})
                   .none()
                   .integers({1})
                   .integers({1})
                   .integers({1})
                   .truth(false)
                   .integers({0})
                   .integer(2)
                   .tensor({1, 6, 8})
                   .without_data(),
               "aten::convolution.out", data);
  expect_words(Call().tensor({2, 3}).tensor({3}).without_data().integer(1).tensor({2, 3}),
               "aten::add.out", data);

  const char* const dtype = "expected a result of the tensor's dtype";
  expect_words(Call()
                   .tensor({9, 4})
                   .tensor({2}, kLong)
                   .integer(-1)
                   .truth(false)
                   .truth(false)
                   .tensor({2, 4}, kHalf),
               "aten::embedding.out", dtype);
  expect_words(Call().tensor({9, 4}).tensors({{3}}, kLong).tensor({3, 4}, kBool),
               "aten::index.Tensor_out", dtype);
  expect_words(Call().tensor({2, 3}).integer(0).tensor({2, 3}, kHalf), "aten::tril.out", dtype);
  expect_words(Call()
                   .tensor({2, 3}, kBool)
                   .integer(0)
                   .tensor({2, 3}, kLong)
                   .tensor({2, 3}, kBool)
                   .tensor({2, 3}),
               "aten::scatter.src_out", dtype);

  // 8 indices of 256, each along a dimension of its own: 2^64 positions.
  std::vector<std::vector<SizesType>> indices(8, std::vector<SizesType>(8, 1));
  for (size_t d = 0; d < 8; ++d) indices[d][d] = 256;
  expect_words(
      Call().tensor({1, 1, 1, 1, 1, 1, 1, 1}).tensors(indices, kLong).tensor({1}).truth(false),
      "aten::index_put_", "expected each size of the positions");

  // 4 channels a group in 2^62 + 1 groups: as many as in one, in 64 bits.
  expect_words(Call()
                   .tensor({1, 4, 8})
                   .tensor({0, 4, 3})
                   .none()
                   .integers({1})
                   .integers({1})
                   .integers({1})
                   .truth(false)
                   .integers({0})
                   .integer((int64_t{1} << 62) + 1)
                   .tensor({1, 0, 8}),
               "aten::convolution.out", "channels of input and weight to agree");

  const char* const order = "export the model with contiguous tensors";
  expect_words(Call().tensor({2, 3}).integers({3, 2}).tensor({3, 2}).turned(),
               "aten::view_copy.out", order);
  expect_words(Call().tensor({4, 2, 2}).turned().integer(2).tensor({1, 4, 4}),
               "aten::pixel_shuffle.out", order);
  expect_words(Call().tensor({2, 3}).turned().integers({1}).integers({}).tensor({2, 3}),
               "aten::roll.out", order);
  expect_words(Call().tensor({2, 3}).turned().integer(0).tensor({2, 3}), "aten::tril.out", order);
  expect_words(Call().tensor({2, 3}).integers({2, 2}).tensor({4, 6}).turned(), "aten::repeat.out",
               order);
}

/// `empty` needs no kernel; of tensors without elements there is nothing to put together.
bool is_done_without_kernels(const std::string& name) {
  for (const char* part : {"empty", "cat", "stack", "split", "unbind", "roll", "_pad"})
    if (name.find(part) != std::string::npos) return true;
  return false;
}

// Argument lists that no file of ours has: each op says so and leaves memory alone.
void test_any_arguments_are_survived() {
  std::mt19937 random(7);
  constexpr ScalarType kDtypes[] = {ScalarType::Float, kHalf, kLong, kBool, ScalarType::Byte};
  for (const CudaOps& family : cuda_op_families())
    for (const CudaOp& op : family)
      for (int round = 0; round < 400; ++round) {
        Call call;
        const size_t n = random() % 13;
        for (size_t i = 0; i < n; ++i) {
          std::vector<int64_t> ints(random() % 4);
          for (int64_t& value : ints)
            value = random() % 5 == 0 ? int64_t(random()) << 31 : int64_t(random() % 6) - 2;
          std::vector<SizesType> sizes(random() % 5);
          for (SizesType& size : sizes) size = SizesType(random() % 4);
          switch (random() % 9) {
            case 0:
              call.integer(random() % 4 == 0 ? INT64_MIN + int64_t(random() % 2)
                                             : int64_t(random() % 9) - 4);
              break;
            case 1:
              call.number(0.5);
              break;
            case 2:
              call.truth(random() % 2);
              break;
            case 3:
              call.none();
              break;
            case 4:
              call.integers(ints);
              break;
            case 5:
              call.tensors({sizes, sizes, {0}}, kDtypes[random() % 5]);
              break;
            default:
              call.tensor(sizes, kDtypes[random() % 5]);
          }
        }
        const Error error = call.run(op.graph_name);
        CHECK(error != Error::Ok || is_done_without_kernels(op.graph_name));
      }
}

}  // namespace

void test_cuda_ops() {
  test_calls_that_are_right_reach_the_kernels();
  test_wrong_calls_are_named();
  test_tensor_ops_that_are_right_reach_the_kernels();
  test_wrong_tensor_ops_are_named();
  test_tensors_that_memory_does_not_hold_are_named();
  test_any_arguments_are_survived();
}
