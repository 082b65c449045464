/* The two sinks on the shared memory of ring.h: the trainer's engine posts the slots that it filled, the monitor's
 * engine writes slots that came filled.
 *
 * The trainer's staging buffers are the ring's slots. A writer thread fills one (copy and checksum in one pass) and posts
 * it; a fence that helps copies into one too. One thread, the collector, takes back what the monitor returned and watches
 * the monitor's pidfd, so that its death ends all waiting at once. In the monitor, staging buffers come from outside
 * (fx_emit_posted), and giving one back returns it to the trainer.
 */
#include "core/sink.h"
#include "monitor/ring.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* The state of either sink. */
struct relay {
    struct fx_ring *ring;
    int posted, freed; /* eventfds: the trainer posted, the monitor returned */
    int peer, stop;    /* trainer: pidfd of the monitor, eventfd that ends the collector; -1 in the monitor */
    bool collecting;   /* the collector was started and not joined */
    bool gone;         /* the monitor is dead: nothing can be posted any more */
    pthread_t collector;
};

/* Never blocks: the counter would have to reach 2^64. */
static void signal_event(int fd) {
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR) continue;
}

/* The descriptors are non-blocking: nothing to read is fine. */
static void clear_event(int fd) {
    uint64_t count;
    while (read(fd, &count, sizeof count) < 0 && errno == EINTR) continue;
}

/* ---- the trainer's side ---- */

static int trainer_admit(struct fx_engine *engine, struct fx_error *error) {
    const struct relay *relay = engine->sink_state;
    return relay->gone ? fx_error_set(error, "begin: the monitor process ended", "", -1, EPIPE) : 0;
}

/* Under the lock all the time: a monitor's death in between would leave the slot with it. */
static int trainer_store(struct writer *writer, struct fx_checkpoint *ck, uint32_t chunk, void *data,
                         struct fx_error *error) {
    (void)writer, (void)error;
    if (!*ck->files[ck->plan->chunks[chunk].file].path) return 0; /* only its checksums are wanted */
    struct relay *relay = ck->engine->sink_state;
    struct slot *slot = &relay->ring->head->table[fx_ring_slot_of(relay->ring, data)];
    slot->chunk = chunk;
    slot->checkpoint = ck->id;
    slot->same = fx_is_known(ck, chunk);
    ck->chunks[chunk].staging = NULL;
    ck->engine->staging.away++;
    /* Before this store the slot is nobody's business; after it, it is the monitor's. */
    atomic_store_explicit(&slot->state, POSTED, memory_order_release);
    signal_event(relay->posted);
    return 0;
}

/* Lock held: takes back what was returned; with `all`, everything: the monitor is dead. */
static void collect(struct fx_engine *engine, bool all) {
    struct relay *relay = engine->sink_state;
    for (uint32_t i = 0; i < relay->ring->head->slots; i++) {
        struct slot *slot = &relay->ring->head->table[i];
        uint32_t state = atomic_load_explicit(&slot->state, memory_order_acquire);
        if (state != RETURNED && !(all && state != OWNED)) continue;
        atomic_store_explicit(&slot->state, OWNED, memory_order_relaxed);
        engine->staging.away--;
        fx_staging_keep(engine, fx_ring_data(relay->ring, i));
    }
}

/* Lock held. */
static void lose_monitor(struct fx_engine *engine) {
    struct relay *relay = engine->sink_state;
    relay->gone = true;
    for (struct fx_checkpoint *ck = engine->oldest, *next; ck; ck = next) {
        next = ck->next;
        fx_give_up(ck, FAILED, "the monitor process ended", "", -1, EPIPE);
        fx_settle(ck);
    }
    collect(engine, true);
}

static void *collector_main(void *argument) {
    struct fx_engine *engine = argument;
    struct relay *relay = engine->sink_state;
    struct pollfd fds[] = {{relay->stop, POLLIN, 0}, {relay->freed, POLLIN, 0}, {-1, POLLIN, 0}};
    for (;;) {
        fx_lock(engine);
        fds[2].fd = relay->gone ? -1 : relay->peer;
        fx_unlock(engine);
        if (poll(fds, 3, -1) < 0) continue; /* EINTR */
        if (fds[0].revents) return NULL;
        fx_lock(engine);
        if (fds[1].revents) clear_event(relay->freed);
        collect(engine, false);
        if (fds[2].revents) lose_monitor(engine);
        fx_wake(engine);
        fx_wake_writers(engine);
        fx_unlock(engine);
    }
}

