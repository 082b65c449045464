/* Training on a device that the fake driver plays (fake_cuda.c), with everything going on at once: several
 * checkpoints in flight, late copies, copies that overtake and are overtaken, two devices and the host, a stream
 * that is not the default one, slow writes, cancels, captures in other threads, devices that know pinned memory by another
 * address. Each fence is followed by a kernel that overwrites the layer, so an order that is missing is a violation that the
 * driver counts, or a wrong byte in the file. So is a call that a driver would refuse.
 *
 *     cuda DIRECTORY SECONDS SEED DRIVER [MUTATION]
 *
 * With a mutation (see csrc/cuda/cuda.h; needs FX_MUTATIONS) the program must fail; with 0, it only trains.
 */
#include "harness.h"

#include <dlfcn.h>

#ifdef FX_MUTATIONS
extern int fx_mutation;
#endif

#define DEVICES 2

struct kernel {
    char *to;
    size_t n;
    uint64_t step, layer, tensor;
};

static void (*fake_configure)(uint64_t, unsigned);
static void (*fake_fail)(uint64_t, int, int);
static uint64_t (*fake_calls)(void);
static int (*fake_violations)(char *, size_t);
static void *(*fake_stream)(int, int);
static int (*fake_retained)(int);
static int (*fake_depth)(void);
static int (*fake_relaxed)(void);
static void (*fake_capture)(int);
static void (*fake_capture_stream)(void *, int);
static void (*fake_host_pointers)(int, int);
static char *(*fake_alloc)(size_t, char **);
static void (*fake_free_all)(void);
static void (*fake_launch)(void *, void (*)(void *), void *, char *);
static void (*fake_synchronize)(void);

static struct model model;
static uint32_t device_of[MAX_LAYERS][MAX_TENSORS]; /* as in fx_view */
static char *alias_of[MAX_LAYERS][MAX_TENSORS];
static struct fx_stream streams[DEVICES];
static struct fx_engine *engine;
static const char *driver;

static void find(void *library, const char *name, void *to) {
    void *symbol = dlsym(library, name);
    CHECK(symbol, "%s", name);
    memcpy(to, &symbol, sizeof symbol);
}

static void load_fake(void) {
    void *library = dlopen(driver, RTLD_NOW);
    CHECK(library, "%s", dlerror());
#define FIND(name) find(library, #name, &name)
    FIND(fake_configure);
    FIND(fake_fail);
    FIND(fake_calls);
    FIND(fake_violations);
    FIND(fake_stream);
    FIND(fake_retained);
    FIND(fake_depth);
    FIND(fake_relaxed);
    FIND(fake_capture);
    FIND(fake_capture_stream);
    FIND(fake_host_pointers);
    FIND(fake_alloc);
    FIND(fake_free_all);
    FIND(fake_launch);
    FIND(fake_synchronize);
#undef FIND
}

static void check_order(void) {
    char text[512];
    int n = fake_violations(text, sizeof text);
    CHECK(!n, "%d violations of the order of events; the first: %s", n, text);
    CHECK(fake_depth() == 0, "a context was left on the stack");
    CHECK(fake_relaxed() == 0, "this thread's mode was left changed");
}

static void check_batches(void) {
    struct fx_statistics statistics;
    fx_engine_statistics(engine, &statistics);
    CHECK(statistics.unbatched_devices == 0, "the driver refused a batch");
}

