/* For LD_PRELOAD: the k-th call that writes below a folder fails, as on a disk that is full. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[4096];
static long fail_at, calls;
static int number, once;

void failing_writes(const char *folder, long k, int error, int only) {
    strncpy(under, folder, sizeof under - 1);
    fail_at = k, number = error, once = only, calls = 0;
}

long failing_writes_calls(void) { return calls; }

static int fails(const char *path) {
    if (!under[0] || strncmp(path, under, strlen(under))) return 0;
    long n = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (!fail_at || n < fail_at || (once && n > fail_at)) return 0;
    errno = number;
    return 1;
}

static int fails_fd(int fd) {
    char link[64], path[4096];
    if (!under[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails(path);
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        NEXT(name);                                                             \
        va_list rest; va_start(rest, flags);                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                           \
        return (flags & O_CREAT) && fails(path) ? -1 : next(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                       \
    int name(int at, const char *path, int flags, ...) {                                   \
        NEXT(name);                                                                        \
        va_list rest; va_start(rest, flags);                                               \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;            \
        va_end(rest);                                                                      \
        return (flags & O_CREAT) && fails(path) ? -1 : next(at, path, flags, mode);        \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t n) { NEXT(write); return fails_fd(fd) ? -1 : next(fd, data, n); }
ssize_t writev(int fd, const struct iovec *v, int n) { NEXT(writev); return fails_fd(fd) ? -1 : next(fd, v, n); }
ssize_t pwrite64(int fd, const void *d, size_t n, off64_t o) { NEXT(pwrite64); return fails_fd(fd) ? -1 : next(fd, d, n, o); }
int fsync(int fd) { NEXT(fsync); return fails_fd(fd) ? -1 : next(fd); }
int ftruncate64(int fd, off64_t n) { NEXT(ftruncate64); return fails_fd(fd) ? -1 : next(fd, n); }
int rename(const char *a, const char *b) { NEXT(rename); return fails(a) ? -1 : next(a, b); }
int mkdir(const char *path, mode_t mode) { NEXT(mkdir); return fails(path) ? -1 : next(path, mode); }
