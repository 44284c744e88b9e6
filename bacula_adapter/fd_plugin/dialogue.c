/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* The parts of the conversation with a backend that all jobs have: its beginning, the verdict, its end. */
#include "job.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_S 120
#define TIMEOUT_S_MAX 86400U
#define UNDO_SILENCE_MS 60000
#define UNDO_MS 300000
/* After an E that may have been the answer to RESULT, or on its way before it. */
#define AFTER_REFUSAL_MS 15000
#define SETTLING_MS 1000

int io_failed(struct io_packet *io, int error)
{
    io->status = -1;
    io->error = error;
    return RC_ERROR;
}

bool line_lives(const struct line *line)
{
    return backend_lives(&line->backend);
}

static void hear(void *listener, enum severity severity, const char *text)
{
    struct line *line = listener;
    if (severity == SAY_FATAL)
        line_fail(line, "%s", text);
    else
        job_say(line->job, severity, text);
}

bool line_check(struct line *line, enum outcome outcome)
{
    if (outcome == DONE)
        return true;
    line->failed = true;
    return false;
}

struct line *line_find(struct job *job, const char *plugin_string)
{
    for (size_t i = 0; i < LINES_MAX; i++) {
        struct line *line = atomic_load(&job->lines[i]);
        if (line != NULL && strcmp(line->plugin_string, plugin_string) == 0)
            return line;
    }
    return NULL;
}

/* ---- What the backend is told about the job ---- */

static enum outcome tell(struct line *line, const char *key, const char *value)
{
    for (const char *at = value; *at != '\0'; at++) {
        if ((unsigned char)*at < 0x20 || *at == 0x7F)
            return backend_break(&line->backend, "%s holds a control character", key);
    }
    return backend_command(&line->backend, "%s=%s", key, value);
}

static enum outcome tell_if_set(struct line *line, const char *key, const char *value)
{
    return value != NULL && *value != '\0' ? tell(line, key, value) : DONE;
}

static enum outcome tell_number(struct line *line, const char *key, long long value)
{
    return backend_command(&line->backend, "%s=%lld", key, value);
}

static enum outcome tell_character(struct line *line, const char *key, char value)
{
    char text[2] = {value, '\0'};
    return tell_if_set(line, key, value > ' ' && value < 0x7F ? text : NULL);
}

/* The file that the daemon's command line names with -c. `path` has room for PATH_MAX. False if there is none. */
static bool daemon_configuration(char *path)
{
    char text[4 * PATH_MAX];
    size_t length = 0;
    int file = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    while (length < sizeof text - 2) {
        ssize_t got = read(file, text + length, sizeof text - 2 - length);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        length += (size_t)got;
    }
    close(file);
    text[length] = text[length + 1] = '\0';
    for (const char *word = text; word < text + length; word += strlen(word) + 1) {
        if (strcmp(word, "-c") == 0)
            return realpath(word + strlen(word) + 1, path) != NULL;
        if (strncmp(word, "-c", 2) == 0)
            return realpath(word + 2, path) != NULL;
    }
    return false;
}

static enum outcome tell_run(struct line *line)
{
    struct job *job = line->job;
    enum outcome outcome = DONE;
    if (line->purpose == FOR_RESTORE) {
        char replace[2] = {job->replace, '\0'};
        if (job->where != NULL)
            outcome = tell(line, "Where", job->where);
        if (outcome == DONE)
            outcome = tell_if_set(line, "RegexWhere", job->regex_where);
        return outcome == DONE ? tell_if_set(line, "Replace", replace) : outcome;
    }
    char level = job->level != '\0' ? job->level : (char)job_number(job, VAR_LEVEL);
    int64_t since = job->since != 0 ? job->since : job_number(job, VAR_SINCE);
    outcome = tell_character(line, "Level", level);
    if (outcome == DONE && since > 0)
        outcome = tell_number(line, "Since", since);
    if (outcome == DONE)
        outcome = tell_if_set(line, "PrevJobName", job_text(job, VAR_PREV_JOB_NAME));
    return outcome == DONE ? tell_number(line, "Accurate", job_number(job, VAR_ACCURATE) != 0) : outcome;
}

