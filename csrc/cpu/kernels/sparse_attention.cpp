// Attention of one token over the chunks in its slots and its exact tokens, per row and KV head.
//
// Reads each key and value once, for all query heads of the group: 2 * head_size elements per
// token. A row is cut into splits of kSplitTokens; a split goes over its tokens in tiles that fit
// the first cache, with the online softmax, all in fp32. Keys whose dimensions are adjacent (slots,
// CUDA's exact pages) go through dot products; keys whose tokens are adjacent (exact pages on the
// CPU) through sums over the dimensions in vectors of tokens; any other memory order is first
// copied to fp32 rows.
//
// A partial result, in floats: the largest logit of each query head; the sum of exp(logit -
// largest); the number of tokens; the sum of exp(logit - largest) * value, group * head_size. The
// rest, which select_chunks has estimated, is merged as one more.
#include "cpu/kernels/sparse_attention.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/numeric.h"

namespace shadowkv::SHADOWKV_ISA {
namespace {

constexpr int64_t kSplitTokens = 512;
constexpr int64_t kSplitChunks = kSplitTokens / 8;  // at most
static_assert(kSplitTokens % kTile == 0);

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Range {
  int64_t begin;
  int64_t end;
};

// Exact tokens of a row that its table has a column for.
Range exact_range(const SparseAttentionParams& p, int64_t row) {
  const int64_t begin = std::max(p.exact_start[row], 0);
  const int64_t end = std::min<int64_t>(p.seq_lens[row], p.exact_width * p.layout.exact_tokens);
  return {begin, std::max(begin, end)};
}

int64_t num_slot_splits(const SparseAttentionParams& p) {
  return (p.columns * p.layout.chunk_size + kSplitTokens - 1) / kSplitTokens;
}

// The places of a partial result.
struct Partial {
  float* largest;
  float* total;
  float* tokens;
  float* values;
};

Partial partial_at(const SparseAttentionParams& p, float* memory) {
  return {memory, memory + p.group, memory + 2 * p.group,
          memory + round_up(2 * p.group + 1, kMaxLanes)};
}

// One split of one row and KV head.
template <typename T>
class Split {
 public:
  Split(const SparseAttentionParams& p, int64_t row, int64_t head, const Partial& partial)
      : p_(p),
        row_(row),
        head_(head),
        size_(p.layout.head_size),
        partial_(partial),
        memory_(scratch()) {
    memory_.resize(p.group * (size_ + kTile + 1));
    queries_ = memory_.data();
    logits_ = queries_ + p.group * size_;
    decay_ = logits_ + p.group * kTile;
    const T* query = static_cast<const T*>(p.query) + row * p.query_row_stride +
                     head * p.group * p.query_head_stride;
    for (int64_t g = 0; g < p.group; ++g) {
      widen(query + g * p.query_head_stride, 1, size_, queries_ + g * size_);
    }
    std::fill_n(partial.largest, p.group, -kInfinity);
    std::fill_n(partial.total, p.group, 0.0f);
    std::fill_n(partial.values, p.group * size_, 0.0f);
    *partial.tokens = 0;
  }

  // The chunks in columns [begin, end) of slot_ids.
  void add_slots(int64_t begin, int64_t end) {
    const int64_t chunk = p_.layout.chunk_size, in_tile = kTile / chunk;
    Chunk chunks[kSplitChunks];
    int64_t count = 0;
    for (int64_t column = begin; column < end; ++column) {
      chunks[count] = chunk_at(column);
      count += chunks[count].keys != nullptr;
    }
    const auto fetch = [&](int64_t from, Ahead& ahead) {
      for (int64_t i = from; i < std::min(count, from + in_tile); ++i) {
        ahead.add(chunks[i].keys, sizeof(T) * chunk * size_);
        ahead.add(chunks[i].values, sizeof(T) * chunk * size_);
      }
    };
    Ahead first;
    fetch(0, first);
    first.finish();
    for (int64_t i = 0; i < count; i += in_tile) {
      // Chunks lie anywhere: the next tile is on its way while this one is multiplied.
      Ahead ahead;
      fetch(i + in_tile, ahead);
      const int64_t present = std::min(in_tile, count - i);
      spread_over_products(present * chunk, ahead);
      const T* values[kTile];
      for (int64_t j = 0; j < present; ++j) {
        dot_products(queries_, p_.group, size_, chunks[i + j].keys, chunk, size_, size_, ahead,
                     logits_ + j * chunk, kTile);
        for (int64_t t = 0; t < chunk; ++t) {
          values[j * chunk + t] = chunks[i + j].values + t * size_;
        }
      }
      add_tile(0, present * chunk, values, ahead);
    }
  }

