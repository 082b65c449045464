/* The little that the engine asks of the machine: memory for buffers, threads, the clock. */
#ifndef FX_SYSTEM_H
#define FX_SYSTEM_H

#include <pthread.h>
#include <stdint.h>

#define SECOND_NS 1000000000ll

void *fx_buffer_new(uint64_t nbytes); /* aligned, absent in forked children; NULL: no memory */
void fx_buffer_free(void *buffer, uint64_t nbytes);

/* Starts a thread that takes no signals: a handler of the host program must not run in one of ours. `name` has at most
 * 15 characters. 0, or a positive errno. */
int fx_thread_start(pthread_t *thread, void *(*function)(void *), void *argument, const char *name);

int64_t fx_now(void); /* nanoseconds of the monotonic clock */
int64_t fx_deadline(int64_t timeout_ns);

#endif
