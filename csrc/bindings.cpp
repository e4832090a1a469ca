// llama_smop._C: the functions of api.h as Python sees them. Pointers, sizes and the stream are integers, so the module
// knows nothing of torch and one build serves every version of it; the operators (llama_smop/ops) check the tensors.
// A launch can be noted in a plan (plan.h), to be made again without its arguments' way through Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "api.h"
#include "plan.h"
#include "prefetch.cuh"
#include "tile_scheduler.cuh"

namespace py = pybind11;
using namespace py::literals;

namespace {

thread_local Plan* noting = nullptr;  // where this thread's launches are noted

// A function of the module that makes a launch; all its arguments are keywords.
template <class... P, class... Names>
void def_launch(py::module_& m, const char* name, int (*launch)(P...), const Names&... names) {
  const auto call = [=](P... arguments) {
    check(launch(arguments...), name);
    if (noting) noting->note(name, launch, arguments...);
  };
  m.def(name, call, py::kw_only(), names...);
}

int grouped_gemm(int dtype, Address a, int64_t lda, int64_t a_rows, Address b, int64_t ldb,
                 int64_t stride_b, bool b_k_major, Address offs, Address order, int top_k, int64_t rows, int experts,
                 int n, int k, Address bias, Address aux, Address pre, Address out, int epilogue, Address sums,
                 Address ahead, int ahead_bytes, int64_t ahead_stride, int columns, int cluster, bool dependent,
                 Stream stream) {
  SmopGemm p{};
  p.dtype = dtype;
  p.a = at<void>(a), p.lda = lda, p.a_rows = a_rows;
  p.b = at<void>(b), p.ldb = ldb, p.stride_b = stride_b, p.b_k_major = b_k_major;
  p.offs = at<int32_t>(offs), p.order = at<int32_t>(order), p.top_k = top_k;
  p.rows = rows, p.experts = experts, p.n = n, p.k = k;
  p.bias = at<void>(bias), p.aux = at<void>(aux), p.pre = at<void>(pre), p.out = at<void>(out), p.epilogue = epilogue;
  p.sums = at<float>(sums), p.ahead = {at<void>(ahead), ahead_bytes, ahead_stride};
  p.columns = columns, p.cluster = cluster;
  return smop_grouped_gemm(&p, stream, dependent);
}

int grouped_wgrad(int dtype, Address a, int64_t lda, int64_t a_rows, Address b, int64_t ldb,
                  int64_t b_rows, Address offs, Address order, int top_k, int experts, int m, int n, Address out,
                  int columns, int cluster, bool dependent, Stream stream) {
  SmopWgrad p{};
  p.dtype = dtype;
  p.a = at<void>(a), p.lda = lda, p.a_rows = a_rows, p.b = at<void>(b), p.ldb = ldb, p.b_rows = b_rows;
  p.offs = at<int32_t>(offs), p.order = at<int32_t>(order), p.top_k = top_k;
  p.experts = experts, p.m = m, p.n = n, p.out = at<void>(out), p.columns = columns, p.cluster = cluster;
  return smop_grouped_wgrad(&p, stream, dependent);
}

int zero_tail(int dtype, Address out, int64_t rows, int n, Address offs, int experts, bool dependent,
              Stream stream) {
  const SmopZeroTail p{dtype, at<void>(out), rows, n, experts, at<int32_t>(offs)};
  return smop_zero_tail(&p, stream, dependent);
}

int route_fwd(int dtype, int tokens, int dim, int routers, int gates, int experts, int top_k, int shared, Address x,
              Address gate_weight, Address modality, Address mask, Address logits, Address weights, Address chosen,
              Address all_weights, Address all_chosen, Address counts, Address balance_loss, Address z_loss,
              Address order, Address inverse, Address offs, Address block_counts, Address block_probs,
              Address block_z, Address ahead, int ahead_bytes, int64_t ahead_stride, Stream stream) {
  SmopRoute p{};
  p.dtype = dtype, p.tokens = tokens, p.dim = dim, p.routers = routers, p.gates = gates, p.experts = experts,
  p.top_k = top_k, p.shared = shared;
  p.x = at<void>(x), p.gate_weight = at<void>(gate_weight), p.modality = at<int32_t>(modality),
  p.mask = at<uint8_t>(mask);
  p.logits = at<float>(logits), p.weights = at<float>(weights), p.chosen = at<int32_t>(chosen),
  p.counts = at<int32_t>(counts);
  p.all_weights = at<float>(all_weights), p.all_chosen = at<int32_t>(all_chosen);
  p.balance_loss = at<float>(balance_loss), p.z_loss = at<float>(z_loss);
  p.order = at<int32_t>(order), p.inverse = at<int32_t>(inverse), p.offs = at<int32_t>(offs);
  p.block_counts = at<int32_t>(block_counts), p.block_probs = at<float>(block_probs), p.block_z = at<float>(block_z);
  p.ahead = {at<void>(ahead), ahead_bytes, ahead_stride};
  return smop_route_fwd(&p, stream);
}

int route_bwd(int dtype, int tokens, int dim, int routers, int gates, int top_k, Address x, Address gate_weight,
              Address modality, Address mask, Address logits, Address weights, Address chosen, Address counts,
              Address dlogits, Address dweights, int dweights_columns, Address dbalance, Address dz,
              Address dlogits_total, Address dgate_partial, Address dgate, Address dx, Stream stream) {
  SmopRouteBwd p{};
  p.dtype = dtype, p.tokens = tokens, p.dim = dim, p.routers = routers, p.gates = gates, p.top_k = top_k;
  p.x = at<void>(x), p.gate_weight = at<void>(gate_weight), p.modality = at<int32_t>(modality),
  p.mask = at<uint8_t>(mask);
  p.logits = at<float>(logits), p.weights = at<float>(weights), p.chosen = at<int32_t>(chosen),
  p.counts = at<int32_t>(counts);
  p.dlogits = at<float>(dlogits), p.dweights = at<float>(dweights), p.dbalance = at<float>(dbalance),
  p.dz = at<float>(dz), p.dweights_columns = dweights_columns;
  p.dlogits_total = at<float>(dlogits_total), p.dgate_partial = at<float>(dgate_partial);
  p.dgate = at<void>(dgate), p.dx = at<void>(dx);
  return smop_route_bwd(&p, stream);
}

int schedule(int tokens, int experts, int top_k, Address chosen, Address order, Address inverse, Address offs,
             Address block_counts, Stream stream) {
  const SmopSchedule p{tokens,
                       experts,
                       top_k,
                       at<int32_t>(chosen),
                       at<int32_t>(order),
                       at<int32_t>(inverse),
                       at<int32_t>(offs),
                       at<int32_t>(block_counts),
                       0};
  return smop_schedule(&p, stream);
}

int combine_fwd(int dtype, int ln_dtype, int tokens, int top_k, int experts, int dim, Address z, Address weights,
                Address chosen, Address inverse, Address ln_weight, Address ln_bias, float eps, Address y,
                Address mean, Address rstd, bool dependent, Stream stream) {
  SmopCombine p{};
  p.dtype = dtype, p.ln_dtype = ln_dtype, p.tokens = tokens, p.top_k = top_k, p.experts = experts, p.dim = dim;
  p.z = at<void>(z), p.weights = at<float>(weights), p.chosen = at<int32_t>(chosen), p.inverse = at<int32_t>(inverse);
  p.ln_weight = at<void>(ln_weight), p.ln_bias = at<void>(ln_bias), p.eps = eps;
  p.y = at<void>(y), p.mean = at<float>(mean), p.rstd = at<float>(rstd);
  return smop_combine_fwd(&p, stream, dependent);
}

int combine_bwd(int dtype, int ln_dtype, int tokens, int top_k, int experts, int dim, Address dy, Address z,
                Address weights, Address order, Address inverse, Address offs, Address ln_weight, Address ln_bias,
                Address mean, Address rstd, Address dz, Address dweights, Address sums, Address ahead,
                int ahead_bytes, int64_t ahead_stride, bool dependent, Stream stream) {
  SmopCombineBwd p{};
  p.dtype = dtype, p.ln_dtype = ln_dtype, p.tokens = tokens, p.top_k = top_k, p.experts = experts, p.dim = dim;
  p.dy = at<void>(dy), p.z = at<void>(z), p.weights = at<float>(weights), p.order = at<int32_t>(order),
  p.inverse = at<int32_t>(inverse), p.offs = at<int32_t>(offs);
  p.ln_weight = at<void>(ln_weight), p.ln_bias = at<void>(ln_bias), p.mean = at<float>(mean), p.rstd = at<float>(rstd);
  p.dz = at<void>(dz), p.dweights = at<float>(dweights), p.sums = at<float>(sums);
  p.ahead = {at<void>(ahead), ahead_bytes, ahead_stride};
  return smop_combine_bwd(&p, stream, dependent);
}

int bias_sums(int dtype, int ln_dtype, int experts, int hidden, int dim, int64_t rows, Address offs,
              Address hidden_sums, Address combine_sums, Address db1, Address db2, Address dln_weight,
              Address dln_bias, bool dependent, Stream stream) {
  SmopBiasSums p{};
  p.dtype = dtype, p.ln_dtype = ln_dtype, p.experts = experts, p.hidden = hidden, p.dim = dim, p.rows = rows;
  p.offs = at<int32_t>(offs), p.hidden_sums = at<float>(hidden_sums), p.combine_sums = at<float>(combine_sums);
  p.db1 = at<void>(db1), p.db2 = at<void>(db2), p.dln_weight = at<void>(dln_weight), p.dln_bias = at<void>(dln_bias);
  return smop_bias_sums(&p, stream, dependent);
}

int gather_sum(int dtype, int tokens, int top_k, int dim, Address rows, Address inverse, Address dx, bool dependent,
               Stream stream) {
  const SmopGatherSum p{dtype, tokens, top_k, dim, at<void>(rows), at<int32_t>(inverse), at<void>(dx)};
  return smop_gather_sum(&p, stream, dependent);
}

void run(const Plan& plan, const std::vector<uintptr_t>& arrays, Stream stream) { plan.run(arrays, stream); }

int device_arch() {
  int arch = 0;
  check(smop_device_arch(&arch), "device_arch");
  return arch;
}

// What `blocks` persistent blocks compute, alone or in clusters: (block, expert, first row, rows, column tile, index,
// shared) of every tile, in each block's order.
using Tile = std::tuple<int, int, int, int, int, int, bool>;
template <int kBlocks>
std::vector<Tile> walk_row_tiles(const std::vector<int32_t>& offs, int64_t rows, int block_rows, int col_tiles,
                                 int blocks) {
  std::vector<Tile> tiles;
  for (int block = 0; block < blocks; ++block) {
    smop::RowTileScheduler<kBlocks> scheduler(offs.data(), static_cast<int>(offs.size()), rows, block_rows, col_tiles);
    smop::RowTile t;
    for (int number = block / kBlocks; scheduler.find(number, t, block % kBlocks); number += blocks / kBlocks)
      tiles.emplace_back(block, t.expert, t.row, t.rows, t.col_tile, t.index, t.shared);
  }
  return tiles;
}

std::vector<Tile> row_tiles(const std::vector<int32_t>& offs, int64_t rows, int block_rows, int col_tiles, int blocks,
                            int cluster) {
  if ((cluster != 1 && cluster != 2) || blocks % cluster) throw py::value_error("clusters of 1 or 2 of the blocks");
  return cluster == 1 ? walk_row_tiles<1>(offs, rows, block_rows, col_tiles, blocks)
                      : walk_row_tiles<2>(offs, rows, block_rows, col_tiles, blocks);
}

py::dict build_info() {
  return py::dict("architectures"_a = SMOP_ARCHS, "nvcc"_a = smop_nvcc_version(), "cudart"_a = smop_cudart_version(),
                  "cudart_linkage"_a = SMOP_CUDART, "cxx"_a = "g++ " __VERSION__);
}

template <class T>
struct FromInteger {
  PYBIND11_TYPE_CASTER(T, py::detail::const_name("int"));
  bool load(py::handle from, bool convert) {
    py::detail::make_caster<uint64_t> integer;
    if (!integer.load(from, convert)) return false;
    value = {static_cast<uint64_t>(integer)};
    return true;
  }
};

}  // namespace

