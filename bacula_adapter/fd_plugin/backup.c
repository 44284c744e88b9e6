/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* Backups, estimates and listings: what the backend emits becomes the daemon's packets. */
#include "job.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Commands between FNAME and the end of a file's attributes. */
#define ATTRIBUTES_MAX 16

static enum outcome unexpected(struct line *line, const char *text)
{
    return backend_break(&line->backend, "replicator-backend said out of turn: %.200s", text);
}

/* ---- What comes next ---- */

static enum outcome read_attributes(struct line *line)
{
    struct backend *backend = &line->backend;
    struct item *item = &line->item;
    char text[COMMAND_MAX], status = '\0';
    bool sized = false;
    for (int i = 0; i < ATTRIBUTES_MAX; i++) {
        const char *value;
        enum outcome outcome = backend_next(backend, &status);
        if (outcome != DONE)
            return outcome;
        if (status == 'F' && sized)
            return DONE;
        if (status != 'C')
            return backend_break(backend, "replicator-backend sent %c among the attributes of a file", status);
        outcome = backend_text(backend, text);
        if (outcome != DONE)
            return outcome;
        if (after(text, "STAT:", &value) && stat_parse(value, &item->facts))
            sized = true;
        else if (strcmp(text, "OFFSETS") == 0 && line->purpose == FOR_BACKUP)
            item->addressed = true;
        else if (!after(text, "TSTAMP:", &value) || !times_parse(value, &item->facts))
            return unexpected(line, text);
    }
    return backend_break(backend, "replicator-backend sends attributes of a file without end");
}

static enum outcome read_object(struct line *line, const char *length_key)
{
    struct backend *backend = &line->backend;
    struct item *item = &line->item;
    char text[COMMAND_MAX], status = '\0';
    const char *value;
    uint64_t length = 0;
    uint32_t have = 0;
    enum outcome outcome = backend_answer(backend, text);
    if (outcome != DONE)
        return outcome;
    if (!after(text, length_key, &value) || !number_parse(value, OBJECT_BYTES_MAX, &length) || length == 0)
        return unexpected(line, text);
    item->object = malloc(length);
    if (item->object == NULL)
        return backend_break(backend, "no memory for an object of %llu bytes", (unsigned long long)length);
    for (;;) {
        outcome = backend_next(backend, &status);
        if (outcome != DONE)
            return outcome;
        if (status == 'F' && have == length)
            break;
        if (status != 'D' || backend->left > length - have)
            return backend_break(backend, "replicator-backend sent an object that is not of its length");
        uint32_t more = backend->left;
        outcome = backend_payload(backend, item->object + have, more);
        if (outcome != DONE)
            return outcome;
        have += more;
    }
    item->object_length = (uint32_t)length;
    return DONE;
}

static enum outcome read_named(struct line *line, const char *text)
{
    struct item *item = &line->item;
    const char *name, *length_key = NULL;
    enum item_kind kind = FILE_ITEM;
    if (after(text, "FNAME:", &name)) {
        /* It would be stored without signature and compression: an object takes them away from what follows. */
        if (line->objects_begun)
            return unexpected(line, text);
    } else if (line->purpose == FOR_BACKUP && after(text, "RESTOREOBJ:", &name)) {
        kind = OBJECT_ITEM;
        length_key = "RESTOREOBJ_LEN:";
        line->objects_begun = true;
    } else if (line->purpose == FOR_BACKUP && after(text, "PLUGINCONF:", &name)) {
        kind = OPTIONS_ITEM;
        length_key = "PLUGINCONF_LEN:";
    } else {
        return unexpected(line, text);
    }
    if (*name == '\0')
        return unexpected(line, text);
    memcpy(item->name, name, strlen(name) + 1);
    enum outcome outcome = kind == FILE_ITEM ? read_attributes(line) : read_object(line, length_key);
    if (outcome == DONE)
        item->kind = kind;
    return outcome;
}

/* Puts what the backend emits next into line->item. */
static enum outcome read_item(struct line *line)
{
    struct item *item = &line->item;
    char text[COMMAND_MAX], status = '\0';
    free(item->object);
    memset(item, 0, sizeof *item);
    line->file = NO_FILE;
    line->position = 0;
    line->data_waits = false;
    enum outcome outcome = backend_next(&line->backend, &status);
    if (outcome != DONE)
        return outcome;
    if (status == 'F') {
        item->kind = END_ITEM;
        return DONE;
    }
    if (status != 'C')
        return backend_break(&line->backend, "replicator-backend sent %c where a file was due", status);
    outcome = backend_text(&line->backend, text);
    return outcome == DONE ? read_named(line, text) : outcome;
}

static bool next_item(struct line *line)
{
    if (!line_check(line, read_item(line)))
        return false;
    /* Estimates have no verdict: nothing was done that could be undone. */
    if (line->item.kind == END_ITEM && line->purpose != FOR_BACKUP)
        line_close(line);
    return true;
}

