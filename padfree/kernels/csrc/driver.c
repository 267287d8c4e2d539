/* A depthwise convolution of a float32 map, what follows it and the max-pool beside it, in one pass: first the sums of the
 * convolution and the maxima of the pool, then scale, shift, activation and the sum of both, all of it while a piece of the
 * input lies in the first caches. An activation may come first (`lead.c`), a 1x1 convolution last (`pointwise.c`).
 */
#include "pass.h"

enum { BAND = 1 << 15, ITEM = 8 }; /* floats of a band of rows; rows of a channels_last map worked on as one item */
enum { TILE = 1 << 15 };           /* floats of what a 1x1 convolution reads at once */
enum { LED = 1 << 17 };            /* floats of rows of a channels_last map behind its activation */

/* Rows of an item of work: a few (channels_last), or as many as a band has; with a 1x1 convolution no more than a tile has,
 * or than leave each thread its share. */
static size item_rows(const pass *p) {
    const size band = (BAND / (p->width + 2 * p->padding) - p->kernel) / p->stride + 1;
    size most = at_most(p->last ? ITEM : band, p->rows);
    if (by_blocks(p)) return p->rows;
    if (p->outputs) most = at_most(most, at_most(TILE / (p->inputs * p->columns), p->rows * p->count / p->threads));
    if (p->leads && p->last) most = at_most(most, (LED / (p->width * p->channels) - p->kernel) / p->stride + 1);
    return most < 1 ? 1 : most;
}

/* Maps of an item: one, or as many whole ones as a tile has with a 1x1 convolution and leave each thread its share. */
static size item_maps(const pass *p) {
    const size most = p->outputs && by_blocks(p) ? at_most(TILE / (p->inputs * p->rows * p->columns), p->count / p->threads) : 1;
    return most < 1 ? 1 : most;
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
    const size tile = p->outputs ? p->inputs * tile_pitch(p, item_maps(p) * rows) + 2 * VECTOR : 0;
    const size led = p->leads && !blocks ? lead_floats(p, rows) : 0;
    const size all = lines + 4 * line + pool + turned + framed + 2 * made + tile + led + 12 * VECTOR;
    float *memory = malloc((size_t)all * sizeof(float)), *rest = memory;
    if (memory == NULL) return NULL;
    memset(memory, 0, (size_t)all * sizeof(float)); /* what is between numbers must be none that a processor is slow with */
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
    mine->tile = carve(&rest, tile);
    mine->led = carve(&rest, led);
    pool_edges(mine->pool, pool_floats(p->width, edge, unit), edge, unit);
    for (size i = 0; i < framed; i++) mine->framed[i] = -INFINITY;
    for (size i = 0; blocks && i < p->height * p->width; i++)
        mine->places[i] = (int)(((i / p->width + p->padding) * wide + i % p->width + p->padding) * VECTOR);
    return memory;
}

/* The bias is scaled too: it comes before the scale. */
INLINE void weigh_ending(ending *e, size channels) {
    for (size c = 0; c < channels; c++) {
        e->scale[c] = e->own_scale == NULL ? 1.0f : e->own_scale[c];
        e->shift[c] = e->own_shift == NULL ? 0.0f : e->own_shift[c];
        if (e->bias != NULL) e->shift[c] += e->bias[c] * e->scale[c];
    }
}

/* What follows the convolutions, and the weights tap by tap, sixteen channels at a time. */
FOR_EVERY_CPU
static void weigh(pass *p) {
    const size area = p->kernel * p->kernel;
    int places[5 * 5];
    weigh_ending(&p->own, p->channels);
    weigh_ending(&p->mixed, p->outputs);
    if (p->columnwise != NULL) turn_matrix(p->mix, p->inputs, p->outputs, p->inputs, p->columnwise, columnwise_pitch(p));
    if (!p->last && !by_blocks(p)) return;
    for (int t = 0; t < area; t++) places[t] = t * VECTOR;
    for (size block = 0; block * VECTOR < p->channels; block++)
        turn(p->weight + first_channel(p, block) * area, p->channels < VECTOR ? p->channels : VECTOR, area, places,
             p->taps + block * area * VECTOR);
    for (size i = p->channels; i < VECTOR; i++) /* pixels of few channels are worked on side by side */
        for (size t = 0; t < area; t++) p->taps[t * VECTOR + i] = p->taps[t * VECTOR + i - p->channels];
}

INLINE int finite(const float *from, size count) {
    const uint32_t exponent = 0x7f800000;
    uint32_t bits, found = 0;
    for (size i = 0; i < count; i++) {
        memcpy(&bits, from + i, sizeof bits);
        found |= (bits & exponent) == exponent;
    }
    return !found;
}