/* Moves most of the model's tensors to a device, in the order of the file: neighbours there are allocations that touch. */
static void place_model(uint64_t *random) {
    for (uint32_t l = 0; l < model.n_layers; l++) {
        struct layer *layer = &model.layers[l];
        struct fx_view views[MAX_TENSORS];
        for (uint32_t odd = 0; odd < 2; odd++)
            for (uint32_t i = 0; i < layer->n; i++) {
                if (i % 2 != odd) continue;
                device_of[l][i] = (uint32_t)between(random, 0, 8) % 4 % (DEVICES + 1);
                if (l % 3 == 0) device_of[l][i] = 1; /* layers that lie on one device alone */
                if (device_of[l][i]) {
                    free(layer->tensors[i].data);
                    layer->tensors[i].data = fake_alloc(layer->tensors[i].nbytes, &alias_of[l][i]);
                }
                views[i] = (struct fx_view){.address = layer->tensors[i].data, .ndim = -1, .device = device_of[l][i]};
            }
        fx_sources_free(layer->sources);
        layer->sources = fx_sources_new(views, layer->n);
    }
}

static void free_placed_model(void) {
    for (uint32_t l = 0; l < model.n_layers; l++)
        for (uint32_t i = 0; i < model.layers[l].n; i++)
            if (device_of[l][i]) model.layers[l].tensors[i].data = NULL;
    fake_free_all();
    free_model(&model);
}

static void run_kernel(void *argument) {
    struct kernel *k = argument;
    fill_pattern(k->to, k->n, k->step, k->layer, k->tensor);
    free(k);
}

static void update_placed_layer(uint32_t l, uint64_t step) {
    for (uint32_t i = 0; i < model.layers[l].n; i++) {
        uint64_t n = model.layers[l].tensors[i].nbytes;
        if (!n) continue;
        if (!device_of[l][i]) {
            fill_pattern(model.layers[l].tensors[i].data, n, step, l, i);
            continue;
        }
        struct kernel *k = malloc(sizeof *k);
        *k = (struct kernel){alias_of[l][i], n, step, l, i};
        fake_launch((void *)(uintptr_t)streams[device_of[l][i] - 1].handle, run_kernel, k,
                    model.layers[l].tensors[i].data);
    }
}

static void fence_device(int64_t layer, bool on_host) {
    int64_t start = now_ns();
    int r = on_host ? fx_fence(engine, layer, 40 * SECOND)
                    : fx_fence_for(engine, layer, 40 * SECOND, streams, DEVICES);
    CHECK(r == 1 && now_ns() - start < 35 * SECOND, "the fence of layer %ld hangs", (long)layer);
}

static int emit(struct fx_checkpoint *ck, uint32_t l) {
    return fx_emit_from(ck, l, model.layers[l].sources, streams, DEVICES);
}

static void one_step(uint64_t step, struct fx_checkpoint *ck, uint64_t *random) {
    bool whole = between(random, 0, 6) == 0;
    if (whole) fence_device(-1, between(random, 0, 2));
    for (uint32_t l = 0; l < model.n_layers; l++) {
        if (!whole) fence_device(l, between(random, 0, 16) == 0);
        update_placed_layer(l, step);
        if (ck) CHECK(emit(ck, l) == 0);
    }
}

/* ---- single values ---- */

#define FETCHES 5

static struct fetched {
    struct fx_fetch *fetch;
    uint64_t nbytes, step, layer, tensor;
} fetches[FETCHES];

/* What was fetched is what was there then, also if it is asked for after the engine's end. */
static void end_fetch(struct fetched *f, bool wait) {
    struct fx_error error = {.operation = ""};
    if (!f->fetch) return;
    if (wait) {
        char *found = malloc(f->nbytes), *expected = malloc(f->nbytes);
        fill_pattern(expected, f->nbytes, f->step, f->layer, f->tensor);
        CHECK(fx_fetch_wait(f->fetch, found, &error) == 0, "%s %s", error.operation, error.path);
        CHECK(memcmp(found, expected, f->nbytes) == 0, "a value of step %lu", (unsigned long)f->step);
        free(found);
        free(expected);
    }
    fx_fetch_free(f->fetch);
    f->fetch = NULL;
}

