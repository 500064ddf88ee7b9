// How tensors, dtypes and names come in from Python: tensors are asked for address, dtype and
// stream in Python's own terms, because torch's headers would tie a build to one torch. Included by
// bindings.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <string>

#include "fastnorm.h"

namespace fastnorm {

// A tensor of a dtype that is known without asking, or that does not matter; null for None.
struct Pointer {
    void* data;

    template <class T>
    operator T*() const {
        return static_cast<T*>(data);
    }
};

#define FASTNORM_NAME(name) #name,
constexpr const char* kDtypes[] = {FASTNORM_DTYPES(FASTNORM_NAME)};
constexpr const char* kActivations[] = {FASTNORM_ACTIVATIONS(FASTNORM_NAME)};

// What loading arguments asks Python for, found once: a function's static variables would be found
// under a lock that another thread may wait for while it holds the interpreter's.
struct Known {
    PyObject *data_ptr, *dtype, *numel, *get_device, *is_contiguous;  // the names of attributes
    PyObject* dtypes[std::size(kDtypes)];  // torch's, which it keeps for ever
    PyObject* activations[std::size(kActivations)];
    PyObject* current_stream;  // torch's function; null in a torch for the CPU
};
inline Known known;

namespace arguments {

// By the module, before any argument is loaded.
inline void prepare() {
    known.data_ptr = PyUnicode_InternFromString("data_ptr");
    known.dtype = PyUnicode_InternFromString("dtype");
    known.numel = PyUnicode_InternFromString("numel");
    known.get_device = PyUnicode_InternFromString("get_device");
    known.is_contiguous = PyUnicode_InternFromString("is_contiguous");
    const pybind11::module_ torch = pybind11::module_::import("torch");
    for (std::size_t i = 0; i < std::size(kDtypes); ++i)
        known.dtypes[i] = pybind11::object(torch.attr(kDtypes[i])).release().ptr();
    for (std::size_t i = 0; i < std::size(kActivations); ++i)
        known.activations[i] = PyUnicode_InternFromString(kActivations[i]);
    const pybind11::object stream =
        pybind11::getattr(torch.attr("_C"), "_cuda_getCurrentRawStream", pybind11::none());
    known.current_stream = stream.is_none() ? nullptr : stream.inc_ref().ptr();
}

// What Python has answered; an error where it has raised one.
inline pybind11::object answer(PyObject* given) {
    if (given == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(given);
}

// A tensor's method that takes nothing and returns a number.
inline long number(pybind11::handle tensor, PyObject* method) {
    const long found = PyLong_AsLong(answer(PyObject_CallMethodNoArgs(tensor.ptr(), method)).ptr());
    if (found == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return found;
}

// Where a tensor's data begin.
inline void* address(pybind11::handle tensor) {
    void* found =
        PyLong_AsVoidPtr(answer(PyObject_CallMethodNoArgs(tensor.ptr(), known.data_ptr)).ptr());
    if (found == nullptr && number(tensor, known.numel) > 0)
        throw pybind11::value_error("fastnorm's CUDA backend was given a tensor without data");
    return found;
}

// A dtype's position in kDtypes.
inline Dtype position(pybind11::handle dtype) {
    for (std::size_t i = 0; i < std::size(kDtypes); ++i)
        if (dtype.ptr() == known.dtypes[i]) return Dtype(i);
    std::string names;
    for (const char* name : kDtypes) names += (names.empty() ? "" : ", ") + std::string(name);
    throw pybind11::type_error("fastnorm's CUDA backend takes " + names + ", and was given " +
                               pybind11::str(dtype).cast<std::string>());
}

inline Dtype dtype(pybind11::handle tensor) {
    return position(answer(PyObject_GetAttr(tensor.ptr(), known.dtype)));
}

// The current stream of a tensor's device; null for a CPU tensor, which the tests give to kernels
// compiled for the CPU.
inline CUstream_st* stream(pybind11::handle tensor) {
    const pybind11::object device =
        answer(PyObject_CallMethodNoArgs(tensor.ptr(), known.get_device));
    if (PyLong_AsLong(device.ptr()) < 0) return nullptr;
    const pybind11::object handle = answer(PyObject_CallOneArg(known.current_stream, device.ptr()));
    return static_cast<CUstream_st*>(PyLong_AsVoidPtr(handle.ptr()));
}

}  // namespace arguments

// A parameter or a buffer as kernels see it: without gaps, a copy of a slice or an expansion.
struct Parameter : Array {
    pybind11::handle tensor;
    pybind11::object copy;

    // What a launch has written, in stream order.
    void put_back() const {
        if (copy) tensor.attr("copy_")(copy);
    }
};

// The tensor that a launch is for: it decides the dtype of the kernel, and the stream.
struct Subject : Array {
    pybind11::handle tensor;

    long numel() const { return arguments::number(tensor, known.numel); }
    CUstream_st* stream() const { return arguments::stream(tensor); }
};

}  // namespace fastnorm

namespace pybind11::detail {

template <>
struct type_caster<fastnorm::Pointer> {
    PYBIND11_TYPE_CASTER(fastnorm::Pointer, const_name("Tensor | None"));

