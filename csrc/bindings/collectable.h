#pragma once

#include <pybind11/pybind11.h>

namespace fastopt {

// The plan holds parameters, whose hooks may hold the optimizer, which holds the plan: the garbage
// collector has to see through it.
template <class Plan>
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (pybind11::detail::is_holder_constructed(self)) {
      Py_VISIT(pybind11::cast<Plan&>(pybind11::handle(self)).references.ptr());
    }
    return 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (pybind11::detail::is_holder_constructed(self)) {
      pybind11::cast<Plan&>(pybind11::handle(self)).clear();
    }
    return 0;
  };
}

}  // namespace fastopt
