/* Preloaded into an engine under test: a boot clock that runs faster, a wall clock that is wrong, no IPv6. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

static long number(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    static struct timespec start;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int r = real(id, t);
    long rate = number("SHIM_RATE");
    if (r == 0 && id == CLOCK_BOOTTIME && rate > 1) {
        if (!start.tv_sec) start = *t;
        long long ns = (t->tv_sec - start.tv_sec) * 1000000000LL + (t->tv_nsec - start.tv_nsec);
        ns = ns * rate + start.tv_nsec;
        t->tv_sec = start.tv_sec + ns / 1000000000LL;
        t->tv_nsec = ns % 1000000000LL;
    }
    if (r == 0 && id == CLOCK_REALTIME) t->tv_sec += number("SHIM_WALL_SECONDS");
    return r;
}

int epoll_wait(int fd, struct epoll_event *events, int max, int timeout) {
    static int (*real)(int, struct epoll_event *, int, int);
    if (!real) real = (int (*)(int, struct epoll_event *, int, int))dlsym(RTLD_NEXT, "epoll_wait");
    long rate = number("SHIM_RATE");
    return real(fd, events, max, timeout > 0 && rate > 1 ? (int)((timeout + rate - 1) / rate) : timeout);
}

int socket(int domain, int type, int protocol) {
    static int (*real)(int, int, int);
    if (!real) real = (int (*)(int, int, int))dlsym(RTLD_NEXT, "socket");
    if (domain == AF_INET6 && number("SHIM_NO_IPV6")) {
        errno = EAFNOSUPPORT;
        return -1;
    }
    return real(domain, type, protocol);
}
