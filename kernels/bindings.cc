// pagedcore._kernels: the operations of ops.h as Python functions of addresses and numbers, in the order of the
// structs' fields.
//
// `pagedcore/ops` is the only caller and has checked everything. No argument has a name, and an address is a plain
// int: a call costs well under a microsecond. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <functional>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "ops.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

using Address = std::uintptr_t;
using I32 = int32_t;
using I64 = int64_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

RotaryWriteKV rotary_write_kv(Address qkv, Address cos_sin, Address q_norm, Address k_norm, Address k_cache,
                              Address v_cache, Address positions, Address slot_mapping, I64 row_stride, I32 num_tokens,
                              I32 num_heads, I32 num_kv_heads, I32 head_dim, I32 rotary_dim, I32 block_size,
                              float norm_eps, I32 dtype) {
  return {at<void>(qkv),
          at<const float>(cos_sin),
          at<void>(q_norm),
          at<void>(k_norm),
          at<void>(k_cache),
          at<void>(v_cache),
          at<const int32_t>(positions),
          at<const int32_t>(slot_mapping),
          row_stride,
          num_tokens,
          num_heads,
          num_kv_heads,
          head_dim,
          rotary_dim,
          block_size,
          norm_eps,
          DType{dtype}};
}

PagedAttention paged_attention(Address out, Address q, Address k_cache, Address v_cache, Address block_tables,
                               Address query_start_loc, Address seq_lens, Address workspace, I64 workspace_bytes,
                               I64 q_row_stride, I32 num_tokens, I32 num_rows, I32 table_stride, I32 num_heads,
                               I32 num_kv_heads, I32 head_dim, I32 block_size, I32 max_query_len, float scale,
                               I32 dtype, bool batch_invariant) {
  return {at<void>(out),
          at<void>(q),
          at<void>(k_cache),
          at<void>(v_cache),
          at<const int32_t>(block_tables),
          at<const int32_t>(query_start_loc),
          at<const int32_t>(seq_lens),
          at<void>(workspace),
          workspace_bytes,
          q_row_stride,
          num_tokens,
          num_rows,
          table_stride,
          num_heads,
          num_kv_heads,
          head_dim,
          block_size,
          max_query_len,
          scale,
          DType{dtype},
          batch_invariant};
}

CopyBlocks copy_blocks(Address src, Address dst, Address pairs, I64 src_plane_stride, I64 src_block_stride,
                       I64 dst_plane_stride, I64 dst_block_stride, I64 block_bytes, I32 num_pairs, I32 num_planes) {
  return {at<void>(src),    at<void>(dst),    at<const int32_t>(pairs), src_plane_stride,
          src_block_stride, dst_plane_stride, dst_block_stride,         block_bytes,
          num_pairs,        num_planes};
}

RMSNorm rms_norm(Address out, Address x, Address residual, Address weight, I32 num_tokens, I32 hidden_size, float eps,
                 I32 dtype) {
  return {at<void>(out), at<void>(x), at<void>(residual), at<void>(weight), num_tokens, hidden_size, eps, DType{dtype}};
}

LayerNorm layer_norm(Address out, Address x, Address residual, Address weight, Address bias, I32 num_tokens,
                     I32 hidden_size, float eps, I32 dtype) {
  return {at<void>(out), at<void>(x), at<void>(residual), at<void>(weight), at<void>(bias), num_tokens,
          hidden_size,   eps,         DType{dtype}};
}

SiluAndMul silu_and_mul(Address out, Address x, I32 num_tokens, I32 size, I32 dtype) {
  return {at<void>(out), at<void>(x), num_tokens, size, DType{dtype}};
}

Relu relu(Address out, Address x, I32 num_tokens, I32 size, I32 dtype) {
  return {at<void>(out), at<void>(x), num_tokens, size, DType{dtype}};
}

Sample sample(Address logits, Address parameters, Address token_ids, I64 row_stride, I32 num_rows, I32 vocab_size) {
  return {
      at<const float>(logits), at<const int32_t>(parameters), at<int32_t>(token_ids), row_stride, num_rows, vocab_size};
}

Logprobs logprobs(Address logits, Address token_ids, Address chosen, Address rank, Address top, Address top_ids,
                  I64 row_stride, I32 num_rows, I32 vocab_size, I32 num_top) {
  return {at<const float>(logits),
          at<const int32_t>(token_ids),
          at<float>(chosen),
          at<int32_t>(rank),
          at<float>(top),
          at<int32_t>(top_ids),
          row_stride,
          num_rows,
          vocab_size,
          num_top};
}

PackedLinear packed_linear(Address y, Address x, Address packed, Address bias, I64 x_row_stride, I64 y_row_stride,
                           I32 num_tokens, I32 in_features, I32 out_features, I32 dtype, I32 y_dtype) {
  return {at<void>(y), at<void>(x), at<void>(packed), at<void>(bias), x_row_stride,  y_row_stride,
          num_tokens,  in_features, out_features,     DType{dtype},   DType{y_dtype}};
}

// CPU kernel calls, captured once and replayed without Python between them, as a CUDA graph is. Their addresses stay
// as they were: what lies there may change.
class Graph {
 public:
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void replay() const {
    for (const auto& call : calls_) call();
  }

  // The graph that this thread's calls go to instead of running; null: they run.
  static thread_local Graph* capturing;

 private:
  std::vector<std::function<void()>> calls_;
};

thread_local Graph* Graph::capturing = nullptr;

