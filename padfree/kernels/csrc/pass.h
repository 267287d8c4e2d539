/* What the parts of the depthwise pass share: its sizes, the taps of a window, and what is done with their sums. */
#ifndef PADFREE_DEPTHWISE_H
#define PADFREE_DEPTHWISE_H
#include "turn.h"

/* As `padfree/kernels/chain.py` counts them: the activations, */
enum { CLAMP, HARDSWISH, SILU, GELU, GELU_TANH, LEAKY };
enum { BESIDE, AFTER_ACTIVATION, BEFORE_SCALE }; /* where the maxima are added (beside: nowhere, a map of their own), */
enum { NO_EXTRA, INPUT, MAXIMA };               /* and the residual that is added after the 1x1 convolution */
enum { NARROW = 16, TALL = 64 };                /* the sides of small maps, pixels */

typedef struct { /* what follows a convolution: its bias, a scale and shift, and an activation */
    int act;
    float low, high;                          /* of a clamp; low: the slope of a leak */
    const float *bias, *own_scale, *own_shift; /* channel by channel; NULL where there is none */
    float *scale, *shift;                     /* all of them in two, and room for whole vectors */
} ending;

typedef struct {
    size count, channels, height, width, kernel, stride, padding, pool, pool_padding, rows, columns;
    size out_channels;              /* of the map that `out` and `pooled` lie in: more than `channels` in a concatenation */
    size inputs, outputs;           /* of the 1x1 convolution of the result; 0: there is none */
    int last, shared, merge, extra; /* last: channels_last; shared: the maxima of the convolution's own reads */
    int leads, threads;             /* leads: an activation comes before all the others */
    const float *in, *weight, *mix; /* mix: the weights of the 1x1 */
    ending lead, own, mixed;        /* what comes first (no more than an activation); what follows the depthwise, and the 1x1 */
    float *out, *pooled, *taps, *columnwise; /* the weights tap by tap; those of the 1x1 input by input */
} pass;

typedef struct { /* one thread's memory */
    float *lines, *sums, *maxima, *own, *done, *pool, *block, *framed, *result, *pooled, *tile, *led;
    int places[NARROW * TALL];
} scratch;

INLINE float above(float a, float b) { return a > b ? a : b; } /* may lose a NaN, which the sum then has too */
INLINE float spread(float a, float b) { return takes(b, a) ? b : a; } /* keeps it */
INLINE float clamp(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

/* e^v: 2^n times the series of what is left of v, which is at most ln(2) / 2. */
INLINE float exponential(float v) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number, n */
    const float bounded = clamp(v, -87.0f, 89.0f), shifted = bounded * 1.44269504f + magic, n = shifted - magic;
    const float r = bounded - n * 0.693145752f - n * 1.42860677e-6f; /* ln(2) in two parts */
    const float tail = 1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720)));
    uint32_t bits;
    float power; /* half of 2^n: 2^128 is no float */
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 126) << 23;
    memcpy(&power, &bits, sizeof power);
    return (1.0f + r + r * r * (0.5f + r * tail)) * power * 2.0f;
}

/* v times half of 1 + erf(v / sqrt(2)), by Abramowitz and Stegun 7.1.26: erf to 1.5e-7. */
INLINE float gelu(float v) {
    const float x = v * 0.70710678f, far = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * far);
    const float series = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float most = 1.0f - series * exponential(-x * x);
    return v * 0.5f * (1.0f + (x < 0.0f ? -most : most));
}

INLINE float gelu_tanh(float v) { /* half of 1 + tanh(u) is 1 / (1 + e^(-2u)) */
    return v / (1.0f + exponential(-1.59576912f * (v + 0.044715f * v * v * v)));
}

/* AT(a, b): what lies under row a and column b of the window; W(t): the weight of tap t. */
#define TAP(K, a, b, POOLED)                                                                                           \
    do {                                                                                                               \
        const float v = AT(a, b);                                                                                      \
        row += v * W((K) * (a) + (b));                                                                                 \
        if (POOLED) high = above(v, high);                                                                             \
    } while (0)
