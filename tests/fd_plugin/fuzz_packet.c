/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* The packet's own functions under random bytes, with their invariants checked: fuzz_packet FIRST_SEED RUNS. */
#include "packet.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition) ((condition) ? (void)0 : (fprintf(stderr, "fuzz_packet: line %d: %s\n", __LINE__, #condition), abort()))

static uint64_t state;

static uint32_t random_below(uint32_t limit)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ULL) >> 33) % limit;
}

static void header(void)
{
    unsigned char bytes[HEADER_BYTES], again[HEADER_BYTES];
    struct packet_header decoded;
    static const char likely[] = "CDFEAQWIKBT0123456789\n";
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (unsigned char)(random_below(30) ? likely[random_below(sizeof likely - 1)] : (char)random_below(256));
    if (random_below(2)) {
        for (size_t i = 1; i < HEADER_BYTES - 1; i++)
            bytes[i] = (unsigned char)('0' + random_below(10));
        bytes[HEADER_BYTES - 1] = '\n';
    }
    if (packet_decode(bytes, &decoded)) {
        CHECK(decoded.length <= PAYLOAD_MAX);
        packet_encode(again, decoded.status, decoded.length);
        CHECK(memcmp(bytes, again, sizeof bytes) == 0);
    }
}

static void texts(void)
{
    size_t length = random_below(20) ? random_below(80) : random_below(4000);
    char *text = malloc(length + 1), *copy = malloc(length + 1);
    static const char likely[] = "STAT:F 0123456789 755 TSTAMP:\n\t ";
    CHECK(text != NULL && copy != NULL);
    bool ascii = random_below(2);
    for (size_t i = 0; i < length; i++)
        text[i] = ascii ? likely[random_below(sizeof likely - 1)] : (char)random_below(256);
    text[length] = '\0';
    memcpy(copy, text, length + 1);
    message_clean(text, length);
    size_t clean = strlen(text);
    CHECK(clean <= length && clean <= MESSAGE_MAX);
    for (size_t i = 0; i < clean; i++)
        CHECK((unsigned char)text[i] >= 0x20 && text[i] != 0x7F);
    if (command_trim(copy, length)) {
        struct file_facts facts = {0};
        uint64_t number;
        CHECK(strlen(copy) <= length);
        if (stat_parse(copy, &facts))
            CHECK(facts.size >= 0 && facts.mode <= 07777);
        if (times_parse(copy, &facts))
            CHECK(facts.mtime >= 0);
        if (number_parse(copy, 1000, &number))
            CHECK(number <= 1000);
    }
    free(text);
    free(copy);
}

int main(int argc, char **argv)
{
    unsigned char bytes[ADDRESS_BYTES];
    CHECK(argc == 3);
    uint64_t first = strtoull(argv[1], NULL, 10), runs = strtoull(argv[2], NULL, 10);
    for (uint64_t seed = first; seed < first + runs; seed++) {
        state = 0x9E3779B97F4A7C15ULL * (1 + seed) | 1;
        header();
        texts();
        uint64_t address = (uint64_t)random_below(UINT32_MAX) << random_below(33);
        address_encode(bytes, address);
        CHECK(address_decode(bytes) == address);
    }
    printf("fuzzed %llu\n", (unsigned long long)runs);
    return 0;
}