static enum outcome tell_daemon(struct line *line)
{
    struct job *job = line->job;
    char path[PATH_MAX];
    enum outcome outcome = tell_if_set(line, "WorkingDir", job_text(job, VAR_WORKING_DIR));
    if (outcome == DONE)
        outcome = tell_if_set(line, "Client", job_text(job, VAR_CLIENT));
    if (outcome == DONE)
        outcome = tell_if_set(line, "FDVersion", job_text(job, abi->version));
    if (outcome == DONE)
        outcome = tell_number(line, "Interface", abi->interface);
    if (outcome == DONE && daemon_configuration(path))
        outcome = tell(line, "FDConfig", path);
    return outcome;
}

static enum outcome end_of_block(struct line *line)
{
    enum outcome outcome = backend_send(&line->backend, 'F', NULL, 0);
    return outcome == DONE ? backend_expect(&line->backend, 'F') : outcome;
}

static enum outcome tell_job(struct line *line)
{
    static const char types[] = {[FOR_BACKUP] = 'B', [FOR_ESTIMATE] = 'E', [FOR_LISTING] = 'E', [FOR_QUERY] = 'E',
                                 [FOR_RESTORE] = 'R'};
    struct job *job = line->job;
    enum outcome outcome = backend_command(&line->backend, "Job");
    if (outcome == DONE)
        outcome = tell_if_set(line, "Name", job_text(job, VAR_JOB_NAME));
    if (outcome == DONE)
        outcome = tell_number(line, "JobID", job_number(job, VAR_JOB_ID));
    if (outcome == DONE)
        outcome = tell_character(line, "Type", types[line->purpose]);
    if (outcome == DONE)
        outcome = tell_run(line);
    if (outcome == DONE)
        outcome = tell_daemon(line);
    return outcome == DONE ? end_of_block(line) : outcome;
}

static enum outcome tell_parameters(struct line *line, const char *query)
{
    const char *colon = strchr(line->plugin_string, ':');
    enum outcome outcome = backend_command(&line->backend, "Params");
    if (outcome == DONE)
        outcome = tell(line, "PluginString", colon != NULL ? colon + 1 : "");
    if (outcome == DONE && query != NULL)
        outcome = tell(line, "query", query);
    return outcome == DONE ? end_of_block(line) : outcome;
}

static enum outcome greet(struct line *line)
{
    char text[COMMAND_MAX];
    enum outcome outcome = backend_command(&line->backend, "Hello replicator 3 ext=1");
    if (outcome == DONE)
        outcome = backend_answer(&line->backend, text);
    if (outcome == DONE && strcmp(text, "Hello Bacula ext=1") != 0)
        return backend_break(&line->backend, "replicator-fd.so and replicator-backend were not installed together");
    return outcome;
}

static enum outcome take_claim(struct line *line, const char *prefix)
{
    if (line->claim_count == CLAIMS_MAX)
        return backend_break(&line->backend, "replicator-backend claims more than %u names", CLAIMS_MAX);
    line->claims[line->claim_count] = strdup(prefix);
    if (line->claims[line->claim_count] == NULL)
        return backend_break(&line->backend, "no memory");
    line->claim_count++;
    return DONE;
}

