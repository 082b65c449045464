/* The engine when the disk fails, hangs or is left: nothing hangs, nothing leaks, nothing is written
 * afterwards.
 *
 *     faults DIRECTORY SECONDS SEED
 */
#include "harness.h"

#define CHUNK (2 * FX_BLOCK)

static void emit_all(struct fx_checkpoint *ck, struct model *m) {
    for (uint32_t l = 0; l < m->n_layers; l++) CHECK(fx_emit(ck, l, m->layers[l].sources) == 0);
}

static void update_all(struct model *m, uint64_t step) {
    for (uint32_t l = 0; l < m->n_layers; l++) update_layer(m, l, step);
}

/* Every call of a checkpoint fails once, in every way; each time the next checkpoint works again. */
static void test_each_call_fails(struct fx_engine *engine, struct model *m, const char *path,
                                 uint64_t *random) {
    int errors[] = {EIO, ENOSPC, EDQUOT, EINTR, 0, EINVAL};
    struct fx_error error;
    update_all(m, 1);
    int64_t before = fx_io_calls(-1);
    for (int64_t nth = 0, calls = 1; nth <= calls; nth++) {
        int err = errors[between(random, 0, 6)];
        fx_io_fail(-1, nth, err);
        struct fx_checkpoint *ck = begin(engine, m, path);
        if (ck) {
            emit_all(ck, m);
            fence_fully(engine, -1);
            int r = fx_durable(ck, 20 * SECOND, &error);
            CHECK(r == 1 || (r < 0 && r == -error.err && err == error.err), "%d after %d", r, err);
            CHECK(nth || r == 1, "without a fault");
            CHECK(fx_settled(ck, 20 * SECOND) == 1);
            fx_io_fail(-1, 0, 0);
            if (r == 1) check_file(m, ck, path, 1);
            if (nth == 0) calls = fx_io_calls(-1) - before;
            fx_checkpoint_release(ck);
        }
        check_idle(engine);
    }
    fx_io_fail(-1, 0, 0);
}

static int64_t elapsed_since(int64_t start) { return now_ns() - start; }

/* A checkpoint with a thread stuck in a write. */
static struct fx_checkpoint *begin_hanging(struct fx_engine *engine, struct model *m, const char *path) {
    struct timespec pause = {0, MS};
    fx_io_delay(FX_PWRITE, 1000 * SECOND);
    int64_t before = fx_io_calls(FX_PWRITE);
    struct fx_checkpoint *ck = begin(engine, m, path);
    emit_all(ck, m);
    while (fx_io_calls(FX_PWRITE) == before) nanosleep(&pause, NULL);
    return ck;
}

/* The disk hangs: training goes on, the checkpoint can be given up, its files stay barred until the disk
 * answers. */
static void test_hung_disk(struct model *m, const char *path) {
    struct fx_engine *engine = make_engine(2, CHUNK, 1 << 26);
    struct fx_checkpoint *ck = begin_hanging(engine, m, path);
    int64_t start = now_ns();
    fence_fully(engine, -1);
    CHECK(fx_copied(ck, SECOND, NULL) == 1, "all of it fits into staging");
    CHECK(fx_durable(ck, 20 * MS, NULL) == 0);
    fx_cancel(ck);
    CHECK(elapsed_since(start) < 20 * SECOND);
    CHECK(fx_settled(ck, 20 * MS) == 0);
    CHECK(begin(engine, m, path) == NULL, "a write to this file may still land");
    CHECK(fx_engine_close(engine, 20 * MS) == 0);
    fx_io_delay(FX_PWRITE, 0);
    CHECK(fx_settled(ck, 20 * SECOND) == 1);
    fx_checkpoint_release(ck);
    CHECK(fx_engine_close(engine, 20 * SECOND) == 1);
    fx_engine_free(engine);
}

/* Writers that copied and then hang have let go of the memory: a fence that was waiting for the copy must
 * notice. */