#define ROW(K, a, SHARED)                                                                                              \
    do {                                                                                                               \
        const int inner = (K) == 3 || ((a) >= 1 && (a) <= 3), all = (SHARED) == ALL, some = (SHARED) != NONE && inner; \
        float row = 0.0f;                                                                                              \
        TAP(K, a, 0, (K) == 3 ? some : all);                                                                           \
        TAP(K, a, 1, all || some);                                                                                     \
        TAP(K, a, 2, all || some);                                                                                     \
        if ((K) == 5) TAP(K, a, 3, all || some);                                                                       \
        if ((K) == 5) TAP(K, a, 4, all);                                                                               \
        total += row;                                                                                                  \
    } while (0)

enum { NONE, INNER, ALL }; /* the maxima of the convolution's own reads: of its inner 3x3, of all of them */
#define TAPS(K, SHARED)                                                                                                \
    do {                                                                                                               \
        float total = 0.0f, high = -INFINITY;                                                                          \
        ROW(K, 0, SHARED);                                                                                             \
        ROW(K, 1, SHARED);                                                                                             \
        ROW(K, 2, SHARED);                                                                                             \
        if ((K) == 5) ROW(K, 3, SHARED);                                                                               \
        if ((K) == 5) ROW(K, 4, SHARED);                                                                               \
        sum[i] = total;                                                                                                \
        if (SHARED != NONE) most[i] = high;                                                                            \
    } while (0)
#define EACH_KIND(LOOP)                                                                                                \
    do {                                                                                                               \
        if (p->kernel == 3 && p->shared) { LOOP(3, ALL) }                                                              \
        else if (p->kernel == 3) { LOOP(3, NONE) }                                                                     \
        else if (p->shared == ALL) { LOOP(5, ALL) }                                                                    \
        else if (p->shared) { LOOP(5, INNER) }                                                                         \
        else { LOOP(5, NONE) }                                                                                         \
    } while (0)

/* Scale, shift, activation; the maxima, where there are any here, before the scale or after the activation. E: what
 * follows the convolution; A and B: its scale and shift of place i of a piece. */
#define EACH(A, B, V, RESULT)                                                                                          \
    for (size j = 0; j < pieces; j++, sum += step, to += pitch, most += most == NULL ? 0 : step)                       \
        VECTORISED for (size i = 0; i < length; i++) {                                                                 \
            const float v = (V)*(A) + (B);                                                                             \
            to[i] = RESULT;                                                                                            \
        }
#define FINISH(A, B, ACTIVATED)                                                                                        \
    do {                                                                                                               \
        if (most == NULL) { EACH(A, B, sum[i], ACTIVATED) }                                                            \
        else if (before_scale) { EACH(A, B, sum[i] + most[i], ACTIVATED) }                                             \
        else { EACH(A, B, sum[i], ACTIVATED + most[i]) }                                                               \
    } while (0)
#define FINISH_EACH(E, A, B)                                                                                           \
    do {                                                                                                               \
        const float low = (E)->low, high = (E)->high;                                                                  \
        if ((E)->act == HARDSWISH) FINISH(A, B, v * clamp(v + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f));                   \
        else if ((E)->act == SILU) FINISH(A, B, v / (1.0f + exponential(-v)));                                      \
        else if ((E)->act == GELU) FINISH(A, B, gelu(v));                                                           \
        else if ((E)->act == GELU_TANH) FINISH(A, B, gelu_tanh(v));                                                 \
        else if ((E)->act == LEAKY) FINISH(A, B, (v > 0.0f ? v : v * low));                                         \
        else FINISH(A, B, clamp(v, low, high));                                                                     \
    } while (0)

INLINE size at_most(size a, size b) { return a < b ? a : b; }
INLINE size whole_vectors(size floats) { return (floats + VECTOR - 1) / VECTOR * VECTOR; }

