/* Training against the engine, with everything going on at once: several checkpoints in flight, slow copies,
 * slow and failing writes, cancels, a second thread that fences and asks. Memory is overwritten right after
 * each fence, so a fence that lets go too early is a data race (for the thread sanitizer) and a wrong byte
 * (for the check of the file).
 *
 *     stress DIRECTORY SECONDS SEED
 */
#include "harness.h"

static struct model model;
static struct fx_engine *engine;
static atomic_bool over;

/* The other thread: reads every counter, and fences without owning anything. Not often: where there is no
 * staging room, a fence of all layers ends a checkpoint of which only some are emitted. */
static void *bystander(void *unused) {
    struct fx_statistics statistics;
    for (uint64_t turn = 0; !over; turn++) {
        fx_engine_statistics(engine, &statistics);
        if (turn % 64 == 0) fx_fence(engine, -1, MS / 2);
        struct timespec pause = {0, 200000};
        nanosleep(&pause, NULL);
    }
    return unused;
}

static void disturb(uint64_t *random) {
    fx_io_delay(FX_COPY, (int64_t)between(random, 0, 3) * 100000);
    fx_io_delay(FX_PWRITE, (int64_t)between(random, 0, 3) * 200000);
    int errors[] = {EIO, ENOSPC, EINTR, 0, EINVAL, EAGAIN};
    if (between(random, 0, 4) == 0)
        fx_io_fail(-1, (int64_t)between(random, 1, 60), errors[between(random, 0, 6)]);
}

/* A disturbed checkpoint may fail. Returns whether it was durable. */
static bool finish(struct slot *slot, bool patiently) {
    struct fx_error error;
    return end_slot(&model, slot, patiently, &error) == 1;
}

static void one_step(uint64_t step, struct slot *starting) {
    for (uint32_t l = 0; l < model.n_layers; l++) {
        fence_fully(engine, l);
        update_layer(&model, l, step);
        if (starting && starting->ck) CHECK(fx_emit(starting->ck, l, model.layers[l].sources) == 0);
    }
}

static void train(struct slot slots[SLOTS], uint64_t *random, int64_t until, uint64_t counts[2]) {
    for (uint64_t step = 1; now_ns() < until; step++) {
        struct slot *slot = &slots[step % SLOTS];
        fx_io_fail(-1, 0, 0); /* what is checked here is not what is disturbed */
        counts[finish(slot, between(random, 0, 8) != 0)]++;
        disturb(random);
        slot->step = step;
        slot->ck = between(random, 0, 5) ? begin(engine, &model, slot->path) : NULL;
        one_step(step, slot);
        if (slot->ck && between(random, 0, 16) == 0) counts[finish(slot, false)]++;
    }
    fx_io_fail(-1, 0, 0);
    for (int i = 0; i < SLOTS; i++) counts[finish(&slots[i], true)]++;
}

static void round_of(const char *directory, uint64_t *random, int64_t until, uint64_t counts[2]) {
    struct slot slots[SLOTS] = {0};
    uint64_t chunk = FX_BLOCK << between(random, 0, 3), stagings[] = {0, chunk, 4 * chunk, 1 << 24};
    make_model(&model, random, (uint32_t)between(random, 1, 24), 3 * chunk, chunk);
    engine = make_engine((uint32_t)between(random, 1, 4), chunk, stagings[between(random, 0, 4)]);
    for (int i = 0; i < SLOTS; i++) snprintf(slots[i].path, sizeof slots[i].path, "%s/slot-%d", directory, i);
    pthread_t thread;
    over = false;
    CHECK(pthread_create(&thread, NULL, bystander, NULL) == 0);
    train(slots, random, until, counts);
    over = true;
    pthread_join(thread, NULL);
    check_idle(engine);
    CHECK(fx_engine_close(engine, 10 * SECOND) == 1);
    fx_engine_free(engine);
    free_model(&model);
}

int main(int argc, char **argv) {
    CHECK(argc == 4, "stress DIRECTORY SECONDS SEED");
    seed_of_run = strtoull(argv[3], NULL, 0);
    uint64_t random = seed_of_run, counts[2] = {0, 0};
    int64_t end = now_ns() + strtoll(argv[2], NULL, 0) * SECOND;
    while (now_ns() < end) round_of(argv[1], &random, now_ns() + SECOND / 2, counts);
    printf("%lu durable and right, %lu not\n", (unsigned long)counts[1], (unsigned long)counts[0]);
    CHECK(counts[1] > 0);
    return 0;
}