static void test_fence_waits_for_the_copy_only(const char *path) {
    struct model m;
    uint64_t random = 9;
    make_model(&m, &random, 1, FX_BLOCK, CHUNK);
    struct fx_engine *engine = make_engine(8, CHUNK, 0);
    struct fx_checkpoint *ck = begin(engine, &m, path);
    CHECK(fx_plan_chunks(m.plan) > 1 && fx_plan_chunks(m.plan) <= 8, "one thread for each chunk");
    fx_io_delay(FX_PWRITE, 1000 * SECOND);
    fx_io_delay(FX_COPY, 30 * MS);
    emit_all(ck, &m);
    fence_fully(engine, -1);
    CHECK(fx_durable(ck, 0, NULL) == 0);
    fx_io_delay(FX_COPY, 0);
    fx_io_delay(FX_PWRITE, 0);
    CHECK(fx_durable(ck, 20 * SECOND, NULL) == 1);
    fx_checkpoint_release(ck);
    fx_engine_free(engine);
    free_model(&m);
}

/* An engine that is freed while its threads hang: they clean up when the disk answers (the leak check sees
 * it). */
static void test_freed_while_hung(struct model *m, const char *path) {
    struct fx_engine *engine = make_engine(2, CHUNK, 0);
    struct fx_checkpoint *ck = begin_hanging(engine, m, path);
    struct timespec pause = {0, 50 * MS};
    fx_checkpoint_release(ck);
    fx_engine_free(engine);
    fx_io_delay(FX_PWRITE, 0);
    nanosleep(&pause, NULL);
}

/* Without staging, a chunk that waits for another layer's emit must not hang the fence: the checkpoint gives
 * way. */
static void test_starved_fence(struct model *m, const char *path) {
    struct fx_engine *engine = make_engine(1, CHUNK, 0);
    struct fx_error error;
    struct fx_checkpoint *ck = begin(engine, m, path);
    for (uint32_t l = 0; l + 1 < m->n_layers; l++) CHECK(fx_emit(ck, l, m->layers[l].sources) == 0);
    fence_fully(engine, -1);
    CHECK(fx_emitted(ck) == m->n_layers - 1);
    CHECK(fx_durable(ck, 0, &error) == -ENOBUFS);
    fx_checkpoint_release(ck);
    fx_engine_free(engine);
}

static void test_cancel_at_random(struct fx_engine *engine, struct model *m, const char *path,
                                  uint64_t *random) {
    fx_io_delay(FX_COPY, 200000);
    for (int i = 0; i < 20; i++) {
        struct fx_checkpoint *ck = begin(engine, m, path);
        uint64_t emits = between(random, 0, m->n_layers + 1);
        CHECK(ck);
        update_all(m, (uint64_t)i);
        for (uint32_t l = 0; l < emits; l++) CHECK(fx_emit(ck, l, m->layers[l].sources) == 0);
        struct timespec pause = {0, (long)between(random, 0, 2000000)};
        nanosleep(&pause, NULL);
        fx_cancel(ck);
        update_all(m, 1000); /* a data race if anyone still reads */
        CHECK(fx_settled(ck, 20 * SECOND) == 1);
        check_idle(engine);
        fx_checkpoint_release(ck);
    }
    fx_io_delay(FX_COPY, 0);
}

int main(int argc, char **argv) {
    CHECK(argc == 4, "faults DIRECTORY SECONDS SEED");
    seed_of_run = strtoull(argv[3], NULL, 0);
    uint64_t random = seed_of_run;
    char path[512];
    struct model m;
    snprintf(path, sizeof path, "%s/file", argv[1]);
    int64_t end = now_ns() + strtoll(argv[2], NULL, 0) * SECOND;
    do {
        make_model(&m, &random, 8, 2 * CHUNK, CHUNK);
        struct fx_engine *engine = make_engine(2, CHUNK, 2 * CHUNK);
        test_each_call_fails(engine, &m, path, &random);
        test_cancel_at_random(engine, &m, path, &random);
        fx_engine_free(engine);
        test_hung_disk(&m, path);
        test_freed_while_hung(&m, path);
        free_model(&m);
    } while (now_ns() < end);
    test_fence_waits_for_the_copy_only(path);
    random = 4; /* a model whose last layer shares a chunk with an earlier one */
    make_model(&m, &random, 8, FX_BLOCK, CHUNK);
    test_starved_fence(&m, path);
    free_model(&m);
    puts("done");
    return 0;
}
