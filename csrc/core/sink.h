/* Where chunks go once they are copied: one table of operations for each place. The rest of the engine knows no other
 * difference between them.
 *
 *     fx_disk      io/disk.c         files, which writers open, write and sync
 *     fx_nowhere   core/nowhere.c    a mock: all is done but open, write and sync
 *     trainer      monitor/relay.c   slots of shared memory, posted to the process that writes them
 *     monitor      monitor/relay.c   the disk, out of slots that came filled
 *
 * An engine begins with one of the first two; relay.c puts one of the others in its place before a checkpoint begins.
 * Errors: a negative errno, with *error filled in.
 */
#ifndef FX_SINK_H
#define FX_SINK_H

#include "core/internal.h"

struct fx_sink_ops {
    /* A chunk leaves in its staging buffer, which comes back later or never: a writer fills one for each chunk instead of
     * its own bounce buffer, and does no chunk that cannot have one. */
    bool takes_staging;

    /* Whether a checkpoint may begin now. Lock held, and kept until the checkpoint is in the engine's list. */
    int (*admit)(struct fx_engine *engine, struct fx_error *error);

    /* Gets ready what the checkpoint's chunks go to; what it opened before it failed, `close` closes. Lock not held; the
     * checkpoint is in no list yet. */
    int (*open)(struct fx_checkpoint *ck, struct fx_error *error);

    /* Takes a chunk of an active checkpoint: complete in `data`, its checksums in ck->crcs. Returns when nobody reads `data`
     * any more, unless that is the chunk's staging buffer and chunks[].staging was set to NULL: then it is the sink's. Lock
     * held on entry and on return; may be given up in between, so the checkpoint may have ended meanwhile. */
    int (*store)(struct writer *writer, struct fx_checkpoint *ck, uint32_t chunk, void *data, struct fx_error *error);

    /* Makes the chunks of a file durable, all of which were stored, and lets go of the file. Lock not held. */
    int (*sync)(struct writer *writer, struct fx_checkpoint *ck, struct ck_file *file, struct fx_error *error);

    /* Lets go of all that `open` got and `sync` did not let go of. Lock not held; nobody else works on the checkpoint. */
    void (*close)(struct fx_checkpoint *ck);

    /* A staging buffer is not needed any more: fx_staging_keep, unless buffers come from elsewhere. Lock held. */
    void (*give)(struct fx_engine *engine, void *buffer);

    /* Closes every descriptor of the engine, straight in the kernel. In a forked child, which holds the lock. */
    void (*close_in_child)(struct fx_engine *engine);

    /* Leaves the engine without anything of the sink's. Lock not held; no checkpoint in flight, no writer alive. Called
     * again, it does nothing. */
    void (*end)(struct fx_engine *engine);
};

extern const struct fx_sink_ops fx_disk, fx_nowhere;

/* Operations that relay.c's tables share with these. */
int fx_disk_open(struct fx_checkpoint *ck, struct fx_error *error);
int fx_disk_store(struct writer *writer, struct fx_checkpoint *ck, uint32_t chunk, void *data, struct fx_error *error);
int fx_disk_sync(struct writer *writer, struct fx_checkpoint *ck, struct ck_file *file, struct fx_error *error);
void fx_disk_close(struct fx_checkpoint *ck);
int fx_nowhere_open(struct fx_checkpoint *ck, struct fx_error *error);
int fx_nowhere_sync(struct writer *writer, struct fx_checkpoint *ck, struct ck_file *file, struct fx_error *error);
void fx_nowhere_close(struct fx_checkpoint *ck);
int fx_always_admit(struct fx_engine *engine, struct fx_error *error);

#endif
