// How tensors come in from Python: asked for address and dtype in Python's own terms, because
// torch's headers would tie a build to one torch. Included by bindings.cpp alone.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <iterator>

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

namespace arguments {

// Where a tensor's data begin; false for what is no tensor.
inline bool address(PyObject* tensor, void** found) {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    PyObject* number = PyObject_CallMethodNoArgs(tensor, name);
    if (number != nullptr) *found = PyLong_AsVoidPtr(number);
    Py_XDECREF(number);
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
}

// The position of a tensor's dtype in kDtypes; false for one that is not there.
inline bool dtype(PyObject* tensor, Dtype* found) {
    static const auto known = [] {
        std::array<PyObject*, std::size(kDtypes)> dtypes;
        const pybind11::module_ torch = pybind11::module_::import("torch");
        for (std::size_t i = 0; i < dtypes.size(); ++i)
            dtypes[i] = pybind11::object(torch.attr(kDtypes[i])).release().ptr();
        return dtypes;
    }();
    static PyObject* const name = PyUnicode_InternFromString("dtype");
    PyObject* own = PyObject_GetAttr(tensor, name);
    if (own == nullptr) PyErr_Clear();
    Py_XDECREF(own);  // torch keeps its dtypes for ever
    for (std::size_t i = 0; i < known.size(); ++i) {
        *found = Dtype(i);
        if (own == known[i]) return true;
    }
    return false;
}

}  // namespace arguments
}  // namespace fastnorm

namespace pybind11::detail {

template <>
struct type_caster<fastnorm::Pointer> {
    PYBIND11_TYPE_CASTER(fastnorm::Pointer, const_name("Tensor | None"));

    bool load(handle tensor, bool) {
        value.data = nullptr;
        return tensor.is_none() || fastnorm::arguments::address(tensor.ptr(), &value.data);
    }
};

template <>
struct type_caster<fastnorm::Array> {
    PYBIND11_TYPE_CASTER(fastnorm::Array, const_name("Tensor | None"));

    bool load(handle tensor, bool) {
        value = {};
        return tensor.is_none() || (fastnorm::arguments::address(tensor.ptr(), &value.data) &&
                                    fastnorm::arguments::dtype(tensor.ptr(), &value.dtype));
    }
};

}  // namespace pybind11::detail
