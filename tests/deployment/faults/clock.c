/* A wall clock that is wrong by the seconds in the file FAKETIME_TIMESTAMP_FILE ("+60"), read anew every second.

   What Debian's libfaketime does, where that does not work: its release 0.9.10 breaks time.sleep of Python 3.11 and
   newer, which sleeps until a moment of the monotonic clock. This touches the wall clock alone. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long ahead(void) {
    static long seconds, read_at = -1;
    struct timespec up;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &up);
    if (up.tv_sec != read_at) {
        const char *name = getenv("FAKETIME_TIMESTAMP_FILE");
        FILE *file = name ? fopen(name, "r") : NULL;
        if (file) {
            if (fscanf(file, "%ld", &seconds) != 1) seconds = 0;
            fclose(file);
        }
        read_at = up.tv_sec;
    }
    return seconds;
}

int clock_gettime(clockid_t which, struct timespec *found) {
    long failed = syscall(SYS_clock_gettime, which, found);
    if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) found->tv_sec += ahead();
    return (int)failed;
}

int gettimeofday(struct timeval *restrict found, void *restrict zone) {
    long failed = syscall(SYS_gettimeofday, found, zone);
    if (!failed && found) found->tv_sec += ahead();
    return (int)failed;
}

time_t time(time_t *found) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (found) *found = now.tv_sec;
    return now.tv_sec;
}
