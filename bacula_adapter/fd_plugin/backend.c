/* SPDX-License-Identifier: AGPL-3.0-or-later */
#include "backend.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* A cancellation is noticed at the latest after this time, also if its signal came between a look and a wait. */
#define LOOK_MS 500
#define NATURAL_END_MS 2000
#define FAREWELL_MS 30000
#define ABANDON_MS 10000
#define LAST_WORDS_MS 5000
#define CANCELLED_SILENCE_MS 60000
#define MESSAGES_MAX 2000U
#define ERROR_LINES_MAX 50U

bool backend_start(struct backend *backend, const char *program, int *why)
{
    if (!process_start(&backend->process, program, why))
        return false;
    /* A cancellation that came before there was somebody to tell. */
    if (atomic_load(backend->cancelled))
        backend_cancel(backend);
    return true;
}

bool backend_lives(const struct backend *backend)
{
    return backend->process.from >= 0;
}

void backend_cancel(struct backend *backend)
{
    process_signal(&backend->process, SIGUSR1);
}

/* ---- Its standard error ---- */

static void say_error_line(struct backend *backend)
{
    if (backend->error_length == 0)
        return;
    message_clean(backend->error_line, backend->error_length);
    backend->error_length = 0;
    if (backend->error_line[0] != '\0' && backend->error_lines++ < ERROR_LINES_MAX)
        backend->say(backend->listener, SAY_ERROR, backend->error_line);
}

/* Passes on what stands in the pipe. Never waits. */
static void hear_errors(struct backend *backend)
{
    unsigned char bytes[1024];
    /* At most what a pipe holds: a flood does not keep us here. */
    for (int i = 0; backend->process.errors >= 0 && i < PIPE_BYTES / (int)sizeof bytes; i++) {
        ssize_t got = read(backend->process.errors, bytes, sizeof bytes);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return;
        if (got <= 0) {
            close_one(&backend->process.errors);
            return;
        }
        for (ssize_t k = 0; k < got; k++) {
            if (bytes[k] != '\n')
                backend->error_line[backend->error_length++] = (char)bytes[k];
            if (bytes[k] == '\n' || backend->error_length == sizeof backend->error_line - 1)
                say_error_line(backend);
        }
    }
}

/* ---- Ends ---- */

static void close_pipes(struct backend *backend)
{
    hear_errors(backend);
    say_error_line(backend);
    close_one(&backend->process.to);
    close_one(&backend->process.from);
    close_one(&backend->process.errors);
}

static void describe_end(char *text, size_t size, int status)
{
    if (status != -1 && WIFSIGNALED(status))
        snprintf(text, size, " (signal %d)", WTERMSIG(status));
    else if (status != -1 && WIFEXITED(status) && WEXITSTATUS(status) != 0)
        snprintf(text, size, " (exit code %d)", WEXITSTATUS(status));
    else
        text[0] = '\0';
}

static enum outcome ended_unasked(struct backend *backend)
{
    char how[32], text[128];
    close_one(&backend->process.to);
    int status = process_end(&backend->process, NATURAL_END_MS);
    close_pipes(backend);
    describe_end(how, sizeof how, status);
    snprintf(text, sizeof text, "replicator-backend ended in the middle of the job%s", how);
    backend->say(backend->listener, backend->breakdown, text);
    return BROKEN;
}

enum outcome backend_break(struct backend *backend, const char *format, ...)
{
    char text[MESSAGE_MAX + 1];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    close_one(&backend->process.to);
    process_end(&backend->process, 0);
    close_pipes(backend);
    backend->say(backend->listener, backend->breakdown, text);
    return BROKEN;
}

void backend_farewell(struct backend *backend)
{
    char how[32], text[128];
    close_one(&backend->process.to);
    close_one(&backend->process.from);
    int status = -1;
    bool by_itself = process_reap(&backend->process, FAREWELL_MS, &status);
    if (!by_itself)
        status = process_end(&backend->process, 0);
    close_pipes(backend);
    describe_end(how, sizeof how, status);
    if (by_itself && how[0] == '\0')
        return;
    snprintf(text, sizeof text, "replicator-backend did not end well after the job%s", how);
    backend->say(backend->listener, SAY_WARNING, text);
}