template <>
struct py::detail::type_caster<Address> : FromInteger<Address> {};
template <>
struct py::detail::type_caster<Stream> : FromInteger<Stream> {};

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "CUDA kernels of llama_smop. Addresses are device addresses as integers, 0 for none; work is queued on `stream`.";
  m.attr("MAX_EXPERTS") = static_cast<int>(SMOP_MAX_EXPERTS);
  m.attr("DTYPES") =
      py::dict("bfloat16"_a = static_cast<int>(SMOP_BFLOAT16), "float16"_a = static_cast<int>(SMOP_FLOAT16),
               "float32"_a = static_cast<int>(SMOP_FLOAT32));
  m.attr("EPILOGUES") =
      py::dict("identity"_a = static_cast<int>(SMOP_IDENTITY), "relu"_a = static_cast<int>(SMOP_RELU),
               "gelu"_a = static_cast<int>(SMOP_GELU), "silu"_a = static_cast<int>(SMOP_SILU),
               "relu_grad"_a = static_cast<int>(SMOP_RELU_GRAD), "gelu_grad"_a = static_cast<int>(SMOP_GELU_GRAD),
               "silu_grad"_a = static_cast<int>(SMOP_SILU_GRAD));

  def_launch(m, "grouped_gemm", grouped_gemm, "dtype"_a, "a"_a, "lda"_a, "a_rows"_a, "b"_a, "ldb"_a,
             "stride_b"_a, "b_k_major"_a, "offs"_a, "order"_a, "top_k"_a, "rows"_a, "experts"_a, "n"_a, "k"_a, "bias"_a,
             "aux"_a, "pre"_a, "out"_a, "epilogue"_a, "sums"_a, "ahead"_a, "ahead_bytes"_a, "ahead_stride"_a,
             "columns"_a, "cluster"_a, "dependent"_a, "stream"_a);
  def_launch(m, "grouped_wgrad", grouped_wgrad, "dtype"_a, "a"_a, "lda"_a, "a_rows"_a, "b"_a, "ldb"_a,
             "b_rows"_a, "offs"_a, "order"_a, "top_k"_a, "experts"_a, "m"_a, "n"_a, "out"_a, "columns"_a,
             "cluster"_a, "dependent"_a, "stream"_a);
  def_launch(m, "zero_tail", zero_tail, "dtype"_a, "out"_a, "rows"_a, "n"_a, "offs"_a, "experts"_a, "dependent"_a,
             "stream"_a);
  def_launch(m, "route_fwd", route_fwd, "dtype"_a, "tokens"_a, "dim"_a, "routers"_a, "gates"_a, "experts"_a, "top_k"_a,
             "shared"_a, "x"_a, "gate_weight"_a, "modality"_a, "mask"_a, "logits"_a, "weights"_a, "chosen"_a,
             "all_weights"_a, "all_chosen"_a, "counts"_a, "balance_loss"_a, "z_loss"_a, "order"_a, "inverse"_a,
             "offs"_a, "block_counts"_a, "block_probs"_a, "block_z"_a, "ahead"_a, "ahead_bytes"_a, "ahead_stride"_a,
             "stream"_a);
  def_launch(m, "route_bwd", route_bwd, "dtype"_a, "tokens"_a, "dim"_a, "routers"_a, "gates"_a, "top_k"_a, "x"_a,
             "gate_weight"_a, "modality"_a, "mask"_a, "logits"_a, "weights"_a, "chosen"_a, "counts"_a, "dlogits"_a,
             "dweights"_a, "dweights_columns"_a, "dbalance"_a, "dz"_a, "dlogits_total"_a, "dgate_partial"_a, "dgate"_a,
             "dx"_a, "stream"_a);
  def_launch(m, "schedule", schedule, "tokens"_a, "experts"_a, "top_k"_a, "chosen"_a, "order"_a, "inverse"_a, "offs"_a,
             "block_counts"_a, "stream"_a);
  def_launch(m, "combine_fwd", combine_fwd, "dtype"_a, "ln_dtype"_a, "tokens"_a, "top_k"_a, "experts"_a, "dim"_a, "z"_a,
             "weights"_a, "chosen"_a, "inverse"_a, "ln_weight"_a, "ln_bias"_a, "eps"_a, "y"_a, "mean"_a, "rstd"_a,
             "dependent"_a, "stream"_a);
  def_launch(m, "combine_bwd", combine_bwd, "dtype"_a, "ln_dtype"_a, "tokens"_a, "top_k"_a, "experts"_a, "dim"_a,
             "dy"_a, "z"_a, "weights"_a, "order"_a, "inverse"_a, "offs"_a, "ln_weight"_a, "ln_bias"_a, "mean"_a,
             "rstd"_a, "dz"_a, "dweights"_a, "sums"_a, "ahead"_a, "ahead_bytes"_a, "ahead_stride"_a,
             "dependent"_a, "stream"_a);
  def_launch(m, "bias_sums", bias_sums, "dtype"_a, "ln_dtype"_a, "experts"_a, "hidden"_a, "dim"_a, "rows"_a, "offs"_a,
             "hidden_sums"_a, "combine_sums"_a, "db1"_a, "db2"_a, "dln_weight"_a, "dln_bias"_a, "dependent"_a,
             "stream"_a);
  def_launch(m, "gather_sum", gather_sum, "dtype"_a, "tokens"_a, "top_k"_a, "dim"_a, "rows"_a, "inverse"_a, "dx"_a,
             "dependent"_a, "stream"_a);

  py::class_<Plan>(m, "Plan", py::module_local(),  // a process may have loaded another copy of the extension
                   "What a thread launches inside `with plan`, to be launched again by `run`.")
      .def(py::init<>())
      .def("__enter__", [](Plan& plan) { noting = &plan; })
      .def("__exit__", [](Plan&, const py::args&) { noting = nullptr; })
      .def_property_readonly("addresses", &Plan::addresses, "Those that the launches were given, each once.")
      .def("place", &Plan::place, "places"_a, "For each of `addresses`: in which array of `run`, how many bytes in.");
  m.def("run", &run, py::kw_only(), "plan"_a, "arrays"_a, "stream"_a, "The launches of a plan on other arrays.");

  m.def("route_blocks", &smop_route_blocks, "tokens"_a, "Blocks of the router: the first size of its scratch arrays.");
  m.def("gate_splits", &smop_gate_splits, "tokens"_a,
        "Token splits of the gate's gradient: the first size of its scratch array.");
  py::module_ sizes = m.def_submodule("sizes", "Sizes of the arrays of partial sums that bias_sums adds up.");
  sizes.def("column_sums", &smop_column_sums_size, "rows"_a, "experts"_a, "n"_a, "Floats of grouped_gemm's sums.");
  sizes.def("combine_sums", &smop_combine_sums_size, "rows"_a, "experts"_a, "dim"_a, "layer_norm"_a,
            "Floats of combine_bwd's sums.");
  m.def("device_arch", &device_arch, "10 * major + minor of the current device.");
  m.def("max_row_tiles", &smop::max_row_tiles, "rows"_a, "experts"_a, "block_rows"_a);
  m.def("row_tiles", &row_tiles, "offs"_a, "rows"_a, "block_rows"_a, "col_tiles"_a, "blocks"_a, "cluster"_a = 1,
        "(block, expert, first row, rows, column tile, index, shared) of every tile that `blocks` persistent blocks "
        "compute, alone or in clusters of two.");
  m.def(
      "weight_tile",
      [](int number, int row_tiles, int col_tiles) {
        const smop::WeightTile t = smop::weight_tile(number, row_tiles, col_tiles);
        return std::make_tuple(t.expert, t.row_tile, t.col_tile);
      },
      "number"_a, "row_tiles"_a, "col_tiles"_a);
  m.def(
      "part_of",
      [](int bytes, int count, int number) {
        const smop::Part part = smop::part_of(bytes, count, number);
        return std::make_tuple(part.at, part.bytes);
      },
      "bytes"_a, "count"_a, "number"_a, "(first byte, bytes) of a part of what is brought into the L2.");
  m.def("build_info", &build_info, "What this extension was built with and for.");
}
