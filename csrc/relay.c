/* An engine with the shared memory of ring.h: the trainer's fills slots instead of writing, the monitor's writes slots
 * that came filled.
 *
 * The trainer's staging buffers are the ring's slots. A writer thread fills one (copy and checksum in one pass) and posts
 * it; a fence that helps copies into one too. One thread, the collector, takes back what the monitor returned and watches
 * the monitor's pidfd, so that its death ends all waiting at once. In the monitor, staging buffers come from outside
 * (fx_emit_posted), and giving one back returns it to the trainer.
 */
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct relay {
    struct fx_ring *ring;
    int posted, freed; /* eventfds: the trainer posted, the monitor returned */
    int peer, stop;    /* trainer: pidfd of the monitor, eventfd that ends the collector; -1 in the monitor */
    bool collecting;   /* the collector was started and not joined */
    bool gone;         /* the monitor is dead: nothing can be posted any more */
    uint32_t away;     /* slots that the monitor has */
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

static bool is_trainer(const struct fx_engine *engine) { return engine->relay && engine->relay->stop >= 0; }

/* ---- what the engine asks ---- */

bool fx_relay_posts(const struct fx_engine *engine) { return is_trainer(engine); }

bool fx_relay_lacks_slot(const struct fx_engine *engine) { return is_trainer(engine) && !engine->staging.n_free; }

bool fx_relay_slots_will_return(const struct fx_engine *engine) { return is_trainer(engine) && engine->relay->away; }

/* What fences leave to writers, so that chunks which are ready can always move on and free more. */
uint32_t fx_relay_reserve(const struct fx_engine *engine) {
    if (!is_trainer(engine)) return 0;
    uint32_t slots = engine->relay->ring->head->slots, threads = engine->options.threads;
    return threads < slots ? threads : slots - 1;
}

char *fx_relay_memory(const struct fx_engine *engine, uint64_t *nbytes) {
    if (!is_trainer(engine)) return NULL;
    *nbytes = engine->relay->ring->head->slots * engine->relay->ring->head->slot_bytes;
    return fx_ring_data(engine->relay->ring, 0);
}

bool fx_relay_gone(const struct fx_engine *engine) { return is_trainer(engine) && engine->relay->gone; }

/* ---- the trainer's side; lock held ---- */

void fx_relay_post(struct fx_engine *engine, const struct fx_checkpoint *ck, uint32_t chunk, void *buffer) {
    struct relay *relay = engine->relay;
    struct slot *slot = &relay->ring->head->table[fx_ring_slot_of(relay->ring, buffer)];
    slot->chunk = chunk;
    slot->checkpoint = ck->id;
    slot->same = ck->has_known[chunk] && ck->known[chunk] == ck->crcs[chunk];
    relay->away++;
    /* Before this store the slot is nobody's business; after it, it is the monitor's. */
    atomic_store_explicit(&slot->state, POSTED, memory_order_release);
    signal_event(relay->posted);
}

/* Takes back what was returned; with `all`, everything: the monitor is dead. */
static void collect(struct fx_engine *engine, bool all) {
    struct relay *relay = engine->relay;
    for (uint32_t i = 0; i < relay->ring->head->slots; i++) {
        struct slot *slot = &relay->ring->head->table[i];
        uint32_t state = atomic_load_explicit(&slot->state, memory_order_acquire);
        if (state != RETURNED && !(all && state != OWNED)) continue;
        atomic_store_explicit(&slot->state, OWNED, memory_order_relaxed);
        relay->away--;
        fx_staging_give(engine, fx_ring_data(relay->ring, i));
    }
}

static void lose_monitor(struct fx_engine *engine) {
    engine->relay->gone = true;
    for (struct fx_checkpoint *ck = engine->oldest, *next; ck; ck = next) {
        next = ck->next;
        fx_give_up(ck, FAILED, "the monitor process ended", "", -1, EPIPE);
        fx_settle(ck);
    }
    collect(engine, true);
}

static void *collector_main(void *argument) {
    struct fx_engine *engine = argument;
    struct relay *relay = engine->relay;
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

/* Lock held (or none needed: the slot is ours). False: the buffer is no slot to return, the engine keeps it. */
bool fx_relay_returns(struct fx_engine *engine, void *buffer) {
    struct relay *relay = engine->relay;
    if (!relay || is_trainer(engine)) return false;
    fx_ring_return(relay->ring, fx_ring_slot_of(relay->ring, buffer), relay->freed);
    return true;
}

void fx_ring_return(struct fx_ring *ring, uint32_t slot, int freed) {
    atomic_store_explicit(&ring->head->table[slot].state, RETURNED, memory_order_release);
    signal_event(freed);
}

void fx_relay_wrote(struct fx_engine *engine, uint64_t nbytes, uint64_t ns) {
    if (!engine->relay || is_trainer(engine)) return;
    atomic_fetch_add(&engine->relay->ring->head->bytes_written, nbytes);
    atomic_fetch_add(&engine->relay->ring->head->write_ns, ns);
}

int fx_emit_posted(struct fx_checkpoint *ck, const struct fx_posted *posted) {
    struct fx_engine *engine = ck->engine;
    struct fx_ring *ring = engine->relay->ring;
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

void fx_relay_statistics(const struct fx_engine *engine, struct fx_statistics *out) {
    if (!is_trainer(engine)) return;
    out->bytes_written = engine->relay->ring->head->bytes_written;
    out->write_ns = engine->relay->ring->head->write_ns;
}

static void close_all(const struct relay *relay) {
    int fds[] = {relay->posted, relay->freed, relay->peer, relay->stop};
    for (int i = 0; i < 4; i++)
        if (fds[i] >= 0) close(fds[i]);
}

/* Straight to the kernel, in a forked child. */
void fx_relay_close_in_child(const struct fx_engine *engine) {
    const struct relay *relay = engine->relay;
    if (!relay) return;
    close_all(relay);
    if (relay->ring->fd >= 0) close(relay->ring->fd);
}

/* Lock not held, no writer thread alive. Afterwards nothing of the engine refers to the ring; its slots are not the
 * engine's to free. */
void fx_relay_end(struct fx_engine *engine) {
    struct relay *relay = engine->relay;
    if (!relay) return;
    if (relay->collecting) {
        signal_event(relay->stop);
        pthread_join(relay->collector, NULL);
    }
    fx_lock(engine);
    if (relay->stop >= 0) {
        engine->staging.n_free = engine->staging.n_made = engine->staging.limit = 0;
        engine->bytes_written = relay->ring->head->bytes_written;
        engine->write_ns = relay->ring->head->write_ns;
    }
    engine->relay = NULL;
    fx_unlock(engine);
    close_all(relay);
    free(relay);
}

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

int fx_relay_monitor(struct fx_engine *engine, struct fx_ring *ring, int freed, struct fx_error *error) {
    if (ring->head->slot_bytes != engine->options.chunk_bytes || engine->relay)
        return fx_error_set(error, "relay: the ring's slots are no chunks of this engine", "", -1, EINVAL);
    struct relay *relay = make(ring, -1, freed, -1, -1);
    if (!relay) return fx_error_set(error, "relay", "", -1, ENOMEM);
    fx_lock(engine);
    engine->relay = relay;
    fx_unlock(engine);
    return 0;
}

static int start_collector(struct fx_engine *engine) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int r = pthread_create(&engine->relay->collector, NULL, collector_main, engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!r) pthread_setname_np(engine->relay->collector, "fxckpt-ring");
    engine->relay->collecting = !r;
    return r;
}

int fx_relay_trainer(struct fx_engine *engine, struct fx_ring *ring, int posted, int freed, int peer,
                     struct fx_error *error) {
    struct staging *staging = &engine->staging;
    if (ring->head->slot_bytes != engine->options.chunk_bytes || engine->relay || !engine->options.mock ||
        staging->limit != ring->head->slots)
        return fx_error_set(error, "relay: the ring's slots are not this engine's staging", "", -1, EINVAL);
    int stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (stop < 0) return fx_error_set(error, "eventfd", "", -1, errno);
    struct relay *relay = make(ring, posted, freed, peer, stop);
    if (!relay) {
        close(stop);
        return fx_error_set(error, "relay", "", -1, ENOMEM);
    }
    fx_lock(engine);
    engine->relay = relay;
    for (uint32_t i = 0; i < ring->head->slots; i++) staging->free[staging->n_free++] = fx_ring_data(ring, i);
    staging->n_made = ring->head->slots;
    int r = start_collector(engine);
    fx_unlock(engine);
    return r ? fx_error_set(error, "start of the collector thread", "", -1, r) : 0;
}

int fx_relay_revive(struct fx_engine *engine, int peer, struct fx_error *error) {
    struct relay *relay = engine->relay;
    fx_lock(engine);
    bool gone = fx_relay_gone(engine);
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