    bool load(handle tensor, bool) {
        value.data = tensor.is_none() ? nullptr : fastnorm::arguments::address(tensor);
        return true;
    }
};

template <>
struct type_caster<fastnorm::Array> {
    PYBIND11_TYPE_CASTER(fastnorm::Array, const_name("Tensor | None"));

    bool load(handle tensor, bool) {
        value = {};
        if (!tensor.is_none())
            value = {fastnorm::arguments::address(tensor), fastnorm::arguments::dtype(tensor)};
        return true;
    }
};

template <>
struct type_caster<fastnorm::Parameter> {
    PYBIND11_TYPE_CASTER(fastnorm::Parameter, const_name("Tensor | None"));

    bool load(handle tensor, bool) {
        using namespace fastnorm;
        value = {};
        if (tensor.is_none()) return true;
        value.tensor = tensor;
        if (arguments::number(tensor, known.is_contiguous) == 0)
            tensor = value.copy = tensor.attr("contiguous")();
        value.data = arguments::address(tensor);
        value.dtype = arguments::dtype(tensor);
        return true;
    }
};

template <>
struct type_caster<fastnorm::Subject> {
    PYBIND11_TYPE_CASTER(fastnorm::Subject, const_name("Tensor"));

    bool load(handle tensor, bool) {
        value = {{fastnorm::arguments::address(tensor), fastnorm::arguments::dtype(tensor)},
                 tensor};
        return true;
    }
};

template <>
struct type_caster<fastnorm::Dtype> {
    PYBIND11_TYPE_CASTER(fastnorm::Dtype, const_name("torch.dtype"));

    bool load(handle dtype, bool) {
        value = fastnorm::arguments::position(dtype);
        return true;
    }
};

template <>
struct type_caster<fastnorm::Activation> {
    PYBIND11_TYPE_CASTER(fastnorm::Activation, const_name("str"));

    // Names are constants of Python's source, interned as ours are.
    bool load(handle name, bool) {
        if (!PyUnicode_Check(name.ptr())) return false;
        for (std::size_t i = 0; i < std::size(fastnorm::kActivations); ++i) {
            if (name.ptr() == fastnorm::known.activations[i]) {
                value = fastnorm::Activation(i);
                return true;
            }
        }
        for (std::size_t i = 0; i < std::size(fastnorm::kActivations); ++i) {
            if (PyUnicode_CompareWithASCIIString(name.ptr(), fastnorm::kActivations[i]) == 0) {
                value = fastnorm::Activation(i);
                return true;
            }
        }
        return false;
    }
};

}  // namespace pybind11::detail
