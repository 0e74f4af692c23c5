// Tensors, checks and operator registration over libtorch's stable C ABI: what torch::stable offers, without its headers
// (torch_abi.h says why). The operators themselves are declared, with their documentation, in register.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch_abi.h"

#ifndef MINIMIND_NAMESPACE  // of torch.ops; tests build the CUDA half for the CPU under another
#define MINIMIND_NAMESPACE "minimind"
#endif

namespace minimind {

constexpr uint64_t kTorchVersion = uint64_t{2} << 56 | uint64_t{11} << 48;  // the ABI that torch_abi.h declares

enum class Dtype { float32, bfloat16, float16, float8_e4m3fn, int8, int32, int64, other };
inline const char* name(Dtype dtype) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "float8_e4m3fn",
                                   "int8",    "int32",    "int64",   "another dtype"};
  return names[static_cast<int>(dtype)];
}

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

// A wrong argument: one RuntimeError line in Python. MINIMIND_CHECK(q.dim() == 3, "q: ...", q.dim());
#define MINIMIND_CHECK(condition, ...)                       \
  do {                                                       \
    if (!(condition)) [[unlikely]] minimind::fail(__VA_ARGS__); \
  } while (false)

inline void check_torch(AOTITorchError error, const char* call) {
  if (error != 0) fail("torch: ", call, " failed");
}
#define MINIMIND_TORCH(call) minimind::check_torch(call, #call)

// A counted reference to a tensor; what it says of the tensor is read once.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned, [](AtenTensorHandle h) { aoti_torch_delete_tensor_object(h); }) {
    int32_t dtype = 0;
    MINIMIND_TORCH(aoti_torch_get_dim(owned, &dim_));
    MINIMIND_TORCH(aoti_torch_get_sizes(owned, &sizes_));
    MINIMIND_TORCH(aoti_torch_get_strides(owned, &strides_));
    MINIMIND_TORCH(aoti_torch_get_data_ptr(owned, &data_));
    MINIMIND_TORCH(aoti_torch_get_dtype(owned, &dtype));
    MINIMIND_TORCH(aoti_torch_get_device_type(owned, &device_type_));
    MINIMIND_TORCH(aoti_torch_get_device_index(owned, &device_index_));
    dtype_ = known_dtype(dtype);
  }

  // Uninitialised and contiguous, on the device of `like`.
  static Tensor empty(std::initializer_list<int64_t> sizes, Dtype dtype, const Tensor& like) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes.begin()[i], 1);
    AtenTensorHandle handle = nullptr;
    MINIMIND_TORCH(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
                                            torch_dtype(dtype), like.device_type_, like.device_index_, &handle));
    return Tensor(handle);
  }

  bool defined() const { return handle_ != nullptr; }
  AtenTensorHandle handle() const { return handle_.get(); }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d < 0 ? d + dim_ : d]; }
  int64_t stride(int64_t d) const { return strides_[d < 0 ? d + dim_ : d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim_; ++d) n *= sizes_[d];
    return n;
  }
  // Whether dimensions from `first` on lie densely in memory, the last one fastest.
  bool is_contiguous(int64_t first = 0) const {
    int64_t expected = 1;
    for (int64_t d = dim_; d-- > first; expected *= sizes_[d])
      if (sizes_[d] != 1 && strides_[d] != expected && numel() != 0) return false;
    return true;
  }
  Dtype dtype() const { return dtype_; }
  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }
  int32_t device_index() const { return device_index_; }
  bool same_device(const Tensor& other) const {
    return device_type_ == other.device_type_ && device_index_ == other.device_index_;
  }
  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  static int32_t torch_dtype(Dtype dtype) {
    static const int32_t table[] = {aoti_torch_dtype_float32(),       aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                                    aoti_torch_dtype_float8_e4m3fn(), aoti_torch_dtype_int8(),     aoti_torch_dtype_int32(),
                                    aoti_torch_dtype_int64()};
    return table[static_cast<int>(dtype)];
  }
  static Dtype known_dtype(int32_t dtype) {
    for (int i = 0; i < static_cast<int>(Dtype::other); ++i)
      if (torch_dtype(static_cast<Dtype>(i)) == dtype) return static_cast<Dtype>(i);
    return Dtype::other;
  }

  std::shared_ptr<AtenTensorOpaque> handle_;
  int64_t dim_ = 0, *sizes_ = nullptr, *strides_ = nullptr;
  void* data_ = nullptr;
  int32_t device_type_ = 0, device_index_ = 0;
  Dtype dtype_ = Dtype::other;
};

