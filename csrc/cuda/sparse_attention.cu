// Split-KV flash decoding over the slots and the exact tokens of a row, on tensor cores.
//
// A CTA takes one of kSplits equal shares of a row and KV head for up to 16 query heads; its warps
// take turns at steps of 16 tokens, each with an online softmax of its own (base 2, fp32). A second
// kernel merges the splits, in order, so a result depends neither on the grid nor on other rows.
// Bound by reading each key and value once: 2 * head_size elements per token and KV head. A warp
// has the keys of its next step on their way while it works on this one.
#include "arguments/sparse_attention.h"

#include <algorithm>

#include "cuda/include/attention_partials.cuh"
#include "cuda/include/attention_tokens.cuh"
#include "cuda/include/dispatch.cuh"
#include "cuda/include/launch.cuh"
#include "cuda/include/online_softmax.cuh"

namespace shadowkv::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Merges a CTA's warps into its partial results; `seen` tells whether this warp had a token.
template <int kHeadSize>
__device__ __forceinline__ void merge_warps(const Pass& pass, int query_head, int num_queries,
                                            bool seen, const OnlineSoftmax& softmax,
                                            const float (&sums)[kHeadSize / 8][4]) {
  __shared__ float shared_values[kWarps][kMaxQueries][kPiece + 4];
  __shared__ float shared_stats[kWarps][kMaxQueries][2];
  __shared__ float shared_factors[kWarps][kMaxQueries];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const auto partial = [&](int query) {
    return partial_at(pass, blockIdx.z, query_head + query, blockIdx.x);
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = softmax.total[i];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    if (t == 0) {
      shared_stats[warp][g + 8 * i][0] = softmax.largest[i];
      shared_stats[warp][g + 8 * i][1] = seen ? total : kNoToken;
    }
  }
  const bool any = sync_threads_count(seen) > 0;
  if (static_cast<int>(threadIdx.x) < num_queries) {
    const int query = threadIdx.x;
    float largest = kNegativeInfinity, total = 0;
    for (int w = 0; w < kWarps; ++w) largest = max_or_nan(largest, shared_stats[w][query][0]);
    const float base = largest == kNegativeInfinity ? 0.0f : largest;
    for (int w = 0; w < kWarps; ++w) {
      shared_factors[w][query] = fast_exp2(shared_stats[w][query][0] - base);
      const float part = shared_stats[w][query][1];
      if (part != kNoToken) total += shared_factors[w][query] * part;
    }
    float* stats = partial(query).stats;
    stats[0] = largest;
    stats[1] = any ? total : kNoToken;
  }
  if (!any) return;
  for_pieces<kHeadSize>([&]<int kFirst, int kDims>() {
    sync_threads();
#pragma unroll
    for (int i = 0; i < kDims / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        shared_values[warp][g + j / 2 * 8][(2 * t + j % 2) * (kDims / 8) + i] =
            sums[kFirst / 8 + i][j];
      }
    }
    sync_threads();
    for (int i = threadIdx.x; i < num_queries * kDims; i += kThreads) {
      const int query = i / kDims, d = i % kDims;
      float value = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        value += shared_factors[w][query] * shared_values[w][query][d];
      }
      partial(query).values[kFirst + d] = value;
    }
  });
}

