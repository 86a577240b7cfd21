// Host-side argument checks over torch::stable::Tensor: dtype, device, layout, shape, in that
// order.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "checks.h"
#include "layout.h"

namespace shadowkv {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A size that check_tensor does not look at.
constexpr int64_t kAnySize = -1;

// What a tensor's memory must look like.
enum class Strides {
  kContiguous,
  kLastContiguous,  // the last dimension's stride is 1, the others are free
  kRows,            // contiguous but for the first dimension's stride
  kAny,
};

inline const char* dtype_name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline ScalarType scalar_type(const PageLayout& layout) {
  switch (static_cast<DType>(layout.dtype_index)) {
    case DType::kFloat:
      return ScalarType::Float;
    case DType::kHalf:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
  }
  fail("layout: dtype_index must be 0, 1 or 2, got ", layout.dtype_index);
}

inline int64_t dtype_bytes(const PageLayout& layout) { return layout.dtype_index == 0 ? 4 : 2; }

template <typename Sizes>
std::string sizes_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "";
  text << '[';
  for (const int64_t size : sizes) {
    text << separator;
    if (size == kAnySize) {
      text << "any";
    } else {
      text << size;
    }
    separator = ", ";
  }
  text << ']';
  return text.str();
}

// Dimensions of size 1 have no stride to speak of; empty tensors none at all.
inline bool has_strides(const Tensor& tensor, Strides strides) {
  const int64_t first = strides == Strides::kRows ? 1 : 0;
  int64_t expected = 1;
  if (strides == Strides::kAny || tensor.numel() == 0) return true;
  for (int64_t i = tensor.dim() - 1; i >= first; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return false;
    if (strides == Strides::kLastContiguous) return true;
    expected *= tensor.size(i);
  }
  return true;
}

// Throws a sentence that names the argument unless the tensor is what the op takes.
inline void check_tensor(const Tensor& tensor, const char* name, DeviceType device,
                         ScalarType dtype, std::initializer_list<int64_t> sizes,
                         Strides strides = Strides::kContiguous) {
  SHADOWKV_CHECK(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype_name(dtype),
                 ", got ", dtype_name(tensor.scalar_type()));
  SHADOWKV_CHECK(tensor.device().type() == device, name, ": expected a tensor on ",
                 device == DeviceType::CPU ? "the CPU" : "CUDA", ", got one on another device");
  SHADOWKV_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, ": expected ",
                 sizes.size(), " dimensions ", sizes_text(sizes), ", got ", tensor.dim(),
                 " dimensions ", sizes_text(tensor.sizes()));
  SHADOWKV_CHECK(has_strides(tensor, strides), name, ": expected ",
                 strides == Strides::kContiguous       ? "contiguous memory"
                 : strides == Strides::kLastContiguous ? "stride 1 in the last dimension"
                                                       : "contiguous memory within a row",
                 ", got strides ", sizes_text(tensor.strides()), " of shape ",
                 sizes_text(tensor.sizes()));
  bool equal = true;
  int64_t i = 0;
  for (const int64_t size : sizes) {
    equal &= size == kAnySize || size == tensor.size(i);
    ++i;
  }
  SHADOWKV_CHECK(equal, name, ": expected shape ", sizes_text(sizes), ", got ",
                 sizes_text(tensor.sizes()));
}

// uint8 [N, bytes] whose rows start at multiples of 8 bytes, so that every section is aligned.
inline void check_pages(const Tensor& pages, const char* name, DeviceType device, int64_t bytes) {
  check_tensor(pages, name, device, ScalarType::Byte, {kAnySize, bytes}, Strides::kRows);
  const auto address = reinterpret_cast<uintptr_t>(pages.data_ptr());
  SHADOWKV_CHECK(address % 8 == 0 && (pages.size(0) < 2 || pages.stride(0) % 8 == 0), name,
                 ": expected rows aligned to 8 bytes, got address ", address, " and row stride ",
                 pages.stride(0));
}

// For kernels that read and write 16 bytes at a time: a tensor of 2-byte values whose rows (the
// last dimension, contiguous) all start at multiples of 16 bytes.
inline void check_vectors(const Tensor& tensor, const char* name) {
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    aligned &= tensor.size(i) < 2 || tensor.stride(i) % 8 == 0;
  }
  SHADOWKV_CHECK(tensor.numel() == 0 || (aligned && tensor.stride(tensor.dim() - 1) == 1), name,
                 ": expected rows that are contiguous and aligned to 16 bytes, got strides ",
                 sizes_text(tensor.strides()));
}

// The same for the rows of pages or of the host pool.
inline void check_vector_rows(const Tensor& rows, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(rows.data_ptr());
  SHADOWKV_CHECK(address % 16 == 0 && (rows.size(0) < 2 || rows.stride(0) % 16 == 0), name,
                 ": expected rows aligned to 16 bytes, got address ", address, " and row stride ",
                 rows.stride(0));
}

// Elements between the starts of two neighbours along a dimension; 0 where there is one at most.
inline int64_t stride_of(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}