/* ---- The daemon's packets ---- */

static void fill_stat(struct stat *stat, const struct item *item)
{
    const struct file_facts *facts = &item->facts;
    bool object = item->kind != FILE_ITEM;
    memset(stat, 0, sizeof *stat);
    stat->st_mode = (facts->kind == 'D' ? S_IFDIR : S_IFREG) | (object ? 0600U : facts->mode);
    stat->st_size = object ? (off_t)item->object_length : facts->size;
    stat->st_uid = facts->uid;
    stat->st_gid = facts->gid;
    stat->st_nlink = 1;
    stat->st_blksize = 4096;
    stat->st_blocks = stat->st_size / 512 + (stat->st_size % 512 != 0);
    stat->st_atim.tv_sec = facts->atime;
    stat->st_mtim.tv_sec = facts->mtime;
    stat->st_ctim.tv_sec = facts->ctime;
    if (object)
        stat->st_atim.tv_sec = stat->st_mtim.tv_sec = stat->st_ctim.tv_sec = time(NULL);
}

static int32_t type_of(const struct item *item)
{
    if (item->kind == OBJECT_ITEM)
        return FILE_RESTORE_OBJECT;
    if (item->kind == OPTIONS_ITEM)
        return FILE_PLUGIN_CONFIG;
    if (item->facts.kind == 'D')
        return FILE_DIRECTORY;
    return item->facts.kind == 'E' ? FILE_EMPTY : FILE_REGULAR;
}

static void fill_packet(struct line *line, void *packet)
{
    struct item *item = &line->item;
    struct stat stat;
    int32_t type = type_of(item);
    uint64_t flags = item->addressed ? FLAG_OFFSETS : 0;
    fill_stat(&stat, item);
    if (item->kind != FILE_ITEM)
        line->object_index++;
    if (abi->interface == INTERFACE_9_6) {
        struct save_packet_14 *save = packet;
        save->name = item->name;
        save->link = type == FILE_DIRECTORY ? item->name : NULL;
        save->stat = stat;
        save->type = type;
        save->flags |= flags;
        save->no_read = type == FILE_DIRECTORY;
        if (item->kind != FILE_ITEM) {
            save->object_name = item->name;
            save->object = item->object;
            save->object_length = (int32_t)item->object_length;
            save->index = line->object_index;
        }
        return;
    }
    struct save_packet_23 *save = packet;
    save->name = item->name;
    save->link = type == FILE_DIRECTORY ? item->name : NULL;
    save->stat = stat;
    save->type = type;
    save->flags |= flags;
    save->no_read = type == FILE_DIRECTORY;
    if (item->kind != FILE_ITEM) {
        save->object.name = item->name;
        save->object.object = item->object;
        save->object.length = (int32_t)item->object_length;
        save->object.index = line->object_index;
    }
}

int backup_start_file(struct job *job, void *packet)
{
    struct line *line = job->current;
    if (line == NULL || line->failed)
        return RC_ERROR;
    if (line->item.kind == NO_ITEM && !next_item(line))
        return RC_ERROR;
    if (line->item.kind == END_ITEM)
        return RC_STOP;
    if (line->item.kind == FILE_ITEM)
        line->file = FILE_BEGUN;
    fill_packet(line, packet);
    return RC_OK;
}

/* The answer to "DATA or nothing" of the file at hand. */
static enum outcome begin_data(struct line *line)
{
    struct backend *backend = &line->backend;
    char text[COMMAND_MAX], status = '\0';
    enum outcome outcome = backend_next(backend, &status);
    if (outcome != DONE)
        return outcome;
    if (status == 'F') {
        line->file = FILE_ENDED;
        return DONE;
    }
    if (status != 'C')
        return backend_break(backend, "replicator-backend sent %c where data were due", status);
    outcome = backend_text(backend, text);
    if (outcome != DONE)
        return outcome;
    if (strcmp(text, "DATA") != 0)
        return unexpected(line, text);
    line->file = FILE_OPEN;
    return DONE;
}

int backup_end_file(struct job *job)
{
    struct line *line = job->current;
    if (line == NULL || line->failed)
        return RC_ERROR;
    if (line->purpose == FOR_BACKUP && line->item.kind == FILE_ITEM) {
        /* The daemon did not open it. */
        if (line->file == FILE_BEGUN && !line_check(line, begin_data(line)))
            return RC_ERROR;
        if (line->file != FILE_ENDED) {
            line_fail(line, "%.1000s is not complete", line->item.name);
            return RC_ERROR;
        }
    }
    if (!next_item(line))
        return RC_ERROR;
    return line->item.kind == END_ITEM ? RC_OK : RC_MORE;
}

/* ---- Data ---- */

