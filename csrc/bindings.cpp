// safr_fast._cpu: addresses, sizes and strides in, results written in place. Arguments are checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "cpu_features.hpp"
#include "gemm.hpp"
#include "importance.hpp"
#include "interaction.hpp"
#include "row_energy.hpp"
#include "work.hpp"

namespace py = pybind11;

namespace safr {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (address, sample stride, token stride) of an array over tokens; (address, length) of cu_seqlens.
using Strided = std::array<int64_t, 3>;
using Offsets = std::array<int64_t, 2>;

Layout layout(int64_t samples, int64_t tokens, const std::optional<Strided>& mask,
              const std::optional<Offsets>& cu_seqlens) {
  Layout layout = {samples, tokens, nullptr, 0, 0, nullptr, 0};
  if (mask) {
    layout.mask = pointer<const bool>(Address((*mask)[0]));
    layout.mask_sample_stride = (*mask)[1];
    layout.mask_token_stride = (*mask)[2];
  }
  if (cu_seqlens) {
    layout.cu_seqlens = pointer<const int32_t>(Address((*cu_seqlens)[0]));
    layout.sequences = (*cu_seqlens)[1] - 1;
  }
  return layout;
}

// What the calls on hidden representations share: (address, dtype, shape (samples, tokens, width), strides).
struct HiddenArgument {
  Hidden hidden;
  Precision precision;
  int threads;

