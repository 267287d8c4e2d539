/* Max-pools of float32 maps in one pass: what torch's elementwise operations need four or more for.
 *
 * A map is planes x height x width x unit floats: unit is 1 for a contiguous (N, C, H, W) map (planes = N*C) and C for a
 * channels_last one (planes = N). The maximum of a window's rows goes into a buffer, each row between `padding` columns
 * of -inf, and the maximum of the window's columns from there into the result. NaN spreads as it does in torch.
 */
#include "maxpool.h"

enum { VECTOR = 16, SLACK = 32 };

INLINE float larger(float a, float b) { return takes(b, a) ? b : a; }

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

INLINE void find_rows(const pool_job *job, size index, const float *row[5]) {
    const size length = job->s.width * job->s.unit, top = index % job->s.rows * job->s.stride - job->s.padding;
    const float *map = job->in + index / job->s.rows * job->s.height * length;
    for (size k = 0; k < job->s.kernel; k++) { /* for a row outside one inside the window: the same maximum */
        const size at = top + k < 0 ? 0 : top + k >= job->s.height ? job->s.height - 1 : top + k;
        row[k] = map + at * length;
    }
}

FOR_EVERY_CPU
static void pool_contiguous(const pool_job *job, float *restrict buffer, size first, size last) {
    const size pitch = job->pitch, padding = job->s.padding, width = job->s.width, count = (last - first) * pitch;
    float *restrict dense = buffer + POOL_GROUP * pitch + SLACK;
    for (size index = first; index < last; index++) {
        const float *row[5];
        find_rows(job, index, row);
        float *restrict line = buffer + (index - first) * pitch, *restrict body = line + padding;
        /* whole vectors, which may read into the next row but not past the last map's end */
        const size whole = (width + VECTOR - 1) / VECTOR * VECTOR;
        const size length = job->end - row[job->s.kernel - 1] >= whole ? whole : width;
        if (job->s.kernel == 3) VERTICAL(3); else VERTICAL(5);
        for (size i = 0; i < padding; i++) line[i] = body[width + i] = -INFINITY;
    }
    if (job->s.kernel == 3 && job->s.stride == 2) { HORIZONTAL(3, 2) }
    else if (job->s.kernel == 3) { HORIZONTAL(3, 1) }
    else if (job->s.stride == 2) { HORIZONTAL(5, 2) }
    else { HORIZONTAL(5, 1) }
    for (size index = first; index < last; index++) {
        const float *restrict from = dense + (index - first) * (pitch / job->s.stride);
        float *restrict out = job->out + index * job->s.columns;
        for (size j = 0; j < job->s.columns; j++) out[j] = from[j];
    }
}

FOR_EVERY_CPU
static void pool_channels_last(const pool_job *job, float *restrict buffer, size first, size last) {
    const size unit = job->s.unit, length = job->s.width * unit;
    float *restrict body = buffer + job->s.padding * unit;
    for (size index = first; index < last; index++) {
        const float *row[5];
        find_rows(job, index, row);
        if (job->s.kernel == 3) VERTICAL(3); else VERTICAL(5);
        /* windows of stride 1 lie side by side: the row is one of them, of more values */
        const size windows = job->s.stride == 1 ? 1 : job->s.columns, each = job->s.columns * unit / windows;
        for (size j = 0; j < windows; j++) {
            const float *restrict t = buffer + job->s.stride * j * unit;
            float *restrict out = job->out + (index * job->s.columns + j) * unit;
            if (job->s.kernel == 3)
                for (size c = 0; c < each; c++) out[c] = larger(larger(t[c], t[c + unit]), t[c + 2 * unit]);
            else
                for (size c = 0; c < each; c++)
                    out[c] = larger(larger(larger(larger(t[c], t[c + unit]), t[c + 2 * unit]), t[c + 3 * unit]),
                                    t[c + 4 * unit]);
        }
    }
}

size pool_pitch(size width, size padding) {
    return (width + 2 * padding + VECTOR - 1) / VECTOR * VECTOR + VECTOR;
}

size pool_floats(size width, size padding, size unit) {
    const size contiguous = 2 * (POOL_GROUP * pool_pitch(width, padding) + SLACK);
    return unit == 1 ? contiguous : (width + 2 * padding) * unit;
}

void pool_edges(float *buffer, size floats, size padding, size unit) {
    for (size i = 0; unit > 1 && i < padding * unit; i++) buffer[i] = buffer[floats - 1 - i] = -INFINITY;
}

void pool_group(const pool_job *job, float *buffer, size first, size last) {
    if (job->s.unit == 1) pool_contiguous(job, buffer, first, last);
    else pool_channels_last(job, buffer, first, last);
}

int pool(const shape *s, const float *in, float *out, int threads) {
    const pool_job job = {.s = *s, .in = in, .end = in + s->planes * s->height * s->width * s->unit, .out = out,
                          .pitch = pool_pitch(s->width, s->padding)};
    const size total = s->planes * s->rows, floats = pool_floats(s->width, s->padding, s->unit);
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
#endif
    {
        float *buffer = calloc((size_t)floats, sizeof(float));
        if (buffer == NULL) failed = 1;
        else pool_edges(buffer, floats, s->padding, s->unit);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (size first = 0; first < total; first += POOL_GROUP) {
            const size last = first + POOL_GROUP < total ? first + POOL_GROUP : total;
            if (buffer != NULL) pool_group(&job, buffer, first, last);
        }
        free(buffer);
    }
    (void)threads;
    return failed;
}

int complete(shape *s) {
    if ((s->kernel != 3 && s->kernel != 5) || (s->stride != 1 && s->stride != 2) || s->padding < 0 ||
        2 * s->padding >= s->kernel || s->height < s->kernel || s->width < s->kernel || s->planes < 1 || s->unit < 1)
        return 0;
    s->rows = (s->height + 2 * s->padding - s->kernel) / s->stride + 1;
    s->columns = (s->width + 2 * s->padding - s->kernel) / s->stride + 1;
    return 1;
}
