/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* A backend: started, spoken to with deadlines, ended. Knows packets, and nothing of Bacula.
 *
 * One thread speaks with a backend; backend_cancel alone may be called by any thread at any time. */
#ifndef REPLICATOR_BACKEND_H
#define REPLICATOR_BACKEND_H

#include "packet.h"
#include "process.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum severity { SAY_FATAL, SAY_ERROR, SAY_WARNING, SAY_INFO };

typedef void say_t(void *listener, enum severity severity, const char *text);

enum outcome {
    DONE,
    CANCELLED, /* the job was, and the wait was one that heeds it */
    REFUSED,   /* the backend said E or A (it has been passed on); the conversation can go on */
    SILENT,    /* nothing came in time; only where silence is allowed */
    BROKEN     /* there is no backend any more; why has been said */
};

struct backend {
    say_t *say;
    void *listener;
    const atomic_bool *cancelled;
    struct process process;
    int64_t silence_ms;   /* longest wait for a byte */
    int64_t end_ms;       /* when every wait ends, 0 for never */
    bool heeds_cancel;    /* whether waits end when the job is cancelled */
    bool silence_allowed;
    enum severity refusal;    /* as what an E is passed on */
    enum severity breakdown;  /* as what the backend's loss is told */
    unsigned messages, error_lines;
    uint32_t left; /* bytes of the packet's payload that were not taken yet */
    size_t start, end;
    unsigned char ahead[4096]; /* what was read beyond what was asked for: [start, end) */
    size_t error_length;
    char error_line[512];
};

/* Starts `program`. False if that failed: *why is an errno. */
bool backend_start(struct backend *backend, const char *program, int *why);
/* Whether it can be spoken to. */
bool backend_lives(const struct backend *backend);
/* Tells the process that the job is cancelled (SIGUSR1). */
void backend_cancel(struct backend *backend);

enum outcome backend_send(struct backend *backend, char status, const void *payload, size_t length);
/* `packet` has HEADER_BYTES of room for the header in front of `length` bytes of payload. */
enum outcome backend_send_in_place(struct backend *backend, char status, unsigned char *packet, size_t length);
enum outcome backend_command(struct backend *backend, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The next packet that asks for something (messages and signs of life have been dealt with). What was left of the packet
 * before is thrown away. */
enum outcome backend_next(struct backend *backend, char *status);
/* All of this packet's payload, as a command. `text` has room for COMMAND_MAX. */
enum outcome backend_text(struct backend *backend, char *text);
/* The next `length` bytes of this packet's payload, which must not be more than `left`. */
enum outcome backend_payload(struct backend *backend, void *to, size_t length);
/* The next packet must be of this status. */
enum outcome backend_expect(struct backend *backend, char status);
/* The next packet must be a command. */
enum outcome backend_answer(struct backend *backend, char *text);

/* Ends the conversation because of what the backend did: says why, and ends the process. Returns BROKEN. */
enum outcome backend_break(struct backend *backend, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* After T: closes the pipes and waits for the process, which is ended if it does not end by itself. */
void backend_farewell(struct backend *backend);
/* Ends what is left without a word: the backend sees the end of its input, gets some time, then it is ended. */
void backend_abandon(struct backend *backend);

#endif
