/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* Plays Bacula's file daemon to the plugin, in the order of calls that was observed (shared/reference/bacula.md, section 5), for
 * interface 14 and 23. Layouts and numbers stand here a second time, as offsets: a mistake in bacula_abi.h does not hide.
 *
 * host PLUGIN INTERFACE WHAT [key=value …]; what happens is printed, one line an event. WHAT: load, console, backup, restore, estimate,
 * query, threads, fuzz. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHECK(condition) ((condition) ? (void)0 : broken(#condition, __LINE__))

static _Noreturn void broken(const char *what, int line)
{
    fprintf(stderr, "host: line %d: %s\n", line, what);
    abort();
}

/* Numbers and offsets by version, from the facts page. */
struct layout {
    uint32_t interface, table_bytes;
    int fatal, error, warning, info;
    int where, regex, exe, version, dist, plugin_dir;
    int query_slot;
    size_t save, s_name, s_link, s_stat, s_type, s_flags, s_no_read, s_portable, s_object_name, s_object, s_object_length,
        s_index, s_end;
    size_t r_stream, r_type, r_index, r_uid;
};

static const struct layout layouts[] = {
    {14, 144, 3, 4, 5, 6, 14, 15, 16, 17, 18, -1, 0, 240, 8, 16, 24, 168, 176, 184, 185, 208, 216, 224, 228, 236, 4, 12, 16,
     24},
    {23, 168, 4, 5, 6, 7, 15, 16, 17, 18, 19, 14, 17, 344, 8, 32, 40, 184, 192, 200, 201, 216, 224, 232, 236, 336, 8, 16, 20,
     28},
};
enum { R_BYTES = 232, R_STAT = 32, R_NAME = 184, R_WHERE = 200, R_REGEX = 208, R_REPLACE = 216, R_STATUS = 220, R_END = 228 };
enum { IO_BYTES = 72, IO_FUNC = 4, IO_COUNT = 8, IO_FLAGS = 12, IO_MODE = 16, IO_BUF = 24, IO_NAME = 32, IO_STATUS = 40 };
enum { IO_ERRNO = 44, IO_WHENCE = 52, IO_OFFSET = 56, IO_END = 68 };

struct context {
    void *daemon, *plugin;
};

/* A job of this daemon. */
struct run {
    struct context context;
    int number, job_id, reads;
    pthread_t thread;
    atomic_int status;
    atomic_bool cancelled;
    sem_t cancel_now;
    const char *cancel_at;
    char kind, level;
    const char *out;
};

static const struct layout *at;
static const void *functions;
static pthread_mutex_t printing = PTHREAD_MUTEX_INITIALIZER;
static char **options;
static int option_count;
static const char *quiet, *fuzz_cancel;

static const char *option_nth(const char *key, int nth)
{
    size_t length = strlen(key);
    for (int i = 0; i < option_count; i++) {
        if (strncmp(options[i], key, length) == 0 && options[i][length] == '=' && nth-- == 0)
            return options[i] + length + 1;
    }
    return NULL;
}

static const char *option(const char *key, const char *otherwise)
{
    const char *value = option_nth(key, 0);
    return value != NULL ? value : otherwise;
}

__attribute__((format(printf, 2, 3))) static void say(const struct run *run, const char *format, ...)
{
    va_list values;
    if (quiet != NULL)
        return;
    va_start(values, format);
    pthread_mutex_lock(&printing);
    printf("%d ", run != NULL ? run->number : 0);
    vprintf(format, values);
    printf("\n");
    fflush(stdout);
    pthread_mutex_unlock(&printing);
    va_end(values);
}

/* ---- Packets, byte by byte ---- */

static void put(void *packet, size_t offset, const void *value, size_t bytes)
{
    memcpy((char *)packet + offset, value, bytes);
}

static void put32(void *packet, size_t offset, int32_t value)
{
    put(packet, offset, &value, sizeof value);
}

static void put_pointer(void *packet, size_t offset, const void *value)
{
    put(packet, offset, &value, sizeof value);
}

static int32_t get32(const void *packet, size_t offset)
{
    int32_t value;
    memcpy(&value, (const char *)packet + offset, sizeof value);
    return value;
}

static int64_t get64(const void *packet, size_t offset)
{
    int64_t value;
    memcpy(&value, (const char *)packet + offset, sizeof value);
    return value;
}

static char *get_pointer(const void *packet, size_t offset)
{
    char *value;
    memcpy(&value, (const char *)packet + offset, sizeof value);
    return value;
}

/* As the daemon makes them: size in front and behind; wrong where the options ask for it. */
static void *new_packet(const char *slot, size_t bytes, size_t end)
{
    void *packet = calloc(1, bytes);
    CHECK(packet != NULL);
    put32(packet, 0, (int32_t)bytes + (strcmp(option("bad_size", ""), slot) == 0 ? 8 : 0));
    put32(packet, end, (int32_t)bytes + (strcmp(option("bad_end", ""), slot) == 0 ? 8 : 0));
    return packet;
}

static void *slot(int number)
{
    void *function;
    memcpy(&function, (const char *)functions + 8 + 8 * (size_t)(number - 1), sizeof function);
    CHECK(function != NULL);
    return function;
}

/* ---- What the daemon offers ---- */

static int get_value(struct context *context, int variable, void *out)
{
    struct run *run = context != NULL ? context->daemon : NULL;
    const char *text = NULL;
    int number = 0;
    bool is_number = false;
    if (run == NULL)
        return 2;
    if (variable == 1 || variable == 3 || variable == 4 || variable == 7 || variable == 8 || variable == 9 || variable == 24) {
        is_number = true;
        number = variable == 1   ? run->job_id
                 : variable == 3 ? run->level
                 : variable == 4 ? run->kind
                 : variable == 7 ? atomic_load(&run->status)
                 : variable == 8 ? atoi(option("since", "0"))
                 : variable == 9 ? atoi(option("accurate", "0"))
                                 : option("replace", "a")[0];
    } else if (variable == 2) {
        text = "test-fd";
    } else if (variable == 5) {
        text = option("client", "test-client");
    } else if (variable == 6) {
        text = option("name", "Test.2026-11-25_10.00.00_03");
    } else if (variable == 13) {
        text = "/working";
    } else if (variable == 20) {
        text = option("previous", "");
    } else if (variable == at->where) {
        text = option("where", NULL);
    } else if (variable == at->regex) {
        text = option("regex", NULL);
    } else if (variable == at->exe) {
        text = "/exe/";
    } else if (variable == at->version) {
        text = at->interface == 14 ? "9.6.7 (10 December 2020)" : "15.0.3 (25 March 2025)";
    } else if (variable == at->dist) {
        text = "debian";
    } else if (variable == at->plugin_dir) {
        text = "/plugins";
    } else {
        return 2;
    }
    put(out, 0, is_number ? (const void *)&number : (const void *)&text, is_number ? sizeof number : sizeof text);
    return 0;
}

static const char *type_name(int type)
{
    return type == at->fatal     ? "FATAL"
           : type == at->error   ? "ERROR"
           : type == at->warning ? "WARNING"
           : type == at->info    ? "INFO"
                                 : "OTHER";
}

__attribute__((format(printf, 6, 7))) static int job_message(struct context *context, const char *file, int line, int type,
                                                             int64_t mtime, const char *format, ...)
{
    struct run *run = context != NULL ? context->daemon : NULL;
    /* The daemon's own buffer: what is longer is cut. */
    char text[2000];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(text, sizeof text, format, values);
    va_end(values);
    CHECK(file != NULL && line > 0 && mtime == 0);
    CHECK(length >= 0 && length < (int)sizeof text && text[length - 1] == '\n');
    text[length - 1] = '\0';
    CHECK(strchr(text, '\n') == NULL);
    if (at == NULL) {
        say(NULL, "log %d %s", type, text);
        return 0;
    }
    /* Those that end the daemon, or are no message at all. */
    CHECK(type == at->fatal || type == at->error || type == at->warning || type == at->info);
    CHECK(run != NULL);
    say(run, "message %s %s", type_name(type), text);
    if (strcmp(option("cancel", ""), "message") == 0 && !atomic_load(&run->cancelled)) {
        /* 15.0 finds that the network has failed while it sends the message: on this thread, within this call. */
        uint32_t event = 14;
        int (*handle)(struct context *, uint32_t *, void *) = (int (*)(struct context *, uint32_t *, void *))slot(5);
        say(run, "cancel %d", handle(&run->context, &event, NULL));
        atomic_store(&run->cancelled, true);
        atomic_store(&run->status, option("status", "A")[0]);
    }
    int running = 'R', good = 'T';
    if (type == at->fatal && !atomic_compare_exchange_strong(&run->status, &running, 'f'))
        atomic_compare_exchange_strong(&run->status, &good, 'f');
    return 0;
}

__attribute__((format(printf, 5, 6))) static int debug_message(struct context *context, const char *file, int line, int level,
                                                               const char *format, ...)
{
    char text[2000];
    va_list values;
    CHECK(context == NULL && file != NULL && line > 0);
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    text[strcspn(text, "\n")] = '\0';
    say(NULL, "debug %d %s", level, text);
    return 0;
}

static void never_called(void)
{
    broken("a function of the daemon that the plugin has no use for", __LINE__);
}

/* ---- Calls of the plugin ---- */

typedef int (*on_context)(struct context *);
typedef int (*on_packet)(struct context *, void *);
typedef int (*on_text)(struct context *, const char *);

static void *cancel_thread(void *argument)
{
    struct run *run = argument;
    uint32_t event = 14;
    int (*handle)(struct context *, uint32_t *, void *) = (int (*)(struct context *, uint32_t *, void *))slot(5);
    while (sem_wait(&run->cancel_now) != 0)
        CHECK(errno == EINTR);
    if (!atomic_load(&run->cancelled)) {
        say(run, "cancel %d", handle(&run->context, &event, NULL));
        atomic_store(&run->cancelled, true);
        atomic_store(&run->status, 'A');
        pthread_kill(run->thread, SIGUSR2);
    }
    return NULL;
}

/* The job comes to a place where the options may have it cancelled. */
static void pass(struct run *run, const char *place)
{
    if (run->cancel_at == NULL || strcmp(run->cancel_at, place) != 0)
        return;
    sem_post(&run->cancel_now);
    /* Usually at the same time as the call; if asked for, before it. */
    while (option("cancel_first", NULL) != NULL && !atomic_load(&run->cancelled))
        usleep(1000);
}

static bool stopped(const struct run *run)
{
    return atomic_load(&run->cancelled) || atomic_load(&run->status) == 'f' || atomic_load(&run->status) == 'A';
}

static int send_event(struct run *run, uint32_t number, void *value)
{
    char place[32];
    snprintf(place, sizeof place, "event%u", number);
    pass(run, place);
    return ((int (*)(struct context *, uint32_t *, void *))slot(5))(&run->context, &number, value);
}

static int send_text(struct run *run, uint32_t number, const char *text)
{
    char *copy = strdup(text);
    CHECK(copy != NULL);
    int code = send_event(run, number, copy);
    free(copy);
    return code;
}

struct io {
    int code, status, error;
    int64_t offset;
};

static struct io call_io(struct run *run, const char *place, int function, void *buffer, int32_t count, int64_t offset)
{
    char *packet = new_packet(place, IO_BYTES, IO_END);
    char name[] = "a name";
    put32(packet, IO_FUNC, function);
    put32(packet, IO_COUNT, count);
    put32(packet, IO_FLAGS, function == 1 && run->kind == 'R' ? 01101 : 0);
    put32(packet, IO_MODE, 0600);
    put_pointer(packet, IO_BUF, buffer);
    put_pointer(packet, IO_NAME, name);
    put32(packet, IO_ERRNO, 0x5A5A5A5A); /* not initialised */
    put(packet, IO_OFFSET, &offset, sizeof offset);
    pass(run, place);
    int code = ((on_packet)slot(10))(&run->context, packet);
    struct io io = {code, get32(packet, IO_STATUS), get32(packet, IO_ERRNO), get64(packet, IO_OFFSET)};
    free(packet);
    /* Of a packet that it does not know the plugin must not write anything. */
    if (strcmp(option("bad_size", option("bad_end", "")), place) == 0) {
        CHECK(io.code != 0 && io.status == 0 && io.error == 0x5A5A5A5A && io.offset == offset);
        io.status = -1;
        io.error = EINVAL;
        io.offset = -1;
    }
    return io;
}

static struct run *new_run(int number, char kind, int job_id)
{
    struct run *run = calloc(1, sizeof *run);
    CHECK(run != NULL);
    run->context.daemon = run;
    run->number = number;
    run->job_id = job_id;
    run->kind = kind;
    run->level = option("level", "F")[0];
    run->out = option("out", NULL);
    run->thread = pthread_self();
    run->cancel_at = option("cancel", fuzz_cancel);
    atomic_init(&run->status, 'R');
    CHECK(sem_init(&run->cancel_now, 0, 0) == 0);
    CHECK(((on_context)slot(1))(&run->context) == 0);
    return run;
}

static void end_run(struct run *run)
{
    CHECK(((on_context)slot(2))(&run->context) == 0);
    sem_destroy(&run->cancel_now);
    say(run, "end %c", atomic_load(&run->status));
    free(run);
}

/* What precedes every job. */
static void begin_job(struct run *run)
{
    send_text(run, 1, "JobId=1 Job=Test");
    if (run->kind == 'R')
        return;
    if (run->level != 'F')
        send_event(run, 13, (void *)(intptr_t)atol(option("since", "0")));
    send_event(run, 12, (void *)(intptr_t)run->level);
    for (int i = 0; option_nth("string", i) != NULL; i++)
        send_text(run, 20, option_nth("string", i));
    send_event(run, 19, NULL);
}

/* Storage has confirmed everything, if nothing has gone wrong. */
static void decide(struct run *run)
{
    int running = 'R';
    atomic_compare_exchange_strong(&run->status, &running, option("verdict", "T")[0]);
}

/* ---- Backup ---- */

static int out_file(const struct run *run, int file, bool object)
{
    char path[4096];
    if (run->out == NULL)
        return -1;
    snprintf(path, sizeof path, "%s/%s-%d-%d", run->out, object ? "object" : "file", run->number, file);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    return fd;
}

static void read_file(struct run *run, int file, bool addressed)
{
    int32_t count = atoi(option("count", addressed ? "65528" : "65536"));
    int reads_max = atoi(option("reads_max", "1000000"));
    int fd = out_file(run, file, false);
    struct io io = call_io(run, "open", 1, NULL, 0, 0);
    int64_t position = 0;
    if (io.code != 0 || io.status < 0) {
        say(run, "open-failed %d %d", io.status, io.error);
        CHECK(io.error != 0x5A5A5A5A);
        if (fd >= 0)
            close(fd);
        return;
    }
    char *buffer = malloc((size_t)count);
    CHECK(buffer != NULL);
    for (int reads = 0; reads < reads_max; reads++) {
        io = call_io(run, "read", 2, buffer, count, 0);
        CHECK(io.status <= count && io.error != 0x5A5A5A5A);
        if (io.status <= 0)
            break;
        if (addressed) {
            CHECK(io.offset >= position);
            position = io.offset;
        }
        say(run, "read %lld %d", (long long)position, io.status);
        if (fd >= 0)
            CHECK(pwrite(fd, buffer, (size_t)io.status, position) == io.status);
        position += io.status;
        if (stopped(run))
            break;
    }
    if (io.status < 0)
        say(run, "read-failed %d", io.error);
    free(buffer);
    if (fd >= 0)
        close(fd);
    io = call_io(run, "close", 4, NULL, 0, 0);
    say(run, "closed %d %d", io.code, io.status);
    char *xacl = new_packet("xacl", 32, 24);
    for (int function = 1; function <= 3; function += 2) {
        put32(xacl, 4, function);
        put32(xacl, 8, 77);
        int code = ((on_packet)slot(14))(&run->context, xacl);
        CHECK(code != 0 || get32(xacl, 8) == 0);
    }
    free(xacl);
}

static void show_file(struct run *run, const char *packet, int file, bool object)
{
    struct stat stat;
    memcpy(&stat, packet + at->s_stat, sizeof stat);
    const char *name = get_pointer(packet, at->s_name), *link = get_pointer(packet, at->s_link);
    say(run, "file %s type=%d flags=%llx size=%lld mode=%o mtime=%lld nlink=%lu link=%s", name, get32(packet, at->s_type),
        (unsigned long long)get64(packet, at->s_flags), (long long)stat.st_size, stat.st_mode, (long long)stat.st_mtime,
        (unsigned long)stat.st_nlink, link != NULL ? link : "-");
    CHECK(packet[at->s_portable] == 1);
    if (object) {
        int fd = out_file(run, file, true);
        int32_t length = get32(packet, at->s_object_length);
        say(run, "object %s %d", get_pointer(packet, at->s_object_name), length);
        if (fd >= 0) {
            CHECK(write(fd, get_pointer(packet, at->s_object), (size_t)length) == length);
            close(fd);
        }
    }
}

/* The files of one line. */
static void save_line(struct run *run, bool with_data)
{
    int files_max = atoi(option("files_max", "1000000"));
    for (int file = 0; !stopped(run) && file < files_max; file++) {
        char *packet = new_packet("save", at->save, at->s_end);
        packet[at->s_portable] = 1;
        pass(run, "start");
        int code = ((on_packet)slot(6))(&run->context, packet);
        say(run, "start %d", code);
        if (code != 0) {
            free(packet);
            return;
        }
        int type = get32(packet, at->s_type);
        uint64_t flags = (uint64_t)get64(packet, at->s_flags);
        bool no_read = packet[at->s_no_read] != 0;
        CHECK(type != 0 && get_pointer(packet, at->s_name) != NULL);
        show_file(run, packet, file, type == 25 || type == 27);
        if (with_data && type != 25 && type != 27 && !no_read)
            read_file(run, file, (flags >> 30 & 1) != 0);
        pass(run, "end");
        code = ((on_context)slot(7))(&run->context);
        say(run, "endfile %d", code);
        free(packet);
        if (code != 3)
            return;
    }
}

static void run_backup(struct run *run)
{
    begin_job(run);
    send_event(run, 3, NULL);
    /* A file that is not a plugin's is handled by the daemon itself. */
    CHECK(send_event(run, 24, NULL) == 6);
    for (int i = 0; option_nth("string", i) != NULL && !stopped(run); i++) {
        int code = send_text(run, 9, option_nth("string", i));
        say(run, "command %d", code);
        if (code == 0)
            save_line(run, true);
    }
    for (int i = 0; option_nth("check", i) != NULL && !stopped(run); i++) {
        char *name = strdup(option_nth("check", i));
        CHECK(name != NULL);
        pass(run, "check");
        say(run, "check %s %d", name, ((on_text)slot(13))(&run->context, name));
        free(name);
    }
    decide(run);
    send_event(run, 4, NULL);
    if (!stopped(run))
        send_event(run, 2, NULL);
}

static void run_estimate(struct run *run)
{
    begin_job(run);
    for (int i = 0; option_nth("string", i) != NULL && !stopped(run); i++) {
        int code = send_text(run, 11, option_nth("string", i));
        say(run, "command %d", code);
        if (code == 0)
            save_line(run, false);
    }
    if (!stopped(run))
        send_event(run, 2, NULL);
}

/* ---- Restore ---- */

static char content(int64_t position)
{
    return (char)(unsigned char)((position * 131 + (position >> 8) * 7 + (position >> 16)) & 255);
}

static char *field(char **text)
{
    char *found = strsep(text, "|");
    CHECK(found != NULL);
    return found;
}

static void send_objects(struct run *run)
{
    for (int i = 0; option_nth("object", i) != NULL; i++) {
        char *copy = strdup(option_nth("object", i)), *rest = copy;
        char *packet = new_packet("object", 64, 60);
        put32(packet, 32, atoi(field(&rest)));
        put32(packet, 56, atoi(field(&rest)));
        put_pointer(packet, 8, field(&rest));
        put_pointer(packet, 24, field(&rest));
        char *text = field(&rest);
        put_pointer(packet, 16, text);
        put32(packet, 36, (int32_t)strlen(text));
        put32(packet, 40, (int32_t)strlen(text));
        say(run, "object %d", send_event(run, 18, packet));
        free(packet);
        free(copy);
    }
    if (option_nth("object", 0) != NULL)
        send_event(run, 18, NULL);
}

/* Ranges: "0+100000,200000+5". False if a write failed. */
static bool write_ranges(struct run *run, char *ranges)
{
    int64_t position = 0;
    int32_t count = atoi(option("count", "65536"));
    char *range;
    while ((range = strsep(&ranges, ",")) != NULL && *range != '\0') {
        char *plus = strchr(range, '+');
        CHECK(plus != NULL);
        int64_t from = atoll(range), length = atoll(plus + 1);
        if (from != position) {
            struct io io = call_io(run, "seek", 5, NULL, 0, from);
            say(run, "seek %lld", (long long)io.offset);
            if (io.offset < 0)
                return false;
            CHECK(io.offset == from);
            position = from;
        }
        while (length > 0) {
            int32_t piece = length < count ? (int32_t)length : count;
            char *buffer = malloc((size_t)piece);
            CHECK(buffer != NULL);
            for (int32_t i = 0; i < piece; i++)
                buffer[i] = content(position + i);
            struct io io = call_io(run, "write", 3, buffer, piece, 0);
            free(buffer);
            if (io.status != piece) {
                say(run, "write-failed %d %d", io.status, io.error);
                CHECK(io.error != 0x5A5A5A5A && io.error != 0);
                return false;
            }
            position += piece;
            length -= piece;
        }
    }
    return true;
}

static char *new_restore_packet(const char *name, int type, int index, int64_t size)
{
    char *packet = new_packet("restore", R_BYTES, R_END);
    struct stat stat = {.st_mode = S_IFREG | 0640, .st_size = size, .st_nlink = 1, .st_uid = 7, .st_gid = 8};
    stat.st_atim.tv_sec = 11;
    stat.st_mtim.tv_sec = 12;
    stat.st_ctim.tv_sec = 13;
    put32(packet, at->r_stream, 1);
    put32(packet, at->r_type, type);
    put32(packet, at->r_index, index);
    put32(packet, at->r_uid, 99);
    put(packet, R_STAT, &stat, sizeof stat);
    put_pointer(packet, R_NAME, name);
    put32(packet, R_REPLACE, 'a');
    return packet;
}

/* "PLUGINSTRING|name|type|index|size|ranges" */
static void restore_file(struct run *run, char *text)
{
    char *command = field(&text), *name = field(&text);
    int type = atoi(field(&text)), index = atoi(field(&text));
    int64_t size = atoll(field(&text));
    say(run, "command %d", send_text(run, 10, command));
    CHECK(((on_text)slot(8))(&run->context, command) == 0);
    char *packet = new_restore_packet(name, type, index, size);
    pass(run, "create");
    int code = ((on_packet)slot(11))(&run->context, packet);
    int status = get32(packet, R_STATUS);
    say(run, "create %d %d", code, status);
    free(packet);
    if (code == 0 && status == 3) {
        struct io io = call_io(run, "open", 1, NULL, 0, 0);
        if (io.code != 0 || io.status < 0) {
            say(run, "open-failed %d %d", io.status, io.error);
        } else {
            if (write_ranges(run, field(&text)) && strcmp(option("attributes", "1"), "1") == 0) {
                packet = new_restore_packet(name, type, index, size);
                CHECK(((on_packet)slot(12))(&run->context, packet) == 0);
                free(packet);
            }
            io = call_io(run, "close", 4, NULL, 0, 0);
            say(run, "closed %d %d", io.code, io.status);
        }
    } else if (code == 0 && status == 5) {
        packet = new_restore_packet(name, type, index, size);
        CHECK(((on_packet)slot(12))(&run->context, packet) == 0);
        CHECK(get32(packet, R_STATUS) == 5);
        free(packet);
    }
    ((on_context)slot(9))(&run->context);
}

static void run_restore(struct run *run)
{
    begin_job(run);
    send_objects(run);
    if (at->interface == 23) {
        const char *features = "features";
        send_event(run, 26, &features);
    }
    send_event(run, 5, NULL);
    for (int i = 0; option_nth("file", i) != NULL && !stopped(run); i++) {
        char *copy = strdup(option_nth("file", i));
        CHECK(copy != NULL);
        restore_file(run, copy);
        free(copy);
    }
    decide(run);
    send_event(run, 6, NULL);
    if (!stopped(run))
        send_event(run, 2, NULL);
}

static void run_query(struct run *run)
{
    char *packet = new_packet("query", 48, 40);
    char *parameter = strdup(option("parameter", "vm")), *command = strdup(option("string", ""));
    put_pointer(packet, 8, parameter);
    put_pointer(packet, 16, command);
    int code;
    do {
        code = ((on_packet)slot(at->query_slot))(&run->context, packet);
        const char *result = get_pointer(packet, 32);
        say(run, "query %d %s", code, result != NULL ? result : "-");
    } while (code == 3);
    free(parameter);
    free(command);
    free(packet);
}

/* ---- Running ---- */

struct work {
    int number;
    char kind;
    void (*run)(struct run *);
};

static void *run_job(void *argument)
{
    struct work *work = argument;
    struct run *run = new_run(work->number, work->kind, work->number + 1);
    pthread_t canceller;
    CHECK(pthread_create(&canceller, NULL, cancel_thread, run) == 0);
    work->run(run);
    /* No cancellation any more. */
    bool came = run->cancel_at == NULL;
    if (came)
        atomic_store(&run->cancelled, true);
    sem_post(&run->cancel_now);
    pthread_join(canceller, NULL);
    end_run(run);
    return NULL;
}

static void on_signal(int number)
{
    (void)number;
}

static const char loaded_from[] = "handed over by the host";

static void *load(const char *plugin, uint32_t interface, uint32_t table_bytes)
{
    static struct {
        uint32_t size, version;
    } info;
    static uint64_t table[64];
    void *library = dlopen(plugin, RTLD_NOW);
    if (library == NULL) {
        fprintf(stderr, "host: %s\n", dlerror());
        exit(3);
    }
    int (*load_plugin)(void *, void *, void **, void **) =
        (int (*)(void *, void *, void **, void **))dlsym(library, "loadPlugin");
    CHECK(load_plugin != NULL);
    info.size = 8;
    info.version = (uint32_t)atol(option("info_version", "0"));
    info.version = info.version != 0 ? info.version : interface;
    for (size_t i = 0; i < 64; i++)
        table[i] = (uint64_t)(uintptr_t)never_called;
    put32(table, 0, (int32_t)table_bytes);
    put32(table, 4, (int32_t)interface);
    table[2] = (uint64_t)(uintptr_t)get_value;
    table[4] = (uint64_t)(uintptr_t)job_message;
    table[5] = (uint64_t)(uintptr_t)debug_message;
    void *plugin_info = (void *)(uintptr_t)loaded_from, *plugin_functions = NULL;
    int code = load_plugin(&info, table, &plugin_info, &plugin_functions);
    say(NULL, "load %d", code);
    if (code != 0) {
        dlclose(library);
        exit(0);
    }
    CHECK(get32(plugin_info, 0) == 56 && (uint32_t)get32(plugin_info, 4) == interface);
    CHECK(strcmp(get_pointer(plugin_info, 8), "*FDPluginData*") == 0);
    CHECK(strcmp(get_pointer(plugin_info, 16), "AGPLv3") == 0);
    for (size_t text = 24; text <= 48; text += 8)
        CHECK(get_pointer(plugin_info, text) != NULL);
    functions = plugin_functions;
    for (int i = 1; i <= 12; i++)
        slot(i);
    return library;
}

static void set_signals(void)
{
    /* Without SA_RESTART, as the daemon's: a wait is interrupted. */
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR2, &action, NULL);
    sigaction(SIGCHLD, &action, NULL);
    if (strcmp(option("sigpipe", "ignored"), "ignored") == 0)
        signal(SIGPIPE, SIG_IGN);
}

static int open_descriptors(void)
{
    int count = 0;
    for (int fd = 0; fd < 1024; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void fuzz(long first, long count)
{
    static const struct work kinds[] = {{0, 'B', run_backup}, {0, 'R', run_restore}, {0, 'B', run_estimate}};
    quiet = option("verbose", NULL) == NULL ? "quiet" : NULL;
    for (long seed = first; seed < first + count; seed++) {
        char text[32];
        struct work work = kinds[seed % 3];
        snprintf(text, sizeof text, "%ld", seed);
        setenv("HOSTILE_SEED", text, 1);
        /* Not in every job, and each place with each kind of job. */
        static const char *const places[16] = {"event9", "event10", "event11", "create", "open", "read", "write", "close", "event4"};
        fuzz_cancel = places[seed / 3 % 16];
        int before = open_descriptors();
        run_job(&work);
        CHECK(open_descriptors() == before);
    }
    quiet = NULL;
    say(NULL, "fuzzed %ld", count);
}

int main(int argc, char **argv)
{
    CHECK(argc >= 4);
    uint32_t interface = (uint32_t)atol(argv[2]);
    const char *what = argv[3];
    options = argv + 4;
    option_count = argc - 4;
    uint32_t table_bytes = 168;
    for (size_t i = 0; i < sizeof layouts / sizeof layouts[0]; i++) {
        if (layouts[i].interface == interface) {
            at = &layouts[i];
            table_bytes = at->table_bytes;
        }
    }
    /* A daemon that is not what its number says: nothing is known of it. */
    if (option("table", NULL) != NULL || option("info_version", NULL) != NULL)
        at = NULL;
    if (option("table", NULL) != NULL)
        table_bytes = (uint32_t)atol(option("table", NULL));
    set_signals();
    /* The daemon's connections are not closed on exec: the plugin has to see to that. */
    CHECK(dup2(1, 50) == 50);
    int before = open_descriptors();
    void *library = load(argv[1], interface, table_bytes);
    CHECK(at != NULL);
    struct work work = {0, strcmp(what, "restore") == 0 ? 'R' : 'B', NULL};
    if (strcmp(what, "console") == 0) {
        struct run *run = new_run(0, ' ', 0);
        end_run(run);
    } else if (strcmp(what, "fuzz") == 0) {
        fuzz(atol(option("seed", "0")), atol(option("runs", "100")));
    } else if (strcmp(what, "threads") == 0) {
        struct work works[2] = {{0, 'B', run_backup}, {1, 'R', run_restore}};
        pthread_t threads[2];
        for (int i = 0; i < 2; i++)
            CHECK(pthread_create(&threads[i], NULL, run_job, &works[i]) == 0);
        for (int i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
    } else if (strcmp(what, "load") != 0) {
        work.run = strcmp(what, "backup") == 0     ? run_backup
                   : strcmp(what, "restore") == 0  ? run_restore
                   : strcmp(what, "estimate") == 0 ? run_estimate
                                                   : run_query;
        run_job(&work);
    }
    CHECK(((int (*)(void))dlsym(library, "unloadPlugin"))() == 0);
    dlclose(library);
    CHECK(open_descriptors() == before);
    close(50);
    return 0;
}