/* A tensor on a device, as the kernels of this step leave it. */
static void fetch_one(struct fetched *f, uint64_t step, uint64_t *random) {
    struct fx_error error = {.operation = ""};
    uint32_t l = (uint32_t)between(random, 0, model.n_layers);
    for (uint32_t i = 0; i < model.layers[l].n; i++) {
        uint64_t n = model.layers[l].tensors[i].nbytes;
        if (!device_of[l][i] || !n) continue;
        *f = (struct fetched){NULL, n, step, l, i};
        int r = fx_fetch_new(engine, &streams[device_of[l][i] - 1], model.layers[l].tensors[i].data, n, &f->fetch, &error);
        CHECK(r == 0, "%s %s", error.operation, error.path);
        return;
    }
}

/* Nothing makes a checkpoint fail but giving it up. Returns whether it was durable. */
static bool finish(struct slot *slot, bool patiently) {
    struct fx_error error;
    bool begun = slot->ck;
    int r = end_slot(&model, slot, patiently, &error);
    CHECK(!begun || !patiently || r == 1, "a checkpoint failed: %s %s", r < 0 ? error.operation : "", r < 0 ? error.path : "");
    return r == 1;
}

static void train(struct slot slots[SLOTS], uint64_t *random, int64_t until, uint64_t counts[2]) {
    for (uint64_t step = 1; now_ns() < until; step++) {
        struct slot *slot = &slots[step % SLOTS];
        counts[finish(slot, true)]++;
        fx_io_delay(FX_PWRITE, (int64_t)between(random, 0, 3) * 100000);
        fx_io_delay(FX_COPY, (int64_t)between(random, 0, 3) * 50000);
        slot->step = step;
        slot->ck = between(random, 0, 5) ? begin(engine, &model, slot->path) : NULL;
        fake_capture((int)between(random, 0, 2));
        one_step(step, slot->ck, random);
        struct fetched *fetched = &fetches[between(random, 0, FETCHES)];
        end_fetch(fetched, between(random, 0, 4));
        fetch_one(fetched, step, random);
        check_order();
        if (slot->ck && between(random, 0, 6) == 0) {
            fx_cancel(slot->ck); /* nobody reads the memory now, if no other checkpoint does */
            for (int i = 0; i < SLOTS; i++)
                if (&slots[i] != slot) counts[finish(&slots[i], true)]++;
            for (uint32_t l = 0; l < model.n_layers; l++) update_placed_layer(l, step);
            check_order();
            counts[finish(slot, false)]++;
        }
    }
    for (int i = 0; i < SLOTS; i++) counts[finish(&slots[i], true)]++;
}

static void open_engine(uint32_t threads, uint64_t chunk, uint64_t staging) {
    struct fx_error error;
    engine = make_engine(threads, chunk, staging);
    CHECK(fx_cuda_open(engine, driver, &error) == 0, "%s %s", error.operation, error.path);
    for (uint32_t d = 0; d < DEVICES; d++) {
        CHECK(fx_cuda_device(engine, d, &error) == 0, "%s %s", error.operation, error.path);
        CHECK(fx_cuda_device(engine, d, &error) == 0);
    }
}

static void close_engine(void) {
    CHECK(fx_engine_close(engine, 30 * SECOND) == 1);
    fx_engine_free(engine);
    for (int d = 0; d < DEVICES; d++) CHECK(fake_retained(d) == 0, "the context of device %d is kept", d);
    check_order();
}

static void round_of(const char *directory, uint64_t *random, int64_t until, uint64_t counts[2]) {
    struct slot slots[SLOTS] = {0};
    uint64_t chunk = FX_BLOCK << between(random, 0, 3), stagings[] = {12, 24, 400};
    make_model(&model, random, (uint32_t)between(random, 1, 24), 3 * chunk, chunk);
    place_model(random);
    fake_configure(next_random(random), (unsigned)between(random, 0, 4) * 100);
    for (int d = 0; d < DEVICES; d++) fake_host_pointers(d, (int)between(random, 0, 2));
    fake_capture((int)between(random, 0, 2));
    open_engine((uint32_t)between(random, 1, 4), chunk, stagings[between(random, 0, 3)] * chunk);
    for (int i = 0; i < SLOTS; i++) snprintf(slots[i].path, sizeof slots[i].path, "%s/slot-%d", directory, i);
    train(slots, random, until, counts);
    check_idle(engine);
    check_batches();
    close_engine();
    for (int i = 0; i < FETCHES; i++) end_fetch(&fetches[i], between(random, 0, 2));
    fake_capture(0);
    fake_synchronize();
    free_placed_model();
}

