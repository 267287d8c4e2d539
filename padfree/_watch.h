/* What the one pass asks about Python's objects: modules that were read before, and tensors. */
#ifndef PADFREE_WATCH_H
#define PADFREE_WATCH_H
#include "_depthwise.h"

/* A watch, as `padfree.chains` makes it of modules that it has read. */
enum {
    MODULES, STATES, NAMES, FUNCTIONS,
    LEAD_NORM, LEAD_NUMBERS,
    CONV, NORM, WINDOW, NUMBERS,
    MIX, MIX_NORM, MIX_OUTPUTS, MIX_NUMBERS,
    WATCHED
};

typedef struct { /* as DLPack lays it out (dlpack.h, DLTensor) */
    void *data;
    int32_t device, number, dims;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t offset;
} memory;

/* Names of Python's, made once: each is an object that dictionaries know by its address. */
#define EACH_NAME(DO)                                                                                                  \
    DO(_modules) DO(_parameters) DO(_buffers) DO(weight) DO(bias) DO(running_mean) DO(running_var) DO(is_neg)          \
    DO(new_empty_strided)
#define DECLARE(NAME) PyObject *NAME;
typedef struct {
    EACH_NAME(DECLARE)
} names;
extern names name;
#undef DECLARE

int unchanged(PyObject *watch, PyObject *modules); /* whether they are what was read; 0 with an exception where it failed */

/* Whether a tensor is float32 numbers in the CPU's memory, and where; `table` is `Tensor.__dlpack_c_exchange_api__`. */
int lies_in(PyObject *table, PyObject *tensor, memory *found);
int is_literal(PyObject *tensor); /* whether its numbers are what lies in the memory, and not their negatives */
int is_dense(const memory *tensor, int dims, const int64_t *shape); /* of this shape, its numbers one after another */
int is_map(const memory *tensor, int *last);                        /* a dense (N, C, H, W) of one unmistakable layout */
PyObject *fresh_map(PyObject *like, const int64_t shape[4], int last);

#endif
