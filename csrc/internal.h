/* What the engine's files share. Note [the lock]:
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

#include "engine.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#define NOTHING UINT32_MAX

/* ---- geometry: chunks.c ---- */

enum { PIECE_OF_HEADER = NOTHING - 1, PIECE_OF_NOBODY = NOTHING }; /* extents that need no emit */

/* Bytes of one tensor (or of the header, or of nobody: zeros) that lie in one chunk. */
struct extent {
    uint32_t piece;
    uint32_t tensor; /* index within its layer's sources */
    uint64_t from;   /* offset in the tensor or header */
    uint32_t at;     /* offset in the chunk */
    uint32_t nbytes;
};

struct piece {
    uint32_t layer, chunk;
};

struct chunk {
    uint64_t offset; /* in the file */
    uint32_t file, nbytes;
    uint32_t first_extent, n_extents; /* in order of `at` */
    uint32_t first_piece, n_pieces;
};

struct plan_file {
    uint64_t nbytes;
    char *header;
    uint64_t header_nbytes;
    uint32_t first_chunk, n_chunks;
};

struct plan_layer {
    uint32_t first_tensor, n_tensors; /* in tensors[] */
    uint32_t first_piece, n_pieces;   /* in layer_pieces[] */
};

struct plan_tensor {
    uint64_t nbytes, itemsize;
};

struct fx_plan {
    atomic_int refs;
    uint64_t chunk_bytes;
    uint32_t n_files, n_layers, n_chunks, n_pieces, n_extents;
    struct plan_file *files;
    struct plan_layer *layers;
    struct plan_tensor *tensors; /* by layer, in the order of its sources */
    struct chunk *chunks;
    struct extent *extents;
    struct piece *pieces;   /* by chunk */
    uint32_t *layer_pieces; /* by layer, in file order */
};

void fx_plan_hold(struct fx_plan *plan);

/* ---- sources: sources.c ---- */

struct fx_sources {
    atomic_int refs;
    uint32_t n;
    uint64_t devices; /* bit i: a tensor lies on CUDA device i */
    struct fx_view views[]; /* sizes and strides follow in the same allocation */
};

void fx_sources_hold(struct fx_sources *sources);
/* Whether they have the layer's number of tensors, with the planned sizes. */
bool fx_sources_fit(struct fx_sources *sources, const struct fx_plan *plan, uint32_t layer);

/* ---- one checkpoint: checkpoint.c ---- */

enum state { ACTIVE, DURABLE, FAILED, CANCELLED };
/* Of an emitted layer; DONE also says "dropped". ISSUED: still TAKEN, by a device's stream. */
enum piece_state { IDLE, TAKEN, DONE, ISSUED };
enum sync_state { UNSYNCED, SYNC_TAKEN, SYNCED };

