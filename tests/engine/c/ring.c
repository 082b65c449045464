/* A trainer's engine and a monitor's engine on one ring, each with its own threads, in one process so that the sanitizers
 * see both sides. Memory is overwritten right after each fence; slow copies and writes, failing writes, cancels on both
 * sides; slots fewer than a checkpoint has chunks. Every checkpoint that both sides call durable must be on disk, byte for
 * byte. What is only checksummed reaches no monitor. In every round the monitor dies at the end: nothing may hang, every slot
 * must come back.
 *
 *     ring DIRECTORY SECONDS SEED
 */
#include "harness.h"

#include <poll.h>
#include <sys/eventfd.h>

#define PAIRS 4

struct pair {
    struct fx_checkpoint *sent, *received; /* the trainer's and the monitor's */
    uint64_t id, step;
    char path[512];
};

static struct model model;
static struct fx_engine *trainer, *monitor;
static struct fx_ring *ring;
static struct fx_plan *chunks; /* what the monitor knows of the model: a layer for each chunk */
static struct pair pairs[PAIRS];
static pthread_mutex_t registry = PTHREAD_MUTEX_INITIALIZER; /* of the test: stands for the messages of the real thing */
static uint64_t newest;
static _Atomic uint64_t summed; /* of a checkpoint of which only checksums are wanted */
static int posted, freed, alive[2], reborn[2];
static atomic_bool over;

static struct fx_checkpoint *received_of(uint64_t id) {
    for (int i = 0; i < PAIRS; i++)
        if (pairs[i].received && pairs[i].id == id) return pairs[i].received;
    return NULL;
}

static void feed(void) {
    struct fx_posted found;
    uint32_t from = 0;
    pthread_mutex_lock(&registry);
    while (fx_ring_next(ring, &from, &found)) {
        CHECK(found.checkpoint != summed, "what nobody writes was posted");
        struct fx_checkpoint *ck = received_of(found.checkpoint);
        if (!ck && found.checkpoint > newest) continue; /* its begin was not heard of yet */
        if (!ck || fx_emit_posted(ck, &found)) fx_ring_return(ring, found.slot, freed);
    }
    pthread_mutex_unlock(&registry);
}

static void *monitor_main(void *unused) {
    while (!over) {
        struct pollfd fd = {posted, POLLIN, 0};
        uint64_t count;
        poll(&fd, 1, 1);
        if (read(posted, &count, sizeof count) < 0) CHECK(errno == EAGAIN);
        feed();
    }
    return unused;
}

static void disturb(uint64_t *random) {
    fx_io_delay(FX_COPY, (int64_t)between(random, 0, 3) * 100000);
    fx_io_delay(FX_PWRITE, (int64_t)between(random, 0, 3) * 200000);
    if (between(random, 0, 4) == 0) fx_io_fail(FX_PWRITE, (int64_t)between(random, 1, 20), EIO);
}

static void end(struct fx_checkpoint **ck) {
    CHECK(fx_settled(*ck, 60 * SECOND) == 1);
    fx_checkpoint_release(*ck);
    *ck = NULL;
}

/* Ends a pair one way or another; what both call durable must be there. Returns whether it was. */
static bool finish(struct pair *pair, bool patiently) {
    struct fx_error error;
    bool good = false;
    if (!pair->sent) return false;
    if (patiently) {
        int r = fx_durable(pair->sent, 60 * SECOND, &error);
        CHECK(r == 1, "all of it is posted sooner or later: %d", r);
        r = fx_durable(pair->received, 60 * SECOND, &error);
        CHECK(r, "the monitor hangs");
        good = r == 1;
        if (good) check_file(&model, pair->sent, pair->path, pair->step);
    } else {
        fx_cancel(pair->sent);
        CHECK(fx_settled(pair->sent, 60 * SECOND) == 1); /* nothing of it is posted any more */
    }
    pthread_mutex_lock(&registry);
    fx_cancel(pair->received);
    struct fx_checkpoint *received = pair->received;
    pair->received = NULL;
    pthread_mutex_unlock(&registry);
    end(&received);
    end(&pair->sent);
    return good;
}

static void start(struct pair *pair, uint64_t step) {
    struct fx_error error;
    pair->sent = begin(trainer, &model, pair->path);
    CHECK(pair->sent);
    const char *path = pair->path;
    struct fx_checkpoint *received = NULL;
    CHECK(fx_begin(monitor, chunks, AT_FDCWD, &path, NULL, &received, &error) == 0);
    pthread_mutex_lock(&registry);
    pair->received = received;
    pair->step = step;
    newest = pair->id = fx_id(pair->sent);
    pthread_mutex_unlock(&registry);
}

/* A checkpoint into a file without a name takes slots, and gives each of them back itself. */
static void sum_only(void) {
    struct fx_error error;
    struct fx_checkpoint *ck = begin(trainer, &model, "");
    CHECK(ck);
    summed = fx_id(ck);
    for (uint32_t l = 0; l < model.n_layers; l++) CHECK(fx_emit(ck, l, model.layers[l].sources) == 0);
    CHECK(fx_durable(ck, 60 * SECOND, &error) == 1);
    end(&ck);
}

