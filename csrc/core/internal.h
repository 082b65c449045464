/* An engine and its checkpoints, as the files that work on them see them. Note [the lock]:
 *
 * One mutex per engine guards every field below that is not immutable or atomic. It is held for bookkeeping
 * only: never while copying, checksumming, or in a system call that may wait for the disk.
 *
 * Note [who may touch what without the lock]: a piece that is TAKEN belongs to the thread that took it; a
 * chunk that is `taken` belongs to its writer; the descriptors of a checkpoint may be used by a thread that
 * counts in `working`.
 */
#ifndef FX_INTERNAL_H
#define FX_INTERNAL_H

#include "core/plan.h"
#include "core/system.h"

/* ---- one checkpoint: checkpoint.c ---- */

enum state { ACTIVE, DURABLE, FAILED, CANCELLED };
/* Of an emitted layer; DONE also says "dropped". ISSUED: still TAKEN, by a device's stream. */
enum piece_state { IDLE, TAKEN, DONE, ISSUED };
enum sync_state { UNSYNCED, SYNC_TAKEN, SYNCED };

struct ck_file {
    int fd; /* -1: not open */
    atomic_bool direct;
    char *path;
    struct fx_file_id waited; /* what it was when the caller knew what it holds; inode 0: not known */
    bool touched;             /* it is not that any more */
    uint64_t device, inode;
    uint32_t chunks_left;
    enum sync_state sync;
};

struct ck_chunk {
    uint32_t layers_left; /* pieces whose layer was not emitted */
    uint32_t helpers;     /* who is copying pieces of it into `staging`: fences, devices */
    uint32_t device_left; /* emitted pieces that are a device's to copy and were not taken */
    uint32_t next_ready;
    bool taken;    /* by a writer; never given back */
    bool whole;    /* `staging` came complete, from another process: nothing to copy or checksum */
    void *staging; /* buffer that holds the pieces which are DONE */
};

struct ck_devices; /* cuda/device.h */
struct ck_cuda;
struct cuda;
struct fx_sink_ops; /* sink.h */

struct ck_layer {
    struct fx_sources *sources;
    struct ck_devices *devices; /* NULL: all in host memory, else the copier thread copies it */
    bool emitted;
    uint32_t left; /* emitted pieces not DONE */
};

struct fx_checkpoint {
    struct fx_engine *engine;
    uint64_t id; /* unique in its engine, ascending */
    int at;      /* the directory that its files are opened in; used in `open` only */
    struct fx_checkpoint *next, *previous; /* in the engine's list, oldest first, until settled */
    struct fx_plan *plan;
    enum state state;
    bool settled;  /* over, descriptors closed, out of the list */
    bool released; /* by the caller: freed once settled */
    struct fx_error error;
    struct ck_file *files;
    struct ck_chunk *chunks;
    struct ck_layer *layers;
    uint8_t *pieces; /* enum piece_state */
    uint32_t *crcs;  /* all of the plan's */
    uint32_t *known; /* of each chunk, one of its checksums */
    uint8_t *has_known;
    struct ck_cuda *cuda; /* NULL: no layer of it is on a device */
    uint32_t ready_head, ready_tail;
    uint32_t emitted;     /* layers */
    uint32_t left;        /* emitted pieces not DONE */
    uint32_t taken;       /* pieces TAKEN: threads are reading the caller's memory */
    uint32_t working;     /* threads with a job of this checkpoint */
    uint32_t chunks_left; /* not written */
    uint32_t syncs_waiting, files_left;
};

/* All with the lock held. */
void fx_take_piece(struct fx_checkpoint *ck, uint32_t piece);
void fx_finish_piece(struct fx_checkpoint *ck, uint32_t piece);
/* Who copied the piece into its chunk's staging buffer, counted in `helpers`, is done with it. The checkpoint may be gone
 * afterwards. */
void fx_end_help(struct fx_checkpoint *ck, uint32_t piece);
void fx_push_ready(struct fx_checkpoint *ck, uint32_t chunk);
uint32_t fx_pop_ready(struct fx_checkpoint *ck); /* NOTHING if there is none that no fence is working on */
void fx_chunk_written(struct fx_checkpoint *ck, uint32_t chunk);
void fx_check_durable(struct fx_checkpoint *ck);
/* Ends an ACTIVE checkpoint as FAILED or CANCELLED and drops what no thread has taken. */
void fx_give_up(struct fx_checkpoint *ck, enum state state, const char *operation, const char *path,
                int64_t offset, int err);
void fx_fail(struct fx_checkpoint *ck, const struct fx_error *error); /* gives it up as FAILED */
/* If it is over and nobody works on it: out of the list, and freed if the caller released it. */
void fx_settle(struct fx_checkpoint *ck);
/* Frees the memory of one that is settled, or that could not begin. No lock needed. */
void fx_checkpoint_destroy(struct fx_checkpoint *ck);
bool fx_has_open_files(const struct fx_checkpoint *ck);

/* ---- copying: copy.c; no lock: the pieces are the caller's ---- */

/* Bytes of one tensor that belong to a piece, and their place in the chunk. */
struct part {
    const struct fx_view *view;
    uint64_t itemsize, from, nbytes;
    uint32_t at;
};