/* ---- the monitor's side ---- */

void fx_ring_return(struct fx_ring *ring, uint32_t slot, int freed) {
    atomic_store_explicit(&ring->head->table[slot].state, RETURNED, memory_order_release);
    signal_event(freed);
}

static void monitor_give(struct fx_engine *engine, void *buffer) {
    struct relay *relay = engine->sink_state;
    fx_ring_return(relay->ring, fx_ring_slot_of(relay->ring, buffer), relay->freed);
}

int fx_emit_posted(struct fx_checkpoint *ck, const struct fx_posted *posted) {
    struct fx_engine *engine = ck->engine;
    struct fx_ring *ring = ((struct relay *)engine->sink_state)->ring;
    const struct fx_plan *plan = ck->plan;
    if (posted->chunk >= plan->n_chunks || plan->n_layers != plan->n_chunks || posted->slot >= ring->head->slots ||
        plan->pieces[plan->chunks[posted->chunk].first_piece].layer != posted->chunk)
        return -EINVAL;
    fx_lock(engine);
    int r = ck->layers[posted->chunk].emitted ? -EALREADY : 0;
    if (!r) {
        struct ck_chunk *chunk = &ck->chunks[posted->chunk];
        atomic_store_explicit(&ring->head->table[posted->slot].state, READING, memory_order_relaxed);
        ck->layers[posted->chunk].emitted = true;
        ck->emitted++;
        ck->pieces[plan->chunks[posted->chunk].first_piece] = DONE;
        chunk->layers_left = 0;
        struct ck_file *file = &ck->files[plan->chunks[posted->chunk].file];
        if (ck->state == ACTIVE && posted->same && file->touched) /* the trainer has not sent what the file lost */
            fx_give_up(ck, FAILED, "open: the file was changed while it waited", file->path, -1, ESTALE);
        if (ck->state != ACTIVE || posted->same) fx_staging_give(engine, fx_ring_data(ring, posted->slot));
        else chunk->staging = fx_ring_data(ring, posted->slot);
        chunk->whole = true;
        if (ck->state == ACTIVE && posted->same) fx_chunk_written(ck, posted->chunk);
        else if (ck->state == ACTIVE) fx_push_ready(ck, posted->chunk);
        fx_check_durable(ck);
        fx_settle(ck);
        fx_wake_writers(engine);
        fx_wake(engine);
    }
    fx_unlock(engine);
    return r;
}

/* ---- life ---- */

static void close_all(const struct relay *relay) {
    int fds[] = {relay->posted, relay->freed, relay->peer, relay->stop};
    for (int i = 0; i < 4; i++)
        if (fds[i] >= 0) close(fds[i]);
}

static void trainer_close_in_child(struct fx_engine *engine) {
    const struct relay *relay = engine->sink_state;
    close_all(relay);
    if (relay->ring->fd >= 0) close(relay->ring->fd);
}

static void monitor_close_in_child(struct fx_engine *engine) {
    fx_disk.close_in_child(engine);
    trainer_close_in_child(engine);
}

/* Afterwards nothing of the engine refers to the ring, and its sink is `next`. */
static void detach(struct fx_engine *engine, const struct fx_sink_ops *next) {
    struct relay *relay = engine->sink_state;
    fx_lock(engine);
    engine->own.bytes = engine->written->bytes;
    engine->own.ns = engine->written->ns;
    engine->written = &engine->own;
    engine->sink = next;
    engine->sink_state = NULL;
    fx_unlock(engine);
    close_all(relay);
    free(relay);
}

static void trainer_end(struct fx_engine *engine) {
    struct relay *relay = engine->sink_state;
    struct staging *staging = &engine->staging;
    if (relay->collecting) {
        signal_event(relay->stop);
        pthread_join(relay->collector, NULL);
    }
    fx_lock(engine);
    /* The slots are not the engine's to free. */
    staging->n_free = staging->n_made = staging->limit = staging->reserve = staging->away = 0;
    staging->block = NULL;
    fx_unlock(engine);
    detach(engine, &fx_nowhere);
}

static void monitor_end(struct fx_engine *engine) { detach(engine, &fx_disk); }