void backend_abandon(struct backend *backend)
{
    if (!process_running(&backend->process))
        return;
    close_pipes(backend);
    process_end(&backend->process, ABANDON_MS);
}

/* ---- Waiting ---- */

/* How long poll may wait; negative if the time is up. */
static int64_t patience_left(const struct backend *backend, int64_t since)
{
    int64_t now = now_ms();
    int64_t silence_ms = backend->silence_ms;
    if (silence_ms > CANCELLED_SILENCE_MS && atomic_load(backend->cancelled))
        silence_ms = CANCELLED_SILENCE_MS;
    int64_t left = since + silence_ms - now;
    if (backend->end_ms != 0 && backend->end_ms - now < left)
        left = backend->end_ms - now;
    return left;
}

static enum outcome out_of_patience(struct backend *backend)
{
    if (backend->silence_allowed)
        return SILENT;
    return backend_break(backend, "replicator-backend was not heard of for %lld s",
                         (long long)(backend->silence_ms / 1000));
}

static bool gives_up(const struct backend *backend)
{
    return backend->heeds_cancel && atomic_load_explicit(backend->cancelled, memory_order_relaxed);
}

static enum outcome wait_for(struct backend *backend, int fd, short events, int64_t since)
{
    for (;;) {
        if (gives_up(backend))
            return CANCELLED;
        int64_t left = patience_left(backend, since);
        if (left < 0)
            return out_of_patience(backend);
        struct pollfd polled[2] = {{.fd = fd, .events = events}, {.fd = backend->process.errors, .events = POLLIN}};
        int ready = poll(polled, 2, (int)(left < LOOK_MS ? left : LOOK_MS));
        if (ready < 0 && errno != EINTR)
            return backend_break(backend, "poll of replicator-backend's pipes: errno %d", errno);
        if (ready > 0 && polled[1].revents != 0)
            hear_errors(backend);
        if (ready > 0 && polled[0].revents != 0)
            return DONE;
    }
}

/* ---- Writing ---- */

