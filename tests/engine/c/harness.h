/* What the C test programs share: checks that say where they failed, a seeded generator, scratch files. */
#ifndef HARNESS_H
#define HARNESS_H

#include "testing/instruments.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000ll
#define SECOND (1000 * MS)

/* Ends the program, with the place and the seed, if a promise is broken. */
#define CHECK(condition, ...) check((condition), #condition, __FILE__, __LINE__, " " __VA_ARGS__)

static unsigned long long seed_of_run;

__attribute__((format(printf, 5, 6))) static inline void check(bool good, const char *what, const char *file,
                                                               int line, const char *format, ...) {
    va_list arguments;
    if (good) return;
    fprintf(stderr, "%s:%d: not so: %s (seed %llu)", file, line, what, seed_of_run);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    abort();
}

static inline uint64_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* At least `low`, less than `high`. */
static inline uint64_t between(uint64_t *state, uint64_t low, uint64_t high) {
    return low + next_random(state) % (high - low);
}

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

/* Fills memory with what only this (a, b, c) gives. */
static inline void fill_pattern(char *to, size_t n, uint64_t a, uint64_t b, uint64_t c) {
    uint64_t state = a * 1000003 + b * 10007 + c;
    for (size_t i = 0; i < n; i++)
        to[i] = (char)(i % 8 ? to[i - 1] * 31 + (char)i : (char)next_random(&state));
}

static inline struct fx_engine *make_engine(uint32_t threads, uint64_t chunk, uint64_t staging) {
    struct fx_options options = {
        .threads = threads, .chunk_bytes = chunk, .staging_bytes = staging, .direct = 1};
    struct fx_engine *engine = NULL;
    struct fx_error error;
    int r = fx_engine_new(&options, &engine, &error);
    CHECK(r == 0, "%s", r ? error.operation : "");
    return engine;
}

/* ---- a model: layers of contiguous tensors in one file, after a header ---- */

#define MAX_LAYERS 64
#define MAX_TENSORS 6

struct layer {
    uint32_t n;
    struct {
        char *data;
        uint64_t nbytes, offset;
    } tensors[MAX_TENSORS];
    struct fx_sources *sources;
};

struct model {
    uint32_t n_layers;
    struct layer layers[MAX_LAYERS];
    uint64_t nbytes, chunk, sum; /* bytes of a checksum */
    char header[100];
    struct fx_plan *plan;
};

static inline void make_layer(struct layer *layer, uint64_t *random, uint64_t largest) {
    struct fx_view views[MAX_TENSORS];
    layer->n = (uint32_t)between(random, 0, MAX_TENSORS);
    for (uint32_t i = 0; i < layer->n; i++) {
        layer->tensors[i].nbytes = 4 * between(random, 0, largest / 4);
        layer->tensors[i].data = malloc(layer->tensors[i].nbytes + 1);
        views[i] = (struct fx_view){.address = layer->tensors[i].data, .ndim = -1};
    }
    layer->sources = fx_sources_new(views, layer->n);
    CHECK(layer->sources);
}

/* Tensors lie in the file in layer order, every second tensor of all layers first: pieces interleave in
 * chunks. */
static inline void make_model(struct model *m, uint64_t *random, uint32_t n_layers, uint64_t largest,
                              uint64_t chunk) {
    struct fx_tensor tensors[MAX_LAYERS * MAX_TENSORS];
    uint32_t n = 0;
    memset(m, 0, sizeof *m);
    m->n_layers = n_layers;
    m->chunk = chunk;
    m->sum = between(random, 0, 2) ? chunk : FX_BLOCK;
    memset(m->header, 'h', sizeof m->header);
    uint64_t at = sizeof m->header;
    for (uint32_t l = 0; l < n_layers; l++) make_layer(&m->layers[l], random, largest);
    for (uint32_t odd = 0; odd < 2; odd++)
        for (uint32_t l = 0; l < n_layers; l++)
            for (uint32_t i = odd; i < m->layers[l].n; i += 2) {
                m->layers[l].tensors[i].offset = at;
                at += m->layers[l].tensors[i].nbytes;
            }
    for (uint32_t l = 0; l < n_layers; l++)
        for (uint32_t i = 0; i < m->layers[l].n; i++)
            tensors[n++] = (struct fx_tensor){l, 0, m->layers[l].tensors[i].offset,
                                              m->layers[l].tensors[i].nbytes, 4};
    m->nbytes = (at + FX_BLOCK - 1) / FX_BLOCK * FX_BLOCK;
    struct fx_file file = {m->nbytes, m->header, sizeof m->header};
    struct fx_error error;
    int r = fx_plan_new(&file, 1, tensors, n, n_layers, chunk, m->sum, &m->plan, &error);
    CHECK(r == 0, "%s", r ? error.operation : "");
}