/* The piece's next part from extent number *next of its chunk on (0 to start), which is moved behind it; false: there is
 * none. */
bool fx_next_part(const struct fx_checkpoint *ck, uint32_t piece, uint32_t *next, struct part *out);
/* Copies what of the piece is in host memory to its place in the chunk's buffer. */
void fx_copy_piece(const struct fx_checkpoint *ck, uint32_t piece, char *to);
/* Completes the chunk in `to`: copies its pieces that are TAKEN, adds header and zeros. Its checksums go to ck->crcs. */
void fx_fill_chunk(struct fx_checkpoint *ck, uint32_t chunk, char *to);

/* Tests can have each copy take longer (csrc/testing). */
#ifdef FX_TESTING
void fx_copy_delay(void);
#else
static inline void fx_copy_delay(void) {}
#endif

/* Whether the disk holds the chunk's bytes already. */
static inline bool fx_is_known(const struct fx_checkpoint *ck, uint32_t index) {
    const struct chunk *chunk = &ck->plan->chunks[index];
    const uint32_t *crcs = ck->crcs + fx_first_sum(ck->plan, chunk);
    if (ck->files[chunk->file].touched || !ck->has_known[index]) return false;
    return ck->known[index] == fx_crc32c(0, crcs, fx_sums_of(ck->plan, chunk) * sizeof *crcs);
}

/* ---- staging buffers: staging.c; lock held ---- */

struct staging {
    void **free; /* buffers not in use */
    uint32_t n_free, n_made, limit;
    uint64_t used_bytes, peak_bytes;
    /* Of a sink that takes_staging, else 0: */
    uint32_t reserve; /* buffers that fences and devices leave to writers */
    uint32_t away;    /* buffers that it has, and will give back */
    char *block;      /* the memory that all `limit` buffers lie in, one behind the other */
};

bool fx_staging_has_room(const struct fx_engine *engine);
void *fx_staging_take(struct fx_engine *engine); /* NULL: none left, or no memory */
void fx_staging_give(struct fx_engine *engine, void *buffer);
void fx_staging_keep(struct fx_engine *engine, void *buffer); /* it is the engine's, and free again */

/* ---- the engine: engine.c ---- */

struct writer {
    struct fx_engine *engine;
    pthread_t thread;
    void *bounce;
};

/* What went to the disk, and the time it took. */
struct written {
    _Atomic uint64_t bytes, ns;
};

/* A condition, and how many threads wait for it. */
struct waits {
    pthread_cond_t changed;
    uint32_t waiters;
};

struct fx_engine {
    pthread_mutex_t lock;
    pthread_cond_t work;         /* writers wait: a job, or closing */
    struct waits progress, ends; /* for anything to change; for a checkpoint to be copied, over or settled */
    struct fx_options options;
    const struct fx_sink_ops *_Atomic sink; /* sink.h; changes under the lock, while nothing is in flight */
    void *sink_state;                       /* the sink's own */
    uint32_t refs; /* the caller's, one for each checkpoint, one for each living thread */
    uint32_t threads_started, threads_alive;
    bool closing, joined;
    struct fx_checkpoint *oldest, *newest;
    struct staging staging;
    struct writer *writers;
    uint64_t ids;
    struct cuda *cuda; /* NULL: no driver was opened */
    struct trace *trace;
    struct fx_engine *next; /* in fork.c's list */
    _Atomic int64_t pending;
    struct written own, *written; /* own, unless another process writes or counts too */
    _Atomic uint64_t copy_ns, stall_ns, buffered_files, unbatched_devices;
};

void fx_lock(struct fx_engine *engine);
void fx_unlock(struct fx_engine *engine);
void fx_wake(struct fx_engine *engine);      /* those who wait for progress */
void fx_wake_ends(struct fx_engine *engine); /* those who wait for a checkpoint: a thread that commits has no part in more */
void fx_wake_writers(struct fx_engine *engine);
void fx_wake_writers_for(struct fx_engine *engine, uint32_t jobs); /* no more of them than these jobs want */
/* Waits for progress; false once the deadline has passed. */
bool fx_wait(struct fx_engine *engine, int64_t deadline_ns);
bool fx_wait_end(struct fx_engine *engine, int64_t deadline_ns); /* the same for an end */
void fx_engine_release(struct fx_engine *engine); /* drops one reference and the lock */

/* ---- threads: writer.c ---- */

int fx_writers_start(struct fx_engine *engine, struct fx_error *error);

/* ---- trace.c ---- */

int fx_trace_new(struct fx_engine *engine);
void fx_trace_free(struct fx_engine *engine);
/* From begin_ns until now, if somebody asked for it. With or without the engine's lock. */
void fx_span_add(struct fx_engine *engine, enum fx_span_kind kind, uint32_t track, int64_t begin_ns, struct fx_span span);
struct fx_span fx_chunk_span(const struct fx_checkpoint *ck, uint32_t chunk);
uint32_t fx_track(const struct writer *writer);

/* ---- fork.c ---- */

void fx_fork_add(struct fx_engine *engine);
void fx_fork_remove(struct fx_engine *engine);

#endif
