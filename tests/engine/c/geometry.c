/* Strided views, checksums, plans and verified reading against slow and obvious versions of themselves.
 *
 *     geometry DIRECTORY SECONDS SEED
 */
#include "harness.h"

/* ---- views ---- */

struct strided {
    struct fx_view view;
    int64_t sizes[5], strides[5];
    uint64_t itemsize, nbytes;
    char *memory, *packed; /* packed: its row-major bytes */
};

/* A dense tensor with its dimensions permuted, some of them sliced with a step, some of size 1. */
static void make_strided(struct strided *s, uint64_t *random) {
    uint64_t itemsizes[] = {1, 2, 4, 8, 16, 12};
    int32_t ndim = (int32_t)between(random, 0, 5);
    int order[5] = {0, 1, 2, 3, 4};
    for (int i = ndim - 1; i > 0; i--) {
        int j = (int)between(random, 0, (uint64_t)i + 1), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    s->itemsize = itemsizes[between(random, 0, 6)];
    int64_t stride = (int64_t)s->itemsize, items = 1;
    for (int i = 0; i < ndim; i++) {
        int d = order[i];
        s->sizes[d] = (int64_t)between(random, 1, 9);
        s->strides[d] = stride * (int64_t)(between(random, 0, 3) == 0 ? 2 : 1);
        stride = s->strides[d] * s->sizes[d];
        items *= s->sizes[d];
    }
    s->nbytes = (uint64_t)items * s->itemsize;
    s->memory = malloc((size_t)stride);
    s->packed = malloc(s->nbytes);
    s->view = (struct fx_view){.address = s->memory, .ndim = ndim, .sizes = s->sizes, .strides = s->strides};
    for (int64_t i = 0; i < stride; i++) s->memory[i] = (char)next_random(random);
    for (int64_t i = 0; i < items; i++) { /* the obvious way, one item at a time */
        int64_t rest = i, offset = 0;
        for (int d = ndim - 1; d >= 0; d--) {
            offset += rest % s->sizes[d] * s->strides[d];
            rest /= s->sizes[d];
        }
        memcpy(s->packed + i * (int64_t)s->itemsize, s->memory + offset, s->itemsize);
    }
    fx_view_normalise(&s->view);
}

static void test_views(uint64_t *random) {
    struct strided s;
    make_strided(&s, random);
    char *got = malloc(s.nbytes);
    for (int i = 0; i < 20; i++) {
        uint64_t from = between(random, 0, s.nbytes), n = between(random, 0, s.nbytes - from + 1);
        fx_view_gather(&s.view, s.itemsize, from, n, got);
        CHECK(memcmp(got, s.packed + from, n) == 0, "gather of %lu at %lu", (unsigned long)n,
              (unsigned long)from);
        for (uint64_t k = 0; k < n; k++) s.packed[from + k] = got[k] = (char)next_random(random);
        fx_view_scatter(&s.view, s.itemsize, from, n, got);
    }
    fx_view_gather(&s.view, s.itemsize, 0, s.nbytes, got);
    CHECK(memcmp(got, s.packed, s.nbytes) == 0, "gather gives back what was scattered");
    free(got);
    free(s.memory);
    free(s.packed);
}

/* ---- checksums ---- */

static uint32_t crc_bit_by_bit(uint32_t crc, const uint8_t *data, size_t n) {
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= data[i];
        for (int b = 0; b < 8; b++) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
    }
    return ~crc;
}

static void test_checksums(uint64_t *random) {
    size_t limits[] = {40, 1000, 40000}, limit = limits[between(random, 0, 3)];
    size_t n = between(random, 0, limit), skew = between(random, 0, 16), cut = between(random, 0, n + 1);
    uint8_t *data = malloc(n + skew + 1), *copy = malloc(n + skew + 1), *at = data + skew;
    for (size_t i = 0; i < n; i++) at[i] = (uint8_t)next_random(random);
    uint32_t start = (uint32_t)next_random(random), expected = crc_bit_by_bit(start, at, n);
    CHECK(fx_crc32c(start, at, n) == expected);
    CHECK(fx_crc32c_portable(start, at, n) == expected);
    CHECK(fx_crc32c(fx_crc32c(start, at, cut), at + cut, n - cut) == expected, "in two parts");
    CHECK(fx_copy_crc32c(start, copy + 16 - skew, at, n - (n > 16 ? 16 : n)) ==
          crc_bit_by_bit(start, at, n - (n > 16 ? 16 : n)));
    CHECK(n <= 16 || memcmp(copy + 16 - skew, at, n - 16) == 0);
    free(data);
    free(copy);
}

/* ---- whole files ---- */

