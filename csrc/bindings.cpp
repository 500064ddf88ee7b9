// The module fastnorm._cuda: tensors, dtypes, names of activations (arguments.h) and sizes come in;
// a CUDA error goes out as a RuntimeError.
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "activation.h"
#include "arguments.h"
#include "batch_norm.h"
#include "layer_norm.h"
#include "weight_norm.h"

namespace py = pybind11;

namespace {

using fastnorm::Array;
using fastnorm::Parameter;
using fastnorm::Pointer;
using fastnorm::Subject;

void check(const char* name, cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("fastnorm's CUDA backend: ") + name + " failed: " +
                             cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Runs a launcher on a stream without the interpreter's lock: a full launch queue blocks.
template <class F>
void run(const char* name, CUstream_st* stream, F launcher) {
    cudaError_t error;
    {
        py::gil_scoped_release unlocked;
        error = launcher(stream);
    }
    check(name, error);
}

template <std::size_t N>
py::tuple names(const char* const (&list)[N]) {
    py::tuple found(N);
    for (std::size_t i = 0; i < N; ++i) found[i] = list[i];
    return found;
}

std::string version(int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Why no kernel can run here, and what to do about it; None where they can.
py::object unavailable() {
    int driver = 0, runtime = 0, devices = 0;
    cudaRuntimeGetVersion(&runtime);
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return py::str("no NVIDIA driver is installed");
    if (driver / 1000 < runtime / 1000) {
        return py::str("the NVIDIA driver supports CUDA " + version(driver) +
                       ", and the extension was built with CUDA " + version(runtime) +
                       ": update the driver, or build fastnorm with a CUDA toolkit " +
                       std::to_string(driver / 1000) + ".x");
    }
    if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
        cudaGetLastError();  // an error that is left behind would be reported by the next launch
        return py::str(std::string("CUDA finds no device: ") + cudaGetErrorString(error));
    }
    if (devices == 0) return py::str("CUDA finds no device");
    return py::none();
}

// What lies `count` elements behind the first of statistics, which are wide: fp64 for fp64.
void* behind(Pointer statistics, long count, fastnorm::Dtype x) {
    const long size = x == fastnorm::Dtype::float64 ? 8 : 4;
    return statistics.data == nullptr ? nullptr
                                      : static_cast<char*>(statistics.data) + size * count;
}

void bind_activation(py::module_& m) {
    using namespace fastnorm;
    m.def("activation_forward", [](Pointer y, Subject x, Activation activation) {
        const ActivationForward a = {y, x.data, x.numel(), activation};
        run("activation_forward", x.stream(),
            [&](CUstream_st* stream) { return activation_forward(a, x.dtype, stream); });
    });
    m.def("activation_backward", [](Pointer dx, Subject x, Pointer dy, Activation activation) {
        const ActivationBackward a = {dx, x.data, dy, x.numel(), activation};
        run("activation_backward", x.stream(),
            [&](CUstream_st* stream) { return activation_backward(a, x.dtype, stream); });
    });
    py::class_<SwishSizes>(m, "SwishSizes").def_readonly("groups", &SwishSizes::groups);
    m.def("swish_sizes", &swish_sizes);
    m.def("swish_partials", &swish_partials);
    m.def("swish_forward", [](Pointer y, Subject x, Array beta, const SwishSizes& sizes) {
        const SwishForward a = {y, x.data, beta, sizes};
        run("swish_forward", x.stream(),
            [&](CUstream_st* stream) { return swish_forward(a, x.dtype, stream); });
    });
    m.def("swish_backward", [](Pointer dx, Array dbeta, Subject x, Pointer dy, Array beta,
                               Pointer partials, Pointer counters, const SwishSizes& sizes) {
        const SwishBackward a = {dx, dbeta, x.data, dy, beta, partials, counters, sizes};
        run("swish_backward", x.stream(),
            [&](CUstream_st* stream) { return swish_backward(a, x.dtype, stream); });
    });
}

// No momentum: the cumulative average, where batches are counted.
fastnorm::BatchNormRunning running(const Parameter& mean, const Parameter& var,
                                   Pointer num_batches_tracked, std::optional<double> momentum) {
    const bool cumulative = !momentum && num_batches_tracked.data != nullptr;
    return {mean, var, num_batches_tracked, momentum.value_or(0.0), cumulative};
}

void bind_batch_norm(py::module_& m) {
    using namespace fastnorm;
    py::class_<BatchNormPlan>(m, "BatchNormPlan")
        .def_property_readonly("form", [](const BatchNormPlan& p) { return int(p.form); })
        .def_readonly("ordered", &BatchNormPlan::ordered)
        .def_readonly("groups", &BatchNormPlan::groups)
        .def_readonly("quick", &BatchNormPlan::quick)
        .def_readonly("columns", &BatchNormPlan::columns)
        .def_readonly("lag", &BatchNormPlan::lag)
        .def_readonly("channels", &BatchNormPlan::channels)
        .def_readonly("members", &BatchNormPlan::members)
        .def_readonly("branches", &BatchNormPlan::branches)
        .def_readonly("batches", &BatchNormPlan::batches)
        .def_readonly("held", &BatchNormPlan::held)
        .def_readonly("blocks", &BatchNormPlan::blocks)
        .def_readonly("shared_bytes", &BatchNormPlan::shared_bytes)
        .def_readonly("partials", &BatchNormPlan::partials)
        .def_readonly("counters", &BatchNormPlan::counters);
    m.attr("BATCH_NORM_FORMS") = names({FASTNORM_BATCH_NORM_FORMS(FASTNORM_NAME)});
    m.def("batch_norm_plan",
          [](long N, long C, long S, long x_stride_n, long x_stride_c, long x_stride_s, bool y_last,
             Dtype dtype, Activation activation, bool backward, bool one_pass, int operands,
             int extras, int form, int batches, int columns, int blocks, int lag, int hints) {
              const BatchNormShape shape = {N, C, S, x_stride_n, x_stride_c, x_stride_s, 0, 0, 0};
              const BatchNormRequest request = {dtype,    activation, y_last, backward, one_pass,
                                                operands, extras,     form,   batches,  columns,
                                                blocks,   lag,        hints};
              BatchNormPlan plan;
              check("batch_norm_plan", batch_norm_plan(shape, request, &plan));
              return plan;
          });
    m.def("batch_norm_forward",
          [](Pointer y, Pointer statistics, const Parameter& running_mean,
             const Parameter& running_var, Pointer num_batches_tracked,
             std::optional<double> momentum, Subject x, Pointer residual, const Parameter& weight,
             const Parameter& bias, Pointer partials, Pointer counters, double eps,
             Activation activation, bool batch_stats, bool center_only, const BatchNormPlan& plan) {
              const long C = plan.shape.C;
              const BatchNormForward a = {
                  y,
                  statistics,
                  behind(statistics, C, x.dtype),
                  y.data == nullptr ? behind(statistics, 2 * C, x.dtype) : nullptr,
                  running(running_mean, running_var, num_batches_tracked, momentum),
                  x.data,
                  residual,
                  weight,
                  bias,
                  partials,
                  counters,
                  eps,
                  activation,
                  batch_stats,
                  center_only,
                  plan};
              run("batch_norm_forward", x.stream(),
                  [&](CUstream_st* stream) { return batch_norm_forward(a, x.dtype, stream); });
              if (batch_stats) {
                  running_mean.put_back();
                  running_var.put_back();
              }
          });
    m.def("batch_norm_merge", [](Pointer mean, Pointer var, Pointer count,
                                 const Parameter& running_mean, const Parameter& running_var,
                                 Pointer num_batches_tracked, std::optional<double> momentum,
                                 Subject gathered, Pointer counters, long ranks, long C) {
        const BatchNormMerge a = {
            mean,          var,
            count,         running(running_mean, running_var, num_batches_tracked, momentum),
            gathered.data, counters,
            ranks,         C};
        run("batch_norm_merge", gathered.stream(),
            [&](CUstream_st* stream) { return batch_norm_merge(a, gathered.dtype, stream); });
        running_mean.put_back();
        running_var.put_back();
    });
    m.def("batch_norm_backward",
          [](Pointer dx, Pointer dresidual, Array dweight, Array dbias, Pointer x, Subject dy,
             Pointer kept, bool keeps_output, const Parameter& weight, const Parameter& bias,
             Pointer statistics, Pointer sums, Pointer count, Pointer partials, Pointer counters,
             Activation activation, bool center_only, const BatchNormPlan& plan) {
              const BatchNormBackward a = {
                  dx,         dresidual,   dweight,    dbias,
                  x,          dy.data,     kept,       keeps_output,
                  weight,     bias,        statistics, behind(statistics, plan.shape.C, dy.dtype),
                  sums,       count,       partials,   counters,
                  activation, center_only, plan};
              run("batch_norm_backward", dy.stream(),
                  [&](CUstream_st* stream) { return batch_norm_backward(a, dy.dtype, stream); });
          });
}

// The layers of a weight norm, and what their launches need; made once for a model.
struct WeightNormPlan {
    using Tensors = std::vector<Pointer>;
    std::vector<fastnorm::WeightNormSizes> sizes;
    int processors;
    fastnorm::WeightNormWorkspace workspace;

    // with a tensor for each layer in every list, and in `begin` where its part of `norm` begins
    template <class Launcher>
    void launch(const char* name, Launcher launcher, const Tensors& out, const Tensors& v,
                const Tensors& dw, const Tensors& g, Subject norm, const std::vector<long>& begin,
                const Tensors& dg, Pointer partials, Pointer counters) const {
        for (const Tensors* list : {&out, &v, &dw, &g, &dg})
            if (list->size() != sizes.size()) throw std::invalid_argument("one tensor per layer");
        if (begin.size() != sizes.size()) throw std::invalid_argument("one place per layer");
        std::vector<fastnorm::WeightNormLayer> layers(sizes.size());
        for (std::size_t i = 0; i < sizes.size(); ++i)
            layers[i] = {out[i], v[i],    dw[i], g[i], behind({norm.data}, begin[i], norm.dtype),
                         dg[i],  sizes[i]};
        const fastnorm::WeightNorm a = {layers.data(), int(layers.size()), partials, counters,
                                        processors};
        run(name, norm.stream(), [&](CUstream_st* stream) { return launcher(a, stream); });
    }
};

void bind_weight_norm(py::module_& m) {
    using namespace fastnorm;
    using Plan = WeightNormPlan;
    using Tensors = Plan::Tensors;
    using Begin = std::vector<long>;
    using Sizes =  // as in WeightNormSizes
        std::tuple<long, long, long, double, fastnorm::Dtype, fastnorm::Dtype, fastnorm::Dtype>;
    py::class_<Plan>(m, "WeightNormPlan")
        .def(py::init([](const std::vector<Sizes>& layers, int processors) {
            Plan plan = {{}, processors, {}};
            for (const auto& [A, K, B, eps, w, v, g] : layers)
                plan.sizes.push_back({A, K, B, eps, w, v, g});
            plan.workspace =
                weight_norm_workspace(plan.sizes.data(), int(plan.sizes.size()), processors);
            return plan;
        }))
        .def_property_readonly("partials", [](const Plan& plan) { return plan.workspace.partials; })
        .def_property_readonly("counters",
                               [](const Plan& plan) { return plan.workspace.counters; });
    m.def("weight_norm_forward",
          [](const Plan& plan, const Tensors& w, const Tensors& v, const Tensors& g, Subject norm,
             const Begin& begin, Pointer partials, Pointer counters) {
              const Tensors none(v.size());
              plan.launch("weight_norm_forward", weight_norm_forward, w, v, none, g, norm, begin,
                          none, partials, counters);
          });
    m.def("weight_norm_backward",
          [](const Plan& plan, const Tensors& dv, const Tensors& dg, const Tensors& v,
             const Tensors& g, Subject norm, const Begin& begin, const Tensors& dw,
             Pointer partials, Pointer counters) {
              plan.launch("weight_norm_backward", weight_norm_backward, dv, v, dw, g, norm, begin,
                          dg, partials, counters);
          });
}

// What the kernels of layer norm see of their inputs: [rows, cols] of batches of rows, and the
// strides of batches, rows and columns in x and in the other one (residual or dy).
struct LayerNormView {
    using Strides = std::array<long, 3>;
    long rows, batch_rows, cols;
    Strides x, other;

    static fastnorm::Rows of(const void* data, const Strides& strides) {
        return {data, strides[0], strides[1], strides[2]};
    }
};

void bind_layer_norm(py::module_& m) {
    using namespace fastnorm;
    using View = LayerNormView;
    using Plan = LayerNormPlan;
    py::class_<View>(m, "LayerNormView")
        .def(py::init(
            [](long rows, long batch_rows, long cols, const View::Strides& x,
               const View::Strides& other) { return View{rows, batch_rows, cols, x, other}; }));
    py::class_<Plan>(m, "LayerNormPlan")
        .def(py::init([] { return Plan{}; }))
        .def_readwrite("ticket", &Plan::ticket)
        .def_readwrite("blocks", &Plan::blocks)
        .def_readwrite("block", &Plan::block)
        .def_readwrite("shared_bytes", &Plan::shared_bytes)
        .def_readwrite("threads", &Plan::threads)
        .def_readwrite("tile", &Plan::tile)
        .def_readwrite("tiles", &Plan::tiles)
        .def_readwrite("chunk", &Plan::chunk)
        .def_readwrite("chunks", &Plan::chunks)
        .def_readwrite("lag", &Plan::lag)
        .def_readwrite("by_columns", &Plan::by_columns)
        .def_readwrite("streams", &Plan::streams)
        .def_readwrite("group", &Plan::group)
        .def_readwrite("groups", &Plan::groups)
        .def_readwrite("span", &Plan::span)
        .def_readwrite("workers", &Plan::workers)
        .def_readwrite("parts", &Plan::parts);
    m.def("layer_norm_forward",
          [](Array y, Pointer sum, Pointer statistics, Subject x, Array residual,
             const Parameter& weight, const Parameter& bias, Pointer partials, Pointer counters,
             double eps, Activation activation, const View& view, const Plan& plan) {
              const LayerNormForward a = {y,
                                          sum,
                                          statistics,
                                          behind(statistics, view.rows, x.dtype),
                                          View::of(x.data, view.x),
                                          View::of(residual.data, view.other),
                                          residual.dtype,
                                          weight,
                                          bias,
                                          partials,
                                          counters,
                                          eps,
                                          view.rows,
                                          view.batch_rows,
                                          view.cols,
                                          activation,
                                          plan};
              run("layer_norm_forward", x.stream(),
                  [&](CUstream_st* stream) { return layer_norm_forward(a, x.dtype, stream); });
          });
    m.def("layer_norm_backward",
          [](Pointer dx, Array dweight, Array dbias, Subject x, Array dy, Pointer dsum,
             const Parameter& weight, const Parameter& bias, Pointer statistics, Pointer parts,
             Pointer partials, Pointer totals, Pointer counters, Activation activation,
             const View& view, const Plan& plan) {
              const LayerNormBackward a = {dx,
                                           dweight,
                                           dbias,
                                           View::of(x.data, view.x),
                                           View::of(dy.data, view.other),
                                           dy.dtype,
                                           dsum,
                                           weight,
                                           bias,
                                           statistics,
                                           behind(statistics, view.rows, x.dtype),
                                           parts,
                                           partials,
                                           totals,
                                           counters,
                                           view.rows,
                                           view.batch_rows,
                                           view.cols,
                                           activation,
                                           plan};
              run("layer_norm_backward", x.stream(),
                  [&](CUstream_st* stream) { return layer_norm_backward(a, x.dtype, stream); });
          });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastnorm's CUDA C++ kernels; called by fastnorm/ops/<family>/cuda.py alone.";
    fastnorm::arguments::prepare();
    m.def("unavailable", &unavailable, "Why no kernel can run here; None where they can.");
    bind_activation(m);
    bind_batch_norm(m);
    bind_weight_norm(m);
    bind_layer_norm(m);
}
