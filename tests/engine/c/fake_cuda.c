/* A CUDA driver for tests, without a device: a shared library with the entry points that csrc/cuda/driver.c looks up.
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
 * What a driver refuses is refused here: a copy over two allocations, which touch here where they can; a call without a
 * context, or in another device's; a call that a capture forbids, in a thread that is not relaxed; what draws a stream
 * into a graph or a graph's work out of it; unknown flags and fields. On devices without "host pointers"
 * (fake_host_pointers; FAKE_CUDA_HOST_POINTERS=0) registered memory has no address of its own in a batch: one that has
 * ends the context, as an illegal access does. What a driver would bear, but slowly or with luck, is a violation too.
 *
 * FAKE_CUDA_OLD=1: no batches. FAKE_CUDA_NULL=cuName: it is searched with success, and not found.
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
#define STREAMS 256
#define REGIONS 4096
#define ARENA (256u << 20)
#define STACK 8

typedef int CUresult;
typedef unsigned long long CUdeviceptr;

enum {
    INVALID_VALUE = 1,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907
};

enum { BLOCKING_SYNC = 1, NO_TIMING = 2 }; /* of events */

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
    unsigned flags;
    bool captured; /* its last record belongs to a graph */
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
    bool owned; /* `from` is a copy made for this op alone */
};