static const struct fx_sink_ops trainer = {
    .takes_staging = true,
    .admit = trainer_admit,
    .open = fx_nowhere_open,
    .store = trainer_store,
    .sync = fx_nowhere_sync,
    .close = fx_nowhere_close,
    .give = fx_staging_keep,
    .close_in_child = trainer_close_in_child,
    .end = trainer_end,
};

static const struct fx_sink_ops monitor = {
    .admit = fx_always_admit,
    .open = fx_disk_open,
    .store = fx_disk_store,
    .sync = fx_disk_sync,
    .close = fx_disk_close,
    .give = monitor_give,
    .close_in_child = monitor_close_in_child,
    .end = monitor_end,
};

static struct relay *make(struct fx_ring *ring, int posted, int freed, int peer, int stop) {
    struct relay *relay = calloc(1, sizeof *relay);
    if (!relay) return NULL;
    relay->ring = ring;
    relay->posted = posted < 0 ? -1 : fcntl(posted, F_DUPFD_CLOEXEC, 0);
    relay->freed = fcntl(freed, F_DUPFD_CLOEXEC, 0);
    relay->peer = peer < 0 ? -1 : fcntl(peer, F_DUPFD_CLOEXEC, 0);
    relay->stop = stop;
    return relay;
}

/* Lock held: the engine's chunks go there from now on; what the monitor writes is counted where both see it. */
static void attach(struct fx_engine *engine, const struct fx_sink_ops *sink, struct relay *relay) {
    engine->sink = sink;
    engine->sink_state = relay;
    engine->written = &relay->ring->head->written;
}

int fx_relay_monitor(struct fx_engine *engine, struct fx_ring *ring, int freed, struct fx_error *error) {
    if (ring->head->slot_bytes != engine->options.chunk_bytes || engine->sink != &fx_disk)
        return fx_error_set(error, "relay: the ring's slots are no chunks of this engine", "", -1, EINVAL);
    struct relay *relay = make(ring, -1, freed, -1, -1);
    if (!relay) return fx_error_set(error, "relay", "", -1, ENOMEM);
    fx_lock(engine);
    attach(engine, &monitor, relay);
    fx_unlock(engine);
    return 0;
}

/* Lock held: the ring's slots become the staging buffers. Fences and devices leave some to the writers, so that chunks which
 * are ready can always move on and free more. */
static void take_slots(struct staging *staging, const struct fx_ring *ring, uint32_t threads) {
    uint32_t slots = ring->head->slots;
    for (uint32_t i = 0; i < slots; i++) staging->free[staging->n_free++] = fx_ring_data(ring, i);
    staging->n_made = slots;
    staging->reserve = threads < slots ? threads : slots - 1;
    staging->block = fx_ring_data(ring, 0);
}

int fx_relay_trainer(struct fx_engine *engine, struct fx_ring *ring, int posted, int freed, int peer,
                     struct fx_error *error) {
    if (ring->head->slot_bytes != engine->options.chunk_bytes || engine->sink != &fx_nowhere ||
        engine->staging.limit != ring->head->slots)
        return fx_error_set(error, "relay: the ring's slots are not this engine's staging", "", -1, EINVAL);
    int stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (stop < 0) return fx_error_set(error, "eventfd", "", -1, errno);
    struct relay *relay = make(ring, posted, freed, peer, stop);
    if (!relay) {
        close(stop);
        return fx_error_set(error, "relay", "", -1, ENOMEM);
    }
    fx_lock(engine);
    attach(engine, &trainer, relay);
    take_slots(&engine->staging, ring, engine->options.threads);
    int r = fx_thread_start(&relay->collector, collector_main, engine, "fxckpt-ring");
    relay->collecting = !r;
    fx_unlock(engine);
    return r ? fx_error_set(error, "start of the collector thread", "", -1, r) : 0;
}

int fx_relay_revive(struct fx_engine *engine, int peer, struct fx_error *error) {
    fx_lock(engine);
    struct relay *relay = engine->sink == &trainer ? engine->sink_state : NULL;
    bool gone = relay && relay->gone;
    int fd = gone ? fcntl(peer, F_DUPFD_CLOEXEC, 0) : -1, err = gone ? errno : EBUSY;
    if (fd >= 0) {
        close(relay->peer);
        relay->peer = fd;
        relay->gone = false;
        signal_event(relay->freed); /* the collector looks at the new one */
    }
    fx_unlock(engine);
    return fd >= 0 ? 0 : fx_error_set(error, "relay: revival", "", -1, err);
}
