/* What all parts of the extension share: compilers, the shape of a pool, and how torch compares. */
#ifndef PADFREE_MAXPOOL_H
#define PADFREE_MAXPOOL_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif

#ifdef __GNUC__ /* Clang defines it too */
#define INLINE static inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline
#endif

/* Loops whose iterations are independent. */
#if defined(__clang__)
#define VECTORISED _Pragma("clang loop vectorize(enable)")
#elif defined(__GNUC__)
#define VECTORISED _Pragma("omp simd")
#else
#define VECTORISED
#endif

/* Vectors as a type, and their shuffles. Without the first there is no 1x1 convolution here, without the second there are
 * plain loops; -DPLAIN_C leaves out both where a compiler has them. */
#if defined(__GNUC__) && !defined(PLAIN_C)
#define VECTORS 1
#else
#define VECTORS 0
#endif
#if VECTORS && (defined(__clang__) || __GNUC__ >= 12)
#define SHUFFLES 1
#else
#define SHUFFLES 0
#endif

typedef ptrdiff_t size;
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
INLINE int takes(float b, float a) { return (b > a) | (b != b); }

int complete(shape *shape); /* fills rows and columns; 0 where the window is not one of ours, or larger than the map */
size pool_pitch(size width, size padding);
size pool_floats(size width, size padding, size unit);                     /* of a thread's buffer, zero at first, */
void pool_edges(float *buffer, size floats, size padding, size unit);      /* whose edges this makes, */
void pool_group(const pool_job *job, float *buffer, size first, size last); /* for rows of the result */

/* Whole maps; nonzero where memory was wanting. */
int pool(const shape *s, const float *in, float *out, int threads);
int pool_taps(const shape *s, const float *in, float *out, uint8_t *taps, int threads);
void pool_backward(const shape *s, const float *grad, const uint8_t *taps, float *out, int threads);

#endif