static enum outcome start_work(struct line *line)
{
    static const char *const starts[] = {[FOR_BACKUP] = "BackupStart", [FOR_ESTIMATE] = "EstimateStart",
                                         [FOR_LISTING] = "ListingStart", [FOR_QUERY] = "QueryStart",
                                         [FOR_RESTORE] = "RestoreStart"};
    struct backend *backend = &line->backend;
    char text[COMMAND_MAX], status = '\0';
    enum outcome outcome = backend_command(backend, "%s", starts[line->purpose]);
    while (outcome == DONE) {
        const char *value;
        uint64_t seconds;
        outcome = backend_next(backend, &status);
        if (outcome != DONE || status == 'F')
            return outcome;
        if (status != 'C')
            return backend_break(backend, "replicator-backend sent %c while it got ready", status);
        outcome = backend_text(backend, text);
        if (outcome != DONE)
            return outcome;
        if (after(text, "TIMEOUT:", &value) && number_parse(value, TIMEOUT_S_MAX, &seconds) && seconds > 0)
            backend->silence_ms = line->timeout_ms = (int64_t)seconds * 1000;
        else if (after(text, "CLAIM:", &value) && *value != '\0')
            outcome = take_claim(line, value);
        else
            return backend_break(backend, "replicator-backend said while it got ready: %.200s", text);
    }
    return outcome;
}

static struct line *line_make(struct job *job, enum purpose purpose, const char *plugin_string)
{
    struct line *line = calloc(1, sizeof *line);
    if (line == NULL)
        return NULL;
    line->plugin_string = strdup(plugin_string);
    if (line->plugin_string == NULL) {
        free(line);
        return NULL;
    }
    line->job = job;
    line->purpose = purpose;
    line->timeout_ms = TIMEOUT_S * INT64_C(1000);
    line->backend.say = hear;
    line->backend.listener = line;
    line->backend.cancelled = &job->cancelled;
    line->backend.process.to = line->backend.process.from = line->backend.process.errors = -1;
    line->backend.silence_ms = line->timeout_ms;
    line->backend.heeds_cancel = true;
    line->backend.refusal = line->backend.breakdown = SAY_FATAL;
    return line;
}

static bool line_keep(struct job *job, struct line *line)
{
    for (size_t i = 0; i < LINES_MAX; i++) {
        if (atomic_load(&job->lines[i]) == NULL) {
            atomic_store(&job->lines[i], line);
            return true;
        }
    }
    return false;
}

struct line *line_open(struct job *job, enum purpose purpose, const char *plugin_string, const char *query)
{
    const char *program = backend_program();
    int why = 0;
    struct line *line = line_make(job, purpose, plugin_string);
    if (line == NULL || !line_keep(job, line)) {
        job_sayf(job, SAY_FATAL, line == NULL ? "no memory for a backend" : "a job can have %u plugin strings at most",
                 LINES_MAX);
        if (line != NULL)
            line_free(line);
        return NULL;
    }
    if (atomic_load(&job->cancelled)) {
        line->failed = true;
        return NULL;
    }
    if (!backend_start(&line->backend, program, &why)) {
        char reason[128];
        line_fail(line, "cannot start %s: %s", program, strerror_r(why, reason, sizeof reason));
        return NULL;
    }
    enum outcome outcome = greet(line);
    if (outcome == DONE)
        outcome = tell_job(line);
    if (outcome == DONE)
        outcome = tell_parameters(line, query);
    if (outcome == DONE)
        outcome = start_work(line);
    return line_check(line, outcome) ? line : NULL;
}

/* ---- The end ---- */

void line_close(struct line *line)
{
    struct backend *backend = &line->backend;
    if (!line_lives(line))
        return;
    backend->heeds_cancel = false;
    /* What the job is worth has been decided. */
    backend->refusal = backend->breakdown = SAY_WARNING;
    backend->silence_allowed = false;
    backend->silence_ms = UNDO_SILENCE_MS;
    backend->end_ms = now_ms() + UNDO_MS;
    enum outcome outcome = DONE;
    if (line->purpose != FOR_QUERY) {
        outcome = backend_command(backend, "END");
        /* Something may still be on its way; an E stands for F, and has been passed on. */
        for (char status = '\0'; outcome == DONE && status != 'F';)
            outcome = backend_next(backend, &status);
    }
    if (outcome == DONE || outcome == REFUSED)
        outcome = backend_send(backend, 'T', NULL, 0);
    if (outcome == DONE)
        backend_farewell(backend);
}