  // The exact tokens [begin, end), of which no two tiles share an aligned kTile.
  void add_exact(int64_t begin, int64_t end) {
    ExactTile tile = exact_tile(begin, end);
    Ahead first;
    fetch(tile, first);
    first.finish();
    while (tile.tokens > 0) {
      const ExactTile next = exact_tile(tile.next, end);
      Ahead ahead;
      fetch(next, ahead);
      if (tile.keys != nullptr) add_exact_tile(tile, ahead);
      tile = next;
    }
  }

 private:
  static std::vector<float>& scratch() {
    thread_local std::vector<float> memory;
    return memory;
  }

  struct Chunk {
    const T *keys, *values;  // null: the slot is not valid
  };

  // The chunk in a column of slot_ids.
  Chunk chunk_at(int64_t column) const {
    const int64_t per_page = p_.layout.slots_per_page;
    const int32_t slot = p_.slot_ids[(row_ * p_.layout.num_kv_heads + head_) * p_.columns + column];
    if (slot < 0 || slot >= p_.pages_per_row * per_page) return {};
    const int64_t page = p_.slot_table[row_ * p_.slot_table_stride + slot / per_page];
    if (page <= 0 || page >= p_.num_pages) return {};
    const uint8_t* start = p_.slot_pages + page * p_.page_stride;
    const int64_t place = (head_ * per_page + slot % per_page) * p_.layout.chunk_size * size_;
    return {reinterpret_cast<const T*>(start + p_.layout.slot_keys) + place,
            reinterpret_cast<const T*>(start + p_.layout.slot_values) + place};
  }

  // Tokens of an exact page, inside one aligned kTile.
  struct ExactTile {
    const T *keys, *values;  // of the page's first token; null: the page is not valid
    int64_t begin;           // in the page
    int64_t tokens;          // 0: there is none
    int64_t next;            // where the tile after it begins, in the row
  };

  // The tile at token `begin` of the row.
  ExactTile exact_tile(int64_t begin, int64_t end) const {
    if (begin >= end) return {};
    const int64_t per_page = p_.layout.exact_tokens;
    const int64_t column = begin / per_page, first = column * per_page, place = begin - first;
    const int64_t last = std::min({end - first, per_page, place / kTile * kTile + kTile});
    ExactTile tile = {nullptr, nullptr, place, last - place, first + last};
    const int64_t page = p_.exact_table[row_ * p_.exact_table_stride + column];
    if (page > 0 && page < p_.num_exact) {
      const ExactStrides &ks = p_.key_strides, &vs = p_.value_strides;
      tile.keys = static_cast<const T*>(p_.exact_keys) + page * ks.page + head_ * ks.head;
      tile.values = static_cast<const T*>(p_.exact_values) + page * vs.page + head_ * vs.head;
    }
    return tile;
  }

  // What the tile will read. Memory orders that are copied are left out.
  void fetch(const ExactTile& tile, Ahead& ahead) const {
    if (tile.keys == nullptr) return;
    const ExactStrides &ks = p_.key_strides, &vs = p_.value_strides;
    constexpr int64_t kBytes = sizeof(T);
    if (ks.dim == 1) {
      ahead.add(tile.keys + tile.begin * ks.token, kBytes * size_, tile.tokens, kBytes * ks.token);
    } else if (ks.token == 1) {
      ahead.add(tile.keys + tile.begin, kBytes * tile.tokens, size_, kBytes * ks.dim);
    }
    if (vs.dim == 1) {
      ahead.add(tile.values + tile.begin * vs.token, kBytes * size_, tile.tokens,
                kBytes * vs.token);
    }
  }

  // Half of what is ahead is asked for during the products of `tokens` keys, the other half while
  // their values are added.
  void spread_over_products(int64_t tokens, Ahead& ahead) const {
    ahead.spread(2 * ((tokens + 3) / 4) * ((p_.group + 3) / 4));
  }

