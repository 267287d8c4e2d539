/* Tensors as memory, through DLPack's table of functions (dlpack.h, DLPackExchangeAPI). */
#include "_watch.h"

enum { CPU = 1, FLOATS = 2 }; /* as DLPack counts them */

typedef struct {
    uint32_t major, minor;
    void *previous, *allocate, *managed, *back;
    int (*borrow)(void *tensor, memory *to);
} functions;

names name;

int make_names(void) {
#define MAKE(NAME)                                                                                                     \
    if (name.NAME == NULL && (name.NAME = PyUnicode_InternFromString(#NAME)) == NULL) return -1;
    EACH_NAME(MAKE)
#undef MAKE
    return 0;
}

int is_literal(PyObject *tensor) {
    PyObject *negative = PyObject_CallMethodObjArgs(tensor, name.is_neg, NULL);
    Py_XDECREF(negative);
    return negative == Py_False;
}

int lies_in(PyObject *table, PyObject *tensor, memory *found) {
    const functions *known = PyCapsule_GetPointer(table, "dlpack_exchange_api");
    if (known == NULL || known->major != 1 || known->borrow == NULL || known->borrow(tensor, found) != 0) {
        PyErr_Clear(); /* another table, or memory that DLPack cannot describe */
        return 0;
    }
    found->data = found->data == NULL ? NULL : (char *)found->data + found->offset;
    return found->device == CPU && found->code == FLOATS && found->bits == 32 && found->lanes == 1 && found->data != NULL;
}

/* Whether it lies one after another in this order of its axes, the innermost first. */
static int is_laid(const memory *tensor, const int *order) {
    int64_t step = 1;
    for (int i = 0; i < tensor->dims; i++) {
        const int axis = order[i];
        if (tensor->shape[axis] != 1 && tensor->strides[axis] != step) return 0;
        step *= tensor->shape[axis];
    }
    return step > 0;
}

int is_dense(const memory *tensor, int dims, const int64_t *shape) {
    const int order[] = {3, 2, 1, 0};
    if (tensor->dims != dims || dims > 4) return 0;
    for (int i = 0; i < dims; i++)
        if (tensor->shape[i] != shape[i]) return 0;
    return is_laid(tensor, order + 4 - dims);
}

int is_map(const memory *tensor, int *last) {
    const int contiguous[] = {3, 2, 1, 0}, channels_last[] = {1, 3, 2, 0};
    if (tensor->dims != 4) return 0;
    *last = is_laid(tensor, channels_last);
    return is_laid(tensor, contiguous) != *last;
}

PyObject *fresh_map(PyObject *like, const int64_t shape[4], int last) {
    const long long n = shape[0], c = shape[1], h = shape[2], w = shape[3];
    PyObject *sizes = Py_BuildValue("(LLLL)", n, c, h, w), *made = NULL;
    PyObject *strides = last ? Py_BuildValue("(LLLL)", c * h * w, 1LL, c * w, c) : Py_BuildValue("(LLLL)", c * h * w, h * w, w, 1LL);
    if (sizes != NULL && strides != NULL) made = PyObject_CallMethodObjArgs(like, name.new_empty_strided, sizes, strides, NULL);
    Py_XDECREF(sizes);
    Py_XDECREF(strides);
    return made;
}
