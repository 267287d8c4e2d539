/* A depthwise convolution of a float32 map, the norm and activation behind it and the max-pool beside it, in one pass:
 * first the sums of the convolution and the maxima of the pool, then scale, shift, activation and the sum of both, all of
 * it while a piece of the input lies in the first caches.
 */
#include "_depthwise.h"

enum { BAND = 1 << 15, ITEM = 8 }; /* floats of a band of rows; rows of a channels_last map worked on as one item */

/* Rows of an item of work: a few (channels_last), or as many as a band has. */
static size item_rows(const pass *p) {
    const size band = (BAND / (p->width + 2 * p->padding) - p->kernel) / p->stride + 1, most = p->last ? ITEM : band;
    return by_blocks(p) || most > p->rows ? p->rows : most < 1 ? 1 : most;
}

/* Pieces of a thread's memory begin where a vector may be read at once. */
static float *aligned(float *at) { return (float *)(((uintptr_t)at + 63) / 64 * 64); }

static float *carve(float **from, size floats) {
    float *piece = aligned(*from);
    *from = piece + floats;
    return piece;
}

static float *prepare(const pass *p, scratch *mine, size rows) {
    const int blocks = by_blocks(p), rowwise = p->last || blocks;
    const size unit = blocks ? VECTOR : p->last ? p->channels : 1, wide = p->width + 2 * p->padding;
    const size lines = rowwise ? wide * unit : (p->stride == 2 ? 4 : 1) * phase_floats(p, rows); /* rowwise: one of zeros */
    const size line = (rowwise ? p->columns * unit : rows * line_pitch(p)) + 2 * VECTOR;
    const size edge = blocks ? 0 : p->pool_padding, pool = pool_floats(wide, edge, unit);
    const size turned = blocks ? (p->height + 2 * p->padding) * wide * VECTOR : 0;
    const size framed = p->pool_padding ? turned : 0, made = blocks ? p->rows * p->columns * VECTOR : 0;
    float *memory = calloc((size_t)(lines + 4 * line + pool + turned + framed + 2 * made + 10 * VECTOR), sizeof(float)), *rest = memory;
    if (memory == NULL) return NULL;
    mine->lines = carve(&rest, lines);
    mine->sums = carve(&rest, line);
    mine->maxima = carve(&rest, line);
    mine->own = carve(&rest, line);
    mine->done = carve(&rest, line);
    mine->pool = carve(&rest, pool);
    mine->block = carve(&rest, turned);
    mine->framed = carve(&rest, framed);
    mine->result = carve(&rest, made);
    mine->pooled = carve(&rest, made);
    pool_edges(mine->pool, pool_floats(p->width, edge, unit), edge, unit);
    for (size i = 0; i < framed; i++) mine->framed[i] = -INFINITY;
    for (size i = 0; blocks && i < p->height * p->width; i++)
        mine->places[i] = (int)(((i / p->width + p->padding) * wide + i % p->width + p->padding) * VECTOR);
    return memory;
}

/* The norm's scale and shift of each channel, and the weights tap by tap, sixteen channels at a time. */
FOR_EVERY_CPU
static void weigh(pass *p) {
    const size area = p->kernel * p->kernel;
    int places[5 * 5];
    for (size c = 0; c < p->channels; c++) {
        p->scale[c] = p->mean == NULL ? 1.0f : (p->gain == NULL ? 1.0f : p->gain[c]) / sqrtf(p->variance[c] + p->eps);
        p->shift[c] = p->mean == NULL ? 0.0f : (p->offset == NULL ? 0.0f : p->offset[c]) - p->mean[c] * p->scale[c];
        p->added[c] = p->bias == NULL ? 0.0f : p->bias[c];
    }
    if (!p->last && !by_blocks(p)) return;
    for (int t = 0; t < area; t++) places[t] = t * VECTOR;
    for (size block = 0; block * VECTOR < p->channels; block++)
        turn(p->weight + first_channel(p, block) * area, p->channels < VECTOR ? p->channels : VECTOR, area, places,
             p->taps + block * area * VECTOR);
    for (size i = p->channels; i < VECTOR; i++) /* pixels of few channels are worked on side by side */
        for (size t = 0; t < area; t++) p->taps[t * VECTOR + i] = p->taps[t * VECTOR + i - p->channels];
}

/* Beside an infinite weight or a NaN a frame of zeros is not what torch sees there, which is nothing. */
FOR_EVERY_CPU
int all_finite(const pass *p) {
    const uint32_t exponent = 0x7f800000;
    const size count = p->padding ? p->channels * p->kernel * p->kernel : 0;
    uint32_t bits, found = 0;
    for (size i = 0; i < count; i++) {
        memcpy(&bits, p->weight + i, sizeof bits);
        found |= (bits & exponent) == exponent;
    }
    return !found;
}

int depthwise(pass *p) {
    const int blocks = by_blocks(p);
    const size rows = item_rows(p), each = (p->rows + rows - 1) / rows;
    const size planes = blocks ? (p->channels + VECTOR - 1) / VECTOR : p->last ? 1 : p->channels, maps = p->count * planes;
    float *memory = calloc((size_t)((p->channels + VECTOR) * (3 + p->kernel * p->kernel) + 4 * VECTOR), sizeof(float)), *rest = memory;
    int failed = memory == NULL;
    if (failed) return failed;
    p->scale = carve(&rest, p->channels + VECTOR);
    p->shift = carve(&rest, p->channels + VECTOR);
    p->added = carve(&rest, p->channels + VECTOR);
    p->taps = carve(&rest, (p->channels + VECTOR) * p->kernel * p->kernel);
    weigh(p);
#ifdef _OPENMP
#pragma omp parallel num_threads(p->threads) if (p->threads > 1) reduction(| : failed)
#endif
    {
        scratch mine;
        float *own = prepare(p, &mine, rows);
        if (own == NULL) failed = 1;
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (size item = 0; item < maps * each; item++) {
            const size first = item % each * rows, last = first + rows < p->rows ? first + rows : p->rows;
            if (own == NULL) continue;
            if (blocks) block(p, &mine, item / planes, item % planes);
            else if (p->last) rows_last(p, &mine, item / each, first, last);
            else band(p, &mine, item / each, rows, first, last);
        }
        free(own);
    }
    free(memory);
    return failed;
}

int depthwise_fits(pass *p) {
    shape window = {1, p->height, p->width, 1, p->kernel, p->stride, p->padding, 0, 0}, pool = window;
    pool.kernel = p->pool;
    pool.padding = p->pool_padding;
    if (!complete(&window) || (p->pool && !complete(&pool))) return 0;
    p->rows = window.rows;
    p->columns = window.columns;
    const int same = p->pool == p->kernel && p->pool_padding == p->padding, inner = p->pool == 3 && p->pool_padding == 0;
    /* a plane's band has room for one kind of edge only */
    p->shared = same && (p->padding == 0 || (p->last && !by_blocks(p))) ? ALL : inner && p->padding == (p->kernel - 3) / 2;
    /* both windows have one centre, so that both results have one size */
    return p->pool ? p->kernel - 2 * p->padding == p->pool - 2 * p->pool_padding : p->merge == BESIDE;
}