// grid: kSplits, KV heads * tiles of 16 query heads, rows.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kThreads) attend_kernel(const Pass pass) {
  // Beyond 128 dimensions the sums take half of the registers: queries are in shared memory, keys
  // and values are loaded in pieces when they are needed, and none ahead.
  constexpr bool kWide = kHeadSize > 128;
  constexpr int kKeyDims = kWide ? 64 : kHeadSize;
  constexpr int kPieces = (kHeadSize + kPiece - 1) / kPiece;
  __shared__ uint4 shared_queries[kWide ? kHeadSize / 16 : 1][kWarp];

  const SparseAttentionParams& p = pass.p;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4;
  const int group = static_cast<int>(p.group);
  const int query_tiles = (group + kMaxQueries - 1) / kMaxQueries;
  const int head = blockIdx.y / query_tiles;
  const int first_query = blockIdx.y % query_tiles * kMaxQueries;
  const int num_queries = group - first_query < kMaxQueries ? group - first_query : kMaxQueries;
  const int query_head = head * group + first_query;
  const int64_t row = pass.first_row + blockIdx.z;

  const RowTokens<T, kHeadSize> tokens(p, row, head);
  const auto share = [&](int i) {
    return static_cast<int>(static_cast<int64_t>(tokens.num_steps()) * i / kSplits);
  };
  int index = share(blockIdx.x) + warp;
  const int end = share(blockIdx.x + 1);
  // This warp's next step with a token in it; false at the end.
  const auto find = [&](Step<T>& step) {
    for (; index < end; index += kWarps) {
      step = tokens.at(index);
      if (step.tokens == 0) continue;
      index += kWarps;
      return true;
    }
    return false;
  };

  // The a registers of the first product's k.
  uint32_t queries[kWide ? 1 : kHeadSize / 16][4];
  {
    const T* from = static_cast<const T*>(p.query) + row * p.query_row_stride +
                    query_head * p.query_head_stride;
    uint32_t low[kHeadSize / 8], high[kHeadSize / 8];
    if (!kWide || warp == 0) {
      load_row<kHeadSize>(from + g * p.query_head_stride, g < num_queries, low);
      load_row<kHeadSize>(from + (g + 8) * p.query_head_stride, g + 8 < num_queries, high);
#pragma unroll
      for (int k = 0; k < kHeadSize / 16; ++k) {
        const uint32_t a[4] = {low[2 * k], high[2 * k], low[2 * k + 1], high[2 * k + 1]};
        if constexpr (kWide) {
          shared_queries[k][lane] = {a[0], a[1], a[2], a[3]};
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) queries[k][i] = a[i];
        }
      }
    }
    if constexpr (kWide) sync_threads();
  }

  const float scale = p.scale * kLog2E;
  OnlineSoftmax softmax;
  float sums[kHeadSize / 8][4] = {};
  Step<T> step = {}, next = {};
  uint32_t keys[2][kKeyDims / 8];
  bool more = find(step), more_next = false;
  const bool seen = more;
  if (more && !kWide) {
    load_keys<kKeyDims>(step, 0, keys);
    more_next = find(next);
  }
  while (more) {
    uint32_t values[kPieces][4][4];
    if constexpr (!kWide) {
      for_pieces<kHeadSize>([&]<int kFirst, int kDims>() {
        load_values<kDims>(step, kFirst, values[kFirst / kPiece]);
      });
    }

    float s[2][4] = {};
#pragma unroll
    for (int d = 0; d < kHeadSize; d += 16) {
      if (kWide && d % kKeyDims == 0) load_keys<kKeyDims>(step, d, keys);
      const int k = d % kKeyDims / 16;
      uint32_t a[4];
      if constexpr (kWide) {
        const uint4 query = shared_queries[d / 16][lane];
        a[0] = query.x, a[1] = query.y, a[2] = query.z, a[3] = query.w;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = queries[d / 16][i];
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint32_t b[2] = {keys[tile][2 * k], keys[tile][2 * k + 1]};
        mma_16x8x16<T>(s[tile], a, b);
      }
    }
    Step<T> after = next;
    bool more_after = false;
    if constexpr (!kWide) {
      if (more_next) load_keys<kKeyDims>(next, 0, keys);
      more_after = find(after);  // its way through the tables hides behind the loads
    }

    float decay[2];
    softmax.add(s, step.tokens, scale, decay);
    // The sums' layout of two tiles is the a layout of one step.
    const uint32_t weights[4] = {pack<T>(s[0][0], s[0][1]), pack<T>(s[0][2], s[0][3]),
                                 pack<T>(s[1][0], s[1][1]), pack<T>(s[1][2], s[1][3])};
#pragma unroll
    for (int i = 0; i < kHeadSize / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] *= decay[j / 2];
    }
    for_pieces<kHeadSize>([&]<int kFirst, int kDims>() {
      if constexpr (kWide) load_values<kDims>(step, kFirst, values[kFirst / kPiece]);
      add_values<kDims, T>(weights, values[kFirst / kPiece], sums + kFirst / 8);
    });
    if constexpr (kWide) {
      more = find(step);
    } else {
      step = next, more = more_next;
      next = after, more_next = more_after;
    }
  }

  merge_warps<kHeadSize>(pass, query_head, num_queries, seen, softmax, sums);
}

// A warp merges the splits of a query head, and what select_chunks has estimated of the rest.
// grid: query heads / kWarps, 1, rows.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kThreads) merge_kernel(const Pass pass) {
  const SparseAttentionParams& p = pass.p;
  const int query_heads = static_cast<int>(p.layout.num_kv_heads * p.group);
  const int query_head = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = pass.first_row + blockIdx.z;
  if (query_head >= query_heads) return;

  float factors[kSplits], totals[kSplits];
  const int64_t result = row * query_heads + query_head;
  const float rest = p.rest_lse[result] * kLog2E;  // -inf: there is none
  const bool has_rest = rest != kNegativeInfinity;
  float largest = rest, total = 0;
  const Partial first = partial_at(pass, blockIdx.z, query_head, 0);