  void add_exact_tile(const ExactTile& tile, Ahead& ahead) {
    const ExactStrides &ks = p_.key_strides, &vs = p_.value_strides;
    const int64_t begin = tile.begin, tokens = tile.tokens;
    int64_t skipped = 0;  // lanes before the first token
    if (ks.dim == 1) {
      spread_over_products(tokens, ahead);
      dot_products(queries_, p_.group, size_, tile.keys + begin * ks.token, tokens, ks.token, size_,
                   ahead, logits_, kTile);
    } else if (ks.token == 1) {
      // Whole vectors, so lanes may hold tokens that are not asked for; a page is a multiple of
      // them.
      const int64_t start = begin / kMaxLanes * kMaxLanes;
      skipped = begin - start;
      const int64_t lanes = round_up(begin + tokens, kMaxLanes) - start;
      ahead.spread(2 * size_ * ((lanes + 2 * kLanes - 1) / (2 * kLanes)) * ((p_.group + 3) / 4));
      column_products(queries_, p_.group, tile.keys + start, ks.dim, lanes, size_, ahead, logits_);
    } else {
      float* rows = wide_rows(tile.keys + begin * ks.token, ks.token, ks.dim, tokens, 0);
      dot_products(queries_, p_.group, size_, rows, tokens, size_, size_, ahead, logits_, kTile);
    }
    if (vs.dim == 1) {
      const T* pointers[kTile];
      for (int64_t t = 0; t < tokens; ++t) pointers[t] = tile.values + (begin + t) * vs.token;
      add_tile(skipped, tokens, pointers, ahead);
    } else {
      const float* rows = wide_rows(tile.values + begin * vs.token, vs.token, vs.dim, tokens, 1);
      const float* pointers[kTile];
      for (int64_t t = 0; t < tokens; ++t) pointers[t] = rows + t * size_;
      add_tile(skipped, tokens, pointers, ahead);
    }
  }

  // Copies tokens of any memory order to fp32 rows.
  float* wide_rows(const T* from, int64_t token_stride, int64_t dim_stride, int64_t tokens,
                   int which) {
    thread_local std::vector<float> rows[2];
    rows[which].resize(kTile * size_);
    for (int64_t t = 0; t < tokens; ++t) {
      widen(from + t * token_stride, dim_stride, size_, rows[which].data() + t * size_);
    }
    return rows[which].data();
  }

  // Adds a tile whose products are in lanes [skipped, skipped + tokens) of each row of logits_.
  template <typename Value>
  void add_tile(int64_t skipped, int64_t tokens, const Value* const* values, Ahead& ahead) {
    const int64_t end = round_up(skipped + tokens, kLanes);
    for (int64_t g = 0; g < p_.group; ++g) {
      float* logits = logits_ + g * kTile;
      for (int64_t t = 0; t < end; t += kLanes) store(logits + t, load(logits + t) * p_.scale);
      std::fill_n(logits, skipped, -kInfinity);
      std::fill(logits + skipped + tokens, logits + end, -kInfinity);
      FloatV largest = splat(partial_.largest[g]);
      for (int64_t t = 0; t < end; t += kLanes) largest = max_or_nan(largest, load(logits + t));
      const float top = max_or_nan(largest);
      // While no logit is above -inf, exp(-inf - 0) = 0 is wanted and not exp(-inf + inf) = NaN.
      const float base = top == -kInfinity ? 0.0f : top;
      FloatV total{};
      for (int64_t t = 0; t < end; t += kLanes) {
        const FloatV weight = exp_negative(load(logits + t) - base);
        store(logits + t, weight);
        total += weight;
      }
      decay_[g] = partial_.largest[g] == -kInfinity ? 0.0f : std::exp(partial_.largest[g] - base);
      partial_.total[g] = partial_.total[g] * decay_[g] + sum(total);
      partial_.largest[g] = top;
    }
    *partial_.tokens += tokens;
    add_values(logits_ + skipped, decay_, p_.group, values, tokens, size_, ahead, partial_.values);
  }

