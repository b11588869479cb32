// pagedcore._core: the block manager for Python. The documentation of the interface is pagedcore/_core.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "block_manager.h"
#include "check.h"
#include "contiguous_manager.h"
#include "step_buffer.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

// A view of a Python object's int32 elements (array('i'), numpy, memoryview), held until it goes out of scope.
// Through the C API: a step reads hundreds of them, and py::buffer_info allocates for each.
class Int32View {
 public:
  Int32View(PyObject* object, const char* name, int extra_flags = 0) {
    if (PyObject_GetBuffer(object, &buffer_, PyBUF_ND | PyBUF_FORMAT | extra_flags) != 0) throw py::error_already_set();
    const std::string_view format = buffer_.format == nullptr ? "B" : buffer_.format;
    if (buffer_.ndim != 1 || buffer_.itemsize != sizeof(int32_t) || (format != "i" && format != "l")) {
      PyBuffer_Release(&buffer_);
      throw py::type_error(std::string(name) +
                           " must be a contiguous one-dimensional buffer of int32, such as array('i')");
    }
  }
  Int32View(Int32View&& other) noexcept : buffer_(other.buffer_) { other.buffer_.obj = nullptr; }
  Int32View(const Int32View&) = delete;
  Int32View& operator=(const Int32View&) = delete;
  ~Int32View() { PyBuffer_Release(&buffer_); }

  std::span<int32_t> span() const {
    return {static_cast<int32_t*>(buffer_.buf), static_cast<size_t>(buffer_.len) / sizeof(int32_t)};
  }

 private:
  Py_buffer buffer_;
};

int64_t to_int64(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

void check_length(const py::list& list, size_t expected, const char* name) {
  if (list.size() != expected) {
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(expected) + " elements, got " +
                                std::to_string(list.size()));
  }
}

size_t grow_many(BlockManager& manager, const py::list& seq_ids, const py::list& num_tokens,
                 const py::list& write_from) {
  check_length(num_tokens, seq_ids.size(), "num_tokens");
  check_length(write_from, seq_ids.size(), "write_from");
  const auto item = [](const py::list& list, size_t i) { return to_int64(PyList_GET_ITEM(list.ptr(), i)); };
  for (size_t i = 0; i < seq_ids.size(); ++i) {
    if (!manager.grow(item(seq_ids, i), item(num_tokens, i), item(write_from, i))) return i;
  }
  return seq_ids.size();
}

int64_t fill_step_from_lists(BlockManager& manager, const py::handle& buffer, int64_t num_rows, int64_t num_tokens,
                             int64_t table_width, const py::list& seq_ids, const py::list& num_computed,
                             const py::list& query_lens, const py::list& token_ids, const py::list& last_rows) {
  const size_t num_real_rows = seq_ids.size();
  check_length(num_computed, num_real_rows, "num_computed");
  check_length(query_lens, num_real_rows, "query_lens");
  check_length(token_ids, num_real_rows, "token_ids");
  check_length(last_rows, num_real_rows, "last_rows");
  const Int32View out(buffer.ptr(), "buffer", PyBUF_WRITABLE);
  std::vector<Int32View> views;
  std::vector<StepRow> rows;
  views.reserve(num_real_rows);
  rows.reserve(num_real_rows);
  for (size_t i = 0; i < num_real_rows; ++i) {
    views.emplace_back(PyList_GET_ITEM(token_ids.ptr(), i), "token_ids");
    rows.push_back({.seq_id = to_int64(PyList_GET_ITEM(seq_ids.ptr(), i)),
                    .num_computed = to_int64(PyList_GET_ITEM(num_computed.ptr(), i)),
                    .query_len = to_int64(PyList_GET_ITEM(query_lens.ptr(), i)),
                    .token_ids = views.back().span(),
                    .last_row = to_int64(PyList_GET_ITEM(last_rows.ptr(), i))});
  }
  return fill_step(manager, rows, {num_rows, num_tokens, table_width}, out.span());
}

int64_t copy_tokens_of_lists(const py::handle& buffer, const py::list& token_ids, const py::list& starts,
                             const py::list& lengths, int32_t unknown) {
  check_length(starts, token_ids.size(), "starts");
  check_length(lengths, token_ids.size(), "lengths");
  const Int32View out(buffer.ptr(), "out", PyBUF_WRITABLE);
  std::span<int32_t> rest = out.span();
  for (size_t i = 0; i < token_ids.size(); ++i) {
    const Int32View tokens(PyList_GET_ITEM(token_ids.ptr(), i), "token_ids");
    const int64_t start = to_int64(PyList_GET_ITEM(starts.ptr(), i));
    const int64_t length = to_int64(PyList_GET_ITEM(lengths.ptr(), i));
    rest = rest.subspan(copy_tokens(tokens.span(), start, length, unknown, rest));
  }
  return std::ssize(out.span()) - std::ssize(rest);
}