/* Beside an infinite weight or a NaN a frame of zeros is not what torch sees there, which is nothing. An infinite scale of a
 * sum is not the sum of both, scaled. */
FOR_EVERY_CPU
int all_finite(const pass *p) {
    return finite(p->weight, p->padding ? p->channels * p->kernel * p->kernel : 0) &&
           finite(p->own.own_scale, p->own.own_scale != NULL && p->own.bias != NULL ? p->channels : 0);
}

/* Of the tile that a 1x1 convolution reads, and of its weights. */
size tile_pitch(const pass *p, size rows) {
    const size pixels = rows * p->columns;
    return p->last && !by_blocks(p) ? pixels : whole_vectors(pixels);
}
size columnwise_pitch(const pass *p) { return whole_vectors(p->outputs); }

/* How many parts of a map are worked on one after another: planes, sixteen channels, or all of them. */
static size parts(const pass *p) {
    return by_blocks(p) ? (p->channels + VECTOR - 1) / VECTOR : p->last ? 1 : p->channels;
}

/* Where row `row` of channel c of map n is, in a map of results. */
static float *place(const pass *p, float *map, size n, size c, size row) {
    if (map == NULL) return NULL;
    return map + (p->last ? (n * p->rows + row) * p->columns * p->out_channels + c
                          : ((n * p->out_channels + c) * p->rows + row) * p->columns);
}

/* One part of map n's rows first ... last, of at most `rows`, to planes that are `pitch` apart, or to pixels. */
static void work(const pass *p, scratch *mine, size n, size part, size rows, size first, size last, float *out, float *pooled,
                 size pitch) {
    if (by_blocks(p)) block(p, mine, n, part, out, pooled, pitch);
    else if (p->last) rows_last(p, mine, n, first, last, out, pooled);
    else band(p, mine, n * p->channels + part, rows, first, last, out, pooled);
}

static size first_of(const pass *p, size part) { return by_blocks(p) ? first_channel(p, part) : part; }

/* The same to its place. */
static void work_in_place(const pass *p, scratch *mine, size n, size part, size rows, size first, size last) {
    const size c = first_of(p, part), pitch = p->last ? 0 : p->rows * p->columns;
    work(p, mine, n, part, rows, first, last, place(p, p->out, n, c, first), place(p, p->pooled, n, c, first), pitch);
}

/* All parts of these rows of `maps` maps, to the tile, and from there to their place. */
static void work_and_mix(const pass *p, scratch *mine, size n, size maps, size rows, size first, size last) {
    const size pixels = (last - first) * p->columns, pitch = tile_pitch(p, maps * (last - first));
    const size step = by_blocks(p) || !p->last ? pitch : 1, both = p->inputs > p->channels;
    for (size m = 0; m < maps; m++)
        for (size part = 0; part < parts(p); part++) {
            float *out = mine->tile + first_of(p, part) * step + m * pixels, *pooled = both ? out + p->channels * step : NULL;
            work(p, mine, n + m, part, rows, first, last, out, pooled, pitch);
        }
    mix(p, mine, n, maps, first, last);
}

static float *weights(pass *p) {
    const size padded = p->channels + VECTOR, outputs = p->outputs ? p->outputs + 2 * VECTOR : 0;
    const size taps = padded * p->kernel * p->kernel, columnwise = p->last && !by_blocks(p) ? p->inputs * columnwise_pitch(p) : 0;
    const size all = 2 * padded + 2 * outputs + taps + columnwise + 7 * VECTOR;
    float *memory = calloc((size_t)all, sizeof(float)), *rest = memory;
    if (memory == NULL) return NULL;
    p->own.scale = carve(&rest, padded);
    p->own.shift = carve(&rest, padded);
    p->mixed.scale = carve(&rest, outputs);
    p->mixed.shift = carve(&rest, outputs);
    p->taps = carve(&rest, taps);
    p->columnwise = columnwise ? carve(&rest, columnwise) : NULL;
    weigh(p);
    return memory;
}

int depthwise(pass *p) {
    const size rows = item_rows(p), each = (p->rows + rows - 1) / rows, maps = item_maps(p);
    const size apart = p->outputs ? 1 : parts(p), items = (p->count + maps - 1) / maps * apart * each;
    float *memory = weights(p);
    int failed = memory == NULL;
    if (failed) return failed;
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
        for (size item = 0; item < items; item++) {
            const size n = item / each / apart * maps, first = item % each * rows, last = at_most(first + rows, p->rows);
            if (own == NULL) continue;
            if (p->outputs) work_and_mix(p, &mine, n, at_most(maps, p->count - n), rows, first, last);
            else work_in_place(p, &mine, n, item / each % apart, rows, first, last);
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