static inline void free_model(struct model *m) {
    for (uint32_t l = 0; l < m->n_layers; l++) {
        for (uint32_t i = 0; i < m->layers[l].n; i++) free(m->layers[l].tensors[i].data);
        fx_sources_free(m->layers[l].sources);
    }
    fx_plan_free(m->plan);
}

/* What "training" does to a layer in a step. */
static inline void update_layer(struct model *m, uint32_t l, uint64_t step) {
    for (uint32_t i = 0; i < m->layers[l].n; i++)
        fill_pattern(m->layers[l].tensors[i].data, m->layers[l].tensors[i].nbytes, step, l, i);
}

/* In one long wait, so that a wake-up that got lost is a failure and not a delay. */
static inline void fence_fully(struct fx_engine *engine, int64_t layer) {
    int64_t start = now_ns();
    bool done = fx_fence(engine, layer, 40 * SECOND) == 1;
    CHECK(done && now_ns() - start < 35 * SECOND, "the fence of layer %ld hangs", (long)layer);
}

/* Once nothing is in flight, nothing is kept: no piece is pending, every staging buffer was given back. */
static inline void check_idle(struct fx_engine *engine) {
    struct fx_statistics statistics;
    fx_engine_statistics(engine, &statistics);
    CHECK(*fx_engine_pending(engine) == 0);
    CHECK(statistics.staging_bytes == 0, "%lu", (unsigned long)statistics.staging_bytes);
}

static inline struct fx_checkpoint *begin(struct fx_engine *engine, struct model *m, const char *path) {
    struct fx_checkpoint *ck = NULL;
    struct fx_error error;
    return fx_begin(engine, m->plan, AT_FDCWD, &path, NULL, &ck, &error) ? NULL : ck;
}

/* A durable checkpoint's file holds every layer as it was after the update of `step`, and its checksums hold.
 */
static inline void check_file(struct model *m, struct fx_checkpoint *ck, const char *path, uint64_t step) {
    char *file = malloc(m->nbytes), *expected = malloc(m->nbytes + 1);
    struct fx_target target = {.nbytes = m->nbytes, .itemsize = 1, .view = {.address = file, .ndim = -1}};
    struct fx_error error;
    int fd = fx_open(AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    CHECK(fd >= 0, "%s", path);
    uint64_t n = fx_plan_sums(m->plan), cut = n / 3; /* in two ranges, with an empty one between them */
    struct fx_range ranges[] = {{0, cut}, {cut, 0}, {cut, n - cut}};
    int r = fx_read_verified(fd, path, m->nbytes, m->sum, fx_crcs(ck), ranges, 3, &target, 1, 2, &error);
    CHECK(r == 0, "read_verified says %d at %ld", r, r ? (long)error.offset : 0);
    CHECK(memcmp(file, m->header, sizeof m->header) == 0);
    for (uint32_t l = 0; l < m->n_layers; l++)
        for (uint32_t i = 0; i < m->layers[l].n; i++) {
            uint64_t n = m->layers[l].tensors[i].nbytes;
            fill_pattern(expected, n, step, l, i);
            CHECK(memcmp(file + m->layers[l].tensors[i].offset, expected, n) == 0,
                  "step %ld, layer %u, tensor %u", (long)step, l, i);
        }
    close(fd);
    free(file);
    free(expected);
}

/* ---- slots: the checkpoints of a model that are in flight ---- */

#define SLOTS 3

struct slot {
    struct fx_checkpoint *ck;
    uint64_t step;
    char path[512];
};

/* Ends a slot's checkpoint one way or another; a durable one must hold what it promised. Returns what
 * fx_durable said (with *error), -ECANCELED if it was given up, 0 if there was none. */
static inline int end_slot(struct model *m, struct slot *slot, bool patiently, struct fx_error *error) {
    int r = -ECANCELED;
    if (!slot->ck) return 0;
    memset(error, 0, sizeof *error);
    error->operation = "given up";
    if (patiently) {
        r = fx_durable(slot->ck, 60 * SECOND, error);
        CHECK(r, "a checkpoint hangs");
        if (r == 1) check_file(m, slot->ck, slot->path, slot->step);
    } else {
        fx_cancel(slot->ck);
    }
    CHECK(fx_settled(slot->ck, 60 * SECOND) == 1);
    fx_checkpoint_release(slot->ck);
    slot->ck = NULL;
    return r;
}

#endif
