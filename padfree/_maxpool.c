/* Max-pools of float32 maps in one pass: what torch's elementwise operations need four or more for.
 *
 * A map is planes x height x width x unit floats: unit is 1 for a contiguous (N, C, H, W) map (planes = N*C) and C for a
 * channels_last one (planes = N). The maximum of a window's rows goes into a buffer, each row between `padding` columns
 * of -inf, and the maximum of the window's columns from there into the result. NaN spreads as it does in torch.
 */
#include "_maxpool.h"

enum { VECTOR = 16, SLACK = 32 };

static inline float larger(float a, float b) { return takes(b, a) ? b : a; }

#define VERTICAL(K)                                                                                                    \
    do {                                                                                                               \
        const float *restrict r0 = row[0], *restrict r1 = row[1], *restrict r2 = row[2];                               \
        const float *restrict r3 = row[K > 3 ? 3 : 2], *restrict r4 = row[K > 3 ? 4 : 2];                              \
        for (size i = 0; i < length; i++) {                                                                            \
            float m = larger(larger(r0[i], r1[i]), r2[i]);                                                             \
            if (K > 3) m = larger(larger(m, r3[i]), r4[i]);                                                            \
            body[i] = m;                                                                                               \
        }                                                                                                              \
    } while (0)

/* Columns of a group of rows at once: a long loop, whose results between one row's end and the next one's begin
 * are never read. */
#define HORIZONTAL(K, S)                                                                                               \
    for (size j = 0; j < count / S; j++) {                                                                             \
        const float *t = buffer + S * j;                                                                               \
        float m = larger(larger(t[0], t[1]), t[2]);                                                                    \
        if (K > 3) m = larger(larger(m, t[3]), t[4]);                                                                  \
        dense[j] = m;                                                                                                  \
    }

static inline void find_rows(const pool_job *job, size index, const float *row[5]) {
    const size length = job->s.width * job->s.unit, top = index % job->s.rows * job->s.stride - job->s.padding;
    const float *map = job->in + index / job->s.rows * job->s.height * length;
    for (size k = 0; k < job->s.kernel; k++) { /* for a row outside one inside the window: the same maximum */
        const size at = top + k < 0 ? 0 : top + k >= job->s.height ? job->s.height - 1 : top + k;
        row[k] = map + at * length;
    }
}

FOR_EVERY_CPU
static void pool_contiguous(const pool_job *job, float *restrict buffer, size first, size last) {
    const size pitch = job->pitch, padding = job->s.padding, width = job->s.width, count = (last - first) * pitch;
    float *restrict dense = buffer + POOL_GROUP * pitch + SLACK;
    for (size index = first; index < last; index++) {
        const float *row[5];
        find_rows(job, index, row);
        float *restrict line = buffer + (index - first) * pitch, *restrict body = line + padding;
        /* whole vectors, which may read into the next row but not past the last map's end */
        const size whole = (width + VECTOR - 1) / VECTOR * VECTOR;
        const size length = job->end - row[job->s.kernel - 1] >= whole ? whole : width;
        if (job->s.kernel == 3) VERTICAL(3); else VERTICAL(5);
        for (size i = 0; i < padding; i++) line[i] = body[width + i] = -INFINITY;
    }
    if (job->s.kernel == 3 && job->s.stride == 2) { HORIZONTAL(3, 2) }
    else if (job->s.kernel == 3) { HORIZONTAL(3, 1) }
    else if (job->s.stride == 2) { HORIZONTAL(5, 2) }
    else { HORIZONTAL(5, 1) }
    for (size index = first; index < last; index++) {
        const float *restrict from = dense + (index - first) * (pitch / job->s.stride);
        float *restrict out = job->out + index * job->s.columns;
        for (size j = 0; j < job->s.columns; j++) out[j] = from[j];
    }
}

FOR_EVERY_CPU
static void pool_channels_last(const pool_job *job, float *restrict buffer, size first, size last) {
    const size unit = job->s.unit, length = job->s.width * unit;
    float *restrict body = buffer + job->s.padding * unit;
    for (size index = first; index < last; index++) {
        const float *row[5];
        find_rows(job, index, row);
        if (job->s.kernel == 3) VERTICAL(3); else VERTICAL(5);
        /* windows of stride 1 lie side by side: the row is one of them, of more values */
        const size windows = job->s.stride == 1 ? 1 : job->s.columns, each = job->s.columns * unit / windows;
        for (size j = 0; j < windows; j++) {
            const float *restrict t = buffer + job->s.stride * j * unit;
            float *restrict out = job->out + (index * job->s.columns + j) * unit;
            if (job->s.kernel == 3)
                for (size c = 0; c < each; c++) out[c] = larger(larger(t[c], t[c + unit]), t[c + 2 * unit]);
            else
                for (size c = 0; c < each; c++)
                    out[c] = larger(larger(larger(larger(t[c], t[c + unit]), t[c + 2 * unit]), t[c + 3 * unit]),
                                    t[c + 4 * unit]);
        }
    }
}

