/* The extension's functions as Python sees them: addresses of dense float32 maps and weights, and numbers. Who calls has
 * seen to it that they are what these sizes say; see `padfree/kernels/_native.pyi`.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "pass.h"

static void *memory(unsigned long long address) { return (void *)(uintptr_t)address; }

static PyObject *refused(const char *why) {
    PyErr_SetString(PyExc_ValueError, why);
    return NULL;
}

/* Sizes of a pool and two or three maps; 0 with an exception where they are none. */
static int read_pool(PyObject *args, const char *format, unsigned long long at[3], shape *s, int *threads) {
    const int three = format[2] == 'K';
    const int read = three ? PyArg_ParseTuple(args, format, &at[0], &at[1], &at[2], &s->planes, &s->height, &s->width, &s->unit,
                                              &s->kernel, &s->stride, &s->padding, threads)
                           : PyArg_ParseTuple(args, format, &at[0], &at[1], &s->planes, &s->height, &s->width, &s->unit,
                                              &s->kernel, &s->stride, &s->padding, threads);
    if (!read) return 0;
    if (at[0] == 0 || at[1] == 0 || (three && at[2] == 0)) return refused("a map without memory") != NULL;
    if (complete(s)) return 1;
    return refused("windows of 3 or 5 pixels, stride 1 or 2, padding below half a window, inside the map") != NULL;
}

static PyObject *max_pool(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long at[3];
    int threads, failed;
    shape s;
    if (!read_pool(args, "KKnnnnnnni", at, &s, &threads)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = pool(&s, memory(at[0]), memory(at[1]), threads);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *max_pool_taps(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long at[3];
    int threads, failed;
    shape s;
    if (!read_pool(args, "KKKnnnnnnni", at, &s, &threads)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = pool_taps(&s, memory(at[0]), memory(at[1]), memory(at[2]), threads);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *max_pool_backward(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long at[3];
    int threads;
    shape s;
    if (!read_pool(args, "KKKnnnnnnni", at, &s, &threads)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    pool_backward(&s, memory(at[0]), memory(at[1]), memory(at[2]), threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

enum { LONGEST = 1 << 18 }; /* floats of a row of what a 1x1 convolution reads: more would not stay in the caches */

/* Whether a 1x1 convolution, if there is one, can be done here, and what is added to it has its size. */
static int mixes(const pass *p, int joined) {
    const int two = p->pool && p->merge == BESIDE, same_channels = p->outputs == p->channels;
    if (p->outputs == 0) return p->extra == NO_EXTRA && two == joined;
    if (!VECTORS || two != joined || p->inputs * p->columns > LONGEST) return 0;
    if (p->extra == INPUT) return same_channels && !p->leads && p->rows == p->height && p->columns == p->width;
    return p->extra == NO_EXTRA || (p->extra == MAXIMA && same_channels && two);
}

static PyObject *chain(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long in, out, weight, bias, scale, shift, matrix, point_bias;
    pass p = {.count = 0};
    int joined, failed;
    if (!PyArg_ParseTuple(args, "KK(innnn)(iff)(KKKKnnn)(iff)(nni)(KKniff)ii", &in, &out, &p.last, &p.count, &p.channels,
                          &p.height, &p.width, &p.lead.act, &p.lead.low, &p.lead.high, &weight, &bias, &scale, &shift,
                          &p.kernel, &p.stride, &p.padding, &p.own.act, &p.own.low, &p.own.high, &p.pool, &p.pool_padding,
                          &p.merge, &matrix, &point_bias, &p.outputs, &p.mixed.act, &p.mixed.low, &p.mixed.high, &p.extra,
                          &p.threads))
        return NULL;
    if (in == 0 || out == 0 || weight == 0 || (p.outputs && matrix == 0)) return refused("a map or a weight without memory");
    joined = p.merge < 0; /* both halves of one map */
    if (joined) p.merge = BESIDE;
    p.leads = p.lead.act >= 0;
    p.inputs = p.outputs ? (joined ? 2 : 1) * p.channels : 0;
    p.in = memory(in);
    p.weight = memory(weight);
    p.own.bias = memory(bias);
    p.own.own_scale = memory(scale);
    p.own.own_shift = memory(shift);
    p.mix = memory(matrix);
    p.mixed.bias = memory(point_bias);
    if (p.count < 1 || p.threads < 1 || !depthwise_fits(&p) || !mixes(&p, joined) || !all_finite(&p)) Py_RETURN_FALSE;
    p.out = memory(out);
    p.out_channels = (joined ? 2 : 1) * p.channels; /* of the map, or of the tile that the 1x1 convolution reads */
    if (joined && !p.outputs) p.pooled = p.out + p.channels * (p.last ? 1 : p.rows * p.columns);
    Py_BEGIN_ALLOW_THREADS
    failed = depthwise(&p);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_TRUE;
}

static PyMethodDef methods[] = {
    {"max_pool", max_pool, METH_VARARGS,
     "max_pool(in, out, planes, height, width, unit, kernel, stride, padding, threads): addresses of float32 maps."},
    {"max_pool_taps", max_pool_taps, METH_VARARGS,
     "max_pool_taps(in, out, taps, planes, ...): the same, and the tap of each maximum, one byte."},
    {"max_pool_backward", max_pool_backward, METH_VARARGS,
     "max_pool_backward(grad, taps, out, planes, ...): the gradient of the input, of the sizes that it had."},
    {"chain", chain, METH_VARARGS,
     "chain(in, out, map, ahead, conv, act, pool, point, residual, threads): whether it could be done here."},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "padfree.kernels._native", NULL, 0, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__native(void) {
    PyObject *made = PyModule_Create(&module);
    if (made != NULL && PyModule_AddIntConstant(made, "POINTWISE", VECTORS) != 0) Py_CLEAR(made);
    return made;
}
