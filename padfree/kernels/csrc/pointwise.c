/* The 1x1 convolution of a depthwise pass's results, while they lie in the caches, its activation, and what is added. */
#include "pass.h"

#if VECTORS
enum { MATRIX = 8 * VECTOR }; /* floats of a piece of the result: 4 rows of two vectors, or 8 of one */

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#endif

/* `sums` = a b: R rows of `depth` floats, of which those past the last are the last, by `depth` rows of V vectors. */
#define PRODUCT(NAME, R, V)                                                                                            \
    INLINE void NAME(const float *a, size row, size rows, const float *b, size pitch, size depth, float *sums) {       \
        const float *at[R];                                                                                            \
        vec s[R][V];                                                                                                   \
        UNROLLED for (int r = 0; r < R; r++) {                                                                         \
            at[r] = a + at_most(r, rows - 1) * row;                                                                     \
            UNROLLED for (int v = 0; v < V; v++) s[r][v] = (vec){0};                                                   \
        }                                                                                                              \
        for (size k = 0; k < depth; k++, b += pitch) {                                                                 \
            vec x[V];                                                                                                  \
            UNROLLED for (int v = 0; v < V; v++) x[v] = *(const vec *)(b + v * VECTOR);                                \
            UNROLLED for (int r = 0; r < R; r++)                                                                       \
                UNROLLED for (int v = 0; v < V; v++) s[r][v] += at[r][k] * x[v];                                       \
        }                                                                                                              \
        UNROLLED for (int r = 0; r < R; r++)                                                                           \
            UNROLLED for (int v = 0; v < V; v++) *(vec *)(sums + (r * V + v) * VECTOR) = s[r][v];                      \
    }
PRODUCT(product_narrow, 8, 1)
PRODUCT(product_wide, 4, 2)

typedef struct { /* a piece of the result, and of what it is made of */
    size rows, columns, wide;
    float sums[MATRIX], extra[MATRIX], done[MATRIX];
} piece;

INLINE void multiply(piece *q, const float *a, size row, size rows, const float *b, size pitch, size columns, size depth) {
    const int narrow = columns <= VECTOR;
    q->wide = narrow ? VECTOR : 2 * VECTOR;
    q->rows = at_most(rows, MATRIX / q->wide);
    q->columns = at_most(columns, q->wide);
    if (narrow) product_narrow(a, row, q->rows, b, pitch, depth, q->sums);
    else product_wide(a, row, q->rows, b, pitch, depth, q->sums);
}

INLINE void copy_floats(float *restrict to, const float *restrict from, size count) {
    if (count == 2 * VECTOR) memcpy(to, from, 2 * VECTOR * sizeof(float));
    else for (size i = 0; i < count; i++) to[i] = from[i];
}

/* What is added to the piece; its rows are `apart`. */
INLINE const float *gathered(piece *q, const float *from, size apart) {
    for (size r = 0; r < q->rows; r++) copy_floats(q->extra + r * q->wide, from + r * apart, q->columns);
    return q->extra;
}

/* Rows of a piece are outputs, its columns pixels. */
INLINE void finish_outputs(const pass *p, piece *q, size o, const float *extra) {
    const size pieces = 1, pitch = 0, step = 0, length = VECTOR;
    const int before_scale = 0;
    for (size at = 0; at < q->rows * q->wide; at += VECTOR) {
        const size c = o + at / q->wide;
        const float scale = p->mixed.scale[c], shift = p->mixed.shift[c];
        const float *restrict sum = q->sums + at, *restrict most = extra == NULL ? NULL : extra + at;
        float *restrict to = q->done + at;
        FINISH_EACH(&p->mixed, scale, shift);
    }
}