/* Finds the next data packet, or the file's end. */
static enum outcome find_data(struct line *line)
{
    struct backend *backend = &line->backend;
    struct item *item = &line->item;
    unsigned char address[ADDRESS_BYTES];
    char status = '\0';
    enum outcome outcome = backend_next(backend, &status);
    if (outcome != DONE)
        return outcome;
    if (status == 'F') {
        line->file = FILE_ENDED;
        return DONE;
    }
    if (status != (item->addressed ? 'B' : 'D'))
        return backend_break(backend, "replicator-backend sent %c among data", status);
    line->data_at = line->position;
    line->data_waits = true;
    if (!item->addressed)
        return DONE;
    outcome = backend_payload(backend, address, sizeof address);
    if (outcome != DONE)
        return outcome;
    line->data_at = address_decode(address);
    uint64_t size = (uint64_t)item->facts.size;
    if (line->data_at < line->position || line->data_at > size || backend->left > size - line->data_at)
        return backend_break(backend, "replicator-backend sent data that lie outside of their file, or out of order");
    return DONE;
}

/* Fills the daemon's buffer as far as data lie one behind the other. */
static enum outcome fill_buffer(struct line *line, char *buffer, size_t room, size_t *filled, uint64_t *offset)
{
    struct backend *backend = &line->backend;
    *filled = 0;
    *offset = line->position;
    while (*filled < room && line->file == FILE_OPEN) {
        if (!line->data_waits) {
            enum outcome outcome = find_data(line);
            if (outcome != DONE || line->file != FILE_OPEN)
                return outcome;
        }
        if (line->data_at != line->position) {
            if (*filled > 0)
                return DONE;
            line->position = *offset = line->data_at;
        }
        size_t length = backend->left < room - *filled ? backend->left : room - *filled;
        enum outcome outcome = backend_payload(backend, buffer + *filled, length);
        if (outcome != DONE)
            return outcome;
        *filled += length;
        line->position += length;
        line->data_at = line->position;
        line->data_waits = backend->left > 0;
    }
    return DONE;
}

static int backup_open(struct line *line, struct io_packet *io)
{
    if (line->file != FILE_BEGUN) {
        line_fail(line, "the file daemon opens a file that it was not given");
        return io_failed(io, EINVAL);
    }
    if (!line_check(line, begin_data(line)))
        return io_failed(io, EIO);
    return RC_OK;
}

static int backup_read(struct line *line, struct io_packet *io)
{
    size_t filled = 0;
    uint64_t offset = 0;
    if (line->file == FILE_ENDED)
        return RC_OK;
    if (line->file != FILE_OPEN || io->count <= 0 || io->buffer == NULL) {
        line_fail(line, "the file daemon reads in a way that is not known");
        return io_failed(io, EINVAL);
    }
    if (!line_check(line, fill_buffer(line, io->buffer, (size_t)io->count, &filled, &offset)))
        return io_failed(io, EIO);
    io->status = (int32_t)filled;
    io->offset = (int64_t)offset;
    return RC_OK;
}

int backup_io(struct job *job, struct io_packet *io)
{
    struct line *line = job->current;
    if (line == NULL || line->purpose != FOR_BACKUP || (line->failed && io->func != IO_CLOSE))
        return io_failed(io, EIO);
    switch (io->func) {
    case IO_OPEN:
        return backup_open(line, io);
    case IO_READ:
        return backup_read(line, io);
    case IO_CLOSE:
        if (!line->failed && line->file != FILE_ENDED) {
            line_fail(line, "%.1000s is not complete", line->item.name);
            return io_failed(io, EIO);
        }
        return RC_OK;
    default:
        line_fail(line, "the file daemon asks for operation %d in a backup", io->func);
        return io_failed(io, EINVAL);
    }
}

/* ---- Accurate jobs ---- */

static bool claims(const struct line *line, const char *name)
{
    const char *rest;
    for (size_t i = 0; i < line->claim_count; i++) {
        if (after(name, line->claims[i], &rest))
            return true;
    }
    return false;
}

/* True if the name must not be taken for deleted. */
static bool is_seen(struct line *line, const char *name)
{
    char text[COMMAND_MAX];
    /* A line that is not good says nothing about what is gone. */
    if (line->failed || !line_lives(line) || line->item.kind != END_ITEM)
        return true;
    enum outcome outcome = backend_command(&line->backend, "CHECKFILE:%s", name);
    if (outcome == DONE)
        outcome = backend_answer(&line->backend, text);
    if (outcome == DONE && strcmp(text, "SEEN") != 0 && strcmp(text, "GONE") != 0)
        outcome = unexpected(line, text);
    return !line_check(line, outcome) || strcmp(text, "SEEN") == 0;
}

int backup_check_file(struct job *job, const char *name)
{
    for (size_t i = 0; i < LINES_MAX; i++) {
        struct line *line = atomic_load(&job->lines[i]);
        if (line == NULL || line->purpose != FOR_BACKUP || !claims(line, name))
            continue;
        if (is_seen(line, name))
            return RC_SEEN;
    }
    return RC_OK;
}
