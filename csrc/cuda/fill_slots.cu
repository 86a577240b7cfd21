// A CTA takes neighbouring misses of one row and KV head: their keys are rebuilt from the shadow
// page (rebuild.cuh) while their values are on their way from mapped host memory. Misses are in
// token order, so neighbours that lie in one block share its basis in shared memory.
//
// A chunk whose tokens still lie in the exact pages that its block was sealed from is copied.
//
// The link bounds it: a value record per miss that is not resident. Next come head_size *
// rank bytes of basis and chunk_size * (rank + leading_rank) / 2 of coefficients, or chunk_size *
// head_size exact keys.
#include "arguments/fill_slots.h"

#include "cuda/include/dispatch.cuh"
#include "cuda/include/launch.cuh"
#include "cuda/include/rebuild.cuh"

namespace shadowkv::cuda {
namespace {

// More than run at once on any GPU, so that a small batch fills it. The number of misses is known
// on the device only.
constexpr int64_t kCtas = 1024;

// One miss, found in the tables.
struct Miss {
  int block = 0;  // 0: it names no chunk, block or slot, or has no position
  int chunk;      // in its row
  int slot_page, slot;
};

template <int kTokens>
__device__ __forceinline__ Miss find_miss(const FillSlotsParams& p, int64_t row, int head,
                                          int index) {
  const PageLayout& layout = p.layout;
  const int64_t group = row * layout.num_kv_heads + head;
  const int place = p.misses[group * p.places + index];
  if (place < 0 || place >= p.places) return {};
  const int chunk = p.chunk_ids[group * p.places + place];
  const int slot = p.slot_ids[group * p.places + place];
  if (chunk < 0 || slot < 0) return {};

  const int slots = static_cast<int>(layout.slots_per_page);
  const int column = chunk / (static_cast<int>(layout.block_size) / kTokens);
  const int slot_column = slot / slots;
  if (column >= p.max_blocks || slot_column >= p.slot_columns) return {};
  const int block = p.block_table[row * p.block_table_stride + column];
  const int slot_page = p.slot_table[row * p.slot_table_stride + slot_column];
  if (block <= 0 || block >= p.num_blocks) return {};
  if (slot_page < 0 || slot_page >= p.num_slot_pages) return {};
  if (!p.rotary.covers(static_cast<int64_t>(chunk) * kTokens, kTokens)) return {};
  return {block, chunk, slot_page, slot % slots};
}

// Which of the chunks that a page holds exactly (exact_keys) a chunk of the block is, or -1.
__device__ __forceinline__ int find_exact_keys(const PageLayout& layout, const uint8_t* page,
                                               int head, int chunk) {
  if (layout.rank == 0) return chunk;
  const int32_t* ids = outlier_ids(layout, page, head);
  for (int i = 0; i < layout.num_outliers; ++i) {
    if (ids[i] == chunk) return i;
  }
  return -1;
}

// Copies a chunk's keys or values of one KV head out of an exact page.
template <int kHeadSize, int kTokens, typename T>
__device__ __forceinline__ void copy_resident(const T* pages, const ExactStrides& strides,
                                              int64_t page, int head, int token, T* out) {
  constexpr int kVectors = kHeadSize / 8;
  const T* from = pages + page * strides.page + head * strides.head + token * strides.token;
#pragma unroll 1
  for (int v = threadIdx.x; v < kTokens * kVectors; v += kRebuildThreads) {
    reinterpret_cast<uint4*>(out)[v] =
        *reinterpret_cast<const uint4*>(from + v / kVectors * strides.token + v % kVectors * 8);
  }
}

// grid: parts of a row's and head's misses, KV heads, rows.
template <typename T, int kHeadSize, int kTokens>
__global__ void __launch_bounds__(kRebuildThreads, rebuild_ctas(kHeadSize, kTokens))
    fill_slots_kernel(const FillSlotsParams p) {
  const PageLayout& layout = p.layout;
  const int head = blockIdx.y;
  const int64_t row = blockIdx.z;
  int64_t count = p.num_misses[row * layout.num_kv_heads + head];
  count = count > p.places ? p.places : count;
  if (count <= 0) return;
  const int begin = static_cast<int>(count * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(count * (blockIdx.x + 1) / gridDim.x);
  if (begin == end) return;

  const int chunks = static_cast<int>(layout.block_size) / kTokens;
  int resident = 0, fetched = 0;
  Rebuilder<T, kHeadSize, kTokens> rebuild(layout);
  // Other CTAs hide the lookups. To have two misses' values under way would take moves between
  // registers, and a move waits for the link.
  for (int i = begin; i < end; ++i) {
    const Miss miss = find_miss<kTokens>(p, row, head, i);
    if (miss.block == 0) continue;
    const int chunk = miss.chunk % chunks;
    uint8_t* slot_page = p.slot_pages + miss.slot_page * p.slot_page_stride;
    const int64_t offset = (head * layout.slots_per_page + miss.slot) * (kTokens * kHeadSize);
    T* keys = reinterpret_cast<T*>(slot_page + layout.slot_keys) + offset;
    T* slot_values = reinterpret_cast<T*>(slot_page + layout.slot_values) + offset;
    if (const int from = p.resident_page(miss.block, chunk)) {
      const int token = chunk * kTokens % static_cast<int>(layout.exact_tokens);
      copy_resident<kHeadSize, kTokens>(static_cast<const T*>(p.exact_keys), p.key_strides, from,
                                        head, token, keys);
      copy_resident<kHeadSize, kTokens>(static_cast<const T*>(p.exact_values), p.value_strides,
                                        from, head, token, slot_values);
      ++resident;
      continue;
    }
    ++fetched;
    ValueTile<T, kHeadSize, kTokens> values;
    const uint8_t* row_of_block = p.host_pool + miss.block * p.host_pool_stride;
    values.load(layout,
                row_of_block + static_cast<int64_t>(head) * chunks * layout.value_record_bytes,
                head_scales(layout, row_of_block, head), chunk * kTokens);

    const uint8_t* page = p.pages + miss.block * p.page_stride;
    const int exact = find_exact_keys(layout, page, head, chunk);
    if (exact >= 0) {
      copy_rows<kHeadSize>(exact_keys<T>(layout, page, head, exact), kTokens, keys, kHeadSize);
    } else {
      const int64_t position = static_cast<int64_t>(miss.chunk) * kTokens;
      rebuild(page, head, chunk * kTokens, position, p.rotary, keys, kHeadSize);
    }
    values.store(layout, slot_values, kHeadSize);
  }
  if (threadIdx.x == 0) {
    if (resident > 0) atomic_add(&p.counts[2], static_cast<int64_t>(resident));
    if (fetched > 0) atomic_add(&p.counts[3], static_cast<int64_t>(fetched));
  }
}

template <typename T, int kHeadSize, int kTokens>
void launch_fill_slots(const Launcher& launch, const FillSlotsParams& p) {
  const int64_t groups = p.rows * p.layout.num_kv_heads;
  if (groups == 0) return;
  const int64_t parts = (kCtas + groups - 1) / groups;
  launch("fill_slots", fill_slots_kernel<T, kHeadSize, kTokens>,
         dim3(parts < p.places ? parts : p.places, p.layout.num_kv_heads, p.rows), kRebuildThreads,
         RebuildShape<kHeadSize, kTokens>::shared_bytes(p.layout.rank), p);
}

}  // namespace

void fill_slots(const Tensor& chunk_ids, const Tensor& slot_ids, const Tensor& misses,
                const Tensor& num_misses, const Tensor& pages, const Tensor& block_table,
                const Tensor& host_pool, const Tensor& cos_sin, bool is_neox, const Tensor& sources,
                const Tensor& epochs, const Tensor& exact_keys, const Tensor& exact_values,
                const Tensor& slot_table, const Tensor& slot_pages,
                const std::vector<int64_t>& layout_ints, const Tensor& counts) {
  const FillSlotsParams p =
      read_fill_slots(chunk_ids, slot_ids, misses, num_misses, pages, block_table, host_pool,
                      cos_sin, is_neox, sources, epochs, exact_keys, exact_values, slot_table,
                      slot_pages, layout_ints, counts, kDevice);
  check_rebuilt_sections(p.layout);
  check_vector_rows(pages, "pages");
  check_vector_rows(host_pool, "host_pool");
  check_vector_rows(slot_pages, "slot_pages");
  check_vectors(exact_keys, "exact_keys");
  check_vectors(exact_values, "exact_values");
  const Launcher launch(pages);
  dispatch_layout(p.layout, [&]<typename T, int kHeadSize>() {
    if (p.layout.chunk_size == 8) {
      launch_fill_slots<T, kHeadSize, 8>(launch, p);
    } else {
      launch_fill_slots<T, kHeadSize, 16>(launch, p);
    }
  });
}

}  // namespace shadowkv::cuda

SHADOWKV_CUDA_KERNEL(fill_slots)