  const SparseAttentionParams& p_;
  int64_t row_, head_, size_;
  Partial partial_;
  std::vector<float>& memory_;
  float *queries_, *logits_, *decay_;
};

}  // namespace

int64_t attention_num_splits(const SparseAttentionParams& p, int64_t row) {
  const Range exact = exact_range(p, row);
  const int64_t first = exact.begin / kSplitTokens;
  const int64_t exact_splits =
      exact.end > exact.begin ? (exact.end + kSplitTokens - 1) / kSplitTokens - first : 0;
  return num_slot_splits(p) + exact_splits;
}

int64_t attention_partial_size(const SparseAttentionParams& p) {
  return round_up(2 * p.group + 1, kMaxLanes) + p.group * p.layout.head_size;
}

void attention_split_kernel(const SparseAttentionParams& p, int64_t row, int64_t head,
                            int64_t split, float* partial) {
  const int64_t slot_splits = num_slot_splits(p);
  dispatch_dtype(p.layout.dtype_index, [&]<typename T>(T) {
    Split<T> part(p, row, head, partial_at(p, partial));
    if (split < slot_splits) {
      const int64_t columns = kSplitTokens / p.layout.chunk_size;
      part.add_slots(split * columns, std::min(p.columns, (split + 1) * columns));
    } else {
      const Range exact = exact_range(p, row);
      const int64_t begin = (exact.begin / kSplitTokens + split - slot_splits) * kSplitTokens;
      part.add_exact(std::max(exact.begin, begin), std::min(exact.end, begin + kSplitTokens));
    }
  });
}

void attention_merge_kernel(const SparseAttentionParams& p, int64_t row, int64_t head,
                            const float* partials) {
  const int64_t size = p.layout.head_size, splits = attention_num_splits(p, row);
  const int64_t step = attention_partial_size(p);
  const auto partial = [&](int64_t split) {
    return partial_at(p, const_cast<float*>(partials) + split * step);
  };
  thread_local std::vector<float> merged;
  merged.resize(size);
  for (int64_t g = 0; g < p.group; ++g) {
    const int64_t query_head = head * p.group + g;
    const int64_t result = row * p.layout.num_kv_heads * p.group + query_head;
    const float rest = p.rest_lse[result];  // -inf: there is none
    float largest = rest, total = 0, tokens = rest != -kInfinity;
    for (int64_t i = 0; i < splits; ++i) {
      if (*partial(i).tokens == 0) continue;
      largest = max_or_nan(largest, partial(i).largest[g]);
      tokens += *partial(i).tokens;
    }
    std::fill(merged.begin(), merged.end(), 0.0f);
    for (int64_t i = 0; i < splits; ++i) {
      const Partial part = partial(i);
      if (*part.tokens == 0) continue;
      // Equal infinities have no difference.
      const float weight = part.largest[g] == largest ? 1.0f : std::exp(part.largest[g] - largest);
      total += weight * part.total[g];
      const float* values = part.values + g * size;
      for (int64_t d = 0; d < size; ++d) merged[d] += weight * values[d];
    }
    if (rest != -kInfinity) {
      const float weight = rest == largest ? 1.0f : std::exp(rest - largest);
      total += weight;
      const float* values = p.rest_values + result * size;
      for (int64_t d = 0; d < size; ++d) merged[d] += weight * values[d];
    }
    // Logits that are all -inf give 0 / 0, as a softmax does; no token at all gives 0.
    const float inverse = tokens > 0 ? 1.0f / total : 0.0f;
    p.lse[result] = std::isinf(largest) ? largest : largest + std::log(total);
    dispatch_dtype(p.layout.dtype_index, [&]<typename T>(T) {
      T* out =
          static_cast<T*>(p.output) + row * p.output_row_stride + query_head * p.output_head_stride;
      const float factor = tokens > 0 && total == 0 ? std::nanf("") : inverse;
      for (int64_t d = 0; d < size; d += kLanes) store(out + d, load(merged.data() + d) * factor);
    });
  }
}

void sparse_attention_kernel(const SparseAttentionParams& p, int64_t row, int64_t head) {
  const int64_t splits = attention_num_splits(p, row), step = attention_partial_size(p);
  thread_local std::vector<float> partials;
  partials.resize(std::max<int64_t>(partials.size(), splits * step));
  for (int64_t i = 0; i < splits; ++i) {
    attention_split_kernel(p, row, head, i, partials.data() + i * step);
  }
  attention_merge_kernel(p, row, head, partials.data());
}

}  // namespace shadowkv::SHADOWKV_ISA
