// The byte layout of a page as kernels see it: vllm_shadowkv/page.py's PageLayout, field by field.
#pragma once

#include <cstdint>

namespace shadowkv {

enum class DType : int64_t { kFloat = 0, kHalf = 1, kBFloat16 = 2 };

// All members are int64_t, in the order of PageLayout's fields; offsets are in bytes.
struct PageLayout {
  int64_t num_kv_heads;
  int64_t head_size;
  int64_t block_size;
  int64_t chunk_size;
  int64_t exact_tokens;
  int64_t dtype_index;   // DType
  int64_t rank;          // 0: exact keys instead of factors
  int64_t leading_rank;  // directions whose coefficients have 8 bits
  int64_t num_outliers;
  int64_t slots_per_page;
  int64_t value_int8;
  int64_t page_bytes;
  int64_t value_record_bytes;
  // Shadow page.
  int64_t coefficients;        // int8 [block_size, leading_rank]
  int64_t tail_coefficients;   // uint8 [block_size, tail_bytes], nibbles
  int64_t tail_steps;          // uint8 [block_size], what a tail code is multiplied with
  int64_t coefficient_scales;  // bf16 [block_size]
  int64_t basis;               // int8 [num_kv_heads, rank, head_size]
  int64_t mean;                // fp32 [num_kv_heads, head_size]
  int64_t exact_keys;          // dtype [num_kv_heads, block_size, head_size], rank 0 only
  int64_t landmarks;           // uint8 [num_kv_heads, chunks, landmark_bytes], nibbles
  int64_t landmark_scales;     // fp32 [num_kv_heads, chunks]
  int64_t landmark_mean;       // fp32 [num_kv_heads, head_size]
  int64_t outlier_ids;         // int32 [num_kv_heads, num_outliers], chunk in the block
  int64_t outlier_cosines;     // fp32 [num_kv_heads, num_outliers]
  int64_t outlier_keys;  // dtype [num_kv_heads, num_outliers, chunk_size, head_size], rank > 0 only
  int64_t mean_values;   // dtype [num_kv_heads, head_size]
  // Slot page.
  int64_t slot_keys;    // dtype [num_kv_heads, slots_per_page, chunk_size, head_size]
  int64_t slot_values;  // dtype [num_kv_heads, slots_per_page, chunk_size, head_size]
  int64_t slot_tags;    // int64 [num_kv_heads, slots_per_page]
  int64_t slot_used;    // int64 [num_kv_heads, slots_per_page]
  int64_t slot_epoch;   // int64

  constexpr int64_t chunks() const { return block_size / chunk_size; }
  constexpr int64_t tail_bytes() const { return (rank - leading_rank) / 2; }
  constexpr int64_t landmark_bytes() const { return head_size / 2; }
  constexpr int64_t width() const { return num_kv_heads * head_size; }
  // A row of the host pool: the values of [num_kv_heads, block_size] tokens, then, where they are
  // int8, as many scales.
  constexpr int64_t value_scales() const { return num_kv_heads * chunks() * value_record_bytes; }
  constexpr int64_t value_row_bytes() const {
    return value_scales() + (value_int8 ? 4 * num_kv_heads * block_size : 0);
  }
};

constexpr int64_t kLayoutInts = sizeof(PageLayout) / sizeof(int64_t);

// Codes of 4 bits, -kNibbleCode to kNibbleCode, two to a byte: byte i of a run has its i-th code in
// the low half and the one half a run later in the high half, both plus kNibbleOffset.
constexpr int kNibbleCode = 7;
constexpr int kNibbleOffset = 8;
// A run is a landmark, or so many tail coefficients of a token.
constexpr int kTailGroup = 16;
// Largest step of a tail: a code times it is an int8.
constexpr int kTailStep = 17;

// vllm_shadowkv/config.py: SINK_CHUNKS, LOCAL_CHUNKS.
constexpr int64_t kSinkChunks = 1;
constexpr int64_t kLocalChunks = 4;

}  // namespace shadowkv
