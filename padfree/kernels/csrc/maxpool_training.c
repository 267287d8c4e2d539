/* Max-pools for training: the maxima with their taps, and the gradient back to where they were found.
 *
 * A tap is a place in a window, row * kernel + column: one byte. The first of equal maxima is taken, and the last NaN,
 * as torch does. A contiguous map is pooled as a channels_last one of LANES planes, a band of rows at a time.
 */
#include "maxpool.h"

enum { LANES = 16, BAND_FLOATS = 1 << 14 /* of the map at a time: 64 KB, which stay in the cache */ };

/* One tap of a window after others: n values beside each other, their best so far and its tap. */
INLINE void try_tap(const float *restrict x, size n, int tap, float *restrict best, int32_t *restrict taps) {
    for (size c = 0; c < n; c++) {
        const int take = takes(x[c], best[c]);
        best[c] = take ? x[c] : best[c];
        taps[c] = take ? tap : taps[c];
    }
}

/* A window of 3x3 that lies inside the map: all taps at once, in registers. */
INLINE void try_nine(const float *restrict x, size line, size n, float *restrict best, int32_t *restrict taps) {
    const float *restrict y = x + line, *restrict z = y + line;
#define TAKE(p, i) { const float v = p; const int take = takes(v, m); m = take ? v : m; tap = take ? i : tap; }
    for (size c = 0; c < n; c++) {
        float m = x[c];
        int32_t tap = 0;
        TAKE(x[c + n], 1) TAKE(x[c + 2 * n], 2)
        TAKE(y[c], 3) TAKE(y[c + n], 4) TAKE(y[c + 2 * n], 5)
        TAKE(z[c], 6) TAKE(z[c + n], 7) TAKE(z[c + 2 * n], 8)
        best[c] = m;
        taps[c] = tap;
    }
}

/* One window, n planes beside each other: `x` is a channels_last map's row `top`, which exists, and those below it. */
INLINE void pool_window(const shape *s, const float *x, size top, size row, size column, size n, float *best,
                        int32_t *taps) {
    const size k = s->kernel, y = row * s->stride - s->padding, left = column * s->stride - s->padding;
    if (k == 3 && y >= 0 && y + 3 <= s->height && left >= 0 && left + 3 <= s->width) {
        try_nine(x + ((y - top) * s->width + left) * n, s->width * n, n, best, taps);
        return;
    }
    int fresh = 1;
    for (size r = y < 0 ? -y : 0; r < k && y + r < s->height; r++)
        for (size t = left < 0 ? -left : 0; t < k && left + t < s->width; t++) {
            const float *from = x + ((y + r - top) * s->width + left + t) * n;
            const int tap = (int)(r * k + t);
            if (!fresh) try_tap(from, n, tap, best, taps);
            else for (size c = 0; c < n; c++) best[c] = from[c], taps[c] = tap;
            fresh = 0;
        }
}

FOR_EVERY_CPU
static void row_channels_last(const shape *s, const float *in, float *out, uint8_t *out_taps, size index,
                              int32_t *taps) {
    const size unit = s->unit;
    const float *map = in + index / s->rows * s->height * s->width * unit;
    for (size j = 0; j < s->columns; j++) {
        const size at = (index * s->columns + j) * unit;
        pool_window(s, map, 0, index % s->rows, j, unit, out + at, taps);
        for (size c = 0; c < unit; c++) out_taps[at + c] = (uint8_t)taps[c];
    }
}

/* LANES planes of a contiguous map, `band` rows of the result at a time; after its end others stand in for them.
 * `unit` is LANES: as a number known here it would keep the compiler from using whole vectors. */
FOR_EVERY_CPU
static void group_contiguous(const shape *s, const float *in, float *out, uint8_t *out_taps, size first, size band,
                             size unit, float *scratch) {
    const size lanes = s->planes - first < LANES ? s->planes - first : LANES;
    const size area = s->height * s->width, out_area = s->rows * s->columns;
    const float *plane[LANES];
    float *best = scratch + ((band - 1) * s->stride + s->kernel) * s->width * unit;
    int32_t *taps = (int32_t *)(best + band * s->columns * unit);
    for (size lane = 0; lane < LANES; lane++) plane[lane] = in + (first + (lane < lanes ? lane : 0)) * area;
    for (size row = 0; row < s->rows; row += band) {
        const size end = row + band < s->rows ? row + band : s->rows, y = row * s->stride - s->padding;
        const size top = y < 0 ? 0 : y, below = (end - 1) * s->stride - s->padding + s->kernel;
        const size begin = top * s->width, length = (below < s->height ? below : s->height) * s->width - begin;
        for (size i = 0; i < length; i++)
            for (size lane = 0; lane < LANES; lane++) scratch[i * LANES + lane] = plane[lane][begin + i];
        const size windows = (end - row) * s->columns;
        for (size w = 0; w < windows; w++)
            pool_window(s, scratch, top, row + w / s->columns, w % s->columns, unit, best + w * unit, taps + w * unit);
        for (size lane = 0; lane < lanes; lane++) {
            float *to = out + (first + lane) * out_area + row * s->columns;
            uint8_t *taps_to = out_taps + (first + lane) * out_area + row * s->columns;
            for (size w = 0; w < windows; w++) to[w] = best[w * LANES + lane];
            for (size w = 0; w < windows; w++) taps_to[w] = (uint8_t)taps[w * LANES + lane];
        }
    }
}

int pool_taps(const shape *s, const float *in, float *out, uint8_t *taps, int threads) {
    const size line = s->width * LANES, held = BAND_FLOATS / line;
    const size band = held > 2 * s->kernel ? (held - s->kernel) / s->stride + 1 : s->kernel; /* rows of the result */
    const size jobs = s->unit == 1 ? (s->planes + LANES - 1) / LANES : s->planes * s->rows;
    const size held_rows = (band - 1) * s->stride + s->kernel, results = band * s->columns * LANES;
    const size floats = s->unit == 1 ? held_rows * line + 2 * results : s->unit;
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
#endif
    {
        void *scratch = malloc((size_t)floats * sizeof(float));
        if (scratch == NULL) failed = 1;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (size job = 0; job < jobs; job++) {
            if (scratch == NULL) continue;
            if (s->unit == 1) group_contiguous(s, in, out, taps, job * LANES, band, LANES, scratch);
            else row_channels_last(s, in, out, taps, job, scratch);
        }
        free(scratch);
    }
    (void)threads;
    return failed;
}

/* The gradient of one image or plane: every window adds to the place its tap names. */
static void scatter(const shape *s, const float *grad, const uint8_t *taps, float *out) {
    const size k = s->kernel, unit = s->unit;
    size step[256] = {0};
    for (size tap = 0; tap < k * k; tap++) step[tap] = (tap / k * s->width + tap % k) * unit;
    memset(out, 0, (size_t)(s->height * s->width * unit) * sizeof(float));
    for (size i = 0; i < s->rows; i++) {
        size corner = ((i * s->stride - s->padding) * s->width - s->padding) * unit;
        for (size j = 0; j < s->columns; j++, corner += s->stride * unit)
            if (unit == 1) out[corner + step[*taps++]] += *grad++;
            else for (size c = 0; c < unit; c++) out[corner + step[*taps++] + c] += *grad++;
    }
}

void pool_backward(const shape *s, const float *grad, const uint8_t *taps, float *out, int threads) {
    const size results = s->rows * s->columns * s->unit, area = s->height * s->width * s->unit;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
    for (size plane = 0; plane < s->planes; plane++)
        scatter(s, grad + plane * results, taps + plane * results, out + plane * area);
    (void)threads;
}
