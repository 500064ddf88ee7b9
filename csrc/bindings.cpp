// The module fastnorm._cuda: pointers, sizes, positions in DTYPES and ACTIVATIONS and the stream
// come in as integers; a CUDA error goes out as a RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "activation.h"
#include "batch_norm.h"
#include "layer_norm.h"
#include "weight_norm.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// An optional array of any dtype: a null address where there is none.
fastnorm::Array array(Address address, int dtype) {
    return {at(address), fastnorm::Dtype(dtype)};
}

// Runs a launcher without the interpreter's lock: a full launch queue blocks.
template <class F>
void run(const char* name, F launcher) {
    cudaError_t error;
    {
        py::gil_scoped_release unlocked;
        error = launcher();
    }
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("fastnorm's CUDA backend: ") + name + " failed: " +
                                 cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
    }
}

#define FASTNORM_NAME(name) #name,

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

void bind_activation(py::module_& m) {
    using namespace fastnorm;
    m.def("activation_forward",
          [](Address y, Address x, long count, int activation, int dtype, Address stream) {
              const ActivationForward a = {at(y), at(x), count, Activation(activation)};
              run("activation_forward",
                  [&] { return activation_forward(a, Dtype(dtype), at<CUstream_st>(stream)); });
          });
    m.def("activation_backward", [](Address dx, Address x, Address dy, long count, int activation,
                                    int dtype, Address stream) {
        const ActivationBackward a = {at(dx), at(x), at(dy), count, Activation(activation)};
        run("activation_backward",
            [&] { return activation_backward(a, Dtype(dtype), at<CUstream_st>(stream)); });
    });
    py::class_<SwishSizes>(m, "SwishSizes").def_readonly("groups", &SwishSizes::groups);
    m.def("swish_sizes", [](long outer, long channels, long inner, int dtype, int processors) {
        return swish_sizes(outer, channels, inner, Dtype(dtype), processors);
    });
    m.def("swish_partials",
          [](const SwishSizes& sizes, int dtype) { return swish_partials(sizes, Dtype(dtype)); });
    m.def("swish_forward", [](Address y, Address x, Address beta, int beta_dtype,
                              const SwishSizes& sizes, int dtype, Address stream) {
        const SwishForward a = {at(y), at(x), array(beta, beta_dtype), sizes};
        run("swish_forward",
            [&] { return swish_forward(a, Dtype(dtype), at<CUstream_st>(stream)); });
    });
    m.def("swish_backward", [](Address dx, Address dbeta, Address x, Address dy, Address beta,
                               int beta_dtype, Address partials, Address counters,
                               const SwishSizes& sizes, int dtype, Address stream) {
        const SwishBackward a = {
            at(dx),       array(dbeta, beta_dtype), at(x), at(dy), array(beta, beta_dtype),
            at(partials), at<unsigned>(counters),   sizes};
        run("swish_backward",
            [&] { return swish_backward(a, Dtype(dtype), at<CUstream_st>(stream)); });
    });
}

