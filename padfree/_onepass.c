/* The pass of `_depthwise.c` on a tensor and on modules that were read before: all that Python would do between two layers
 * in one call.
 */
#include "_watch.h"

enum { WEIGHT, BIAS, MEAN, VARIANCE, GAIN, OFFSET, TENSORS };

typedef struct {
    PyObject *table, *kinds, *tensors[TENSORS]; /* owned, while the map is worked on */
    const float *at[TENSORS];
} weights;

static int is_one_of(PyObject *kinds, PyObject *tensor) {
    int found = 0;
    for (size i = 0; !found && i < PyTuple_Size(kinds); i++)
        found = PyTuple_GetItem(kinds, i) == (PyObject *)Py_TYPE(tensor);
    return found;
}

/* Whether a table of a module's (its `_parameters` or `_buffers`) has a plain tensor of this shape by this name, or None. */
static int take(weights *all, int which, PyObject *module, const char *table, const char *name, int dims, const int64_t *shape) {
    memory found;
    PyObject *own = PyObject_GenericGetDict(module, NULL), *tensors = own ? PyDict_GetItemString(own, table) : NULL;
    PyObject *tensor = tensors && PyDict_Check(tensors) ? PyDict_GetItemString(tensors, name) : NULL;
    Py_XINCREF(tensor);
    Py_XDECREF(own);
    all->tensors[which] = tensor;
    if (tensor == NULL || tensor == Py_None) return tensor == Py_None && which != WEIGHT && which != MEAN && which != VARIANCE;
    if (!is_one_of(all->kinds, tensor) || !lies_in(all->table, tensor, &found) || !is_dense(&found, dims, shape)) return 0;
    all->at[which] = found.data;
    return 1;
}

/* `norm`: NULL where there is none. */
static int take_all(weights *all, PyObject *conv, PyObject *norm, const pass *p) {
    const int64_t channels = p->channels, window[] = {channels, 1, p->kernel, p->kernel};
    int found = take(all, WEIGHT, conv, "_parameters", "weight", 4, window) &&
                take(all, BIAS, conv, "_parameters", "bias", 1, &channels);
    if (norm != NULL)
        found = found && take(all, MEAN, norm, "_buffers", "running_mean", 1, &channels) &&
                take(all, VARIANCE, norm, "_buffers", "running_var", 1, &channels) &&
                take(all, GAIN, norm, "_parameters", "weight", 1, &channels) &&
                take(all, OFFSET, norm, "_parameters", "bias", 1, &channels);
    return found;
}

/* The map's sizes, where the windows fit into it. */
static int fits(pass *p, const memory *map, size stride) {
    if (!is_map(map, &p->last) || map->shape[1] != p->channels || p->stride != stride) return 0;
    p->in = map->data;
    p->count = map->shape[0];
    p->height = map->shape[2];
    p->width = map->shape[3];
    return depthwise_fits(p);
}

/* Maps for the results: one, of twice the channels where both halves are `joined`, or two. */
static PyObject *results(pass *p, PyObject *table, PyObject *x, int joined) {
    const int two = p->pool && p->merge == BESIDE;
    const int64_t shape[] = {p->count, (two && joined ? 2 : 1) * p->channels, p->rows, p->columns};
    memory found;
    PyObject *out = fresh_map(x, shape, p->last), *pooled = out && two && !joined ? fresh_map(x, shape, p->last) : NULL, *both;
    p->out_channels = shape[1];
    p->pooled = NULL;
    if (out == NULL || !lies_in(table, out, &found)) goto failed;
    p->out = found.data;
    if (two && joined) p->pooled = p->out + p->channels * (p->last ? 1 : p->rows * p->columns);
    if (!two || joined) return out;
    if (pooled == NULL || !lies_in(table, pooled, &found)) goto failed;
    p->pooled = found.data;
    both = PyTuple_Pack(2, out, pooled);
    Py_DECREF(out);
    Py_DECREF(pooled);
    return both;
failed:
    Py_XDECREF(out);
    Py_XDECREF(pooled);
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "a new map has no memory");
    return NULL;
}

static PyObject *run(weights *all, PyObject *conv, PyObject *norm, PyObject *x, size stride, pass *p, int joined) {
    memory map;
    PyObject *result = NULL;
    int failed = 0;
    if (!lies_in(all->table, x, &map) || !fits(p, &map, stride) || !take_all(all, conv, norm, p)) return NULL;
    p->weight = all->at[WEIGHT];
    p->bias = all->at[BIAS];
    p->mean = all->at[MEAN];
    p->variance = all->at[VARIANCE];
    p->gain = all->at[GAIN];
    p->offset = all->at[OFFSET];
    if (!all_finite(p)) return NULL;
    result = results(p, all->table, x, joined);
    if (result == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS
    failed = depthwise(p);
    Py_END_ALLOW_THREADS
    if (failed) {
        Py_DECREF(result);
        return PyErr_NoMemory();
    }
    return result;
}

/* What a weak reference leads to, owned by who asks; NULL where it is gone. Code of Python's, and other threads, may run
 * while tensors are looked at. */
static PyObject *referent(PyObject *ref) {
    PyObject *found = PyWeakref_GetObject(ref);
    if (found == Py_None) return NULL;
    Py_XINCREF(found);
    return found;
}

PyObject *onepass(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *watch, *x, *modules, *conv, *norm, *result = NULL;
    weights all = {.table = NULL};
    pass p = {.count = 0};
    size stride;
    int joined;
    if (!PyArg_ParseTuple(args, "OO!O!OO!nnniii", &all.table, &PyTuple_Type, &all.kinds, &PyTuple_Type, &watch, &x,
                          &PyTuple_Type, &modules, &stride, &p.pool, &p.pool_padding, &p.merge, &joined, &p.threads))
        return NULL;
    if (PyTuple_Size(watch) != WATCHED) {
        PyErr_SetString(PyExc_ValueError, "a watch has other fields");
        return NULL;
    }
    if (!unchanged(watch, modules)) {
        if (PyErr_Occurred()) return NULL;
        Py_RETURN_FALSE;
    }
    if (p.merge < 0 || PyTuple_GetItem(watch, CONV) == Py_None) Py_RETURN_NONE; /* nothing that could be passed was read */
    if (!PyArg_ParseTuple(PyTuple_GetItem(watch, WINDOW), "nnnn", &p.channels, &p.kernel, &p.stride, &p.padding) ||
        !PyArg_ParseTuple(PyTuple_GetItem(watch, NUMBERS), "ifff", &p.act, &p.low, &p.high, &p.eps))
        return NULL;
    const int normed = PyTuple_GetItem(watch, NORM) != Py_None;
    conv = referent(PyTuple_GetItem(watch, CONV));
    norm = normed ? referent(PyTuple_GetItem(watch, NORM)) : NULL;
    if (conv != NULL && normed == (norm != NULL)) result = run(&all, conv, norm, x, stride, &p, joined);
    for (int i = 0; i < TENSORS; i++) Py_XDECREF(all.tensors[i]);
    Py_XDECREF(conv);
    Py_XDECREF(norm);
    if (result == NULL && !PyErr_Occurred()) Py_RETURN_NONE;
    return result;
}