/* Memory that is handed over once, as gradients are: whoever held it lets go when all is copied, and with no fence in between
 * it is somebody else's. */
static void test_passing_memory(const char *directory, uint64_t *random) {
    char path[512];
    struct fx_error error;
    snprintf(path, sizeof path, "%s/passing", directory);
    make_model(&model, random, 8, 2 * FX_BLOCK, FX_BLOCK);
    place_model(random);
    fake_configure(next_random(random), 300);
    open_engine(2, FX_BLOCK, 64 * FX_BLOCK);
    for (uint64_t step = 1; step <= 12; step++) {
        struct fx_checkpoint *ck = begin(engine, &model, path);
        for (uint32_t l = 0; l < model.n_layers; l++) {
            update_placed_layer(l, step);
            CHECK(emit(ck, l) == 0);
        }
        CHECK(fx_copied(ck, 20 * SECOND, &error) == 1);
        for (uint32_t l = 0; l < model.n_layers; l++) update_placed_layer(l, step + 1000);
        check_order();
        CHECK(fx_durable(ck, 20 * SECOND, &error) == 1);
        check_file(&model, ck, path, step);
        CHECK(fx_settled(ck, 20 * SECOND) == 1);
        fx_checkpoint_release(ck);
    }
    close_engine();
    fake_synchronize();
    free_placed_model();
}

/* A stream whose work is captured: what is emitted there fails its checkpoint, and nothing else, and no stream is drawn
 * into the graph. */
static void test_a_captured_stream(const char *directory, uint64_t *random) {
    char path[512];
    struct fx_error error;
    struct fx_fetch *fetch;
    char value[4];
    snprintf(path, sizeof path, "%s/captured", directory);
    make_model(&model, random, 6, 2 * FX_BLOCK, FX_BLOCK);
    place_model(random);
    open_engine(1, FX_BLOCK, 16 * FX_BLOCK);
    void *stream = (void *)(uintptr_t)streams[0].handle;
    for (int captured = 1; captured >= 0; captured--) {
        fake_capture(captured);
        fake_capture_stream(stream, captured);
        struct fx_checkpoint *ck = begin(engine, &model, path);
        for (uint32_t l = 0; l < model.n_layers; l++) CHECK(emit(ck, l) == 0);
        int r = fx_durable(ck, 20 * SECOND, &error);
        CHECK(r == (captured ? -EREMOTEIO : 1), "%d %s", r, r < 0 ? error.path : "");
        if (captured) CHECK(strstr(error.path, "CAPTURE_UNSUPPORTED"), "%s", error.path);
        if (captured) CHECK(fx_fetch_new(engine, &streams[0], value, sizeof value, &fetch, &error) == -EREMOTEIO);
        CHECK(fx_settled(ck, 20 * SECOND) == 1);
        fx_checkpoint_release(ck);
        check_order();
    }
    close_engine();
    fake_synchronize();
    free_placed_model();
}