/* Rows of a piece are pixels, its columns outputs. */
INLINE void finish_pixels(const pass *p, piece *q, size o, const float *extra) {
    const size pieces = q->rows, pitch = q->wide, step = pitch, length = VECTOR;
    const int before_scale = 0;
    for (size at = 0; at < q->wide; at += VECTOR) {
        const float *restrict scale = p->mixed.scale + o + at, *restrict shift = p->mixed.shift + o + at;
        const float *restrict sum = q->sums + at;
        const float *restrict most = extra == NULL ? NULL : extra + at;
        float *restrict to = q->done + at;
        FINISH_EACH(&p->mixed, scale[i], shift[i]);
    }
}

/* A stretch of one map's pixels, of those that columns t, t + 1, ... of a piece are: how many, in which map, and where. */
typedef struct {
    size count, map, at;
} stretch;

INLINE stretch next(size t, size left, size each) {
    const stretch s = {at_most(left, each - t % each), t / each, t % each};
    return s;
}

/* `each` pixels, from row `first` on, of `maps` maps from n on. */
INLINE void mix_planes(const pass *p, const float *tile, size n, size maps, size first, size each, size pitch) {
    const size area = p->rows * p->columns, before = first * p->columns, pixels = maps * each;
    piece q;
    for (size t = 0; t < pixels; t += q.wide)
        for (size o = 0; o < p->outputs; o += q.rows) {
            const float *extra = NULL;
            multiply(&q, p->mix + o * p->inputs, p->inputs, p->outputs - o, tile + t, pitch, pixels - t, p->inputs);
            if (p->extra == MAXIMA) extra = gathered(&q, tile + (p->channels + o) * pitch + t, pitch);
            else if (p->extra == INPUT)
                for (size i = 0; i < q.columns; i += next(t + i, q.columns - i, each).count) {
                    const stretch s = next(t + i, q.columns - i, each);
                    extra = q.extra;
                    for (size r = 0; r < q.rows; r++)
                        copy_floats(q.extra + r * q.wide + i,
                                    p->in + ((n + s.map) * p->channels + o + r) * area + before + s.at, s.count);
                }
            finish_outputs(p, &q, o, extra);
            if (p->last) { /* whole maps, one after another */
                turn_matrix(q.done, q.wide, q.rows, q.columns, p->out + (n * area + t) * p->outputs + o, p->outputs);
                continue;
            }
            for (size i = 0; i < q.columns; i += next(t + i, q.columns - i, each).count) {
                const stretch s = next(t + i, q.columns - i, each);
                for (size r = 0; r < q.rows; r++)
                    copy_floats(p->out + ((n + s.map) * p->outputs + o + r) * area + before + s.at,
                                q.done + r * q.wide + i, s.count);
            }
        }
}

INLINE void mix_pixels(const pass *p, const float *tile, size n, size first, size pixels) {
    const size begin = (n * p->rows + first) * p->columns;
    piece q;
    for (size o = 0; o < p->outputs; o += q.wide)
        for (size t = 0; t < pixels; t += q.rows) {
            const float *extra = NULL, *from = tile + t * p->inputs, *weights = p->columnwise + o;
            multiply(&q, from, p->inputs, pixels - t, weights, columnwise_pitch(p), p->outputs - o, p->inputs);
            if (p->extra == MAXIMA) extra = gathered(&q, from + p->channels + o, p->inputs);
            if (p->extra == INPUT) extra = gathered(&q, p->in + (begin + t) * p->channels + o, p->channels);
            finish_pixels(p, &q, o, extra);
            for (size r = 0; r < q.rows; r++)
                copy_floats(p->out + (begin + t + r) * p->outputs + o, q.done + r * q.wide, q.columns);
        }
}

FOR_EVERY_CPU
void mix(const pass *p, const scratch *mine, size n, size maps, size first, size last) {
    const size each = (last - first) * p->columns;
    if (p->last && !by_blocks(p)) mix_pixels(p, mine->tile, n, first, each);
    else mix_planes(p, mine->tile, n, maps, first, each, tile_pitch(p, maps * (last - first)));
}
#else
void mix(const pass *p, const scratch *mine, size n, size maps, size first, size last) {
    (void)p, (void)mine, (void)n, (void)maps, (void)first, (void)last; /* not called: `module.c` refuses a 1x1 convolution */
}
#endif
