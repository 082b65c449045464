/* The memory that a trainer and its monitor share: slots of one chunk each, and a table that says whose each
 * slot is. Note [a slot has one owner]:
 *
 *     OWNED ──post (trainer)──► POSTED ──next (monitor)──► READING ──return (monitor)──► RETURNED ──collect (trainer)──► OWNED
 *
 * Every change of `state` is one atomic store, made by the process that owns the slot at that moment; the other one only
 * looks. So there is nothing in this memory that a process could be killed in the middle of: no lock to hold, no queue to
 * break. A trainer that dies while filling a slot leaves it OWNED, and nobody ever reads it; a monitor that dies leaves
 * slots that the trainer takes back. Wake-ups are eventfds, whose state is the kernel's.
 */
#ifndef FX_RING_H
#define FX_RING_H

#include "core/internal.h"

enum slot_state { OWNED, POSTED, READING, RETURNED };

struct slot {
    _Alignas(64) _Atomic uint32_t state;
    uint32_t chunk;      /* in the plan's numbering */
    uint64_t checkpoint; /* fx_id() in the trainer */
    uint32_t same;       /* the disk holds these bytes already */
};

struct ring_head {
    uint64_t magic;
    uint64_t slot_bytes;
    uint32_t slots;
    uint32_t data_at; /* offset of the first slot's bytes */
    _Alignas(64) struct written written; /* by the monitor */
    struct slot table[];
};

struct fx_ring {
    int fd;
    struct ring_head *head;
    uint64_t nbytes;
};

static inline void *fx_ring_data(const struct fx_ring *ring, uint32_t slot) {
    return (char *)ring->head + ring->head->data_at + slot * ring->head->slot_bytes;
}

static inline uint32_t fx_ring_slot_of(const struct fx_ring *ring, const void *data) {
    return (uint32_t)((uint64_t)((const char *)data - (const char *)fx_ring_data(ring, 0)) / ring->head->slot_bytes);
}

#endif