void bind_batch_norm(py::module_& m) {
    using namespace fastnorm;
    py::class_<BatchNormPlan>(m, "BatchNormPlan")
        .def_property_readonly("form", [](const BatchNormPlan& p) { return int(p.form); })
        .def_readonly("ordered", &BatchNormPlan::ordered)
        .def_readonly("groups", &BatchNormPlan::groups)
        .def_readonly("channels", &BatchNormPlan::channels)
        .def_readonly("members", &BatchNormPlan::members)
        .def_readonly("batches", &BatchNormPlan::batches)
        .def_readonly("held", &BatchNormPlan::held)
        .def_readonly("blocks", &BatchNormPlan::blocks)
        .def_readonly("shared_bytes", &BatchNormPlan::shared_bytes)
        .def_readonly("partials", &BatchNormPlan::partials)
        .def_readonly("counters", &BatchNormPlan::counters);
    m.attr("BATCH_NORM_FORMS") = names({FASTNORM_BATCH_NORM_FORMS(FASTNORM_NAME)});
    m.def("batch_norm_plan",
          [](long N, long C, long S, long x_stride_n, long x_stride_c, long x_stride_s, bool y_last,
             int dtype, int activation, bool backward, bool one_pass, int operands, int extras,
             int form, int batches) {
              const BatchNormShape shape = {N, C, S, x_stride_n, x_stride_c, x_stride_s, y_last};
              const BatchNormRequest request = {
                  Dtype(dtype), Activation(activation), backward, one_pass, operands, extras, form,
                  batches};
              BatchNormPlan plan;
              run("batch_norm_plan", [&] { return batch_norm_plan(shape, request, &plan); });
              return plan;
          });
    py::class_<BatchNormRunning>(m, "BatchNormRunning")
        .def(py::init([](Address mean, int mean_dtype, Address var, int var_dtype,
                         Address num_batches_tracked, double momentum, bool cumulative) {
            return BatchNormRunning{array(mean, mean_dtype), array(var, var_dtype),
                                    at<long>(num_batches_tracked), momentum, cumulative};
        }));
    m.def("batch_norm_forward",
          [](Address y, Address mean, Address rstd, Address count, const BatchNormRunning& running,
             Address x, Address residual, Address weight, int weight_dtype, Address bias,
             int bias_dtype, Address partials, Address counters, double eps, int activation,
             bool batch_stats, bool center_only, const BatchNormPlan& plan, int dtype,
             Address stream) {
              const BatchNormForward a = {at(y),
                                          at(mean),
                                          at(rstd),
                                          at(count),
                                          running,
                                          at(x),
                                          at(residual),
                                          array(weight, weight_dtype),
                                          array(bias, bias_dtype),
                                          at(partials),
                                          at<unsigned>(counters),
                                          eps,
                                          Activation(activation),
                                          batch_stats,
                                          center_only,
                                          plan};
              run("batch_norm_forward",
                  [&] { return batch_norm_forward(a, Dtype(dtype), at<CUstream_st>(stream)); });
          });
    m.def("batch_norm_merge", [](Address mean, Address var, Address count,
                                 const BatchNormRunning& running, Address gathered,
                                 Address counters, long ranks, long C, int dtype, Address stream) {
        const BatchNormMerge a = {
            at(mean), at(var), at(count), running, at(gathered), at<unsigned>(counters), ranks, C};
        run("batch_norm_merge",
            [&] { return batch_norm_merge(a, Dtype(dtype), at<CUstream_st>(stream)); });
    });
    m.def("batch_norm_backward",
          [](Address dx, Address dresidual, Address dweight, int dweight_dtype, Address dbias,
             int dbias_dtype, Address x, Address dy, Address residual, Address weight,
             int weight_dtype, Address bias, int bias_dtype, Address mean, Address rstd,
             Address sums, Address count, Address partials, Address counters, int activation,
             bool center_only, const BatchNormPlan& plan, int dtype, Address stream) {
              const BatchNormBackward a = {at(dx),
                                           at(dresidual),
                                           array(dweight, dweight_dtype),
                                           array(dbias, dbias_dtype),
                                           at(x),
                                           at(dy),
                                           at(residual),
                                           array(weight, weight_dtype),
                                           array(bias, bias_dtype),
                                           at(mean),
                                           at(rstd),
                                           at(sums),
                                           at(count),
                                           at(partials),
                                           at<unsigned>(counters),
                                           Activation(activation),
                                           center_only,
                                           plan};
              run("batch_norm_backward",
                  [&] { return batch_norm_backward(a, Dtype(dtype), at<CUstream_st>(stream)); });
          });
}

using Addresses = std::vector<Address>;

// The layers of a weight norm, and what their launches need; made once for a model.
struct WeightNormPlan {
    std::vector<fastnorm::WeightNormSizes> sizes;
    int processors;
    fastnorm::WeightNormWorkspace workspace;

    // with an address for each layer in every list
    template <class Launcher>
    void launch(const char* name, Launcher launcher, const Addresses& out, const Addresses& v,
                const Addresses& dw, const Addresses& g, const Addresses& norm, const Addresses& dg,
                Address partials, Address counters, Address stream) const {
        for (const Addresses* list : {&out, &v, &dw, &g, &norm, &dg})
            if (list->size() != sizes.size()) throw std::invalid_argument("one address per layer");
        std::vector<fastnorm::WeightNormLayer> layers(sizes.size());
        for (std::size_t i = 0; i < sizes.size(); ++i)
            layers[i] = {at(out[i]),  at(v[i]),  at(dw[i]), at(g[i]),
                         at(norm[i]), at(dg[i]), sizes[i]};
        const fastnorm::WeightNorm a = {layers.data(), int(layers.size()), at(partials),
                                        at<unsigned>(counters), processors};
        run(name, [&] { return launcher(a, at<CUstream_st>(stream)); });
    }
};

