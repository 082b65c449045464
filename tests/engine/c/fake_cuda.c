/* A CUDA driver for tests, without a device: a shared library with the entry points that csrc/driver.c looks up.
 *
 * It does what a device may do and a test cannot wait for: work runs late, in its own thread, in an order that
 * only streams and events fix; sometimes kernels overtake copies, sometimes copies kernels. What a copy will
 * write is filled with 0xDB until it runs, so that who reads it early reads poison. Device memory (fake_alloc)
 * faults when the host touches it.
 *
 * Order is also checked, whatever really ran first: each stream has a vector clock; records take it along, waits
 * merge it. A copy that reads what a kernel wrote without an order between the two, or a kernel that writes what
 * a copy may still read, is a violation. (Host waits order everything after them: one clock for all threads.)
 *
 * A "host stream" stands for a device whose kernels the host itself runs, at once: what waits there, waits now.
 *
 * CUDA_DEVICE_MAX_CONNECTIONS=1 puts the work of all streams into one queue, in the order of the calls, as such a
 * device does.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define DEVICES 4
#define STREAMS 64
#define REGIONS 4096
#define STACK 8

typedef int CUresult;
typedef unsigned long long CUdeviceptr;

enum { INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500 };

struct clock {
    uint64_t at[STREAMS];
};

/* One record of an event: later records of the same event are others. */
struct record {
    int refs;
    bool done;
    struct clock clock;
};

struct CUevent_st {
    int device;
    struct record *last; /* NULL: never recorded */
};

enum kind { COPY, WAIT, RECORD, KERNEL };

struct op {
    enum kind kind;
    struct op *next;
    uint64_t number; /* of the call */
    char *to, *from;
    size_t n;
    struct record *record;
    void (*kernel)(void *argument);
    void *argument;
};

struct CUstream_st {
    int index, device;
    bool host;
    struct op *head, *tail;
    struct clock clock;
};

