/* What the engine's other files see of the CUDA path: device.c (a device's life), events.c (the order of events),
 * copier.c (copies), fetch.c (single values), pinned.c (memory). All is empty for an engine that opened no device. Lock held
 * unless said otherwise. */
#ifndef FX_CUDA_H
#define FX_CUDA_H

#include "core/internal.h"
#include "cuda/driver.h"

#define FX_MAX_DEVICES 64

/* ---- for checkpoint.c, fence.c, progress.c, engine.c ---- */

/* Lock NOT held: marks, on each of the sources' devices, the point of the caller's stream after which the
 * memory holds what is to be copied. *out goes to ck->layers[].devices. -EINVAL: a device without a stream, that
 * was not opened, or with a tensor that is not contiguous; -ENOMEM. What the driver refuses is in *error, and
 * its negative errno is returned. */
int fx_cuda_mark(struct fx_checkpoint *ck, struct fx_sources *sources, const struct fx_stream *streams,
                 uint32_t n_streams, struct ck_devices **out, struct fx_error *error);
/* The layer's pieces are there to be copied by the copier thread. */
int fx_cuda_enqueue(struct fx_checkpoint *ck, uint32_t layer);
void fx_cuda_drop(struct ck_devices *devices);
void fx_cuda_forget(struct fx_checkpoint *ck);
/* Whether `streams` has one for each of the layer's devices: then a copy that was issued is as good as done. */
bool fx_cuda_covers(const struct ck_devices *devices, const struct fx_stream *streams, uint32_t n_streams);
/* Makes the streams wait for all copies of the layer (-1: of all) that were issued and are not done. Gives the
 * lock up meanwhile. */
void fx_cuda_order(struct fx_engine *engine, int64_t layer, const struct fx_stream *streams, uint32_t n_streams);
void fx_cuda_wake(struct fx_engine *engine);
/* Lock NOT held: ends the threads, once nothing is in flight; then gives everything back. */
void fx_cuda_stop(struct fx_engine *engine);
void fx_cuda_free(struct fx_engine *engine);

/* ---- pinned.c; lock not held ---- */

/* One block of n chunks, near the device (its PCI address, as the driver writes it) where the machine tells. */
void *fx_pinned_new(uint64_t nbytes, const char *pci);

/* ---- mutations: each removes one wait or one record from the order of events, or breaks one rule of the driver, so that
 * a test can show that it would be missed. Only where tests define FX_MUTATIONS. ---- */

enum fx_mutation {
    NO_MUTATION,
    NO_EMIT_RECORD,  /* the training stream's point is never recorded */
    NO_COPY_WAIT,    /* the copy stream does not wait for it */
    NO_COPY_RECORD,  /* the end of a copy is never recorded */
    NO_FENCE_WAIT,   /* the training stream does not wait for the copy */
    NO_FENCE_ISSUED, /* the host does not wait until the copy was issued */
    NO_REAP_WAIT,    /* a writer takes the chunk before the copy is done */
    NO_HOST_WAIT,    /* a fence without streams returns when the copy was issued */
    NO_CANCEL_WAIT,  /* a cancel returns while copies still read the memory */
    EARLY_COPIED,    /* a checkpoint counts as copied while copies still read the memory */
    EARLY_REUSE,     /* an event is used anew, of either kind, while a fence is about to wait for it */
    TWO_ALLOCATIONS, /* neighbours in memory are copied as one range */
    HOST_ADDRESSES,  /* batches take host addresses, also where the device has others for that memory */
    NO_SOURCE_ORDER, /* a batch does not say in which order its sources are read */
    CALLERS_MODE,    /* calls are made in the caller's mode: captures forbid them */
    MODE_NOT_GIVEN_BACK, /* the caller's thread stays in our mode */
    NO_CONTEXT,      /* memory is unpinned in no context */
    SPINNING_WAIT,   /* a host wait spins */
    RECORD_IN_CAPTURE, /* `ready` is recorded on a stream that belongs to a graph */
    LOST_BY_CAPTURE, /* a wait that a capture refused counts as a device that is gone */
    MUTATIONS
};

#ifdef FX_MUTATIONS
extern int fx_mutation;
#define FX_KEEPS(mutation) (fx_mutation != (mutation))
#else
#define FX_KEEPS(mutation) 1
#endif

#endif
