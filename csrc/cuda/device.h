/* What the files of the CUDA path have in common. See events.c, Note [the order of events]. */
#ifndef FX_DEVICE_H
#define FX_DEVICE_H

#include "cuda/cuda.h"

/* Where a call failed: the first one that did. */
struct failure {
    const char *call;
    CUresult result;
};

/* An event goes back to its pool when nobody means its last record any more. */
enum event_kind { READY, COPIED, EVENT_KINDS };

struct event {
    CUevent handle;
    struct device *device;
    struct event *next; /* in the pool */
    uint64_t order;     /* of records on the copy stream */
    uint32_t refs;
    enum event_kind kind;
};

/* One piece's copies on one device, from their issue until the reaper has seen them done. */
struct flight {
    struct fx_checkpoint *ck;
    uint32_t piece;
    struct event *copied;
    struct flight *next;
    uint64_t nbytes;
    int64_t issued_ns;
};

struct device {
    struct fx_engine *engine;
    uint32_t ordinal;
    CUdevice handle;
    CUcontext context;
    CUstream stream;
    pthread_t reaper;
    bool reaper_began;
    struct failure reaper_failure; /* why it could not begin */
    struct flight *oldest, *newest;
    struct event *pools[EVENT_KINDS];
    struct fx_fetch *fetches;
    uint64_t order;
    bool one_by_one; /* the copier's: this device, or this driver, takes no batch */
    bool lost;
    struct fx_error why;
    int64_t last_end_ns; /* the reaper's: for the trace */
};

struct cuda {
    struct fx_driver driver;
    pthread_cond_t work; /* copier and reapers wait */
    pthread_t copier;
    struct device *devices[FX_MAX_DEVICES];
    char *memory; /* all staging, pinned */
    uint64_t nbytes;
    struct device *pinned_by;
    bool shared; /* the memory is the sink's, not ours */
    bool copying, stopping, stopped;
    uint32_t inside; /* threads in calls of fetch.c */
};

/* One layer of one checkpoint, on each of its devices. */
struct ck_devices {
    uint32_t n, next; /* next: pieces before it were taken */
    struct on_device {
        struct device *device;
        struct event *ready, *copied;
    } each[];
};

/* The device side of a checkpoint: its layers in the order of their emits. */
struct ck_cuda {
    uint32_t n, first;
    uint32_t *layers;
    uint8_t *parts; /* by piece: flights under way, and one while it is being issued */
};

/* ---- events.c; lock not held unless said otherwise ---- */

/* Whether the call succeeded. */
bool fx_cuda_tried(struct failure *failure, const char *call, CUresult result);
int fx_cuda_explain(struct device *device, struct failure failure, struct fx_error *error);

/* Note [what surrounds calls]: all calls of the driver about a device are made between these two, in any thread: with the
 * device's context, and in a mode in which graphs that are being captured elsewhere neither forbid them nor are broken by
 * them. Both are as before afterwards: the thread is the caller's. */
CUstreamCaptureMode fx_cuda_relax(const struct fx_driver *driver);
void fx_cuda_unrelax(const struct fx_driver *driver, CUstreamCaptureMode before);
bool fx_cuda_enter(struct device *device, CUstreamCaptureMode *before, struct failure *failure);
void fx_cuda_leave(struct device *device, CUstreamCaptureMode before);

/* The rest, but for fx_cuda_is_lost, between fx_cuda_enter and fx_cuda_leave. */

/* A host wait for the event (NULL: for all that is in the copy stream). */
CUresult fx_cuda_await(struct device *device, CUevent event);
/* After a call failed behind others: whether those have ended. If not, the device is lost. */
bool fx_cuda_drain(struct device *device);
bool fx_cuda_is_lost(struct device *device, struct fx_error *error);
/* NULL: *failure says why. */
struct event *fx_cuda_event(struct device *device, enum event_kind kind, struct failure *failure);
void fx_cuda_event_drop(struct event *event); /* lock held */
/* False where the stream belongs to a graph that is being captured: what is put into it now runs later, and other streams
 * that waited for it would be drawn into the graph. */
bool fx_cuda_runs(struct device *device, CUstream stream, struct failure *failure);
const struct fx_stream *fx_cuda_stream_of(const struct device *device, const struct fx_stream *streams, uint32_t n);

/* ---- copier.c: threads, as pthread_create takes them ---- */

void *fx_cuda_copier_main(void *engine);
void *fx_cuda_reaper_main(void *device);

/* ---- fetch.c ---- */

/* Waits for what is under way; without the device's context (`entered`) it is given up. */
void fx_cuda_end_fetches(struct device *device, bool entered);

#endif
