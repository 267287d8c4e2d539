/* The pass of `_depthwise.c` on a tensor and on modules that were read before: all that Python would do between two layers
 * in one call.
 */
#include "_watch.h"

enum { WEIGHT, BIAS, MEAN, VARIANCE, GAIN, OFFSET, TENSORS };

typedef struct { /* a convolution and its norm, or NULL; owned, while the map is worked on, as are their tensors */
    PyObject *conv, *norm, *tensors[TENSORS];
    const float *at[TENSORS];
} layer;

typedef struct {
    PyObject *table, *kinds;
    layer lead, own, mixed;
} weights;

static int is_one_of(PyObject *kinds, PyObject *tensor) {
    int found = 0;
    for (size i = 0; !found && i < PyTuple_Size(kinds); i++)
        found = PyTuple_GetItem(kinds, i) == (PyObject *)Py_TYPE(tensor);
    return found;
}

/* Whether a table of a module's (its `_parameters` or `_buffers`) has a plain tensor of this shape by this name, or None. */
static int take(const weights *all, layer *l, int which, PyObject *module, PyObject *table, PyObject *key, int dims,
                const int64_t *shape) {
    memory found;
    PyObject *own = PyObject_GenericGetDict(module, NULL), *tensors = own ? PyDict_GetItemWithError(own, table) : NULL;
    PyObject *tensor = tensors && PyDict_Check(tensors) ? PyDict_GetItemWithError(tensors, key) : NULL;
    Py_XINCREF(tensor);
    Py_XDECREF(own);
    l->tensors[which] = tensor;
    if (tensor == NULL || tensor == Py_None) return tensor == Py_None && which != WEIGHT && which != MEAN && which != VARIANCE;
    if (!is_one_of(all->kinds, tensor) || !lies_in(all->table, tensor, &found) || !is_literal(tensor)) return 0;
    if (!is_dense(&found, dims, shape)) return 0;
    l->at[which] = found.data;
    return 1;
}

/* A convolution's tensors and its norm's, to where the pass looks for them. */
static int take_layer(const weights *all, layer *l, const int64_t shape[4], const float **weight, ending *e) {
    const int64_t *channels = shape;
    int found = 1;
    if (l->conv != NULL)
        found = take(all, l, WEIGHT, l->conv, name._parameters, name.weight, 4, shape) &&
                take(all, l, BIAS, l->conv, name._parameters, name.bias, 1, channels);
    if (l->norm != NULL)
        found = found && take(all, l, MEAN, l->norm, name._buffers, name.running_mean, 1, channels) &&
                take(all, l, VARIANCE, l->norm, name._buffers, name.running_var, 1, channels) &&
                take(all, l, GAIN, l->norm, name._parameters, name.weight, 1, channels) &&
                take(all, l, OFFSET, l->norm, name._parameters, name.bias, 1, channels);
    if (weight != NULL) *weight = l->at[WEIGHT];
    e->bias = l->at[BIAS];
    e->mean = l->at[MEAN];
    e->variance = l->at[VARIANCE];
    e->gain = l->at[GAIN];
    e->offset = l->at[OFFSET];
    return found;
}