py::object to_pairs(const std::optional<std::vector<SwapPair>>& pairs) {
  if (!pairs) return py::none();
  py::list result(pairs->size());
  for (size_t i = 0; i < pairs->size(); ++i) result[i] = py::make_tuple((*pairs)[i].device, (*pairs)[i].host);
  return result;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  py::register_local_exception_translator([](std::exception_ptr exception) {
    try {
      std::rethrow_exception(exception);
    } catch (const UnknownSequence& unknown) {
      PyErr_SetString(PyExc_KeyError, unknown.what());
    }
  });

  module.def("copy_tokens", &copy_tokens_of_lists, py::arg("out"), py::arg("token_ids"), py::arg("starts"),
             py::arg("lengths"), py::arg("unknown"));

  py::class_<BlockManager>(module, "BlockManager")
      .def(py::init([](int64_t num_blocks, int64_t block_size, int64_t num_host_blocks, bool enable_prefix_caching,
                       int64_t hash_bits) {
             return std::make_unique<BlockManager>(
                 BlockManager::Options{num_blocks, block_size, num_host_blocks, enable_prefix_caching, hash_bits});
           }),
           py::arg("num_blocks"), py::arg("block_size"), py::kw_only(), py::arg("num_host_blocks") = 0,
           py::arg("enable_prefix_caching") = true, py::arg("hash_bits") = 64)
      .def("add", &BlockManager::add, py::arg("seq_id"))
      .def(
          "match_prefix",
          [](BlockManager& manager, SequenceId seq_id, py::handle token_ids, int64_t max_tokens,
             const std::string& salt) {
            return manager.match_prefix(seq_id, Int32View(token_ids.ptr(), "token_ids").span(), max_tokens, salt);
          },
          py::arg("seq_id"), py::arg("token_ids"), py::arg("max_tokens"), py::arg("salt"))
      .def("grow", &BlockManager::grow, py::arg("seq_id"), py::arg("num_tokens"), py::arg("write_from"))
      .def("grow_many", &grow_many, py::arg("seq_ids"), py::arg("num_tokens"), py::arg("write_from"))
      .def("fork", &BlockManager::fork, py::arg("parent"), py::arg("child"))
      .def("release", &BlockManager::release, py::arg("seq_id"))
      .def(
          "commit",
          [](BlockManager& manager, SequenceId seq_id, py::handle token_ids, int64_t num_computed) {
            manager.commit(seq_id, Int32View(token_ids.ptr(), "token_ids").span(), num_computed);
          },
          py::arg("seq_id"), py::arg("token_ids"), py::arg("num_computed"))
      .def(
          "swap_out",
          [](BlockManager& manager, const std::vector<SequenceId>& seq_ids) {
            return to_pairs(manager.swap_out(seq_ids));
          },
          py::arg("seq_ids"))
      .def(
          "swap_in",
          [](BlockManager& manager, const std::vector<SequenceId>& seq_ids) {
            return to_pairs(manager.swap_in(seq_ids));
          },
          py::arg("seq_ids"))
      .def(
          "holding",
          [](const BlockManager& manager, const std::vector<SequenceId>& seq_ids) {
            const auto held = manager.holding(seq_ids);
            return py::make_tuple(held.num_blocks, held.num_exclusive);
          },
          py::arg("seq_ids"))
      .def("fill_step", &fill_step_from_lists, py::arg("buffer"), py::kw_only(), py::arg("num_rows"),
           py::arg("num_tokens"), py::arg("table_width"), py::arg("seq_ids"), py::arg("num_computed"),
           py::arg("query_lens"), py::arg("token_ids"), py::arg("last_rows"))
      .def("blocks_needed", &BlockManager::blocks_needed, py::arg("num_tokens"))
      .def(
          "block_table",
          [](const BlockManager& manager, SequenceId seq_id) {
            const auto table = manager.block_table(seq_id);
            return std::vector<BlockId>(table.begin(), table.end());
          },
          py::arg("seq_id"))
      .def("has", &BlockManager::has, py::arg("seq_id"))
      .def("check_integrity", &BlockManager::check_integrity)
      .def("reset_prefix_cache", &BlockManager::reset_prefix_cache)
      .def_property_readonly("max_blocks_per_sequence", &BlockManager::max_blocks_per_sequence)
      .def_property_readonly("num_blocks", &BlockManager::num_blocks)
      .def_property_readonly("block_size", &BlockManager::block_size)
      .def_property_readonly("num_free_blocks", &BlockManager::num_free_blocks)
      .def_property_readonly("num_cached_blocks", &BlockManager::num_cached_blocks)
      .def_property_readonly("num_evictions", &BlockManager::num_evictions)
      .def_property_readonly("num_host_blocks", &BlockManager::num_host_blocks)
      .def_property_readonly("num_free_host_blocks", &BlockManager::num_free_host_blocks);

  py::class_<ContiguousManager, BlockManager>(module, "ContiguousManager")
      .def(py::init<int64_t, int64_t>(), py::arg("num_blocks"), py::arg("block_size"));
}

}  // namespace pagedcore