struct CUstream_st {
    int index, device;
    bool host, capturing;
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
static char *arena, *arena_alias; /* allocations lie in it one behind the other */
static size_t arena_used;
static struct {
    char *begin;
    size_t n;
    int device;
} pinned[1024];
static int n_pinned;
static uint64_t calls, batches, fail_at, seed = 1, numbers;
static int fail_with, fail_times, retained[DEVICES]; /* fail_times < 0: for good */
static bool no_host_pointers[DEVICES], one_queue, copying, held;
static unsigned delay_us;
static int violations, devices = 2, pending_ops;
static char report[512];

/* Of each thread. In the thread's static block: what a sanitizer believes to know of blocks of libraries that are opened late
 * depends on the heap, and ends it where it is wrong. */
#define PER_THREAD static _Thread_local __attribute__((tls_model("initial-exec")))
PER_THREAD int stack[STACK], depth;
PER_THREAD bool relaxed; /* calls here are allowed while another thread captures a graph */
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
    char *from = op->kind != COPY || op->owned ? op->from : alias_of(op->from);
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
    if (op->owned) free(op->from);
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
    const char *pointers = getenv("FAKE_CUDA_HOST_POINTERS");
    one_queue = connections && !strcmp(connections, "1");
    for (int d = 0; d < DEVICES; d++) no_host_pointers[d] = pointers && !strcmp(pointers, "0");
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
    if (!fail_at || calls < fail_at || (fail_times >= 0 && calls >= fail_at + (uint64_t)fail_times)) return 0;
    if (fail_times < 0) forget_copies();
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

/* Lock held. The stream, in the context of its device; else *error. */
static struct CUstream_st *stream_at(struct CUstream_st *handle, CUresult *error) {
    *error = INVALID_CONTEXT;
    if (current() < 0) {
        violation("a call without a context", handle);
        return NULL;
    }
    if (!handle) return &streams[current()];
    if (handle->device == current()) return handle;
    violation("a call in the context of another device", handle);
    return NULL;
}

#define STREAM(handle)                                                                                       \
    CUresult no_stream;                                                                                      \
    struct CUstream_st *stream = stream_at(handle, &no_stream);                                              \
    if (!stream) return leave(no_stream)

/* Lock held. Unsafe calls are those that are no part of a stream's work: a capture in another thread, or in this one, forbids
 * them unless this thread is relaxed, and is broken by them. */
static bool is_forbidden(const char *what) {
    if (!capturing || relaxed) return false;
    violation(what, NULL);
    return true;
}

#define UNSAFE(name)                                                                                         \
    if (is_forbidden(name " breaks a capture")) return leave(CAPTURE_UNSUPPORTED)

#define IN_CONTEXT(device)                                                                                   \
    if (current() < 0 || ((device) >= 0 && current() != (device))) {                                         \
        violation(current() < 0 ? "a call without a context" : "a call in the context of another device", NULL); \
        return leave(INVALID_CONTEXT);                                                                       \
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
            : error == 1   ? "CUDA_ERROR_INVALID_VALUE"
            : error == 900 ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
            : error == 905 ? "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"
            : error == 907 ? "CUDA_ERROR_CAPTURED_EVENT"
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
    if (ordinal < 0 || ordinal >= devices) return leave(INVALID_DEVICE);
    *device = ordinal;
    return leave(0);
}

CU(cu_attribute)(int *value, int attribute, int device) {
    ENTER;
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    if (attribute != 91) return leave(INVALID_VALUE);
    *value = !no_host_pointers[device];
    return leave(0);
}

CU(cu_pci)(char *text, int n, int device) {
    ENTER;
    if (device < 0 || device >= devices) return leave(INVALID_DEVICE);
    snprintf(text, (size_t)n, "0000:%02X:00.0", device + 1);
    return leave(0);
}

CU(cu_retain)(void **context, int device) {
    ENTER;
    UNSAFE("cuDevicePrimaryCtxRetain");
    *context = (void *)(uintptr_t)(device + 1);
    retained[device]++;
    return leave(0);
}

CU(cu_release)(int device) {
    ENTER;
    UNSAFE("cuDevicePrimaryCtxRelease");
    if (!retained[device]) violation("a context is released that was not retained", NULL);
    else retained[device]--;
    return leave(0);
}

CU(cu_push)(void *context) {
    ENTER;
    if (depth == STACK || !context) return leave(context ? INVALID_VALUE : INVALID_CONTEXT);
    if (!retained[(int)(uintptr_t)context - 1]) violation("a context that nobody retains is made current", context);
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
    UNSAFE("cuStreamCreate");
    IN_CONTEXT(-1);
    if (flags & ~1u) return leave(INVALID_VALUE);
    if (flags != 1) violation("a stream that waits for the default stream", NULL);
    *stream = new_stream(current(), false);
    return leave(*stream ? 0 : 2);
}

CU(cu_stream_destroy)(struct CUstream_st *handle) {
    ENTER;
    UNSAFE("cuStreamDestroy");
    STREAM(handle);
    if (stream->head) violation("a stream was destroyed with work in it", stream);
    stream->device = -1;
    return leave(0);
}

CU(cu_stream_sync)(struct CUstream_st *handle) {
    ENTER;
    UNSAFE("cuStreamSynchronize");
    STREAM(handle);
    if (stream->capturing) return leave(CAPTURE_UNSUPPORTED);
    while (stream->head) pthread_cond_wait(&changed, &lock);
    merge(&host, &stream->clock);
    return leave(0);
}

CU(cu_is_capturing)(struct CUstream_st *handle, int *status) {
    ENTER;
    STREAM(handle);
    *status = stream->capturing;
    return leave(0);
}

CU(cu_stream_wait)(struct CUstream_st *handle, struct CUevent_st *event, unsigned flags) {
    ENTER;
    STREAM(handle);
    if (flags) return leave(INVALID_VALUE);
    if (event->captured != stream->capturing) {
        violation(event->captured ? "a stream is drawn into a graph" : "a graph waits for what is outside of it", stream);
        return leave(CAPTURE_ISOLATION);
    }
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
    UNSAFE("cuEventCreate");
    IN_CONTEXT(-1);
    if (flags & ~7u || (flags & 4 && !(flags & NO_TIMING))) return leave(INVALID_VALUE);
    if (!(flags & NO_TIMING)) violation("an event that takes times", NULL);
    *event = calloc(1, sizeof **event);
    (*event)->device = current();
    (*event)->flags = flags;
    return leave(0);
}

CU(cu_event_destroy)(struct CUevent_st *event) {
    ENTER;
    UNSAFE("cuEventDestroy");
    IN_CONTEXT(event->device);
    drop(event->last);
    free(event);
    return leave(0);
}

CU(cu_event_record)(struct CUevent_st *event, struct CUstream_st *handle) {
    ENTER;
    STREAM(handle);
    if (stream->device != event->device) return leave(INVALID_HANDLE);
    drop(event->last);
    event->last = NULL;
    event->captured = stream->capturing;
    if (stream->capturing) return leave(0); /* a node of the graph: nothing is recorded now */
    struct record *record = calloc(1, sizeof *record);
    record->refs = 2;
    event->last = record;
    enqueue(stream, RECORD)->record = record;
    record->clock = stream->clock;
    return leave(0);
}

CU(cu_event_sync)(struct CUevent_st *event) {
    ENTER;
    UNSAFE("cuEventSynchronize");
    IN_CONTEXT(event->device);
    if (event->captured) return leave(CAPTURED_EVENT);
    if (!(event->flags & BLOCKING_SYNC)) violation("a host wait that spins", event);
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

/* Lock held. Does it lie in one allocation? Memory that is not from fake_alloc is an allocation of its own. */
static bool is_one_allocation(const char *from, size_t n) {
    struct region *region = region_of(from);
    if (region) return from + n <= region->begin + region->n;
    return from + n <= arena || from >= arena + ARENA;
}

static void copy(struct CUstream_st *stream, char *to, char *from, size_t n) {
    struct region *region = region_of(from);
    struct op *op = enqueue(stream, COPY);
    op->to = to;
    op->from = from;
    op->n = n;
    if (stream->host) { /* it runs now; only its end is late */
        op->owned = true;
        op->from = memcpy(malloc(n), alias_of(from), n);
    }
    if (!is_pinned(to, n)) violation("a copy into memory that is not pinned", to);
    memset(to, 0xDB, n);
    if (!region) return;
    if (!is_before(stream, region->writer, region->written))
        violation("a copy reads what a kernel may not have written yet", from);
    region->read[stream->index] = stream->clock.at[stream->index];
}

CU(cu_copy)(void *to, CUdeviceptr from, size_t n, struct CUstream_st *handle) {
    ENTER;
    STREAM(handle);
    if (!n || !is_one_allocation((char *)(uintptr_t)from, n)) return leave(INVALID_VALUE);
    if (stream->capturing) violation("a copy becomes part of a graph", to);
    copy(stream, to, (char *)(uintptr_t)from, n);
    return leave(0);
}

/* As CUmemcpyAttributes. */
struct attributes {
    int order, from_type, from_id, to_type, to_id;
    unsigned flags;
};

CU(cu_batch)(CUdeviceptr *to, CUdeviceptr *from, size_t *n, size_t count, struct attributes *attributes, size_t *starts,
             size_t n_attributes, size_t *failed, struct CUstream_st *handle) {
    ENTER;
    *failed = SIZE_MAX;
    if ((uintptr_t)handle <= 2) return leave(INVALID_VALUE); /* not in a default stream */
    STREAM(handle);
    if (!count || !attributes || n_attributes != 1 || starts[0]) return leave(INVALID_VALUE);
    if (attributes->order < 1 || attributes->order > 3 || attributes->flags & ~1u) return leave(INVALID_VALUE);
    if (attributes->order != 1) violation("a batch reads out of the stream's order", NULL);
    if (attributes->from_type || attributes->from_id || attributes->to_type || attributes->to_id)
        violation("a hint for memory that has a fixed place", NULL);
    for (size_t i = 0; i < count; i++) {
        if (n[i] && is_one_allocation((char *)(uintptr_t)from[i], n[i])) continue;
        *failed = i;
        return leave(INVALID_VALUE);
    }
    if (no_host_pointers[stream->device]) { /* the device finds nothing at these addresses: the context is gone */
        violation("a batch copies to a host address that is none of the device's", (void *)(uintptr_t)to[0]);
        fail_at = calls;
        fail_with = ILLEGAL_ADDRESS;
        fail_times = -1;
        return leave(0);
    }
    batches++;
    for (size_t i = 0; i < count; i++)
        copy(stream, (char *)(uintptr_t)to[i], (char *)(uintptr_t)from[i], n[i]);
    return leave(0);
}

CU(cu_register)(void *memory, size_t n, unsigned flags) {
    ENTER;
    UNSAFE("cuMemHostRegister");
    IN_CONTEXT(-1);
    if (flags & ~15u || !n || is_pinned(memory, 1)) return leave(flags & ~15u || !n ? INVALID_VALUE : 712);
    if (!(flags & 1)) violation("memory that is pinned for one context only", memory);
    if (n_pinned == sizeof pinned / sizeof *pinned) abort();
    pinned[n_pinned].begin = memory;
    pinned[n_pinned].device = current();
    pinned[n_pinned++].n = n;
    return leave(0);
}

CU(cu_unregister)(void *memory) {
    ENTER;
    UNSAFE("cuMemHostUnregister");
    for (int i = 0; i < n_pinned; i++) {
        if (pinned[i].begin != memory) continue;
        IN_CONTEXT(pinned[i].device);
        for (int s = 0; s < n_streams; s++)
            for (struct op *op = streams[s].head; op; op = op->next)
                if (op->kind == COPY && op->to >= pinned[i].begin && op->to < pinned[i].begin + pinned[i].n)
                    violation("memory was unpinned under a copy", op->to);
        pinned[i] = pinned[--n_pinned];
        return leave(0);
    }
    return leave(713);
}

CU(cu_capture_mode)(int *mode) {
    if (*mode < 0 || *mode > 2) return INVALID_VALUE;
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
        AT("cuDeviceGetAttribute", 2000, cu_attribute),
        AT("cuDeviceGetPCIBusId", 4010, cu_pci),
        AT("cuDevicePrimaryCtxRetain", 7000, cu_retain),
        AT("cuDevicePrimaryCtxRelease", 11000, cu_release),
        AT("cuCtxPushCurrent", 4000, cu_push),
        AT("cuCtxPopCurrent", 4000, cu_pop),
        AT("cuStreamCreate", 2000, cu_stream_create),
        AT("cuStreamDestroy", 4000, cu_stream_destroy),
        AT("cuStreamSynchronize", 2000, cu_stream_sync),
        AT("cuStreamWaitEvent", 3020, cu_stream_wait),
        AT("cuStreamIsCapturing", 10000, cu_is_capturing),
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
    const char *null = getenv("FAKE_CUDA_NULL");
    *function = NULL;
    if (null && !strcmp(name, null)) return 0;
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

/* The nth call from now (1: the next) fails, and so many in all; times < 0: all after it. nth 0: no more. */
EXPORT void fake_fail(uint64_t nth, int error, int times) {
    pthread_mutex_lock(&lock);
    fail_at = nth ? calls + nth : 0;
    fail_with = error;
    fail_times = times;
    pthread_mutex_unlock(&lock);
}

/* Another thread captures a graph, as torch.cuda.graph does, in the driver's strictest mode. */
EXPORT void fake_capture(int on) {
    pthread_mutex_lock(&lock);
    capturing = on;
    pthread_mutex_unlock(&lock);
}

/* The work of this stream is captured as a graph, from now until it is not. */
EXPORT void fake_capture_stream(struct CUstream_st *stream, int on) {
    pthread_mutex_lock(&lock);
    stream->capturing = on;
    pthread_mutex_unlock(&lock);
}

/* Has registered memory the same address on the device? */
EXPORT void fake_host_pointers(int device, int same) {
    pthread_once(&once, begin);
    pthread_mutex_lock(&lock);
    no_host_pointers[device] = !same;
    pthread_mutex_unlock(&lock);
}

/* A call of torch's runtime that waits, in this thread. Without a context it makes one, on device 0, whatever the process
 * uses; it waits for a capture's end as badly as the driver's own does; and it spins. */
EXPORT void fake_runtime_wait(void) {
    pthread_mutex_lock(&lock);
    is_forbidden("a runtime's wait breaks a capture");
    if (current() < 0) violation("a runtime's call makes a context on device 0", NULL);
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

/* Batches of copies since the last question. */
EXPORT int fake_batches(void) {
    pthread_mutex_lock(&lock);
    int n = (int)batches;
    batches = 0;
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

/* Of this thread: how many contexts are on its stack; whether captures elsewhere leave it alone. */
EXPORT int fake_depth(void) { return depth; }
EXPORT int fake_relaxed(void) { return relaxed; }

/* Device memory: the host faults on it, kernels get its alias. It begins where the allocation before it ends: two tensors'
 * memory may touch on a device, too. */
EXPORT char *fake_alloc(size_t n, char **alias) {
    pthread_mutex_lock(&lock);
    if (!arena) {
        int fd = memfd_create("fake-device", 0);
        if (fd < 0 || ftruncate(fd, ARENA)) abort();
        arena = mmap(NULL, ARENA, PROT_NONE, MAP_SHARED, fd, 0);
        arena_alias = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    if (n_regions == REGIONS || arena_used + n > ARENA || arena == MAP_FAILED || arena_alias == MAP_FAILED) abort();
    char *begin_ = arena + arena_used;
    *alias = arena_alias + arena_used;
    arena_used += n;
    regions[n_regions++] = (struct region){.begin = begin_, .alias = *alias, .n = n};
    pthread_mutex_unlock(&lock);
    return begin_;
}

EXPORT void fake_free_all(void) {
    pthread_mutex_lock(&lock);
    while (pending_ops) pthread_cond_wait(&changed, &lock);
    n_regions = 0;
    arena_used = 0;
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
