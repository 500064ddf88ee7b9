// How tensors come in from Python: asked for address and dtype in Python's own terms, because
// torch's headers would tie a build to one torch. Included by bindings.cpp alone.
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
    PyObject *data_ptr, *dtype;            // the names of attributes
    PyObject* dtypes[std::size(kDtypes)];  // torch's, which it keeps for ever
};
inline Known known;

namespace arguments {

// By the module, before any argument is loaded.
inline void prepare() {
    known.data_ptr = PyUnicode_InternFromString("data_ptr");
    known.dtype = PyUnicode_InternFromString("dtype");
    const pybind11::module_ torch = pybind11::module_::import("torch");
    for (std::size_t i = 0; i < std::size(kDtypes); ++i)
        known.dtypes[i] = pybind11::object(torch.attr(kDtypes[i])).release().ptr();
}

// Where a tensor's data begin.
inline void* address(pybind11::handle tensor) {
    PyObject* number = PyObject_CallMethodNoArgs(tensor.ptr(), known.data_ptr);
    if (number == nullptr) throw pybind11::error_already_set();
    void* found = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    if (found == nullptr && tensor.attr("numel")().cast<long>() > 0)
        throw pybind11::value_error("fastnorm's CUDA backend was given a tensor without data");
    return found;
}

// The position of a tensor's dtype in kDtypes.
inline Dtype dtype(pybind11::handle tensor) {
    PyObject* own = PyObject_GetAttr(tensor.ptr(), known.dtype);
    if (own == nullptr) throw pybind11::error_already_set();
    Py_DECREF(own);
    for (std::size_t i = 0; i < std::size(kDtypes); ++i)
        if (own == known.dtypes[i]) return Dtype(i);
    std::string names;
    for (const char* name : kDtypes) names += (names.empty() ? "" : ", ") + std::string(name);
    throw pybind11::type_error("fastnorm's CUDA backend takes " + names + ", and was given " +
                               pybind11::str(own).cast<std::string>());
}

}  // namespace arguments
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

}  // namespace pybind11::detail