/* write, without the signal that a pipe without a reader would bring where the daemon does not ignore it. */
static ssize_t write_quietly(int fd, const void *bytes, size_t length)
{
    sigset_t broken_pipe, before, pending;
    sigemptyset(&broken_pipe);
    sigaddset(&broken_pipe, SIGPIPE);
    sigpending(&pending);
    pthread_sigmask(SIG_BLOCK, &broken_pipe, &before);
    ssize_t done = write(fd, bytes, length);
    int error = errno;
    if (done < 0 && error == EPIPE && sigismember(&pending, SIGPIPE) == 0) {
        while (sigtimedwait(&broken_pipe, NULL, &(struct timespec){0}) < 0 && errno == EINTR) {
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return done;
}

/* The backend does not read any more: why, it may have said before it ended. */
static enum outcome last_words(struct backend *backend)
{
    enum outcome outcome;
    char status;
    close_one(&backend->process.to);
    backend->heeds_cancel = false;
    backend->silence_allowed = false;
    backend->silence_ms = NATURAL_END_MS;
    backend->end_ms = now_ms() + LAST_WORDS_MS;
    do
        outcome = backend_next(backend, &status);
    while (outcome == DONE || outcome == REFUSED);
    return outcome;
}

static enum outcome write_all(struct backend *backend, const unsigned char *bytes, size_t length)
{
    int64_t since = now_ms();
    while (length > 0) {
        if (backend->process.to < 0)
            return BROKEN;
        if (gives_up(backend))
            return CANCELLED;
        ssize_t done = write_quietly(backend->process.to, bytes, length);
        if (done > 0) {
            bytes += done;
            length -= (size_t)done;
            since = now_ms();
        } else if (done < 0 && errno == EAGAIN) {
            enum outcome outcome = wait_for(backend, backend->process.to, POLLOUT, since);
            if (outcome == SILENT)
                return backend_break(backend, "replicator-backend does not read");
            if (outcome != DONE)
                return outcome;
        } else if (done < 0 && errno != EINTR) {
            return last_words(backend);
        }
    }
    return DONE;
}

enum outcome backend_send_in_place(struct backend *backend, char status, unsigned char *packet, size_t length)
{
    /* A packet that was begun is finished: half a one would leave no way to go on with RESULT. */
    bool heeded = backend->heeds_cancel;
    if (gives_up(backend))
        return CANCELLED;
    packet_encode(packet, status, length);
    backend->heeds_cancel = false;
    enum outcome outcome = write_all(backend, packet, HEADER_BYTES + length);
    backend->heeds_cancel = heeded;
    return outcome;
}

enum outcome backend_send(struct backend *backend, char status, const void *payload, size_t length)
{
    if (length > PAYLOAD_MAX)
        return backend_break(backend, "a packet of %zu bytes is too long for replicator-backend", length);
    unsigned char *packet = malloc(HEADER_BYTES + length);
    if (packet == NULL)
        return backend_break(backend, "no memory for a packet to replicator-backend");
    if (length > 0)
        memcpy(packet + HEADER_BYTES, payload, length);
    enum outcome outcome = backend_send_in_place(backend, status, packet, length);
    free(packet);
    return outcome;
}

enum outcome backend_command(struct backend *backend, const char *format, ...)
{
    char *text = NULL;
    va_list values;
    va_start(values, format);
    int length = vasprintf(&text, format, values);
    va_end(values);
    if (length < 0)
        return backend_break(backend, "no memory for a command to replicator-backend");
    text[length] = '\n'; /* in place of the zero, which is not sent */
    enum outcome outcome = backend_send(backend, 'C', text, (size_t)length + 1);
    free(text);
    return outcome;
}

/* ---- Reading ---- */

static size_t take_ahead(struct backend *backend, void *to, size_t length)
{
    size_t have = backend->end - backend->start;
    if (length > have)
        length = have;
    if (length > 0)
        memcpy(to, backend->ahead + backend->start, length);
    backend->start += length;
    if (backend->start == backend->end)
        backend->start = backend->end = 0;
    return length;
}

/* At least one byte of `length` to `to`; what comes with it beyond `length` goes to `ahead`, which must be empty. */
static enum outcome read_some(struct backend *backend, void *to, size_t length, bool read_ahead, size_t *got)
{
    int64_t since = 0;
    for (;;) {
        if (backend->process.from < 0)
            return BROKEN;
        if (gives_up(backend))
            return CANCELLED;
        struct iovec parts[2] = {{to, length}, {backend->ahead, sizeof backend->ahead}};
        ssize_t done = readv(backend->process.from, parts, read_ahead ? 2 : 1);
        if (done > 0) {
            *got = (size_t)done < length ? (size_t)done : length;
            backend->start = 0;
            backend->end = (size_t)done - *got;
            return DONE;
        }
        if (done == 0)
            return ended_unasked(backend);
        if (errno == EAGAIN) {
            since = since != 0 ? since : now_ms();
            enum outcome outcome = wait_for(backend, backend->process.from, POLLIN, since);
            if (outcome != DONE)
                return outcome;
        } else if (errno != EINTR) {
            return backend_break(backend, "reading from replicator-backend: errno %d", errno);
        }
    }
}

/* The next header. A wait that ends early loses none of its bytes. */
static enum outcome read_header(struct backend *backend, unsigned char header[HEADER_BYTES])
{
    while (backend->end - backend->start < HEADER_BYTES) {
        if (backend->process.from < 0)
            return BROKEN;
        size_t have = backend->end - backend->start;
        unsigned char more[sizeof backend->ahead - HEADER_BYTES];
        unsigned char kept[HEADER_BYTES];
        size_t got = 0;
        memcpy(kept, backend->ahead + backend->start, have);
        enum outcome outcome = read_some(backend, more, sizeof more, false, &got);
        memcpy(backend->ahead, kept, have);
        memcpy(backend->ahead + have, more, got);
        backend->start = 0;
        backend->end = have + got;
        if (outcome != DONE)
            return outcome;
    }
    take_ahead(backend, header, HEADER_BYTES);
    return DONE;
}

enum outcome backend_payload(struct backend *backend, void *to, size_t length)
{
    unsigned char *at = to;
    /* The packet's last bytes bring the next header with them in one call of the system. */
    bool read_ahead = length == backend->left;
    size_t got = take_ahead(backend, at, length);
    backend->left -= (uint32_t)got;
    while (got < length) {
        size_t more = 0;
        enum outcome outcome = read_some(backend, at + got, length - got, read_ahead, &more);
        if (outcome != DONE)
            return outcome;
        got += more;
        backend->left -= (uint32_t)more;
    }
    return DONE;
}

static enum outcome skip_payload(struct backend *backend)
{
    unsigned char bytes[16384];
    while (backend->left > 0) {
        size_t length = backend->left < sizeof bytes ? backend->left : sizeof bytes;
        size_t got = take_ahead(backend, bytes, length);
        if (got == 0) {
            enum outcome outcome = read_some(backend, bytes, length, false, &got);
            if (outcome != DONE)
                return outcome;
        }
        backend->left -= (uint32_t)got;
    }
    return DONE;
}

static enum outcome pass_on(struct backend *backend, enum severity severity)
{
    char text[MESSAGE_MAX + 16];
    size_t length = backend->left < sizeof text - 1 ? backend->left : sizeof text - 1;
    enum outcome outcome = backend_payload(backend, text, length);
    if (outcome == DONE)
        outcome = skip_payload(backend);
    if (outcome != DONE)
        return outcome;
    message_clean(text, length);
    if (severity == SAY_FATAL || backend->messages < MESSAGES_MAX)
        backend->say(backend->listener, severity, text[0] != '\0' ? text : "replicator-backend gives no reason");
    else if (backend->messages == MESSAGES_MAX)
        backend->say(backend->listener, SAY_WARNING, "replicator-backend says too much: its further messages are left out");
    backend->messages++;
    return DONE;
}

enum outcome backend_next(struct backend *backend, char *status)
{
    for (;;) {
        unsigned char bytes[HEADER_BYTES];
        struct packet_header header = {0};
        enum outcome outcome = skip_payload(backend);
        if (outcome == DONE)
            outcome = read_header(backend, bytes);
        if (outcome != DONE)
            return outcome;
        if (!packet_decode(bytes, &header))
            return backend_break(backend, "replicator-backend sent what is no packet");
        backend->left = header.length;
        switch (header.status) {
        case 'K':
            break;
        case 'I':
            outcome = pass_on(backend, SAY_INFO);
            break;
        case 'W':
            outcome = pass_on(backend, SAY_WARNING);
            break;
        case 'Q':
            outcome = pass_on(backend, SAY_ERROR);
            break;
        case 'E':
        case 'A':
            outcome = pass_on(backend, backend->refusal);
            return outcome == DONE ? REFUSED : outcome;
        default:
            *status = header.status;
            return DONE;
        }
        if (outcome != DONE)
            return outcome;
    }
}

enum outcome backend_text(struct backend *backend, char *text)
{
    size_t length = backend->left;
    if (length >= COMMAND_MAX)
        return backend_break(backend, "replicator-backend sent a command of %zu bytes", length);
    enum outcome outcome = backend_payload(backend, text, length);
    if (outcome != DONE)
        return outcome;
    if (!command_trim(text, length))
        return backend_break(backend, "replicator-backend sent a command that is no text");
    return DONE;
}

enum outcome backend_expect(struct backend *backend, char wanted)
{
    char status = '\0';
    enum outcome outcome = backend_next(backend, &status);
    if (outcome == DONE && status != wanted)
        return backend_break(backend, "replicator-backend sent %c where %c was due", status, wanted);
    return outcome;
}

enum outcome backend_answer(struct backend *backend, char *text)
{
    enum outcome outcome = backend_expect(backend, 'C');
    return outcome == DONE ? backend_text(backend, text) : outcome;
}
