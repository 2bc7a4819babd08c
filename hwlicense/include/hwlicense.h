/* The private socket of `hwlicense exec`, for C99 and C++. Header only; allocates nothing, keeps no state.
 *
 *   cc -I"$(hwlicense exec --include-dir)" program.c
 *
 * Each process and each thread takes a connection of its own:
 *
 *   int license = hwlicense_connect();
 *   struct hwlicense_refusal refusal;
 *   switch (hwlicense_spend(license, 1, &refusal)) {
 *   case 0: infer(); break;                                      the license allows it
 *   case 1: say(refusal.reason, refusal.wait); break;            it does not
 *   default: perror("hwlicense");                                no answer: end, the license is gone
 *   }
 */
#ifndef HWLICENSE_H
#define HWLICENSE_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

/* Bytes of a line of the protocol, its end included, at the most. */
#define HWLICENSE_LINE 128

struct hwlicense_refusal {
    char reason[64]; /* a stable code, such as RATE_EXCEEDED */
    double wait;     /* seconds until it may be allowed; below 0 where waiting does not help */
};

/* A connection for this process or thread: a descriptor for close(2), not passed on by execve(2).
 * -1 with errno where there is none: ENOTCONN outside of `hwlicense exec`. */
static inline int hwlicense_connect(void)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    char line[] = "connect\n";
    const char *name = getenv("HWLICENSE_SOCKET");
    struct iovec part;
    struct msghdr message;
    struct cmsghdr *header;
    ssize_t sent;
    int ends[2], problem;

    if (!name) {
        errno = ENOTCONN;
        return -1;
    }
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
        return -1;
    part.iov_base = line;
    part.iov_len = sizeof line - 1;
    memset(&control, 0, sizeof control);
    memset(&message, 0, sizeof message);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.space;
    message.msg_controllen = sizeof control.space;
    header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &ends[1], sizeof(int));
    do {
        sent = sendmsg(atoi(name), &message, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    problem = errno;
    close(ends[1]);
    if (sent == (ssize_t)part.iov_len)
        return ends[0];
    close(ends[0]);
    errno = sent < 0 ? problem : EIO;
    return -1;
}

/* Whether a number is longer than the 10 digits that a line takes: then nothing is asked, as for `no USAGE -`. */
static inline int hwlicense_too_large(unsigned long long number, struct hwlicense_refusal *refusal)
{
    if (number <= 9999999999ULL)
        return 0;
    if (refusal) {
        strcpy(refusal->reason, "USAGE");
        refusal->wait = -1;
    }
    return 1;
}

/* Send a line and read the answer: 0 allowed, 1 refused, -1 with errno where there is no answer. */
static inline int hwlicense_ask(int connection, const char *line, struct hwlicense_refusal *refusal)
{
    char answer[HWLICENSE_LINE + 1], *wait;
    size_t size = strlen(line), done = 0;
    double digit = 1, seconds = 0;
    int fraction = 0;
    ssize_t part;

    while (done < size) {
        part = send(connection, line + done, size - done, MSG_NOSIGNAL);
        if (part < 0 && errno == EINTR)
            continue;
        if (part < 0)
            return -1;
        done += (size_t)part;
    }
    for (size = 0; size < HWLICENSE_LINE; size++) {
        part = recv(connection, answer + size, 1, 0);
        if (part < 0 && errno == EINTR) {
            size--;
            continue;
        }
        if (part < 0)
            return -1;
        if (!part) {
            errno = ECONNRESET;
            return -1;
        }
        if (answer[size] == '\n')
            break;
    }
    if (size == HWLICENSE_LINE) {
        errno = EPROTO;
        return -1;
    }
    answer[size] = 0;
    if (!strcmp(answer, "ok"))
        return 0;
    wait = strrchr(answer, ' ');
    if (strncmp(answer, "no ", 3) || wait < answer + 3 || (size_t)(wait - answer) - 3 >= sizeof refusal->reason) {
        errno = EPROTO;
        return -1;
    }
    *wait++ = 0;
    if (!strcmp(wait, "-")) {
        seconds = -1;
    } else { /* digits, a point, digits: strtod would go by the locale */
        size = strspn(wait, "0123456789");
        done = wait[size] == '.' ? strspn(wait + size + 1, "0123456789") : 0;
        if (!size || size > 10 || done > 9 || wait[size + (wait[size] == '.') + done] || (wait[size] && !done)) {
            errno = EPROTO;
            return -1;
        }
        for (; *wait; wait++) {
            if (*wait == '.')
                fraction = 1;
            else if (fraction)
                seconds += (digit /= 10) * (*wait - '0');
            else
                seconds = 10 * seconds + (*wait - '0');
        }
    }
    if (refusal) {
        strcpy(refusal->reason, answer + 3);
        refusal->wait = seconds;
    }
    return 1;
}

/* Spend `count` inferences of the license's, or none. */
static inline int hwlicense_spend(int connection, unsigned long count, struct hwlicense_refusal *refusal)
{
    char line[HWLICENSE_LINE];
    if (hwlicense_too_large(count, refusal))
        return 1;
    snprintf(line, sizeof line, "spend %lu\n", count);
    return hwlicense_ask(connection, line, refusal);
}

/* Whether a procedure of so many seconds and inferences may start now. */
static inline int hwlicense_standing(int connection, unsigned long seconds, unsigned long count,
                                     struct hwlicense_refusal *refusal)
{
    char line[HWLICENSE_LINE];
    if (hwlicense_too_large(seconds, refusal) || hwlicense_too_large(count, refusal))
        return 1;
    snprintf(line, sizeof line, "standing %lu %lu\n", seconds, count);
    return hwlicense_ask(connection, line, refusal);
}

/* Begin a procedure that is not interrupted, with so many inferences reserved for this connection's `spend`. */
static inline int hwlicense_session(int connection, unsigned long count, struct hwlicense_refusal *refusal)
{
    char line[HWLICENSE_LINE];
    if (hwlicense_too_large(count, refusal))
        return 1;
    snprintf(line, sizeof line, "session %lu\n", count);
    return hwlicense_ask(connection, line, refusal);
}

/* End it. Closing the connection does so, too. */
static inline int hwlicense_end(int connection, struct hwlicense_refusal *refusal)
{
    return hwlicense_ask(connection, "end\n", refusal);
}

#endif
