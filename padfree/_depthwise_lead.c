/* The norm and activation ahead of a depthwise pass: done to the part of the input that is worked on, while it lies in the
 * first caches.
 */
#include "_depthwise.h"

enum { SLACK = 4 * VECTOR }; /* whole vectors may be read past the last row */

/* Rows of the input that rows first ... last of the result are made of: from the first of them to behind the last. */
static size first_row(const pass *p, size first) {
    const size padding = p->padding > p->pool_padding ? p->padding : p->pool_padding, top = first * p->stride - padding;
    return top < 0 ? 0 : top;
}

static size behind_last_row(const pass *p, size last) {
    const size below = p->kernel - p->padding, pooled = p->pool - p->pool_padding;
    const size end = (last - 1) * p->stride + (below > pooled ? below : pooled);
    return end < p->height ? end : p->height;
}

size lead_floats(const pass *p, size rows) {
    const size window = p->kernel > p->pool ? p->kernel : p->pool;
    return ((rows - 1) * p->stride + window) * p->width * (p->last ? p->channels : 1) + SLACK;
}

FOR_EVERY_CPU
static void to_plane(const pass *p, size c, const float *sum, float *to, size length) {
    const float scale = p->lead.scale[c], shift = p->lead.shift[c], *most = NULL;
    const size pieces = 1, pitch = 0, step = 0;
    const int before_norm = 0;
    FINISH_EACH(&p->lead, scale, shift, 0.0f);
}

FOR_EVERY_CPU
static void to_pixels(const pass *p, size from, const float *sum, float *to, size pieces, size step, size pitch, size length) {
    const float *restrict scale = p->lead.scale + from, *restrict shift = p->lead.shift + from, *most = NULL;
    const int before_norm = 0;
    if (length == VECTOR) {
        const size length = VECTOR;
        FINISH_EACH(&p->lead, scale[i], shift[i], 0.0f);
    } else FINISH_EACH(&p->lead, scale[i], shift[i], 0.0f);
}

const float *lead_plane(const pass *p, scratch *mine, size c, const float *from, size first, size last) {
    const size top = first_row(p, first), length = (behind_last_row(p, last) - top) * p->width;
    to_plane(p, c, from + top * p->width, mine->led, length);
    return mine->led - top * p->width;
}

const float *lead_last(const pass *p, scratch *mine, const float *map, size first, size last) {
    const size row = p->width * p->channels, top = first_row(p, first);
    const size pixels = (behind_last_row(p, last) - top) * p->width;
    const size wide = p->channels < VECTOR ? p->channels : VECTOR;
    for (size block = 0; block * VECTOR < p->channels; block++) {
        const size from = first_channel(p, block);
        to_pixels(p, from, map + top * row + from, mine->led + from, pixels, p->channels, p->channels, wide);
    }
    return mine->led - top * row;
}

void lead_block(const pass *p, scratch *mine, size from) {
    const size wide = (p->width + 2 * p->padding) * VECTOR;
    for (size y = p->padding; y < p->padding + p->height; y++) {
        float *row = mine->block + y * wide + p->padding * VECTOR;
        to_pixels(p, from, row, row, p->width, VECTOR, VECTOR, VECTOR);
    }
}
