/* What `python -m benchmarks.overhead --instructions` loads before everything else: a clock that does not depend on how
 * fast the machine is, and the two calls that begin and end the counting. See `_instructions.py`.
 *
 * Time passes in the event loop alone: a pass of the loop takes 20 us, as one that serves a request does natively, and
 * a pass with nothing to do takes as long as the loop would have waited for its next timer. */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <valgrind/callgrind.h>

static const int64_t second = 1000000000, millisecond = 1000000, pass = 20000;
static int64_t now = 1000 * (int64_t)1000000000;

int clock_gettime(clockid_t clock, struct timespec *result)
{
    if (clock == CLOCK_PROCESS_CPUTIME_ID || clock == CLOCK_THREAD_CPUTIME_ID)
        return syscall(SYS_clock_gettime, clock, result);
    result->tv_sec = now / second;
    result->tv_nsec = now % second;
    return 0;
}

/* The wall clock too: with the real one, two runs differ by some tenths of a percent. */
time_t time(time_t *result)
{
    if (result)
        *result = now / second;
    return now / second;
}

int gettimeofday(struct timeval *result, void *zone)
{
    (void)zone;
    result->tv_sec = now / second;
    result->tv_usec = now % second / 1000;
    return 0;
}

int epoll_pwait(int epoll, struct epoll_event *events, int room, int timeout, const sigset_t *mask)
{
    int ready = syscall(SYS_epoll_pwait, epoll, events, room, timeout < 0 ? -1 : 0, mask, 8);
    now += pass;
    if (ready == 0 && timeout > 0)
        now += timeout * millisecond;
    return ready;
}

int epoll_wait(int epoll, struct epoll_event *events, int room, int timeout)
{
    return epoll_pwait(epoll, events, room, timeout, NULL);
}

void counting_begins(void)
{
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
}

void counting_ends(void)
{
    CALLGRIND_DUMP_STATS;
    CALLGRIND_STOP_INSTRUMENTATION;
}