// The layout that PageLayout.ints of page.py sent, checked so far that a kernel which stays
// inside its sections stays inside a page.
inline PageLayout read_layout(const std::vector<int64_t>& ints) {
  SHADOWKV_CHECK(static_cast<int64_t>(ints.size()) == kLayoutInts, "layout: expected ", kLayoutInts,
                 " integers (PageLayout.ints), got ", ints.size());
  PageLayout layout;
  std::memcpy(&layout, ints.data(), sizeof layout);

  const auto check = [](bool good, const char* field, const char* expected, int64_t value) {
    SHADOWKV_CHECK(good, "layout: ", field, " must be ", expected, ", got ", value);
  };
  constexpr int64_t kHuge = int64_t{1} << 24;  // products of two sizes then fit int64_t
  const auto in_range = [](int64_t value, int64_t low) { return value >= low && value < kHuge; };
  const PageLayout& l = layout;
  check(l.dtype_index >= 0 && l.dtype_index <= 2, "dtype_index", "0, 1 or 2", l.dtype_index);
  check(l.head_size == 64 || l.head_size == 80 || l.head_size == 96 || l.head_size == 128 ||
            l.head_size == 256,
        "head_size", "64, 80, 96, 128 or 256", l.head_size);
  check(l.num_kv_heads >= 1 && l.num_kv_heads <= 4096, "num_kv_heads", "1 to 4096", l.num_kv_heads);
  check(l.chunk_size == 8 || l.chunk_size == 16, "chunk_size", "8 or 16", l.chunk_size);
  check(in_range(l.block_size, 1) && l.block_size % l.chunk_size == 0, "block_size",
        "a positive multiple of chunk_size", l.block_size);
  check(
      in_range(l.exact_tokens, 1) && l.exact_tokens % 16 == 0 && l.block_size % l.exact_tokens == 0,
      "exact_tokens", "a multiple of 16 that divides block_size", l.exact_tokens);
  check(in_range(l.rank, 0) && l.rank % 16 == 0, "rank", "a multiple of 16", l.rank);
  check(l.leading_rank >= 0 && l.leading_rank <= l.rank && l.leading_rank % 16 == 0, "leading_rank",
        "a multiple of 16, at most rank", l.leading_rank);
  check(l.num_outliers >= 0 && l.num_outliers <= l.chunks(), "num_outliers",
        "at most the chunks of a block", l.num_outliers);
  check(in_range(l.slots_per_page, 1), "slots_per_page", "positive", l.slots_per_page);
  check(l.value_int8 == 0 || l.value_int8 == 1, "value_int8", "0 or 1", l.value_int8);
  check(l.page_bytes > 0, "page_bytes", "positive", l.page_bytes);

  const int64_t value_bytes = dtype_bytes(l);
  const int64_t chunk_values = l.chunk_size * l.head_size;
  const int64_t record = chunk_values * (l.value_int8 ? 1 : value_bytes);
  check(l.value_record_bytes == record, "value_record_bytes", "the bytes of a chunk's values",
        l.value_record_bytes);
  const auto check_section = [&](const char* name, int64_t offset, int64_t alignment,
                                 int64_t bytes) {
    SHADOWKV_CHECK(offset >= 0 && offset % alignment == 0 && offset <= l.page_bytes - bytes,
                   "layout: ", name, " must be ", bytes, " bytes inside a page of ", l.page_bytes,
                   ", aligned to ", alignment, ", got offset ", offset);
  };
  if (l.rank) {
    check_section("coefficients", l.coefficients, 1, l.block_size * l.leading_rank);
    check_section("tail_coefficients", l.tail_coefficients, 1, l.block_size * l.tail_bytes());
    check_section("tail_steps", l.tail_steps, 1, l.block_size);
    check_section("coefficient_scales", l.coefficient_scales, 2, 2 * l.block_size);
    check_section("basis", l.basis, 1, l.rank * l.width());
    check_section("mean", l.mean, 4, 4 * l.width());
    check_section("outlier_keys", l.outlier_keys, value_bytes,
                  l.num_kv_heads * l.num_outliers * chunk_values * value_bytes);
  } else {
    check_section("exact_keys", l.exact_keys, value_bytes, l.block_size * l.width() * value_bytes);
  }
  check_section("landmarks", l.landmarks, 1, l.num_kv_heads * l.chunks() * l.landmark_bytes());
  check_section("landmark_scales", l.landmark_scales, 4, 4 * l.num_kv_heads * l.chunks());
  check_section("landmark_mean", l.landmark_mean, 4, 4 * l.width());
  check_section("outlier_ids", l.outlier_ids, 4, 4 * l.num_kv_heads * l.num_outliers);
  check_section("outlier_cosines", l.outlier_cosines, 4, 4 * l.num_kv_heads * l.num_outliers);
  check_section("mean_values", l.mean_values, value_bytes, l.width() * value_bytes);
  const int64_t slots = l.num_kv_heads * l.slots_per_page;
  check_section("slot_keys", l.slot_keys, value_bytes, slots * chunk_values * value_bytes);
  check_section("slot_values", l.slot_values, value_bytes, slots * chunk_values * value_bytes);
  check_section("slot_tags", l.slot_tags, 8, 8 * slots);
  check_section("slot_used", l.slot_used, 8, 8 * slots);
  check_section("slot_epoch", l.slot_epoch, 8, 8);
  return layout;
}

}  // namespace shadowkv
