/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* A backend that means harm: speaks the protocol for a while, with packets left out, cut, doubled or made up, as the number in
 * HOSTILE_SEED has it. Reads what it is sent without caring; ends when it has said everything. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint64_t state;
static unsigned char out[1 << 20];
static size_t length;

static uint32_t random_below(uint32_t limit)
{
    /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ULL) >> 33) % limit;
}

static void add(const void *bytes, size_t count)
{
    if (count <= sizeof out - length) {
        memcpy(out + length, bytes, count);
        length += count;
    }
}

static void packet(char status, const void *payload, size_t count)
{
    char header[40];
    snprintf(header, sizeof header, "%c%06zu\n", status, count);
    add(header, 8);
    add(payload, count);
}

static void text(const char *line)
{
    packet('C', line, strlen(line));
}

static void address(uint64_t offset, size_t count)
{
    static unsigned char payload[8 + 70000];
    for (int i = 0; i < 8; i++)
        payload[i] = (unsigned char)(offset >> (56 - 8 * i));
    packet('B', payload, 8 + count);
}

static void strange(void)
{
    static const char *const lines[] = {
        "FNAME:", "FNAME:%n%s%n\n", "FNAME:a/\n", "STAT:F 99999999999999999999 0 0 0 1\n", "STAT:D 0 0 0 40755 2\n",
        "STAT:F -1 0 0 0 1\n", "TSTAMP:1 2\n", "TSTAMP:253402300799 0 0\n", "OFFSETS\n", "RESTOREOBJ:x\n",
        "RESTOREOBJ_LEN:4294967295\n", "RESTOREOBJ_LEN:7\n", "PLUGINCONF:o\n", "TIMEOUT:0\n", "TIMEOUT:1\n", "CLAIM:\n",
        "CLAIM:@image/\n", "DATA\n", "OK\n", "SKIP\n", "CORE\n", "SEEN\n", "RESULT OK\n", "Hello Bacula\n", "\n", "\x01\x02\n",
    };
    static char junk[20000];
    static const char statuses[] = "CDFEAQWIKBTXcf \n";
    char status = statuses[random_below(sizeof statuses - 1)];
    size_t count = random_below(30);
    for (size_t i = 0; i < sizeof junk; i++)
        junk[i] = (char)random_below(256);
    switch (random_below(8)) {
    case 0:
    case 1:
    case 2:
        text(lines[random_below(sizeof lines / sizeof lines[0])]);
        break;
    case 3:
        packet(status, junk, count);
        break;
    case 4:
        packet(status, junk, random_below(sizeof junk));
        break;
    case 5:
        add(junk, count);
        break;
    case 6:
        address(random_below(2) ? random_below(200000) : UINT64_MAX - random_below(9), 1 + random_below(70000));
        break;
    default:
        packet("FKFK"[random_below(4)], NULL, 0);
    }
}

/* A good conversation's packets, or most of them. */
static void mostly(char status, const char *line)
{
    static uint32_t quirk;
    if (quirk == 0)
        quirk = 1 + random_below(14);
    if (random_below(20 * quirk) == 0)
        strange();
    if (random_below(20 * quirk) != 0)
        packet(status, line, line != NULL ? strlen(line) : 0);
}

static void one_file(int number, int with_data)
{
    char line[100];
    snprintf(line, sizeof line, "FNAME:@image/vm/disks/disk-%d.raw\n", number);
    mostly('C', line);
    mostly('C', "STAT:F 200000 0 0 100600 1\n");
    mostly('C', "TSTAMP:1 2 3\n");
    int addressed = with_data && random_below(2);
    if (addressed)
        mostly('C', "OFFSETS\n");
    mostly('F', NULL);
    if (!with_data)
        return;
    mostly('C', "DATA\n");
    uint64_t offset = 0;
    for (uint32_t i = random_below(6); i > 0; i--) {
        static const char zeros[70000];
        uint32_t count = 1 + random_below(40000);
        if (addressed) {
            address(offset, count);
            offset += count + (random_below(2) ? 0 : random_below(1000));
        } else {
            packet('D', zeros, count);
        }
        if (random_below(40) == 0)
            strange();
    }
    mostly('F', NULL);
}

static void write_out(void)
{
    size_t at = 0;
    while (at < length) {
        /* Cut anywhere: a reader that trusts in whole packets fails. */
        size_t count = 1 + random_below(random_below(2) ? 20 : 60000);
        ssize_t done = write(1, out + at, count < length - at ? count : length - at);
        if (done <= 0)
            exit(0);
        at += (size_t)done;
    }
}

int main(void)
{
    const char *seed = getenv("HOSTILE_SEED");
    unsigned long long number = strtoull(seed != NULL ? seed : "0", NULL, 10);
    state = 0x9E3779B97F4A7C15ULL * (1 + number) | 1;
    for (int i = 0; i < 8; i++)
        random_below(2);
    mostly('C', "Hello Bacula ext=1\n");
    mostly('F', NULL);
    mostly('F', NULL);
    mostly('C', "TIMEOUT:1\n");
    mostly('C', "CLAIM:@image/\n");
    mostly('F', NULL);
    /* The daemon of the tests runs a backup, a restore, an estimate in turn. */
    unsigned long long kind = number % 3;
    uint32_t files = 1 + random_below(3);
    if (kind == 1) {
        /* Two files: each is taken, and is well at its end; then FINISH. */
        for (int i = 0; i < 4; i++)
            mostly('C', "OK\n");
        mostly('F', NULL);
    } else {
        for (uint32_t i = 0; i < files; i++)
            one_file((int)i, kind == 0);
        if (kind == 0) {
            mostly('C', "RESTOREOBJ:description\n");
            mostly('C', "RESTOREOBJ_LEN:9\n");
            mostly('D', "123456789");
            mostly('F', NULL);
        }
        mostly('F', NULL);
    }
    if (kind == 0)
        mostly('C', "SEEN\n");
    mostly('C', "RESULT OK\n");
    mostly('F', NULL);
    write_out();
    close(1);
    /* What it is told it throws away; the end of it is the end. */
    static char bytes[65536];
    while (random_below(4) != 0 && read(0, bytes, sizeof bytes) > 0) {
    }
    return 0;
}
