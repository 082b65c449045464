/* Two small things that Python does not reach: writing through many addresses, and how this thread rounds. */
#include "engine.h"

#include <fenv.h>
#include <string.h>

_Static_assert(sizeof(fenv_t) <= FX_FLOAT_MODE, "fenv_t fits what callers hold");

void fx_spread(const void *value, uint32_t nbytes, const uint64_t *addresses, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) memcpy((void *)(uintptr_t)addresses[i], value, nbytes);
}

void fx_float_mode(char *out) {
    memset(out, 0, FX_FLOAT_MODE);
    fegetenv((fenv_t *)(void *)out);
}

void fx_float_mode_use(const char *mode) { fesetenv((const fenv_t *)(const void *)mode); }