/* Whether a NaN may be missing among the maxima of the same windows: then it is among the sums. */
INLINE int clouded(const float *restrict sum, size length) {
    int found = 0;
    for (size i = 0; i < length; i++) found |= sum[i] != sum[i];
    return found;
}

/* Maxima of rows first ... last of a map by the pool's own way, row by row of `p->columns * unit` floats. */
INLINE void pool_rows(const pass *p, const float *map, size unit, float *buffer, float *to, size first, size last) {
    pool_job job = {.s = {1, p->height, p->width, unit, p->pool, p->stride, p->pool_padding, p->rows, p->columns},
                    .in = map,
                    .end = map + p->height * p->width * unit,
                    .pitch = pool_pitch(p->width, p->pool_padding)};
    for (; first < last; first += POOL_GROUP) {
        const size stop = first + POOL_GROUP < last ? first + POOL_GROUP : last;
        job.out = to - first * p->columns * unit;
        pool_group(&job, buffer, first, stop);
        to += (stop - first) * p->columns * unit;
    }
}

/* Channels are worked on sixteen at a time; the last sixteen overlap those before. */
INLINE size first_channel(const pass *p, size block) {
    const size last = p->channels - VECTOR;
    return last < 0 ? 0 : block * VECTOR < last ? block * VECTOR : last;
}

/* Whether a map is so small that it is set into a frame, where no window reaches over a side. A 1x1 convolution reads whole
 * maps then, of which there must be one for each thread. */
INLINE int by_blocks(const pass *p) {
    const int one_frame = p->pool_padding == 0 || p->pool == p->kernel, small = p->width <= NARROW && p->height <= TALL;
    const int turned = p->outputs ? p->extra != INPUT : p->padding > 0; /* channels_last: whether it is worth while */
    if (p->outputs && p->count < p->threads) return 0;
    return one_frame && small && (!p->last || (turned && p->channels >= VECTOR));
}

/* Contiguous: the floats of a line of a band. */
INLINE size line_pitch(const pass *p) {
    const size wide = p->width + 2 * p->padding;
    return p->stride == 2 ? (wide + 1) / 2 : wide;
}

/* Floats of a quarter of the lines of `rows` rows of the result, stride 2, or of all of them. */
INLINE size phase_floats(const pass *p, size rows) {
    const size lines = (rows - 1) * p->stride + p->kernel;
    return (p->stride == 2 ? (lines + 1) / 2 : lines) * line_pitch(p) + 4 * VECTOR;
}

int depthwise_fits(pass *p);       /* fills rows, columns and shared; 0 where the windows do not fit, or not together */
int all_finite(const pass *p);     /* what it needs of its weights, where there is padding, and of its scale */
int depthwise(pass *p);            /* nonzero where memory was wanting */
/* The input behind its activation: the part that rows first ... last of a plane or of a map are made of, as if the
 * rest lay around it; and of a block. */
size lead_floats(const pass *p, size rows);
const float *lead_rows(const pass *p, scratch *mine, const float *from, size first, size last);
void lead_block(const pass *p, scratch *mine);
/* Sixteen channels of one small map, to planes that are `pitch` apart or, where it is 0, to channels_last maps. */
void block(const pass *p, scratch *mine, size n, size index, float *out, float *pooled, size pitch);
/* Rows first ... last, of at most `rows`, of a plane, and of all channels of a channels_last map. */
void band(const pass *p, scratch *mine, size plane, size rows, size first, size last, float *out, float *pooled);
void rows_last(const pass *p, scratch *mine, size n, size first, size last, float *out, float *pooled);
/* The 1x1 convolution of the tile, rows first ... last of `maps` maps from n on, to the result. */
size tile_pitch(const pass *p, size rows); /* floats from one input's pixels to the next one's, or pixels */
size columnwise_pitch(const pass *p);      /* floats from one input's weights to the next one's */
void mix(const pass *p, const scratch *mine, size n, size maps, size first, size last);

#endif