template <class Op, class... Args>
void bind(py::module_& module, const char* name, Op (*pack)(Args...), void (*kernel)(const Op&)) {
  module.def(name, [pack, kernel](Args... args) {
    const Op op = pack(args...);
    if (Graph::capturing) {
      Graph::capturing->add([kernel, op] { kernel(op); });
      return;
    }
    py::gil_scoped_release unlocked;
    kernel(op);
  });
}

void bind_cpu(py::module_ module) {
  py::class_<Graph>(module, "Graph")
      .def(py::init<>())
      .def("begin_capture", [](Graph& graph) { Graph::capturing = &graph; })
      .def("end_capture", [](Graph&) { Graph::capturing = nullptr; })
      .def("replay", &Graph::replay, py::call_guard<py::gil_scoped_release>());
  bind(module, "rotary_write_kv", rotary_write_kv, cpu::rotary_write_kv);
  bind(module, "paged_attention", paged_attention, cpu::paged_attention);
  bind(module, "copy_blocks", copy_blocks, cpu::copy_blocks);
  bind(module, "rms_norm", rms_norm, cpu::rms_norm);
  bind(module, "layer_norm", layer_norm, cpu::layer_norm);
  bind(module, "silu_and_mul", silu_and_mul, cpu::silu_and_mul);
  bind(module, "relu", relu, cpu::relu);
  bind(module, "sample", sample, cpu::sample);
  bind(module, "logprobs", logprobs, cpu::logprobs);
  bind(module, "packed_linear", packed_linear, cpu::packed_linear);
  module.def("packed_linear_bytes", [](I32 out_features, I32 in_features, I32 dtype) {
    return cpu::packed_linear_bytes(out_features, in_features, DType{dtype});
  });
  module.def(
      "pack_linear",
      [](Address packed, Address weight, I32 out_features, I32 in_features, I32 dtype) {
        cpu::pack_linear(at<void>(packed), at<void>(weight), out_features, in_features, DType{dtype});
      },
      py::call_guard<py::gil_scoped_release>());
  module.def("request_huge_pages",
             [](Address start, I64 num_bytes) { cpu::request_huge_pages(at<void>(start), num_bytes); });
  module.def("set_num_threads", cpu::set_num_threads);
  module.def("num_threads", cpu::num_threads);
  module.def("instruction_set", cpu::instruction_set);
  module.def("set_isa_for_testing", cpu::set_isa_for_testing);
}

#ifdef PAGEDCORE_WITH_CUDA
SkinnyLinear skinny_linear(Address y, Address x, Address weight, Address bias, I64 x_row_stride, I32 num_tokens,
                           I32 in_features, I32 out_features, I32 dtype, I32 y_dtype, bool is_gated) {
  return {at<void>(y), at<void>(x),  at<void>(weight), at<void>(bias), x_row_stride, num_tokens,
          in_features, out_features, DType{dtype},     DType{y_dtype}, is_gated};
}

UnpackStep unpack_step(Address packed, Address last_token_ids, Address token_ids, Address block_tables,
                       Address sampling, I32 num_tokens, I32 num_rows, I32 table_stride) {
  return {at<const int32_t>(packed),
          at<const int32_t>(last_token_ids),
          at<int32_t>(token_ids),
          at<int32_t>(block_tables),
          at<int32_t>(sampling),
          num_tokens,
          num_rows,
          table_stride};
}

EnqueueStep enqueue_step(Address packed, Address host_packed, I64 packed_bytes, Address graph, Address host_tokens,
                         Address tokens, I64 token_bytes, Address event) {
  return {at<void>(packed),      at<const void>(host_packed), packed_bytes, at<void>(graph),
          at<void>(host_tokens), at<const void>(tokens),      token_bytes,  at<void>(event)};
}

// Keeps the interpreter lock, for a launch takes microseconds: the engine thread would get it back behind all others.
template <class Op, class... Args>
void bind(py::module_& module, const char* name, Op (*pack)(Args...), void (*kernel)(const Op&, cuda::Stream)) {
  module.def(name, [pack, kernel](Args... args, Address stream) { kernel(pack(args...), at<void>(stream)); });
}

void bind_cuda(py::module_ module) {
  bind(module, "rotary_write_kv", rotary_write_kv, cuda::rotary_write_kv);
  bind(module, "paged_attention", paged_attention, cuda::paged_attention);
  bind(module, "copy_blocks", copy_blocks, cuda::copy_blocks);
  bind(module, "rms_norm", rms_norm, cuda::rms_norm);
  bind(module, "layer_norm", layer_norm, cuda::layer_norm);
  bind(module, "silu_and_mul", silu_and_mul, cuda::silu_and_mul);
  bind(module, "relu", relu, cuda::relu);
  bind(module, "sample", sample, cuda::sample);
  bind(module, "logprobs", logprobs, cuda::logprobs);
  bind(module, "skinny_linear", skinny_linear, cuda::skinny_linear);
  bind(module, "unpack_step", unpack_step, cuda::unpack_step);
  bind(module, "enqueue_step", enqueue_step, cuda::enqueue_step);
  module.def("has_skinny_linear", cuda::has_skinny_linear);
  module.def("paged_attention_workspace_bytes", cuda::paged_attention_workspace_bytes);
}
#endif

}  // namespace
}  // namespace pagedcore

PYBIND11_MODULE(_kernels, module) {
  pagedcore::bind_cpu(module.def_submodule("cpu"));
#ifdef PAGEDCORE_WITH_CUDA
  pagedcore::bind_cuda(module.def_submodule("cuda"));
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
}