  HiddenArgument(Address h, int dtype, const std::array<int64_t, 3>& shape, const std::array<int64_t, 2>& strides,
                 const std::optional<Strided>& mask, const std::optional<Offsets>& cu_seqlens, int64_t threshold,
                 int precision, int threads)
      : hidden{{pointer<const void>(h), Dtype(dtype), strides[1], 1, nullptr, nullptr},
               strides[0],
               shape[2],
               layout(shape[0], shape[1], mask, cu_seqlens),
               threshold},
        precision(Precision(precision)),
        threads(threads) {}
};

TokenArray token_array(const Strided& a) { return {pointer<const float>(Address(a[0])), a[1], a[2]}; }

void bind_row_energy(py::module_& m) {
  py::class_<HiddenArgument>(m, "Hidden")
      .def(py::init<Address, int, std::array<int64_t, 3>, std::array<int64_t, 2>, std::optional<Strided>,
                    std::optional<Offsets>, int64_t, int, int>(),
           py::kw_only(), py::arg("h"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("mask"),
           py::arg("cu_seqlens"), py::arg("threshold"), py::arg("precision"), py::arg("threads"));

  m.def("row_energy",
        [](const HiddenArgument& a, Address energy, Address squared_norm, Address moments, int64_t slots) {
          const Kernels& table = kernels();
          const py::gil_scoped_release release;
          row_energy(table, a.precision, a.threads, a.hidden, pointer<float>(energy), pointer<float>(squared_norm),
                     slots ? pointer<float>(moments) : nullptr, slots);
        });
  m.def("row_energy_backward", [](const HiddenArgument& a, Address energy, Address squared_norm, Address moments,
                                  int64_t slots, const Strided& grad_energy, const Strided& grad_squared_norm,
                                  Address grad) {
    const Kernels& table = kernels();
    const py::gil_scoped_release release;
    const TokenArray by_energy = token_array(grad_energy), by_norm = token_array(grad_squared_norm);
    const auto gradients = [&](int64_t sample, int64_t position) -> RowGradient {
      return {by_energy.at(sample, position), by_norm.at(sample, position)};
    };
    row_energy_backward(table, a.precision, a.threads, a.hidden, pointer<const float>(energy),
                        pointer<const float>(squared_norm), pointer<const float>(moments), slots, gradients,
                        pointer<void>(grad));
  });
}

void bind_importance(py::module_& m) {
  m.def("importance", [](const HiddenArgument& a, Address energy, Address squared_norm, Address moments, int64_t slots,
                         float eps, double scale, Address loss, Address factor) {
    const Kernels& table = kernels();
    const py::gil_scoped_release release;
    const double sum = importance(table, a.precision, a.threads, a.hidden, pointer<float>(energy),
                                  pointer<float>(squared_norm), slots ? pointer<float>(moments) : nullptr, slots, eps);
    *pointer<float>(loss) = float(scale * sum);
    *pointer<float>(factor) = float(scale);
  });
  m.def("importance_backward", [](const HiddenArgument& a, Address energy, Address squared_norm, Address moments,
                                  int64_t slots, float eps, Address factor, Address grad_loss, Address grad) {
    const Kernels& table = kernels();
    const py::gil_scoped_release release;
    importance_backward(table, a.precision, a.threads, a.hidden, pointer<const float>(energy),
                        pointer<const float>(squared_norm), pointer<const float>(moments), slots, eps,
                        *pointer<const float>(factor) * *pointer<const float>(grad_loss), pointer<void>(grad));
  });
}

// (address, dtype, sample stride, head stride, token stride) of queries, keys or attention.
using HeadsArgument = std::array<int64_t, 5>;

Heads heads_of(const HeadsArgument& a) {
  return {pointer<const void>(Address(a[0])), Dtype(a[1]), a[2], a[3], a[4]};
}

void bind_interaction(py::module_& m) {
  m.def(
      "interaction",
      [](const HeadsArgument& attention, int64_t samples, int64_t heads, int64_t tokens,
         const std::optional<Strided>& mask, bool squared, bool exclude_diagonal, int precision, int threads,
         Address total, Address grad) {
        const Kernels& table = kernels();
        const py::gil_scoped_release release;
        interaction(table, Precision(precision), threads, heads_of(attention), heads,
                    layout(samples, tokens, mask, std::nullopt), {squared, exclude_diagonal}, pointer<float>(total),
                    pointer<void>(grad));
      },
      py::kw_only(), py::arg("attention"), py::arg("samples"), py::arg("heads"), py::arg("tokens"), py::arg("mask"),
      py::arg("squared"), py::arg("exclude_diagonal"), py::arg("precision"), py::arg("threads"), py::arg("total"),
      py::arg("grad"));
  m.def(
      "interaction_from_qk",
      [](const HeadsArgument& q, const HeadsArgument& k, int64_t samples, int64_t heads, int64_t group, int64_t tokens,
         int64_t width, const std::optional<Strided>& mask, const std::optional<Offsets>& cu_seqlens, float scale,
         bool causal, bool squared, bool exclude_diagonal, int precision, int threads, Address total, Address grad_q,
         Address grad_k) {
        const Kernels& table = kernels();
        const py::gil_scoped_release release;
        interaction_from_qk(table, Precision(precision), threads, heads_of(q), heads_of(k), heads, group, width,
                            layout(samples, tokens, mask, cu_seqlens), scale, causal, {squared, exclude_diagonal},
                            pointer<float>(total), pointer<float>(grad_q), pointer<float>(grad_k));
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("samples"), py::arg("heads"), py::arg("group"),
      py::arg("tokens"), py::arg("width"), py::arg("mask"), py::arg("cu_seqlens"), py::arg("scale"),
      py::arg("causal"), py::arg("squared"), py::arg("exclude_diagonal"), py::arg("precision"), py::arg("threads"),
      py::arg("total"), py::arg("grad_q"), py::arg("grad_k"));
  m.def(
      "scale_gradients",
      [](Address gradients, int dtype, const std::array<int64_t, 3>& shape, const Strided& factor, int64_t group,
         int threads, Address out, int out_dtype) {
        const Kernels& table = kernels();
        const py::gil_scoped_release release;
        const TokenArray factors = token_array(factor);
        scale_gradients(table, threads,
                        {pointer<const void>(gradients), Dtype(dtype), shape[0], shape[1], shape[2], factors.data,
                         factors.sample_stride, factors.token_stride},
                        group, Dtype(out_dtype), pointer<void>(out));
      },
      py::kw_only(), py::arg("gradients"), py::arg("dtype"), py::arg("shape"), py::arg("factor"), py::arg("group"),
      py::arg("threads"), py::arg("out"), py::arg("out_dtype"));
}

// a (m × k) · b (k × n), both float32 with rows close together, as the algorithms multiply. For tests and measurements.
void matmul(int precision, Address a, Address b, Address c, int64_t m, int64_t n, int64_t k, int64_t repeats,
            bool bfloat16) {
  const Kernels& table = kernels();
  const Product& p = bfloat16 ? table.bfloat16 : table.float32[precision];
  const View left_matrix = {pointer<const void>(a), Dtype::float32, k, 1, nullptr, nullptr};
  const View right_matrix = {pointer<const void>(b), Dtype::float32, n, 1, nullptr, nullptr};
  const py::gil_scoped_release release;
  parallel_for(table, 1, 1, [&](int64_t) {
    Workspace& workspace = Workspace::own();
    const Workspace::Mark mark(workspace);
    const Operand left(p, Side::left, workspace, m, k), right(p, Side::right, workspace, n, k);
    left.pack(left_matrix, 0, m);
    right.pack(right_matrix, 0, n);
    const int64_t stride = row_stride(p, n);
    float* product = workspace.take<float>(buffer_size(p, m, n));
    for (int64_t i = 0; i < repeats; ++i) multiply(left, {0, m}, right, {0, n}, {0, k}, product, stride);
    for (int64_t i = 0; i < m; ++i)
      std::copy(product + i * stride, product + i * stride + n, pointer<float>(c) + i * n);
  });
}

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of safr_fast. Called through safr_fast.ops.cpp.";
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction-set level in use.");
  m.def("available_isas", &available_isas, "The levels that this machine can run, best first.");
  m.def("matmul", &matmul, py::arg("precision"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("m"), py::arg("n"),
        py::arg("k"), py::arg("repeats") = 1, py::arg("bfloat16") = false);
  m.def("work", [] {
    return std::make_tuple(work.multiply_adds.load(), work.packed_bytes.load(), work.turned_bytes.load());
  }, "Multiply-adds of all products so far, bytes of operands packed for them, and of packed panels turned.");
  m.def("set_home_process", &set_home_process, py::arg("pid"));
  bind_row_energy(m);
  bind_importance(m);
  bind_interaction(m);
}

}  // namespace
}  // namespace safr