static void train(uint64_t *random, int64_t until, uint64_t counts[2]) {
    for (uint64_t step = 1; now_ns() < until; step++) {
        struct pair *pair = &pairs[step % PAIRS];
        fx_io_fail(-1, 0, 0);
        counts[finish(pair, between(random, 0, 8) != 0)]++;
        if (between(random, 0, 5)) start(pair, step);
        disturb(random);
        for (uint32_t l = 0; l < model.n_layers; l++) {
            fence_fully(trainer, l);
            update_layer(&model, l, step);
            if (pair->sent) CHECK(fx_emit(pair->sent, l, model.layers[l].sources) == 0);
        }
        if (between(random, 0, 4) == 0) sum_only();
        if (pair->sent && between(random, 0, 16) == 0) counts[finish(pair, false)]++;
    }
    fx_io_fail(-1, 0, 0);
    for (int i = 0; i < PAIRS - 1; i++) counts[finish(&pairs[i], true)]++;
}

/* What the collector takes back comes back soon, or the check of an idle engine says that it did not. */
static void await_slots(void) {
    struct fx_statistics statistics;
    int64_t limit = now_ns() + 60 * SECOND;
    do fx_engine_statistics(trainer, &statistics);
    while (statistics.staging_bytes && now_ns() < limit);
}

/* The last pair is under way, or is begun now; the monitor takes nothing any more, then its process is gone, and another
 * one takes over. */
static void die(pthread_t thread) {
    struct pair *pair = &pairs[PAIRS - 1];
    struct fx_error error;
    over = true;
    pthread_join(thread, NULL);
    finish(pair, false);
    start(pair, 0);
    for (uint32_t l = 0; l < model.n_layers; l++) CHECK(fx_emit(pair->sent, l, model.layers[l].sources) == 0);
    close(alive[1]);
    fence_fully(trainer, -1);
    int r = fx_durable(pair->sent, 60 * SECOND, &error);
    CHECK(r == 1 || r == -EPIPE, "%d", r);
    await_slots(); /* one that was posted in full is durable before the death is seen */
    const char *path = "";
    struct fx_checkpoint *none;
    CHECK(fx_begin(trainer, model.plan, AT_FDCWD, &path, NULL, &none, &error) == -EPIPE);
    end(&pair->sent);
    fx_cancel(pair->received);
    end(&pair->received);
    CHECK(pipe(reborn) == 0);
    CHECK(fx_relay_revive(trainer, reborn[0], &error) == 0);
    CHECK(fx_relay_revive(trainer, reborn[0], &error) == -EBUSY);
    start(pair, 0);
    fx_cancel(pair->sent);
    end(&pair->sent);
    fx_cancel(pair->received);
    end(&pair->received);
    feed(); /* a chunk that waits for no layer, as of a model without a byte, may have been posted before the cancel */
    await_slots();
    close(reborn[0]), close(reborn[1]);
}

static void make_chunks(uint64_t chunk) {
    struct fx_tensor tensors[1024];
    struct fx_file file = {model.nbytes, "", 0};
    struct fx_error error;
    uint32_t n = fx_plan_chunks(model.plan);
    CHECK(n <= 1024);
    for (uint32_t i = 0; i < n; i++) {
        uint64_t rest = model.nbytes - i * chunk;
        tensors[i] = (struct fx_tensor){i, 0, i * chunk, rest < chunk ? rest : chunk, 1};
    }
    CHECK(fx_plan_new(&file, 1, tensors, n, n, chunk, model.sum, &chunks, &error) == 0, "%s", error.operation);
}

static void round_of(uint64_t *random, int64_t until, uint64_t counts[2]) {
    uint64_t chunk = FX_BLOCK << between(random, 0, 3);
    uint32_t slots = (uint32_t)between(random, 2, 40);
    struct fx_error error;
    make_model(&model, random, (uint32_t)between(random, 1, 24), 3 * chunk, chunk);
    make_chunks(chunk);
    CHECK(fx_ring_new(slots, chunk, &ring, &error) == 0, "%s", error.operation);
    posted = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    freed = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(pipe(alive) == 0);
    struct fx_options options = {.threads = (uint32_t)between(random, 1, 4), .chunk_bytes = chunk,
                                 .staging_bytes = slots * chunk, .mock = 1};
    CHECK(fx_engine_new(&options, &trainer, &error) == 0);
    CHECK(fx_relay_trainer(trainer, ring, posted, freed, alive[0], &error) == 0, "%s", error.operation);
    monitor = make_engine((uint32_t)between(random, 1, 3), chunk, 0);
    CHECK(fx_relay_monitor(monitor, ring, freed, &error) == 0);
    over = false;
    newest = summed = 0; /* an engine's numbers begin with 1, of every round anew */
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, monitor_main, NULL) == 0);
    train(random, until, counts);
    die(thread);
    check_idle(trainer);
    CHECK(fx_engine_close(monitor, 10 * SECOND) == 1);
    CHECK(fx_engine_close(trainer, 10 * SECOND) == 1);
    fx_engine_free(monitor);
    fx_engine_free(trainer);
    fx_ring_free(ring);
    fx_plan_free(chunks);
    free_model(&model);
    close(posted), close(freed), close(alive[0]);
}

int main(int argc, char **argv) {
    CHECK(argc == 4, "ring DIRECTORY SECONDS SEED");
    seed_of_run = strtoull(argv[3], NULL, 0);
    uint64_t random = seed_of_run, counts[2] = {0, 0};
    int64_t stop = now_ns() + strtoll(argv[2], NULL, 0) * SECOND;
    for (int i = 0; i < PAIRS; i++) snprintf(pairs[i].path, sizeof pairs[i].path, "%s/slot-%d", argv[1], i);
    while (now_ns() < stop) round_of(&random, now_ns() + SECOND / 2, counts);
    printf("%lu durable and right, %lu not\n", (unsigned long)counts[1], (unsigned long)counts[0]);
    CHECK(counts[1] > 0);
    return 0;
}