struct ck_file {
    int fd; /* -1: not open */
    atomic_bool direct;
    char *path;
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

struct ck_devices; /* cuda.c */
struct ck_cuda;
struct cuda;

struct ck_layer {
    struct fx_sources *sources;
    struct ck_devices *devices; /* NULL: all in host memory, else the copier thread copies it */
    bool emitted;
    uint32_t left; /* emitted pieces not DONE */
};

struct fx_checkpoint {
    struct fx_engine *engine;
    uint64_t id; /* unique in its engine, ascending */
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
    uint32_t *crcs, *known;
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
void fx_push_ready(struct fx_checkpoint *ck, uint32_t chunk);
uint32_t fx_pop_ready(struct fx_checkpoint *ck); /* NOTHING if there is none that no fence is working on */
void fx_chunk_written(struct fx_checkpoint *ck, uint32_t chunk);
void fx_check_durable(struct fx_checkpoint *ck);
/* Ends an ACTIVE checkpoint as FAILED or CANCELLED and drops what no thread has taken. */
void fx_give_up(struct fx_checkpoint *ck, enum state state, const char *operation, const char *path,
                int64_t offset, int err);
/* If it is over and nobody works on it: out of the list, and freed if the caller released it. */
void fx_settle(struct fx_checkpoint *ck);
/* Frees the memory of one that is settled, or that could not begin. No lock needed. */
void fx_checkpoint_destroy(struct fx_checkpoint *ck);
bool fx_has_open_files(const struct fx_checkpoint *ck);

/* ---- staging buffers: staging.c; lock held ---- */

struct staging {
    void **free; /* buffers not in use */
    uint32_t n_free, n_made, limit;
    uint64_t used_bytes, peak_bytes;
};

bool fx_staging_has_room(const struct fx_engine *engine);
void *fx_staging_take(struct fx_engine *engine); /* NULL: none left, or no memory */
void fx_staging_give(struct fx_engine *engine, void *buffer);
void *fx_buffer_new(uint64_t nbytes); /* aligned, absent in forked children */
void fx_buffer_free(void *buffer, uint64_t nbytes);

/* ---- the engine: engine.c ---- */

struct writer {
    struct fx_engine *engine;
    pthread_t thread;
    void *bounce;
};

struct fx_engine {
    pthread_mutex_t lock;
    pthread_cond_t work;     /* writers wait: a job, or closing */
    pthread_cond_t progress; /* everybody else waits: anything changed */
    struct fx_options options;
    uint32_t waiters; /* on progress */
    uint32_t refs;    /* the caller's, one for each checkpoint, one for each living thread */
    uint32_t threads_started, threads_alive;
    bool closing, joined;
    struct fx_checkpoint *oldest, *newest;
    struct staging staging;
    struct writer *writers;
    struct relay *relay; /* NULL, or the memory shared with a monitor: relay.c */
    uint64_t ids;
    struct cuda *cuda; /* NULL: no driver was opened */
    struct trace *trace;
    struct fx_engine *next; /* in fork.c's list */
    _Atomic int64_t pending;
    _Atomic uint64_t bytes_written, copy_ns, write_ns, stall_ns, buffered_files;
};

void fx_lock(struct fx_engine *engine);
void fx_unlock(struct fx_engine *engine);
void fx_wake(struct fx_engine *engine); /* those who wait for progress */
void fx_wake_writers(struct fx_engine *engine);
/* Waits for progress; false once the deadline has passed. */
bool fx_wait(struct fx_engine *engine, int64_t deadline_ns);
void fx_engine_release(struct fx_engine *engine); /* drops one reference and the lock */
int64_t fx_now(void);
int64_t fx_deadline(int64_t timeout_ns);

/* ---- threads: writer.c ---- */

int fx_writers_start(struct fx_engine *engine, struct fx_error *error);
uint32_t fx_fill_piece(struct fx_checkpoint *ck, uint32_t piece, char *to);

/* ---- the memory shared with a monitor: relay.c; lock held where nothing else is said ---- */

bool fx_relay_posts(const struct fx_engine *engine); /* this engine fills slots and posts them, instead of writing */
bool fx_relay_lacks_slot(const struct fx_engine *engine);
bool fx_relay_slots_will_return(const struct fx_engine *engine);
uint32_t fx_relay_reserve(const struct fx_engine *engine); /* slots that fences leave to writers */
/* The trainer's slots, which are its staging buffers; NULL: it has buffers of its own. */
char *fx_relay_memory(const struct fx_engine *engine, uint64_t *nbytes);
bool fx_relay_gone(const struct fx_engine *engine);        /* the monitor is dead */
void fx_relay_post(struct fx_engine *engine, const struct fx_checkpoint *ck, uint32_t chunk, void *buffer);
bool fx_relay_returns(struct fx_engine *engine, void *buffer); /* it was a slot of the other process, and went back */
void fx_relay_wrote(struct fx_engine *engine, uint64_t nbytes, uint64_t ns);             /* no lock */
void fx_relay_statistics(const struct fx_engine *engine, struct fx_statistics *out);
void fx_relay_close_in_child(const struct fx_engine *engine);
void fx_relay_end(struct fx_engine *engine); /* no lock, all writer threads ended */

/* ---- trace.c ---- */

int fx_trace_new(struct fx_engine *engine);
void fx_trace_free(struct fx_engine *engine);
/* From begin_ns until now, if somebody asked for it. With or without the engine's lock. */
void fx_span_add(struct fx_engine *engine, enum fx_span_kind kind, uint32_t track, int64_t begin_ns, struct fx_span span);

/* ---- fork.c ---- */

void fx_fork_add(struct fx_engine *engine);
void fx_fork_remove(struct fx_engine *engine);

#endif