#pragma unroll
  for (int i = 0; i < kSplits; ++i) {
    factors[i] = first.stats[2 * i];
    totals[i] = first.stats[2 * i + 1];
    if (totals[i] != kNoToken) largest = max_or_nan(largest, factors[i]);
  }
  bool any = has_rest;
#pragma unroll
  for (int i = 0; i < kSplits; ++i) {
    // Equal infinities have no difference.
    factors[i] = factors[i] == largest ? 1.0f : fast_exp2(factors[i] - largest);
    if (totals[i] == kNoToken) continue;
    any = true;
    total += factors[i] * totals[i];
  }
  const float rest_factor = rest == largest ? 1.0f : fast_exp2(rest - largest);
  if (has_rest) total += rest_factor;
  // Logits that are all -inf give 0 * (1 / 0) = NaN, as a softmax does; no token at all gives 0.
  const float inverse = any ? 1.0f / total : 0.0f;
  T* output =
      static_cast<T*>(p.output) + row * p.output_row_stride + query_head * p.output_head_stride;
  for (int d = lane; d < kHeadSize; d += kWarp) {
    float value = 0;
#pragma unroll
    for (int i = 0; i < kSplits; ++i) {
      if (totals[i] != kNoToken) value += factors[i] * first.values[i * kHeadSize + d];
    }
    if (has_rest) value += rest_factor * p.rest_values[result * kHeadSize + d];
    output[d] = from_float<T>(value * inverse);
  }
  if (lane == 0) {
    const bool infinite = largest == INFINITY || largest == kNegativeInfinity;
    p.lse[result] = infinite ? largest : largest * kLn2 + logf(total);
  }
}

}  // namespace

void sparse_attention(const Tensor& query, const Tensor& slot_ids, const Tensor& slot_table,
                      const Tensor& slot_pages, const Tensor& exact_keys,
                      const Tensor& exact_values, const Tensor& exact_table,
                      const Tensor& exact_start, const Tensor& seq_lens, const Tensor& rest_values,
                      const Tensor& rest_lse, double scale, const std::vector<int64_t>& layout_ints,
                      const Tensor& workspace, const Tensor& output, const Tensor& lse) {
  const SparseAttentionParams p = read_sparse_attention(
      query, slot_ids, slot_table, slot_pages, exact_keys, exact_values, exact_table, exact_start,
      seq_lens, rest_values, rest_lse, scale, layout_ints, output, lse, kDevice);
  check_vectors(query, "query");
  check_vectors(exact_keys, "exact_keys");
  check_vectors(exact_values, "exact_values");
  check_vector_rows(slot_pages, "slot_pages");
  SHADOWKV_CHECK(p.layout.slot_keys % 16 == 0 && p.layout.slot_values % 16 == 0,
                 "layout: slot_keys and slot_values must be multiples of 16, got ",
                 p.layout.slot_keys, " and ", p.layout.slot_values);
  check_tensor(workspace, "workspace", kDevice, ScalarType::Float, {kAnySize});
  const int64_t query_heads = p.layout.num_kv_heads * p.group;
  const int64_t per_row = query_heads * kSplits * (p.layout.head_size + 2);
  constexpr int64_t kMaxGrid = 65535;
  const int64_t room = std::min(workspace.numel() / per_row, kMaxGrid);
  SHADOWKV_CHECK(p.num_rows == 0 || room > 0, "workspace: expected at least ", per_row,
                 " values, the part of one row, got ", workspace.numel());

  const Launcher launch(query);
  const int64_t query_tiles = (p.group + kMaxQueries - 1) / kMaxQueries;
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    for (int64_t first = 0; first < p.num_rows; first += room) {
      const int64_t rows = std::min(room, p.num_rows - first);
      const Pass pass = {p, first, rows, static_cast<float*>(workspace.data_ptr())};
      launch("sparse_attention", attend_kernel<T, kHeadSize>,
             dim3(kSplits, p.layout.num_kv_heads * query_tiles, rows), kThreads, 0, pass);
      launch("sparse_attention", merge_kernel<T, kHeadSize>,
             dim3((query_heads + kWarps - 1) / kWarps, 1, rows), kThreads, 0, pass);
    }
  });
}

}  // namespace shadowkv::cuda

SHADOWKV_CUDA_KERNEL(sparse_attention)
