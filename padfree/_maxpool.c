/* Max-pools of float32 maps in one pass: what torch's elementwise operations need four or more for.
 *
 * A map is planes x height x width x unit floats: unit is 1 for a contiguous (N, C, H, W) map (planes = N*C) and C for a
 * channels_last one (planes = N). The maximum of a window's rows goes into a buffer, each row between `padding` columns
 * of -inf, and the maximum of the window's columns from there into the result. NaN spreads as it does in torch.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif

typedef Py_ssize_t size;
enum { GROUP = 16, VECTOR = 16, SLACK = 32 };
typedef struct { /* one pool; lengths in elements, rows and columns those of the result */
    const float *in;
    float *out;
    size planes, height, width, unit, kernel, stride, padding, rows, columns, pitch;
    const float *end;
} job;

static inline float larger(float a, float b) { return b > a || b != b ? b : a; }

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

static inline void find_rows(const job *job, size index, const float *row[5]) {
    const size length = job->width * job->unit, top = index % job->rows * job->stride - job->padding;
    const float *map = job->in + index / job->rows * job->height * length;
    for (size k = 0; k < job->kernel; k++) { /* a row outside is replaced by one inside the window: the same maximum */
        const size at = top + k < 0 ? 0 : top + k >= job->height ? job->height - 1 : top + k;
        row[k] = map + at * length;
    }
}

FOR_EVERY_CPU
static void pool_contiguous(const job *job, float *restrict buffer, size first, size last) {
    const size pitch = job->pitch, padding = job->padding, width = job->width, count = (last - first) * pitch;
    float *restrict dense = buffer + GROUP * pitch + SLACK;
    for (size index = first; index < last; index++) {
        const float *row[5];
        find_rows(job, index, row);
        float *restrict line = buffer + (index - first) * pitch, *restrict body = line + padding;
        /* whole vectors, which may read into the next row but not past the last map's end */
        const size whole = (width + VECTOR - 1) / VECTOR * VECTOR;
        const size length = job->end - row[job->kernel - 1] >= whole ? whole : width;
        if (job->kernel == 3) VERTICAL(3); else VERTICAL(5);
        for (size i = 0; i < padding; i++) line[i] = body[width + i] = -INFINITY;
    }
    if (job->kernel == 3 && job->stride == 2) { HORIZONTAL(3, 2) }
    else if (job->kernel == 3) { HORIZONTAL(3, 1) }
    else if (job->stride == 2) { HORIZONTAL(5, 2) }
    else { HORIZONTAL(5, 1) }
    for (size index = first; index < last; index++) {
        const float *restrict from = dense + (index - first) * (pitch / job->stride);
        float *restrict out = job->out + index * job->columns;
        for (size j = 0; j < job->columns; j++) out[j] = from[j];
    }
}

FOR_EVERY_CPU
static void pool_channels_last(const job *job, float *restrict buffer, size first, size last) {
    const size unit = job->unit, length = job->width * unit;
    float *restrict body = buffer + job->padding * unit;
    for (size index = first; index < last; index++) {
        const float *row[5];
        find_rows(job, index, row);
        if (job->kernel == 3) VERTICAL(3); else VERTICAL(5);
        for (size j = 0; j < job->columns; j++) {
            const float *restrict t = buffer + job->stride * j * unit;
            float *restrict out = job->out + (index * job->columns + j) * unit;
            if (job->kernel == 3)
                for (size c = 0; c < unit; c++) out[c] = larger(larger(t[c], t[c + unit]), t[c + 2 * unit]);
            else
                for (size c = 0; c < unit; c++)
                    out[c] = larger(larger(larger(larger(t[c], t[c + unit]), t[c + 2 * unit]), t[c + 3 * unit]),
                                    t[c + 4 * unit]);
        }
    }
}

static int pool(const job *job, int threads) {
    const size total = job->planes * job->rows, edge = job->padding * job->unit;
    const size floats = job->unit == 1 ? 2 * (GROUP * job->pitch + SLACK) : (job->width + 2 * job->padding) * job->unit;
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
#endif
    {
        float *buffer = calloc((size_t)floats, sizeof(float));
        if (buffer == NULL) failed = 1;
        else if (job->unit > 1)
            for (size i = 0; i < edge; i++) buffer[i] = buffer[floats - 1 - i] = -INFINITY;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (size first = 0; first < total; first += GROUP) {
            const size last = first + GROUP < total ? first + GROUP : total;
            if (buffer == NULL) continue;
            if (job->unit == 1) pool_contiguous(job, buffer, first, last);
            else pool_channels_last(job, buffer, first, last);
        }
        free(buffer);
    }
    return failed;
}

static PyObject *max_pool(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long in, out;
    int threads, failed;
    job job;
    if (!PyArg_ParseTuple(args, "KKnnnnnnni", &in, &out, &job.planes, &job.height, &job.width, &job.unit,
                          &job.kernel, &job.stride, &job.padding, &threads))
        return NULL;
    if (in == 0 || out == 0) {
        PyErr_SetString(PyExc_ValueError, "a map without memory");
        return NULL;
    }
    if ((job.kernel != 3 && job.kernel != 5) || (job.stride != 1 && job.stride != 2) || job.padding < 0 ||
        2 * job.padding >= job.kernel || job.height < job.kernel || job.width < job.kernel || job.planes < 1 || job.unit < 1) {
        PyErr_SetString(PyExc_ValueError, "windows of 3 or 5 pixels, stride 1 or 2, padding below half a window, inside the map");
        return NULL;
    }
    job.in = (const float *)(uintptr_t)in;
    job.out = (float *)(uintptr_t)out;
    job.rows = (job.height + 2 * job.padding - job.kernel) / job.stride + 1;
    job.columns = (job.width + 2 * job.padding - job.kernel) / job.stride + 1;
    job.pitch = (job.width + 2 * job.padding + VECTOR - 1) / VECTOR * VECTOR + VECTOR;
    job.end = job.in + job.planes * job.height * job.width * job.unit;
    Py_BEGIN_ALLOW_THREADS
    failed = pool(&job, threads);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"max_pool", max_pool, METH_VARARGS,
     "max_pool(in, out, planes, height, width, unit, kernel, stride, padding, threads): addresses of float32 maps."},
    {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "padfree._maxpool", NULL, 0, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__maxpool(void) { return PyModule_Create(&module); }