/* Every flipped bit of a file is found, and no byte of its chunk reaches the target. */
static void test_flipped_bit(struct model *m, struct fx_checkpoint *ck, const char *path, uint64_t *random) {
    uint64_t at = between(random, 0, m->nbytes), chunk = at / m->sum * m->sum;
    uint64_t n = m->nbytes - chunk < m->sum ? m->nbytes - chunk : m->sum;
    char byte, *target = calloc(1, n), *zeros = calloc(1, n);
    struct fx_target t = {
        .offset = chunk, .nbytes = n, .itemsize = 1, .view = {.address = target, .ndim = -1}};
    struct fx_error error;
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0 && pread(fd, &byte, 1, (off_t)at) == 1);
    char flipped = byte ^ (char)(1 << between(random, 0, 8));
    CHECK(pwrite(fd, &flipped, 1, (off_t)at) == 1);
    struct fx_range all = {0, fx_plan_sums(m->plan)}, one = {chunk / m->sum, 1};
    int r = fx_read_verified(fd, path, m->nbytes, m->sum, fx_crcs(ck), &all, 1, &t, 1, 2, &error);
    CHECK(r == FX_MISMATCH && error.offset == (int64_t)chunk && error.found != error.expected);
    CHECK(memcmp(target, zeros, n) == 0);
    CHECK(pwrite(fd, &byte, 1, (off_t)at) == 1 && ftruncate(fd, (off_t)chunk) == 0);
    r = fx_read_verified(fd, path, m->nbytes, m->sum, fx_crcs(ck), &one, 1, &t, 1, 2, &error);
    CHECK(r == FX_TRUNCATED && error.offset == (int64_t)chunk);
    close(fd);
    free(target);
    free(zeros);
}

static void test_files(const char *directory, uint64_t *random) {
    struct model m;
    char path[512];
    uint64_t chunk = FX_BLOCK * between(random, 1, 5);
    snprintf(path, sizeof path, "%s/file", directory);
    make_model(&m, random, (uint32_t)between(random, 0, 20), between(random, 5, 4 * chunk), chunk);
    struct fx_engine *engine = make_engine(2, chunk, 2 * chunk);
    struct fx_checkpoint *ck = begin(engine, &m, path);
    CHECK(ck);
    for (uint32_t l = 0; l < m.n_layers; l++) {
        update_layer(&m, l, 7);
        CHECK(fx_emit(ck, l, m.layers[l].sources) == 0);
        CHECK(fx_emit(ck, l, m.layers[l].sources) == -EALREADY);
    }
    CHECK(fx_copied(ck, 10 * SECOND, NULL) == 1 && fx_durable(ck, 10 * SECOND, NULL) == 1);
    check_file(&m, ck, path, 7);
    test_flipped_bit(&m, ck, path, random);
    fx_checkpoint_release(ck);
    fx_engine_free(engine);
    free_model(&m);
}

static void test_refusals(void) {
    struct fx_file file = {8192, "h", 1};
    struct fx_tensor good = {0, 0, 1, 100, 4},
                     bad[] = {{1, 0, 1, 4, 4},    {0, 1, 1, 4, 4},         {0, 0, 0, 4, 4},
                              {0, 0, 8190, 4, 4}, {0, 0, 97, 100, 4},      {0, 0, 200, 6, 4},
                              {0, 0, 200, 4, 0},  {0, 0, UINT64_MAX, 4, 4}};
    struct fx_plan *plan;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct fx_tensor both[] = {good, bad[i]};
        CHECK(fx_plan_new(&file, 1, both, 2, 1, FX_BLOCK, FX_BLOCK, &plan, NULL) == -EINVAL, "tensor %d", (int)i);
    }
    CHECK(fx_plan_new(&file, 1, &good, 1, 1, 1000, 1000, &plan, NULL) == -EINVAL);
    uint64_t sums[] = {0, 1000, 2 * FX_BLOCK, 8 * FX_BLOCK};
    for (size_t i = 0; i < sizeof sums / sizeof *sums; i++)
        CHECK(fx_plan_new(&file, 1, &good, 1, 1, 3 * FX_BLOCK, sums[i], &plan, NULL) == -EINVAL);
    file.nbytes = 100;
    CHECK(fx_plan_new(&file, 1, NULL, 0, 1, FX_BLOCK, FX_BLOCK, &plan, NULL) == -EINVAL);
}

int main(int argc, char **argv) {
    CHECK(argc == 4, "geometry DIRECTORY SECONDS SEED");
    seed_of_run = strtoull(argv[3], NULL, 0);
    uint64_t random = seed_of_run, rounds = 0;
    int64_t end = now_ns() + strtoll(argv[2], NULL, 0) * SECOND;
    test_refusals();
    for (; now_ns() < end; rounds++) {
        for (int i = 0; i < 20; i++) test_views(&random);
        for (int i = 0; i < 20; i++) test_checksums(&random);
        test_files(argv[1], &random);
    }
    printf("%lu rounds\n", (unsigned long)rounds);
    return 0;
}