void bind_weight_norm(py::module_& m) {
    using namespace fastnorm;
    using Sizes = std::tuple<long, long, long, double, int, int, int>;  // as in WeightNormSizes
    py::class_<WeightNormPlan>(m, "WeightNormPlan")
        .def(py::init([](const std::vector<Sizes>& layers, int processors) {
            WeightNormPlan plan = {{}, processors, {}};
            for (const auto& [A, K, B, eps, w, v, g] : layers)
                plan.sizes.push_back({A, K, B, eps, Dtype(w), Dtype(v), Dtype(g)});
            plan.workspace =
                weight_norm_workspace(plan.sizes.data(), int(plan.sizes.size()), processors);
            return plan;
        }))
        .def_property_readonly("partials",
                               [](const WeightNormPlan& plan) { return plan.workspace.partials; })
        .def_property_readonly("counters",
                               [](const WeightNormPlan& plan) { return plan.workspace.counters; });
    m.def("weight_norm_forward",
          [](const WeightNormPlan& plan, const Addresses& w, const Addresses& v, const Addresses& g,
             const Addresses& norm, Address partials, Address counters, Address stream) {
              const Addresses none(w.size());
              plan.launch("weight_norm_forward", weight_norm_forward, w, v, none, g, norm, none,
                          partials, counters, stream);
          });
    m.def("weight_norm_backward",
          [](const WeightNormPlan& plan, const Addresses& dv, const Addresses& dg,
             const Addresses& v, const Addresses& g, const Addresses& norm, const Addresses& dw,
             Address partials, Address counters, Address stream) {
              plan.launch("weight_norm_backward", weight_norm_backward, dv, v, dw, g, norm, dg,
                          partials, counters, stream);
          });
}

using TypedAddress = std::pair<Address, int>;  // and the position of its dtype

fastnorm::Array array(TypedAddress a) {
    return array(a.first, a.second);
}

// A matrix as its address and the strides of batches, rows and columns.
fastnorm::Rows rows(const std::array<long, 4>& m) {
    return {at(Address(m[0])), m[1], m[2], m[3]};
}

void bind_layer_norm(py::module_& m) {
    using namespace fastnorm;
    using Matrix = std::array<long, 4>;
    using Plan = LayerNormPlan;
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
        .def_readwrite("group", &Plan::group)
        .def_readwrite("groups", &Plan::groups)
        .def_readwrite("span", &Plan::span)
        .def_readwrite("workers", &Plan::workers)
        .def_readwrite("parts", &Plan::parts);
    m.def("layer_norm_forward",
          [](TypedAddress y, Address sum, Address mean, Address rstd, const Matrix& x,
             const Matrix& residual, TypedAddress weight, TypedAddress bias, Address partials,
             Address counters, double eps, long all_rows, long batch_rows, long cols,
             int activation, const Plan& plan, int dtype, Address stream) {
              const LayerNormForward a = {array(y),
                                          at(sum),
                                          at(mean),
                                          at(rstd),
                                          rows(x),
                                          rows(residual),
                                          array(weight),
                                          array(bias),
                                          at(partials),
                                          at<unsigned>(counters),
                                          eps,
                                          all_rows,
                                          batch_rows,
                                          cols,
                                          Activation(activation),
                                          plan};
              run("layer_norm_forward",
                  [&] { return layer_norm_forward(a, Dtype(dtype), at<CUstream_st>(stream)); });
          });
    m.def("layer_norm_backward",
          [](Address dx, TypedAddress dweight, TypedAddress dbias, const Matrix& x,
             const Matrix& dy, int dy_dtype, Address dsum, TypedAddress weight, TypedAddress bias,
             Address mean, Address rstd, Address parts, Address partials, Address totals,
             Address counters, long all_rows, long batch_rows, long cols, int activation,
             const Plan& plan, int dtype, Address stream) {
              const LayerNormBackward a = {at(dx),
                                           array(dweight),
                                           array(dbias),
                                           rows(x),
                                           rows(dy),
                                           Dtype(dy_dtype),
                                           at(dsum),
                                           array(weight),
                                           array(bias),
                                           at(mean),
                                           at(rstd),
                                           at(parts),
                                           at(partials),
                                           at(totals),
                                           at<unsigned>(counters),
                                           all_rows,
                                           batch_rows,
                                           cols,
                                           Activation(activation),
                                           plan};
              run("layer_norm_backward",
                  [&] { return layer_norm_backward(a, Dtype(dtype), at<CUstream_st>(stream)); });
          });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastnorm's CUDA C++ kernels; called by fastnorm/ops/<family>/cuda.py alone.";
    m.attr("DTYPES") = names({FASTNORM_DTYPES(FASTNORM_NAME)});
    m.attr("ACTIVATIONS") = names({FASTNORM_ACTIVATIONS(FASTNORM_NAME)});
    m.def("unavailable", &unavailable, "Why no kernel can run here; None where they can.");
    bind_activation(m);
    bind_batch_norm(m);
    bind_weight_norm(m);
    bind_layer_norm(m);
}