/* Reads until the verdict is acknowledged. */
static enum outcome wait_for_result(struct line *line, bool good)
{
    struct backend *backend = &line->backend;
    char text[COMMAND_MAX], status = '\0';
    for (;;) {
        enum outcome outcome = backend_next(backend, &status);
        if (outcome == REFUSED && !good) {
            backend->silence_allowed = true;
            backend->silence_ms = AFTER_REFUSAL_MS;
            continue;
        }
        if (outcome != DONE)
            return outcome;
        if (status == 'C' && backend->left < COMMAND_MAX) {
            size_t length = backend->left;
            outcome = backend_payload(backend, text, length);
            if (outcome != DONE || (command_trim(text, length) && strcmp(text, "RESULT OK") == 0))
                return outcome;
        }
        if (good)
            return backend_break(backend, "replicator-backend answered the job's end with something else");
        /* What was on its way before: thrown away. */
    }
}

static void deliver(struct line *line, char status)
{
    struct backend *backend = &line->backend;
    bool good = status == 'T';
    if (!line_lives(line))
        return;
    backend->heeds_cancel = false;
    backend->silence_ms = good ? line->timeout_ms : UNDO_SILENCE_MS;
    backend->end_ms = good ? 0 : now_ms() + UNDO_MS;
    if (!good)
        backend->refusal = backend->breakdown = SAY_ERROR;
    enum outcome outcome = backend_command(backend, "RESULT %c", status);
    if (outcome == DONE)
        outcome = wait_for_result(line, good);
    line->concluded = outcome == DONE;
    if (!line_check(line, outcome) && good)
        line_fail(line, "replicator-backend did not confirm the end of the job");
}

/* Whether the daemon has left off in the middle of something. */
static bool cut_short(const struct line *line)
{
    if (line->purpose == FOR_BACKUP)
        return line->item.kind != END_ITEM;
    return line->purpose == FOR_RESTORE && line->file == FILE_OPEN;
}

/* Bacula's status of the job. It marks a job as cancelled only after it has said so: it gets the time for that. */
static char settled_status(struct job *job)
{
    char status = (char)job_number(job, VAR_JOB_STATUS);
    int64_t end = now_ms() + SETTLING_MS;
    while ((status == 'T' || status == 'R') && atomic_load(&job->cancelled) && now_ms() < end) {
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
        status = (char)job_number(job, VAR_JOB_STATUS);
    }
    return status;
}

static char verdict(struct job *job)
{
    char status = settled_status(job);
    bool failed = job->failed;
    for (size_t i = 0; i < LINES_MAX; i++) {
        struct line *line = atomic_load(&job->lines[i]);
        failed = failed || (line != NULL && (line->failed || cut_short(line)));
    }
    if (status <= ' ' || status >= 0x7F)
        status = 'f';
    if (status == 'T' && failed) {
        job_say(job, SAY_FATAL, "the job is not complete, although Bacula took it for good");
        status = 'f';
    }
    if (status == 'T' && atomic_load(&job->cancelled))
        status = 'A';
    return status;
}

void job_conclude(struct job *job, bool restore)
{
    char status = verdict(job);
    for (size_t i = 0; restore && status == 'T' && i < LINES_MAX; i++) {
        struct line *line = atomic_load(&job->lines[i]);
        if (line == NULL || line->purpose != FOR_RESTORE || !line_lives(line))
            continue;
        line->backend.heeds_cancel = true;
        enum outcome outcome = backend_command(&line->backend, "FINISH");
        if (outcome == DONE)
            outcome = backend_expect(&line->backend, 'F');
        if (!line_check(line, outcome))
            break;
    }
    if (restore && status == 'T')
        status = verdict(job);
    for (size_t i = 0; i < LINES_MAX; i++) {
        struct line *line = atomic_load(&job->lines[i]);
        if (line == NULL || !line_lives(line))
            continue;
        deliver(line, status);
        line_close(line);
    }
}

void line_free(struct line *line)
{
    backend_abandon(&line->backend);
    for (size_t i = 0; i < line->claim_count; i++)
        free(line->claims[i]);
    free(line->item.object);
    free(line->batch);
    free(line->plugin_string);
    free(line);
}