/* A wait that a capture refuses is made again: neither the checkpoint nor the device is lost by it. */
static void test_refused_waits(const char *directory, uint64_t *random) {
    char path[512];
    struct fx_error error;
    snprintf(path, sizeof path, "%s/refused-waits", directory);
    make_model(&model, random, 6, 2 * FX_BLOCK, FX_BLOCK);
    place_model(random);
    fake_configure(1, 50);
    for (uint64_t nth = 1; nth < 60; nth += 3) {
        open_engine(2, FX_BLOCK, 16 * FX_BLOCK);
        fake_fail(nth, 900, 3);
        for (int turn = 0; turn < 2; turn++) {
            struct fx_checkpoint *ck = begin(engine, &model, path);
            one_step(nth, ck, random);
            fence_device(-1, true);
            int r = fx_durable(ck, 20 * SECOND, &error);
            CHECK(r == 1 || (!turn && r == -EREMOTEIO), "%d %s", r, r < 0 ? error.path : "");
            if (r == 1) check_file(&model, ck, path, nth);
            fake_fail(0, 0, 0);
            CHECK(fx_settled(ck, 20 * SECOND) == 1);
            fx_checkpoint_release(ck);
        }
        fx_engine_close(engine, 30 * SECOND);
        fx_engine_free(engine);
        fake_synchronize();
        fake_violations(NULL, 0);
    }
    free_placed_model();
}

/* Every call of the driver fails once, and once with all after it: the checkpoint fails, with the driver's name for
 * it, or is whole; training goes on; after a single failure the next checkpoint works again. */
static void test_each_call_fails(const char *directory, uint64_t *random, bool for_good) {
    char path[512];
    struct fx_error error;
    uint64_t failed = 0, good = 0;
    snprintf(path, sizeof path, "%s/failing", directory);
    make_model(&model, random, 6, 2 * FX_BLOCK, FX_BLOCK);
    place_model(random);
    fake_configure(1, 50);
    for (uint64_t nth = 1, calls = 2; nth <= calls; nth++) {
        open_engine(2, FX_BLOCK, 16 * FX_BLOCK);
        uint64_t before = fake_calls();
        fake_fail(nth, 700, for_good ? -1 : 1);
        struct fx_checkpoint *ck = begin(engine, &model, path);
        one_step(nth, ck, random);
        int r = fx_durable(ck, 20 * SECOND, &error);
        CHECK(r == 1 || (r == -EREMOTEIO && strstr(error.path, "CUDA_ERROR_ILLEGAL_ADDRESS")), "%d %s", r, error.path);
        if (r == 1) check_file(&model, ck, path, nth);
        *(r == 1 ? &good : &failed) += 1;
        fence_device(-1, true);
        calls = fake_calls() - before + 2;
        fake_fail(0, 0, 0);
        CHECK(fx_settled(ck, 20 * SECOND) == 1);
        fx_checkpoint_release(ck);
        check_idle(engine);
        if (!for_good) { /* a lost device stays lost; otherwise all goes on */
            ck = begin(engine, &model, path);
            one_step(nth, ck, random);
            r = fx_durable(ck, 20 * SECOND, &error);
            CHECK(r == 1 || r == -EREMOTEIO);
            fx_checkpoint_release(ck);
        }
        fx_engine_close(engine, 30 * SECOND);
        fx_engine_free(engine);
        fake_synchronize();
        fake_violations(NULL, 0); /* a wait that failed orders nothing, and the checkpoint failed for it */
    }
    CHECK(failed > 10 && good > 0, "%lu failed, %lu good", (unsigned long)failed, (unsigned long)good);
    free_placed_model();
}

/* Threads that start from now on want a stack that no machine has; 0: what they wanted before. */
static void stacks_of(size_t nbytes) {
    static pthread_attr_t usual, huge;
    if (nbytes) {
        CHECK(pthread_getattr_default_np(&usual) == 0 && pthread_attr_init(&huge) == 0);
        CHECK(pthread_attr_setstacksize(&huge, nbytes) == 0 && pthread_setattr_default_np(&huge) == 0);
    } else {
        CHECK(pthread_setattr_default_np(&usual) == 0);
    }
}

/* Opening a device fails at each call of the driver once, and where a thread cannot start: nothing is kept, and the next
 * attempt works. */
