/* What the two halves of the extension share: the shape of a pool, and how torch compares. */
#ifndef PADFREE_MAXPOOL_H
#define PADFREE_MAXPOOL_H
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif

typedef Py_ssize_t size;
typedef struct { /* lengths in elements; rows and columns are those of the result */
    size planes, height, width, unit, kernel, stride, padding, rows, columns;
} shape;

enum { POOL_GROUP = 16 }; /* rows of the result that one call makes */
typedef struct {
    shape s;
    const float *in, *end;
    float *out;
    size pitch;
} pool_job;

/* Whether `b`, which comes later in a window, takes the place of `a`: a larger one does, and so does NaN. */
static inline int takes(float b, float a) { return (b > a) | (b != b); }

int complete(shape *shape); /* fills rows and columns; 0 where the window is not one of ours, or larger than the map */
PyObject *refused(void);    /* NULL, with an exception that says so */
size pool_pitch(size width, size padding);
size pool_floats(size width, size padding, size unit);                     /* of a thread's buffer, zero at first, */
void pool_edges(float *buffer, size floats, size padding, size unit);      /* whose edges this makes, */
void pool_group(const pool_job *job, float *buffer, size first, size last); /* for rows of the result */
int make_names(void); /* nonzero with an exception where it failed */
PyObject *onepass(PyObject *self, PyObject *args);
PyObject *max_pool_taps(PyObject *self, PyObject *args);
PyObject *max_pool_backward(PyObject *self, PyObject *args);

#endif