/* Memory that kernels write and copies read. */
struct region {
    char *begin, *alias; /* alias: where the fake itself may touch it */
    size_t n;
    int writer;
    uint64_t written, read[STREAMS];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct CUstream_st streams[STREAMS];
static int n_streams;
static struct region regions[REGIONS];
static int n_regions;
static struct clock host;
static struct {
    char *begin;
    size_t n;
} pinned[1024];
static int n_pinned;
static uint64_t calls, fail_at, seed = 1, numbers;
static int fail_with, retained[DEVICES];
static bool fail_for_good, one_queue, copying, held;
static unsigned delay_us;
static int violations, devices = 2, pending_ops;
static char report[512];
static _Thread_local int stack[STACK], depth;
static _Thread_local bool relaxed; /* calls here are allowed while another thread captures a graph */
static bool capturing;

/* ---- bookkeeping; lock held ---- */

static uint64_t next_random(void) {
    uint64_t z = seed += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static void violation(const char *what, const void *where) {
    if (!violations++) snprintf(report, sizeof report, "%s (at %p)", what, where);
}

static void merge(struct clock *into, const struct clock *from) {
    for (int i = 0; i < STREAMS; i++)
        if (from->at[i] > into->at[i]) into->at[i] = from->at[i];
}

static struct region *region_of(const char *address) {
    for (int i = 0; i < n_regions; i++)
        if (address >= regions[i].begin && address < regions[i].begin + regions[i].n) return &regions[i];
    return NULL;
}

static char *alias_of(char *address) {
    struct region *region = region_of(address);
    return region ? region->alias + (address - region->begin) : address;
}

static void drop(struct record *record) {
    if (record && --record->refs == 0) free(record);
}

static struct op *enqueue(struct CUstream_st *stream, enum kind kind) {
    struct op *op = calloc(1, sizeof *op);
    op->kind = kind;
    op->number = ++numbers;
    *(stream->tail ? &stream->tail->next : &stream->head) = op;
    stream->tail = op;
    merge(&stream->clock, &host);
    stream->clock.at[stream->index]++;
    pending_ops++;
    pthread_cond_broadcast(&changed);
    return op;
}

static bool is_before(const struct CUstream_st *stream, int other, uint64_t time) {
    return stream->clock.at[other] >= time;
}

/* ---- the device's thread ---- */

static bool can_run(const struct CUstream_st *stream, uint64_t oldest) {
    const struct op *op = stream->head;
    if (!op || (one_queue && op->number != oldest)) return false;
    return (op->kind != WAIT || op->record->done) && (op->kind != COPY || !held);
}

/* A stream with work that may run now: any, or one that prefers kernels, or copies. */
static struct CUstream_st *choose(void) {
    struct CUstream_st *chosen = NULL;
    uint64_t policy = next_random() % 3, seen = 0, oldest = UINT64_MAX;
    for (int i = 0; i < n_streams; i++)
        if (streams[i].head && streams[i].head->number < oldest) oldest = streams[i].head->number;
    for (int i = 0; i < n_streams; i++) {
        if (!can_run(&streams[i], oldest)) continue;
        bool preferred = (policy == 1 && streams[i].head->kind == KERNEL) ||
                         (policy == 2 && streams[i].head->kind == COPY);
        if (preferred) return &streams[i];
        if (next_random() % ++seen == 0) chosen = &streams[i];
    }
    return chosen;
}

static void run(struct CUstream_st *stream) {
    struct op *op = stream->head;
    struct timespec pause = {0, delay_us ? (long)(next_random() % delay_us) * 1000 : 0};
    char *from = op->kind == COPY ? alias_of(op->from) : NULL;
    pthread_mutex_unlock(&lock);
    if (pause.tv_nsec) nanosleep(&pause, NULL);
    pthread_mutex_lock(&lock);
    size_t n = op->n;
    copying = op->kind == COPY;
    pthread_mutex_unlock(&lock);
    if (op->kind == COPY) memcpy(op->to, from, n);
    if (op->kind == KERNEL) op->kernel(op->argument);
    pthread_mutex_lock(&lock);
    copying = false;
    if (op->kind == RECORD) op->record->done = true;
    stream->head = op->next;
    if (!stream->head) stream->tail = NULL;
    drop(op->record);
    free(op);
    pending_ops--;
    pthread_cond_broadcast(&changed);
}

static void *device_main(void *unused) {
    pthread_mutex_lock(&lock);
    for (;;) {
        struct CUstream_st *stream = choose();
        if (stream) run(stream);
        else pthread_cond_wait(&changed, &lock);
    }
    return unused;
}

static void begin(void) {
    pthread_t thread;
    const char *connections = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
    one_queue = connections && !strcmp(connections, "1");
    for (int d = 0; d < DEVICES; d++) streams[n_streams++] = (struct CUstream_st){.index = d, .device = d};
    pthread_create(&thread, NULL, device_main, NULL);
    pthread_detach(thread);
}

/* A context that is gone copies nothing any more. */
static void forget_copies(void) {
    for (int s = 0; s < n_streams; s++)
        for (struct op *op = streams[s].head; op; op = op->next)
            if (op->kind == COPY) op->n = 0;
    while (copying) pthread_cond_wait(&changed, &lock);
}

/* Lock held on return, if it returns 0. */
static CUresult enter(void) {
    pthread_once(&once, begin);
    pthread_mutex_lock(&lock);
    calls++;
    if (!fail_at || calls < fail_at || (calls > fail_at && !fail_for_good)) return 0;
    if (fail_for_good) forget_copies();
    CUresult error = fail_with;
    pthread_mutex_unlock(&lock);
    return error;
}

static CUresult leave(CUresult r) {
    pthread_mutex_unlock(&lock);
    return r;
}

#define ENTER                                                                                                \
    do {                                                                                                     \
        CUresult failed = enter();                                                                           \
        if (failed) return failed;                                                                           \
    } while (0)

static int current(void) { return depth ? stack[depth - 1] : -1; }

static struct CUstream_st *stream_at(struct CUstream_st *handle) {
    if (handle) return handle;
    return current() < 0 ? NULL : &streams[current()];
}

/* ---- the driver's entry points ---- */

#define CU(name) static CUresult name

CU(cu_init)(unsigned flags) { return flags ? INVALID_VALUE : 0; }

CU(cu_version)(int *version) {
    *version = 12080;
    return 0;
}

CU(cu_error_name)(CUresult error, const char **name) {
    *name = error == 700   ? "CUDA_ERROR_ILLEGAL_ADDRESS"
            : error == 201 ? "CUDA_ERROR_INVALID_CONTEXT"
            : error == 400 ? "CUDA_ERROR_INVALID_HANDLE"
            : error == 4   ? "CUDA_ERROR_DEINITIALIZED"
                           : NULL;
    return *name ? 0 : INVALID_VALUE;
}

CU(cu_error_text)(CUresult error, const char **text) {
    *text = error == 700 ? "an illegal memory access was encountered" : "the fake driver was told to fail";
    return 0;
}

CU(cu_count)(int *count) {
    *count = devices;
    return 0;
}

CU(cu_device)(int *device, int ordinal) {
    ENTER;
    *device = ordinal;
    return leave(ordinal < devices ? 0 : 101);
}

CU(cu_pci)(char *text, int n, int device) {
    ENTER;
    snprintf(text, (size_t)n, "0000:%02X:00.0", device + 1);
    return leave(0);
}

CU(cu_retain)(void **context, int device) {
    ENTER;
    *context = (void *)(uintptr_t)(device + 1);
    retained[device]++;
    return leave(0);
}

CU(cu_release)(int device) {
    ENTER;
    retained[device]--;
    return leave(0);
}

CU(cu_push)(void *context) {
    ENTER;
    if (depth == STACK) return leave(INVALID_VALUE);
    stack[depth++] = (int)(uintptr_t)context - 1;
    return leave(0);
}

CU(cu_pop)(void **context) {
    pthread_mutex_lock(&lock); /* never fails: nobody could do anything about it */
    *context = NULL;
    if (depth) *context = (void *)(uintptr_t)(stack[--depth] + 1);
    return leave(*context ? 0 : INVALID_CONTEXT);
}

static struct CUstream_st *new_stream(int device, bool is_host) {
    int i = 0;
    while (i < n_streams && (i < DEVICES || streams[i].device >= 0)) i++;
    if (i == STREAMS) return NULL;
    if (i == n_streams) n_streams++;
    struct clock clock = streams[i].clock; /* its number may have been another's: times go on */
    streams[i] = (struct CUstream_st){.index = i, .device = device, .host = is_host, .clock = clock};
    return &streams[i];
}

CU(cu_stream_create)(struct CUstream_st **stream, unsigned flags) {
    ENTER;
    if (current() < 0) return leave(INVALID_CONTEXT);
    if (flags != 1) violation("a stream that waits for the default stream", NULL);
    *stream = new_stream(current(), false);
    return leave(*stream ? 0 : 2);
}

CU(cu_stream_destroy)(struct CUstream_st *stream) {
    ENTER;
    if (stream->head) violation("a stream was destroyed with work in it", stream);
    stream->device = -1;
    return leave(0);
}

CU(cu_stream_sync)(struct CUstream_st *handle) {
    ENTER;
    struct CUstream_st *stream = stream_at(handle);
    if (!stream) return leave(INVALID_CONTEXT);
    while (stream->head) pthread_cond_wait(&changed, &lock);
    merge(&host, &stream->clock);
    return leave(0);
}

CU(cu_stream_wait)(struct CUstream_st *handle, struct CUevent_st *event, unsigned flags) {
    ENTER;
    struct CUstream_st *stream = stream_at(handle);
    if (!stream || flags) return leave(stream ? INVALID_VALUE : INVALID_CONTEXT);
    struct record *record = event->last;
    if (!record) return leave(0); /* as the driver: nothing to wait for */
    record->refs++;
    merge(&stream->clock, &record->clock);
    if (stream->host) {
        while (!record->done) pthread_cond_wait(&changed, &lock);
        drop(record);
    } else {
        enqueue(stream, WAIT)->record = record;
    }
    return leave(0);
}

CU(cu_event_create)(struct CUevent_st **event, unsigned flags) {
    ENTER;
    if (current() < 0) return leave(INVALID_CONTEXT);
    if (!(flags & 2)) violation("an event that takes times", NULL);
    *event = calloc(1, sizeof **event);
    (*event)->device = current();
    return leave(0);
}

CU(cu_event_destroy)(struct CUevent_st *event) {
    ENTER;
    drop(event->last);
    free(event);
    return leave(0);
}

CU(cu_event_record)(struct CUevent_st *event, struct CUstream_st *handle) {
    ENTER;
    struct CUstream_st *stream = stream_at(handle);
    if (!stream) return leave(INVALID_CONTEXT);
    if (stream->device != event->device) return leave(INVALID_HANDLE);
    struct record *record = calloc(1, sizeof *record);
    record->refs = 2;
    drop(event->last);
    event->last = record;
    enqueue(stream, RECORD)->record = record;
    record->clock = stream->clock;
    return leave(0);
}

CU(cu_event_sync)(struct CUevent_st *event) {
    ENTER;
    if (capturing && !relaxed) violation("a host wait breaks the capture of another thread", event);
    struct record *record = event->last;
    if (record) {
        record->refs++;
        while (!record->done) pthread_cond_wait(&changed, &lock);
        merge(&host, &record->clock);
        drop(record);
    }
    return leave(0);
}

static bool is_pinned(const char *to, size_t n) {
    for (int i = 0; i < n_pinned; i++)
        if (to >= pinned[i].begin && to + n <= pinned[i].begin + pinned[i].n) return true;
    return false;
}

static void copy(struct CUstream_st *stream, char *to, char *from, size_t n) {
    struct op *op = enqueue(stream, COPY);
    op->to = to;
    op->from = from;
    op->n = n;
    if (!is_pinned(to, n)) violation("a copy into memory that is not pinned", to);
    memset(to, 0xDB, n);
    struct region *region = region_of(from);
    if (!region) return;
    if (from + n > region->begin + region->n) violation("a copy reads beyond its tensor", from);
    if (!is_before(stream, region->writer, region->written))
        violation("a copy reads what a kernel may not have written yet", from);
    region->read[stream->index] = stream->clock.at[stream->index];
}

CU(cu_copy)(void *to, CUdeviceptr from, size_t n, struct CUstream_st *handle) {
    ENTER;
    struct CUstream_st *stream = stream_at(handle);
    if (!stream) return leave(INVALID_CONTEXT);
    copy(stream, to, (char *)(uintptr_t)from, n);
    return leave(0);
}

CU(cu_batch)(CUdeviceptr *to, CUdeviceptr *from, size_t *n, size_t count, void *attributes, size_t *starts,
             size_t n_attributes, size_t *failed, struct CUstream_st *stream) {
    ENTER;
    if (!stream || !attributes || n_attributes != 1 || starts[0] || *(int *)attributes != 1)
        return leave(INVALID_VALUE);
    *failed = SIZE_MAX;
    for (size_t i = 0; i < count; i++)
        copy(stream, (char *)(uintptr_t)to[i], (char *)(uintptr_t)from[i], n[i]);
    return leave(0);
}

CU(cu_register)(void *memory, size_t n, unsigned flags) {
    ENTER;
    if (current() < 0) return leave(INVALID_CONTEXT);
    if (!(flags & 1)) violation("memory that is pinned for one context only", memory);
    if (n_pinned == sizeof pinned / sizeof *pinned) abort();
    pinned[n_pinned].begin = memory;
    pinned[n_pinned++].n = n;
    return leave(0);
}

CU(cu_unregister)(void *memory) {
    ENTER;
    for (int s = 0; s < n_streams; s++)
        for (struct op *op = streams[s].head; op; op = op->next)
            if (op->kind == COPY) violation("memory was unpinned under a copy", op->to);
    for (int i = 0; i < n_pinned; i++)
        if (pinned[i].begin == memory) pinned[i] = pinned[--n_pinned];
    return leave(0);
}

CU(cu_capture_mode)(int *mode) {
    int before = relaxed ? 2 : 0;
    relaxed = *mode == 2;
    *mode = before;
    return 0;
}

/* ---- how they are found ---- */

static void put(void **to, CUresult (*function)(void)) { memcpy(to, &function, sizeof *to); }

static CUresult lookup(const char *name, void **function, int version) {
    static const struct {
        const char *name;
        int since; /* asked for an older form, the driver would give another function */
        CUresult (*function)(void);
    } known[] = {
#define AT(name, since, f) {name, since, (CUresult(*)(void))(void *)f}
        AT("cuInit", 2000, cu_init),
        AT("cuDriverGetVersion", 2020, cu_version),
        AT("cuGetErrorName", 6000, cu_error_name),
        AT("cuGetErrorString", 6000, cu_error_text),
        AT("cuDeviceGetCount", 2000, cu_count),
        AT("cuDeviceGet", 2000, cu_device),
        AT("cuDeviceGetPCIBusId", 4010, cu_pci),
        AT("cuDevicePrimaryCtxRetain", 7000, cu_retain),
        AT("cuDevicePrimaryCtxRelease", 11000, cu_release),
        AT("cuCtxPushCurrent", 4000, cu_push),
        AT("cuCtxPopCurrent", 4000, cu_pop),
        AT("cuStreamCreate", 2000, cu_stream_create),
        AT("cuStreamDestroy", 4000, cu_stream_destroy),
        AT("cuStreamSynchronize", 2000, cu_stream_sync),
        AT("cuStreamWaitEvent", 3020, cu_stream_wait),
        AT("cuEventCreate", 2000, cu_event_create),
        AT("cuEventDestroy", 4000, cu_event_destroy),
        AT("cuEventRecord", 2000, cu_event_record),
        AT("cuEventSynchronize", 2000, cu_event_sync),
        AT("cuMemcpyDtoHAsync", 3020, cu_copy),
        AT("cuMemHostRegister", 6050, cu_register),
        AT("cuMemHostUnregister", 4000, cu_unregister),
        AT("cuThreadExchangeStreamCaptureMode", 10010, cu_capture_mode),
        AT("cuMemcpyBatchAsync", 12080, cu_batch),
#undef AT
    };
    if (getenv("FAKE_CUDA_OLD") && !strcmp(name, "cuMemcpyBatchAsync")) return NOT_FOUND;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name) && version == known[i].since) {
            put(function, known[i].function);
            return 0;
        }
    return NOT_FOUND;
}

EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    *status = 0;
    if (flags != 1) return INVALID_VALUE; /* the per-thread default stream is not torch's */
    return lookup(name, function, version);
}

/* ---- what tests say and ask ---- */

EXPORT void fake_configure(uint64_t new_seed, unsigned max_delay_us) {
    pthread_once(&once, begin);
    pthread_mutex_lock(&lock);
    seed = new_seed;
    delay_us = max_delay_us;
    pthread_mutex_unlock(&lock);
}

/* The nth call from now (1: the next) fails, and with `for_good` all after it. nth 0: no more. */
EXPORT void fake_fail(uint64_t nth, int error, int for_good) {
    pthread_mutex_lock(&lock);
    fail_at = nth ? calls + nth : 0;
    fail_with = error;
    fail_for_good = for_good;
    pthread_mutex_unlock(&lock);
}

/* Another thread captures a graph, as torch.cuda.graph does, in the driver's strictest mode. */
EXPORT void fake_capture(int on) {
    pthread_mutex_lock(&lock);
    capturing = on;
    pthread_mutex_unlock(&lock);
}

/* No copy runs until this is taken back. */
EXPORT void fake_hold(int hold) {
    pthread_mutex_lock(&lock);
    held = hold;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

EXPORT uint64_t fake_calls(void) {
    pthread_mutex_lock(&lock);
    uint64_t n = calls;
    pthread_mutex_unlock(&lock);
    return n;
}

/* Violations since the last question, and the first of them. */
EXPORT int fake_violations(char *text, size_t n) {
    pthread_mutex_lock(&lock);
    int found = violations;
    if (text && n) snprintf(text, n, "%s", found ? report : "");
    violations = 0;
    pthread_mutex_unlock(&lock);
    return found;
}

EXPORT struct CUstream_st *fake_stream(int device, int is_host) {
    pthread_once(&once, begin);
    pthread_mutex_lock(&lock);
    struct CUstream_st *stream = new_stream(device, is_host);
    pthread_mutex_unlock(&lock);
    return stream;
}

EXPORT int fake_retained(int device) {
    pthread_mutex_lock(&lock);
    int n = retained[device];
    pthread_mutex_unlock(&lock);
    return n;
}

EXPORT int fake_depth(void) { return depth; }

/* Device memory: the host faults on it, kernels get its alias. */
EXPORT char *fake_alloc(size_t n, char **alias) {
    size_t size = (n + 4096) / 4096 * 4096;
    int fd = memfd_create("fake-device", 0);
    if (fd < 0 || ftruncate(fd, (off_t)size)) abort();
    char *begin_ = mmap(NULL, size, PROT_NONE, MAP_SHARED, fd, 0);
    *alias = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    pthread_mutex_lock(&lock);
    if (n_regions == REGIONS || begin_ == MAP_FAILED) abort();
    regions[n_regions++] = (struct region){.begin = begin_, .alias = *alias, .n = size};
    pthread_mutex_unlock(&lock);
    return begin_;
}

EXPORT void fake_free_all(void) {
    pthread_mutex_lock(&lock);
    while (pending_ops) pthread_cond_wait(&changed, &lock);
    for (int i = 0; i < n_regions; i++) {
        munmap(regions[i].begin, regions[i].n);
        munmap(regions[i].alias, regions[i].n);
    }
    n_regions = 0;
    pthread_mutex_unlock(&lock);
}

/* A kernel that writes the memory from fake_alloc at `writes`. */
EXPORT void fake_launch(struct CUstream_st *stream, void (*kernel)(void *), void *argument, char *writes) {
    pthread_mutex_lock(&lock);
    struct op *op = enqueue(stream, KERNEL);
    op->kernel = kernel;
    op->argument = argument;
    struct region *region = region_of(writes);
    if (!is_before(stream, region->writer, region->written)) violation("a kernel writes what another one may", writes);
    for (int s = 0; s < STREAMS; s++)
        if (!is_before(stream, s, region->read[s])) violation("a kernel writes what a copy may still read", writes);
    region->writer = stream->index;
    region->written = stream->clock.at[stream->index];
    pthread_mutex_unlock(&lock);
}

/* Waits until the device has nothing to do, as torch.cuda.synchronize(). */
EXPORT void fake_synchronize(void) {
    pthread_mutex_lock(&lock);
    while (pending_ops) pthread_cond_wait(&changed, &lock);
    for (int i = 0; i < n_streams; i++) merge(&host, &streams[i].clock);
    pthread_mutex_unlock(&lock);
}