size pool_pitch(size width, size padding) {
    return (width + 2 * padding + VECTOR - 1) / VECTOR * VECTOR + VECTOR;
}

size pool_floats(size width, size padding, size unit) {
    const size contiguous = 2 * (POOL_GROUP * pool_pitch(width, padding) + SLACK);
    return unit == 1 ? contiguous : (width + 2 * padding) * unit;
}

void pool_edges(float *buffer, size floats, size padding, size unit) {
    for (size i = 0; unit > 1 && i < padding * unit; i++) buffer[i] = buffer[floats - 1 - i] = -INFINITY;
}

void pool_group(const pool_job *job, float *buffer, size first, size last) {
    if (job->s.unit == 1) pool_contiguous(job, buffer, first, last);
    else pool_channels_last(job, buffer, first, last);
}

static int pool(const pool_job *job, int threads) {
    const size total = job->s.planes * job->s.rows, floats = pool_floats(job->s.width, job->s.padding, job->s.unit);
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
#endif
    {
        float *buffer = calloc((size_t)floats, sizeof(float));
        if (buffer == NULL) failed = 1;
        else pool_edges(buffer, floats, job->s.padding, job->s.unit);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (size first = 0; first < total; first += POOL_GROUP) {
            const size last = first + POOL_GROUP < total ? first + POOL_GROUP : total;
            if (buffer != NULL) pool_group(job, buffer, first, last);
        }
        free(buffer);
    }
    return failed;
}

int complete(shape *s) {
    if ((s->kernel != 3 && s->kernel != 5) || (s->stride != 1 && s->stride != 2) || s->padding < 0 ||
        2 * s->padding >= s->kernel || s->height < s->kernel || s->width < s->kernel || s->planes < 1 || s->unit < 1)
        return 0;
    s->rows = (s->height + 2 * s->padding - s->kernel) / s->stride + 1;
    s->columns = (s->width + 2 * s->padding - s->kernel) / s->stride + 1;
    return 1;
}

PyObject *refused(void) {
    PyErr_SetString(PyExc_ValueError, "windows of 3 or 5 pixels, stride 1 or 2, padding below half a window, inside the map");
    return NULL;
}

static PyObject *max_pool(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long in, out;
    int threads, failed;
    pool_job job;
    if (!PyArg_ParseTuple(args, "KKnnnnnnni", &in, &out, &job.s.planes, &job.s.height, &job.s.width, &job.s.unit,
                          &job.s.kernel, &job.s.stride, &job.s.padding, &threads))
        return NULL;
    if (in == 0 || out == 0) {
        PyErr_SetString(PyExc_ValueError, "a map without memory");
        return NULL;
    }
    if (!complete(&job.s)) return refused();
    job.in = (const float *)(uintptr_t)in;
    job.out = (float *)(uintptr_t)out;
    job.pitch = pool_pitch(job.s.width, job.s.padding);
    job.end = job.in + job.s.planes * job.s.height * job.s.width * job.s.unit;
    Py_BEGIN_ALLOW_THREADS
    failed = pool(&job, threads);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"max_pool", max_pool, METH_VARARGS,
     "max_pool(in, out, planes, height, width, unit, kernel, stride, padding, threads): addresses of float32 maps."},
    {"max_pool_taps", max_pool_taps, METH_VARARGS,
     "max_pool_taps(in, out, taps, planes, ...): the same, and the tap of each maximum, one byte."},
    {"max_pool_backward", max_pool_backward, METH_VARARGS,
     "max_pool_backward(grad, taps, out, planes, ...): the gradient of the input, of the sizes that it had."},
    {"onepass", onepass, METH_VARARGS,
     "onepass(table, kinds, watch, map, modules, stride, pool, pool_padding, merge, joined, leads, mixed, extra, threads):\n"
     "the result, or both; None where it cannot be done here, False where the modules are not what was read any more."},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "padfree._maxpool", NULL, 0, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__maxpool(void) { return make_names() ? NULL : PyModule_Create(&module); }
