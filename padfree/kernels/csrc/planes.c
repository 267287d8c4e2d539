/* The depthwise pass of contiguous maps, a band of rows of one plane at a time, while its input lies in the first caches. */
#include "pass.h"

/* Stride 2: columns and rows of even and odd number lie apart, so that a window's taps lie side by side. */
#define AT(a, b) lines[(((a)&1) * 2 + ((b)&1)) * phase + i + ((a) >> 1) * pitch + ((b) >> 1)]
#define W(t) w[t]
#define LOOP(K, SHARED) VECTORISED for (size i = 0; i < length; i++) TAPS(K, SHARED);
INLINE void taps_strided(const pass *p, const float *restrict w, const float *restrict lines, size phase, size pitch,
                         size length, float *restrict sum, float *restrict most) {
    EACH_KIND(LOOP);
}
#undef AT
#define AT(a, b) lines[i + (a)*pitch + (b)]
INLINE void taps_dense(const pass *p, const float *restrict w, const float *restrict lines, size pitch, size length,
                       float *restrict sum, float *restrict most) {
    EACH_KIND(LOOP);
}
#undef AT
#undef W
#undef LOOP

INLINE void finish_plane(const pass *p, size c, const float *restrict sum, const float *restrict most,
                         float *restrict to, size length) {
    const float scale = p->own.scale[c], shift = p->own.shift[c];
    const size pieces = 1, pitch = 0, step = 0;
    const int before_scale = p->merge == BEFORE_SCALE;
    FINISH_EACH(&p->own, scale, shift);
}

/* Columns of even and odd number. Whole vectors, where they fit, write past the line's end. */
INLINE void part(const float *restrict from, const float *end, float *restrict even, float *restrict odd, size width) {
    const size vectors = (width / 2 + VECTOR) / VECTOR;
    if (end - from >= 2 * VECTOR * vectors)
        for (size j = 0; j < VECTOR * vectors; j++) {
            even[j] = from[2 * j];
            odd[j] = from[2 * j + 1];
        }
    else
        for (size j = 0; j < width; j++) (j % 2 ? odd : even)[j / 2] = from[j];
}

/* Lines of the map between columns of zeros, in order: what one writes past its end belongs to a later one. */
INLINE void fill(const pass *p, const float *from, const float *end, float *lines, size phase, size first, size count) {
    const size pitch = line_pitch(p), padding = p->padding, width = p->width, bytes = pitch * (size)sizeof(float);
    for (size r = 0; r < count; r++) {
        const size y = first * p->stride + r - padding;
        const float *source = from + y * width;
        const int inside = y >= 0 && y < p->height;
        if (p->stride == 1) {
            float *line = lines + r * pitch;
            if (inside) memcpy(line + padding, source, (size_t)width * sizeof(float));
            else memset(line, 0, (size_t)bytes);
            continue;
        }
        float *const even = lines + (r & 1) * 2 * phase + (r >> 1) * pitch, *const sides[2] = {even, even + phase};
        if (inside) {
            part(source, end, sides[padding & 1] + padding / 2, sides[~padding & 1] + (padding + 1) / 2, width);
            for (size j = 0; j < padding; j++) {
                sides[j & 1][j >> 1] = 0;
                sides[(width + padding + j) & 1][(width + padding + j) >> 1] = 0;
            }
        } else {
            memset(sides[0], 0, (size_t)bytes);
            memset(sides[1], 0, (size_t)bytes);
        }
    }
}

/* Rows of `columns`, out of lines of `pitch`; whole vectors as long as they stay inside. */
INLINE void gather(const float *restrict from, size pitch, float *restrict to, size columns, size rows) {
    for (size r = 0; r < rows; r++, from += pitch, to += columns) {
        if (columns <= VECTOR && (rows - r) * columns >= VECTOR)
            for (size i = 0; i < VECTOR; i++) to[i] = from[i];
        else
            for (size i = 0; i < columns; i++) to[i] = from[i];
    }
}

FOR_EVERY_CPU
void band(const pass *p, scratch *mine, size plane, size rows, size first, size last, float *out, float *pooled) {
    const size c = plane % p->channels, pitch = line_pitch(p), phase = phase_floats(p, rows);
    const size columns = p->columns, length = ((last - first - 1) * pitch + columns + VECTOR - 1) / VECTOR * VECTOR;
    const float *from = p->in + plane * p->height * p->width, *end = p->in + p->count * p->channels * p->height * p->width;
    const float *weight = p->weight + c * p->kernel * p->kernel;
    if (p->leads) {
        from = lead_rows(p, mine, from, first, last);
        end = mine->led + lead_floats(p, rows);
    }
    fill(p, from, end, mine->lines, phase, first, (last - first - 1) * p->stride + p->kernel);
    if (p->stride == 2) taps_strided(p, weight, mine->lines, phase, pitch, length, mine->sums, mine->maxima);
    else taps_dense(p, weight, mine->lines, pitch, length, mine->sums, mine->maxima);
    if (pooled != NULL && p->shared && !clouded(mine->sums, length))
        gather(mine->maxima, pitch, pooled, columns, last - first);
    else if (pooled != NULL) pool_rows(p, from, 1, mine->pool, pooled, first, last);
    else if (p->pool && !p->shared) {
        pool_rows(p, from, 1, mine->pool, mine->own, first, last);
        for (size r = 0; r < last - first; r++)
            memcpy(mine->maxima + r * pitch, mine->own + r * columns, (size_t)columns * sizeof(float));
    }
    finish_plane(p, c, mine->sums, p->merge == BESIDE ? NULL : mine->maxima, mine->done, length);
    gather(mine->done, pitch, out, columns, last - first);
}
