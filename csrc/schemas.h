// The ops: vllm_shadowkv/ops.py documents the arguments, vllm_shadowkv/reference.py defines the
// results. `layout` is a PageLayout (layout.h), `Tensor(a!)` marks what an op writes. Each op
// registers its kernels beside them.
#pragma once

#include <torch/csrc/stable/library.h>

namespace shadowkv {

template <typename Library>
void define_ops(Library& m) {
  m.def(
      "pack_block(Tensor block_ids, Tensor keys, Tensor query_scales, Tensor mean, Tensor "
      "coefficients, Tensor basis, "
      "Tensor(a!) pages, int[] layout) -> ()");
  m.def(
      "store_values(Tensor block_ids, Tensor exact_ids, Tensor exact_values, Tensor(a!) pages, "
      "Tensor(b!) host_pool, int[] layout) -> ()");
  m.def(
      "select_chunks(Tensor query, Tensor pages, Tensor block_table, Tensor exact_start, "
      "Tensor seq_lens, float scale, int budget_chunks, int[] layout, Tensor(a!) workspace, "
      "Tensor(b!) chunk_ids, Tensor(c!) rest_values, Tensor(d!) rest_lse) -> ()");
  m.def(
      "plan_slots(Tensor chunk_ids, Tensor block_table, Tensor epochs, Tensor clock, "
      "Tensor slot_table, Tensor(a!) slot_pages, int[] layout, Tensor(b!) slot_ids, "
      "Tensor(c!) misses, Tensor(d!) num_misses, Tensor(e!) counts) -> ()");
  m.def(
      "fill_slots(Tensor chunk_ids, Tensor slot_ids, Tensor misses, Tensor num_misses, Tensor "
      "pages, Tensor block_table, Tensor host_pool, Tensor cos_sin, bool is_neox, Tensor sources, "
      "Tensor epochs, Tensor exact_keys, Tensor exact_values, Tensor slot_table, "
      "Tensor(a!) slot_pages, int[] layout, Tensor(b!) counts) -> ()");
  m.def(
      "sparse_attention(Tensor query, Tensor slot_ids, Tensor slot_table, Tensor slot_pages, "
      "Tensor exact_keys, Tensor exact_values, Tensor exact_table, Tensor exact_start, "
      "Tensor seq_lens, Tensor rest_values, Tensor rest_lse, float scale, int[] layout, "
      "Tensor(a!) workspace, Tensor(b!) output, Tensor(c!) lse) -> ()");
  m.def(
      "expand_blocks(Tensor block_ids, Tensor first_positions, Tensor pages, Tensor host_pool, "
      "Tensor cos_sin, bool is_neox, int[] layout, Tensor(a!) keys, Tensor(b!) values) -> ()");
}

}  // namespace shadowkv