static int take_all(weights *all, pass *p) {
    const int64_t window[] = {p->channels, 1, p->kernel, p->kernel}, matrix[] = {p->outputs, p->inputs, 1, 1};
    return (!p->leads || take_layer(all, &all->lead, window, NULL, &p->lead)) &&
           take_layer(all, &all->own, window, &p->weight, &p->own) &&
           (p->outputs == 0 || take_layer(all, &all->mixed, matrix, &p->mix, &p->mixed));
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

/* Maps for the results: one, of twice the channels where both halves are `joined`, or two; that of the 1x1 convolution. */
static PyObject *results(pass *p, PyObject *table, PyObject *x, int joined) {
    const int two = p->pool && p->merge == BESIDE && !p->outputs;
    const int64_t channels = p->outputs ? p->outputs : (two && joined ? 2 : 1) * p->channels;
    const int64_t shape[] = {p->count, channels, p->rows, p->columns};
    memory found;
    PyObject *out = fresh_map(x, shape, p->last), *pooled = out && two && !joined ? fresh_map(x, shape, p->last) : NULL, *both;
    p->out_channels = p->outputs ? p->inputs : channels;
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

enum { LONGEST = 1 << 18 }; /* floats of a row of what a 1x1 convolution reads: more would not stay in the caches */

/* Whether a 1x1 convolution, if there is one, reads what the pass makes, and what is added to it has its size. */
static int mixes(const pass *p, int joined) {
    const int two = p->pool && p->merge == BESIDE, same_channels = p->outputs == p->channels;
    if (p->outputs == 0) return p->extra == NO_EXTRA;
    if (two != joined || p->inputs * p->columns > LONGEST) return 0;
    if (p->extra == INPUT) return same_channels && !p->leads && p->rows == p->height && p->columns == p->width;
    return p->extra == NO_EXTRA || (p->extra == MAXIMA && same_channels && two);
}

static PyObject *run(weights *all, PyObject *x, size stride, pass *p, int joined) {
    memory map;
    PyObject *result = NULL;
    int failed = 0;
    if (!lies_in(all->table, x, &map) || !is_literal(x) || !fits(p, &map, stride) || !mixes(p, joined) || !take_all(all, p)) return NULL;
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

/* The convolution of a watch and its norm, where there are such; 0 where one is gone. */
static int find(layer *l, PyObject *conv, PyObject *norm) {
    l->conv = conv == Py_None ? NULL : referent(conv);
    l->norm = norm == Py_None ? NULL : referent(norm);
    return (conv == Py_None) == (l->conv == NULL) && (norm == Py_None) == (l->norm == NULL);
}

static void let_go(layer *l) {
    for (int i = 0; i < TENSORS; i++) Py_XDECREF(l->tensors[i]);
    Py_XDECREF(l->conv);
    Py_XDECREF(l->norm);
}

static int read_ending(ending *e, PyObject *numbers) { return PyArg_ParseTuple(numbers, "ifff", &e->act, &e->low, &e->high, &e->eps); }

PyObject *onepass(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *watch, *x, *modules, *result = NULL;
    weights all = {.table = NULL};
    pass p = {.count = 0};
    size stride;
    int joined, mixed;
    if (!PyArg_ParseTuple(args, "OO!O!OO!nnniiiiii", &all.table, &PyTuple_Type, &all.kinds, &PyTuple_Type, &watch, &x,
                          &PyTuple_Type, &modules, &stride, &p.pool, &p.pool_padding, &p.merge, &joined, &p.leads, &mixed, &p.extra,
                          &p.threads))
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
        !read_ending(&p.own, PyTuple_GetItem(watch, NUMBERS)))
        return NULL;
    int there = find(&all.own, PyTuple_GetItem(watch, CONV), PyTuple_GetItem(watch, NORM));
    if (there && mixed) {
        p.inputs = joined ? 2 * p.channels : p.channels;
        there = PyTuple_GetItem(watch, MIX) != Py_None && find(&all.mixed, PyTuple_GetItem(watch, MIX), PyTuple_GetItem(watch, MIX_NORM));
        if (there) {
            p.outputs = PyLong_AsSsize_t(PyTuple_GetItem(watch, MIX_OUTPUTS));
            there = p.outputs > 0 && read_ending(&p.mixed, PyTuple_GetItem(watch, MIX_NUMBERS));
        }
    }
    if (there && p.leads)
        there = find(&all.lead, Py_None, PyTuple_GetItem(watch, LEAD_NORM)) && read_ending(&p.lead, PyTuple_GetItem(watch, LEAD_NUMBERS));
    if (there) result = run(&all, x, stride, &p, joined);
    let_go(&all.lead);
    let_go(&all.own);
    let_go(&all.mixed);
    if (result == NULL && !PyErr_Occurred()) Py_RETURN_NONE;
    return result;
}
