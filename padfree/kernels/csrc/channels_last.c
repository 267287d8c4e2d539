/* The depthwise pass of channels_last maps, a row of the result at a time, and of small maps of either layout, sixteen
 * channels at a time.
 */
#include "pass.h"

/* Sixteen channels at a time, so that their weights stay at hand from one column to the next. Windows of stride 1 lie
 * side by side: a few pixels of less channels are worked on as one. */
INLINE size side_by_side(const pass *p) { return p->stride > 1 || p->channels >= VECTOR ? 1 : VECTOR / p->channels; }

/* Hidden from the compiler, which would else keep a pointer for each of the window's pixels, more than it has registers. */
#ifdef __GNUC__
INLINE size hidden(size at) {
    __asm__("" : "+r"(at));
    return at;
}
#else
INLINE size hidden(size at) { return at; }
#endif

#define AT(a, b) rows[a][here + i + (b)*channels]
#define W(t) w[(t)*VECTOR + i]
#define LOOP(K, SHARED)                                                                                                \
    for (size at = from, to = from; to < all; at += hop, to += step) {                                                 \
        const size here = hidden(at);                                                                                  \
        float *restrict sum = sums + to, *restrict most = maxima + to;                                                 \
        if (all - to >= wide && wide == VECTOR) VECTORISED for (size i = 0; i < VECTOR; i++) TAPS(K, SHARED);          \
        else for (size i = 0; i < (all - to < wide ? all - to : wide); i++) TAPS(K, SHARED);                           \
    }
INLINE void taps_last(const pass *p, const float *const rows[5], size columns, float *restrict sums,
                      float *restrict maxima) {
    const size channels = p->channels, all = columns * channels;
    const size step = side_by_side(p) * channels, hop = p->stride * step;
    for (size block = 0; block * VECTOR < channels; block++) {
        const float *restrict w = p->taps + block * VECTOR * p->kernel * p->kernel;
        const size from = first_channel(p, block), wide = step < VECTOR ? step : VECTOR;
        EACH_KIND(LOOP);
    }
}
#undef AT
#undef W
#undef LOOP

/* Calls with a `length` of sixteen channels, which the compiler then knows, or of as many as there are. */
#define SIXTEEN_OR_LESS(CALL)                                                                                          \
    do {                                                                                                               \
        if (p->channels >= VECTOR) {                                                                                   \
            const size length = VECTOR;                                                                                \
            CALL;                                                                                                      \
        } else {                                                                                                       \
            const size length = p->channels;                                                                           \
            CALL;                                                                                                      \
        }                                                                                                              \
    } while (0)

INLINE void finish_block(const pass *p, size from, size length, const float *restrict sum, const float *restrict most,
                         float *restrict to) {
    const float *restrict scale = p->own.scale + from, *restrict shift = p->own.shift + from;
    const size pieces = p->columns, step = p->channels, pitch = p->out_channels;
    const int before_scale = p->merge == BEFORE_SCALE;
    FINISH_EACH(&p->own, scale[i], shift[i]);
}

INLINE void copy_block(const pass *p, size length, const float *restrict from, float *restrict to) {
    for (size j = 0; j < p->columns; j++, from += p->channels, to += p->out_channels)
        for (size i = 0; i < length; i++) to[i] = from[i];
}

INLINE void finish_last(const pass *p, const scratch *mine, float *out, float *pooled) {
    const float *most = p->merge == BESIDE ? NULL : mine->maxima;
    for (size block = 0; block * VECTOR < p->channels; block++) {
        const size from = first_channel(p, block);
        const float *own = most == NULL ? NULL : most + from;
        SIXTEEN_OR_LESS(finish_block(p, from, length, mine->sums + from, own, out + from));
        if (pooled != NULL) SIXTEEN_OR_LESS(copy_block(p, length, mine->maxima + from, pooled + from));
    }
}

/* One window that reaches over the left or right side: the taps that lie inside. */
INLINE void edge_block(const pass *p, const float *const row[5], const scratch *mine, size j, size block, size length) {
    const size channels = p->channels, left = j * p->stride - p->padding, from = first_channel(p, block);
    const size first = left < 0 ? -left : 0, last = left + p->kernel > p->width ? p->width - left : p->kernel;
    const size frame = p->shared == INNER ? (p->kernel - 3) / 2 : 0; /* of the convolution's window around the pool's */
    const float *restrict w = p->taps + block * VECTOR * p->kernel * p->kernel;
    float sum[VECTOR] = {0}, most[VECTOR];
    for (size i = 0; i < length; i++) most[i] = -INFINITY;
    for (size a = 0; a < p->kernel; a++)
        for (size b = first; b < last; b++) {
            const float *restrict at = row[a] + (left + b) * channels + from, *restrict tap = w + (a * p->kernel + b) * VECTOR;
            const int pooled = a >= frame && a < p->kernel - frame && b >= frame && b < p->kernel - frame;
            VECTORISED for (size i = 0; i < length; i++) sum[i] += at[i] * tap[i];
            if (pooled) VECTORISED for (size i = 0; i < length; i++) most[i] = above(at[i], most[i]);
        }
    for (size i = 0; i < length; i++) {
        mine->sums[j * channels + from + i] = sum[i];
        mine->maxima[j * channels + from + i] = most[i];
    }
}