static void test_failures_at_opening(void) {
    struct fx_error error;
    for (uint64_t nth = 1; nth <= 10; nth++) {
        engine = make_engine(1, FX_BLOCK, 16 * FX_BLOCK);
        CHECK(fx_cuda_open(engine, driver, &error) == 0);
        fake_fail(nth, 700, 1);
        int r = fx_cuda_device(engine, 0, &error);
        fake_fail(0, 0, 0);
        CHECK(r == 0 || (r == -EREMOTEIO && fake_retained(0) == 0), "%d at call %d", r, (int)nth);
        for (uint32_t d = 0; d < DEVICES; d++) CHECK(fx_cuda_device(engine, d, &error) == 0);
        close_engine();
    }
    engine = make_engine(1, FX_BLOCK, 16 * FX_BLOCK);
    CHECK(fx_cuda_open(engine, driver, &error) == 0);
    for (uint32_t d = 0; d < DEVICES; d++) { /* first the copier, then a reaper */
        stacks_of((size_t)1 << 46);
        CHECK(fx_cuda_device(engine, d, &error) < 0 && strstr(error.operation, "thread"));
        CHECK(fake_retained((int)d) == 0);
        stacks_of(0);
        CHECK(fx_cuda_device(engine, d, &error) == 0);
    }
    close_engine();
}

/* What the engine must refuse. */
static void test_refusals(const char *directory, uint64_t *random) {
    char path[512];
    struct fx_error error;
    snprintf(path, sizeof path, "%s/refused", directory);
    make_model(&model, random, 2, FX_BLOCK, FX_BLOCK);
    place_model(random);
    open_engine(1, FX_BLOCK, 16 * FX_BLOCK);
    struct fx_checkpoint *ck = begin(engine, &model, path);
    if (model.layers[0].n) CHECK(fx_emit(ck, 0, model.layers[0].sources) == -EINVAL, "no stream was given");
    CHECK(fx_cuda_device(engine, 77, &error) == -EINVAL);
    CHECK(fx_cuda_device(engine, 3, &error) == -EREMOTEIO && !strcmp(error.operation, "cuDeviceGet"));
    fx_checkpoint_release(ck);
    close_engine();
    free_placed_model();
    engine = make_engine(1, FX_BLOCK, FX_BLOCK);
    CHECK(fx_cuda_open(engine, "/nowhere/libcuda.so", &error) == -ENOENT && !strcmp(error.path, "/nowhere/libcuda.so"));
    CHECK(fx_cuda_open(engine, driver, &error) == 0);
    CHECK(fx_cuda_device(engine, 0, &error) == -EINVAL, "one chunk of staging is too little");
    fx_engine_free(engine);
}

int main(int argc, char **argv) {
    CHECK(argc >= 5);
    uint64_t counts[2] = {0, 0}, random = seed_of_run = strtoull(argv[3], NULL, 10);
    driver = argv[4];
    load_fake();
    for (int d = 0; d < DEVICES; d++) {
        streams[d].device = (uint32_t)d;
        streams[d].handle = (uint64_t)(uintptr_t)fake_stream(d, 0);
    }
#ifdef FX_MUTATIONS
    if (argc > 5) fx_mutation = atoi(argv[5]);
#endif
    int64_t until = now_ns() + (int64_t)(atof(argv[2]) * (double)SECOND);
    while (now_ns() < until) {
        int64_t end = now_ns() + SECOND / 2;
        round_of(argv[1], &random, end < until ? end : until, counts);
    }
    test_passing_memory(argv[1], &random);
    test_a_captured_stream(argv[1], &random);
    test_refused_waits(argv[1], &random);
    printf("%lu durable, %lu not\n", (unsigned long)counts[1], (unsigned long)counts[0]);
    CHECK(counts[1] > 2, "too little was tested");
    if (argc > 5) return 0;
    test_refusals(argv[1], &random);
    test_failures_at_opening();
    test_each_call_fails(argv[1], &random, false);
    test_each_call_fails(argv[1], &random, true);
    return 0;
}
