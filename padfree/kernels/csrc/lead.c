/* The activation ahead of a depthwise pass: done to the part of the input that is worked on, while it lies in the caches. */
#include "pass.h"

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
static void activate(const pass *p, const float *sum, float *to, size length) {
    const float *most = NULL;
    const size pieces = 1, pitch = 0, step = 0;
    const int before_scale = 0;
    FINISH_EACH(&p->lead, 1.0f, 0.0f);
}

const float *lead_rows(const pass *p, scratch *mine, const float *from, size first, size last) {
    const size row = p->width * (p->last ? p->channels : 1), top = first_row(p, first);
    activate(p, from + top * row, mine->led, (behind_last_row(p, last) - top) * row);
    return mine->led - top * row;
}

void lead_block(const pass *p, scratch *mine) {
    const size wide = (p->width + 2 * p->padding) * VECTOR;
    for (size y = p->padding; y < p->padding + p->height; y++) {
        float *row = mine->block + y * wide + p->padding * VECTOR;
        activate(p, row, row, p->width * VECTOR);
    }
}