INLINE void edge_last(const pass *p, const float *const row[5], const scratch *mine, size j) {
    for (size block = 0; block * VECTOR < p->channels; block++)
        SIXTEEN_OR_LESS(edge_block(p, row, mine, j, block, length));
}

/* Row `index` of the convolution of `map` and of the pool of `other`, which is the same but for its frame. */
INLINE void row_last(const pass *p, const float *map, const float *other, scratch *mine, size index, float *out,
                     float *pooled) {
    const size channels = p->channels, top = index * p->stride - p->padding;
    const int outside = top < 0 || top + p->kernel > p->height;
    const float *row[5], *shifted[5];
    for (size a = 0; a < p->kernel; a++) {
        const size y = top + a;
        row[a] = y < 0 || y >= p->height ? mine->lines : map + y * p->width * channels;
    }
    const size first = (p->padding + p->stride - 1) / p->stride;
    size last = (p->width + p->padding - p->kernel) / p->stride + 1; /* columns first ... last lie inside */
    if (last < first) last = first;
    for (size a = 0; a < p->kernel; a++) shifted[a] = row[a] + (first * p->stride - p->padding) * channels;
    for (size j = 0; j < first; j++) edge_last(p, row, mine, j);
    taps_last(p, shifted, last - first, mine->sums + first * channels, mine->maxima + first * channels);
    for (size j = last; j < p->columns; j++) edge_last(p, row, mine, j);
    if (p->pool && (!p->shared || (outside && p->pool_padding) || (pooled && clouded(mine->sums, p->columns * channels))))
        pool_rows(p, other, channels, mine->pool, mine->maxima, index, index + 1);
    finish_last(p, mine, out, pooled);
}

FOR_EVERY_CPU
void rows_last(const pass *p, scratch *mine, size n, size first, size last, float *out, float *pooled) {
    const float *map = p->in + n * p->height * p->width * p->channels;
    if (p->leads) map = lead_rows(p, mine, map, first, last);
    for (size index = first; index < last; index++) {
        const size at = (index - first) * p->columns * p->out_channels;
        row_last(p, map, map, mine, index, out + at, pooled == NULL ? NULL : pooled + at);
    }
}

/* -- small maps: sixteen channels, set into a frame of zeros -------------------------------------------------------- */

INLINE void set_in(const pass *p, const float *restrict from, float *restrict to) {
    const size channels = p->channels, width = p->width, wide = width + 2 * p->padding;
    to += (p->padding * wide + p->padding) * VECTOR;
    for (size y = 0; y < p->height; y++)
        for (size x = 0; x < width; x++)
            for (size i = 0; i < VECTOR; i++) to[(y * wide + x) * VECTOR + i] = from[(y * width + x) * channels + i];
}

FOR_EVERY_CPU
void block(const pass *p, scratch *mine, size n, size index, float *out, float *pooled, size pitch) {
    const size from = first_channel(p, index), pixels = p->rows * p->columns, wide = p->width + 2 * p->padding;
    const size planes = p->channels < VECTOR ? p->channels : VECTOR;
    const size begin = p->last ? n * p->height * p->width * p->channels + from : (n * p->channels + from) * p->height * p->width;
    const float *map = mine->block + (p->padding * wide + p->padding) * VECTOR; /* for a pool without padding */
    pass q = *p;
    q.channels = VECTOR;
    q.out_channels = pitch ? VECTOR : p->out_channels;
    q.height = p->height + 2 * p->padding;
    q.width = wide;
    q.padding = q.pool_padding = 0;
    q.taps = p->taps + index * VECTOR * p->kernel * p->kernel;
    q.own.scale = p->own.scale + from;
    q.own.shift = p->own.shift + from;
    float *const result = pitch ? mine->result : out, *const maxima = pitch && pooled != NULL ? mine->pooled : pooled;
    if (p->last) set_in(p, p->in + begin, mine->block);
    else turn(p->in + begin, planes, p->height * p->width, mine->places, mine->block);
    if (p->leads) lead_block(p, mine);
    if (p->pool_padding) { /* the maxima of a frame of -inf */
        map = mine->framed;
        for (size y = p->padding; y < p->padding + p->height; y++)
            memcpy(mine->framed + (y * wide + p->padding) * VECTOR, mine->block + (y * wide + p->padding) * VECTOR,
                   (size_t)(p->width * VECTOR) * sizeof(float));
    }
    for (size row = 0; row < p->rows; row++) {
        const size to = row * p->columns * q.out_channels;
        row_last(&q, mine->block, map, mine, row, result + to, maxima == NULL ? NULL : maxima + to);
    }
    if (pitch == 0) return;
    turn_back(mine->result, planes, pixels, out, pitch);
    if (pooled != NULL) turn_back(mine->pooled, planes, pixels, pooled, pitch);
}