using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;

// Boxing: a call's arguments arrive on a stack of StableIValues, which own what they point to; results replace them.
namespace boxing {

template <class T>
struct Convert {
  static_assert(std::is_arithmetic_v<T>, "an operator's argument must be a number, a tensor or a list of tensors");
  static T take(StableIValue value) {
    T out;
    std::memcpy(&out, &value, sizeof(T));
    return out;
  }
};
template <>
struct Convert<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorHandle>(value)); }
};
template <class T>
struct Convert<std::optional<T>> {
  static std::optional<T> take(StableIValue value) {
    const std::unique_ptr<StableIValue> inner(reinterpret_cast<StableIValue*>(value));
    if (inner == nullptr) return std::nullopt;
    return Convert<T>::take(*inner);
  }
};
template <>
struct Convert<TensorList> {
  static TensorList take(StableIValue value) {
    const auto list = reinterpret_cast<StableListHandle>(value);
    const std::unique_ptr<StableListOpaque, AOTITorchError (*)(StableListHandle)> owner(list, torch_delete_list);
    size_t size = 0;
    MINIMIND_TORCH(torch_list_size(list, &size));
    TensorList out;
    out.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      MINIMIND_TORCH(torch_list_get_item(list, i, &item));
      out.push_back(Convert<Tensor>::take(item));
    }
    return out;
  }
};

inline StableIValue give(const Tensor& tensor) {
  AtenTensorHandle reference = nullptr;
  MINIMIND_TORCH(aoti_torch_new_tensor_handle(tensor.handle(), &reference));
  return reinterpret_cast<StableIValue>(reference);
}

template <auto function, class Result, class... Args, size_t... I>
void call(Result (*)(Args...), StableIValue* stack, std::index_sequence<I...>) {
  // braces: arguments are taken, and owned, in order, before the function may throw
  std::tuple<std::decay_t<Args>...> args{Convert<std::decay_t<Args>>::take(stack[I])...};
  const Result result = std::apply(function, args);
  if constexpr (std::is_same_v<Result, Tensor>)
    stack[0] = give(result);
  else
    std::apply([&](const auto&... each) { StableIValue* to = stack; ((*to++ = give(each)), ...); }, result);
}

template <class Result, class... Args>
constexpr size_t arity(Result (*)(Args...)) {
  return sizeof...(Args);
}

}  // namespace boxing

// The boxed form of `Tensor f(...)` or `std::tuple<Tensor, ...> f(...)`, for Library::impl.
template <auto function>
void boxed(StableIValue* stack, uint64_t num_args, uint64_t) {
  constexpr size_t arity = boxing::arity(function);
  MINIMIND_CHECK(num_args == arity, "the schema has ", num_args, " arguments, the function ", arity);
  boxing::call<function>(function, stack, std::make_index_sequence<arity>());
}

// Registers on construction, takes the registration back when the library is unloaded:
//   static const Library cuda("CUDA", [](Library& m) { m.impl("sample", boxed<sample>); });
class Library {
 public:
  template <class Fill>
  Library(const char* dispatch_key, Fill fill) {
    if (dispatch_key == nullptr)
      MINIMIND_TORCH(aoti_torch_library_init_def(MINIMIND_NAMESPACE, __FILE__, __LINE__, &handle_));
    else
      MINIMIND_TORCH(aoti_torch_library_init_impl(MINIMIND_NAMESPACE, dispatch_key, __FILE__, __LINE__, &handle_));
    fill(*this);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  ~Library() { aoti_torch_delete_library_object(handle_); }

  void def(const char* schema) { MINIMIND_TORCH(aoti_torch_library_def(handle_, schema)); }
  void impl(const char* op, void (*function)(StableIValue*, uint64_t, uint64_t)) {
    MINIMIND_TORCH(torch_library_impl(handle_, op, function, kTorchVersion));
  }

 private:
  TorchLibraryHandle handle_ = nullptr;
};

}  // namespace minimind
